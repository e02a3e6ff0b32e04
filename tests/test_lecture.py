"""The ops implement the lecture: each equals the for-loops of `tests/lecture_loops.py`, value and δ."""

import functools

import jax
import numpy as np
import pytest

import jaxcnn
from tests import lecture_loops as loops
from tests.cases import compiled, with_cotangents


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def backward(f, args, delta):
    """Return the cotangent of each argument; ``f`` takes a batch, here of one image."""
    delta = delta.reshape(jax.eval_shape(f, *args).shape)
    y, found = compiled(with_cotangents(f))(args, delta)
    return np.asarray(y), [np.asarray(c) for c in found]


close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def test_convolution():
    x, w, delta = normal(0, 6, 5, 2), normal(1, 3, 2, 2, 3), normal(2, 4, 4, 3)
    y, (delta_x, grad_w) = backward(jaxcnn.conv, (x[None], w), delta)
    close(y[0], loops.convolution(x, w))
    close(delta_x[0], loops.patch_times_delta(w, delta))
    close(grad_w, loops.delta_times_input(delta, x))


def test_the_patch_must_be_flipped():
    """§15: without the flip, δ_x of an asymmetric kernel changes, and differences of E agree with the flipped one."""
    x, w, delta = normal(0, 6, 5, 1), normal(1, 3, 2, 1, 1), normal(2, 4, 4, 1)
    turned, not_turned = loops.patch_times_delta(w, delta), loops.patch_times_delta(loops.flip(w), delta)
    differences = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = 1e-3
        differences[i] = ((loops.convolution(x + step, w) - loops.convolution(x - step, w)) * delta).sum() / 2e-3
    close(turned, differences, rtol=1e-8, atol=1e-8)
    assert np.linalg.norm(not_turned - differences) > 0.5 * np.linalg.norm(differences)


@pytest.mark.parametrize(
    ("op", "g", "slope"),
    [(jaxcnn.relu, loops.relu, loops.relu_slope), (jaxcnn.sigmoid, loops.sigmoid, loops.sigmoid_slope)],
    ids=["relu", "sigmoid"],
)
def test_activations(op, g, slope):
    x, delta = np.concatenate([normal(0, 20), [0.0]]), normal(1, 21)
    y, (delta_x,) = backward(op, (x,), delta)
    close(y, g(x))
    close(delta_x, delta * slope(x))


def test_max_pooling():
    x, delta = np.random.default_rng(0).integers(0, 4, (6, 4, 3)).astype(float), normal(1, 3, 2, 3)  # with ties
    y, (delta_x,) = backward(functools.partial(jaxcnn.max_pool, window=2), (x[None],), delta)
    expected, winner = loops.max_pooling(x, 2)
    close(y[0], expected)
    close(delta_x[0], loops.up_to_winner(delta, winner, x.shape))


def test_kron():
    a, b = np.array([[1.0, 2], [3, 4]]), np.array([[4.0, 5], [6, 7]])
    close(jaxcnn.kron(a, b), loops.kron(a, b))
    close(jaxcnn.kron(b, a), [[4, 8, 5, 10], [12, 16, 15, 20], [6, 12, 7, 14], [18, 24, 21, 28]])  # as §7 prints it


def test_up():
    delta = normal(0, 2, 3, 2)
    close(jaxcnn.kron_up(delta[None], 2)[0], loops.up(delta, 2))


def test_up_is_the_delta_of_sum_pooling():
    x, delta = normal(0, 4, 6, 2), normal(1, 2, 3, 2)
    y, (delta_x,) = backward(functools.partial(jaxcnn.block_sum, factor=2), (x[None],), delta)
    close(y[0], loops.sum_pooling(x, 2))
    close(delta_x[0], loops.up(delta, 2))


def test_up_over_its_size_is_the_delta_of_average_pooling():
    x, delta = normal(0, 4, 6, 2), normal(1, 2, 3, 2)
    y, (delta_x,) = backward(functools.partial(jaxcnn.avg_pool, window=2), (x[None],), delta)
    close(y[0], loops.sum_pooling(x, 2) / 4)
    close(delta_x[0], loops.up(delta, 2) / 4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_hidden_layer(size):
    a, w, b, delta = normal(0, 8, 8, 2), normal(1, 3, 3, 2, 3), normal(2, 3), normal(3, 6 // size, 6 // size, 3)
    y, found = backward(functools.partial(jaxcnn.hidden_layer, window=size), (a[None], w, b), delta)
    close(y[0], loops.hidden_layer(a, w, b, size))
    delta_a, grad_w, grad_b = loops.hidden_layer_delta(a, w, b, size, delta)
    for array, expected in zip(found, (delta_a[None], grad_w, grad_b), strict=True):
        close(array, expected)


def test_two_hidden_layers_and_an_output():
    """The network of §2, from the loss to the first kernel.

    Products become convolutions; the rest is unchanged (§10).
    """
    x, target = normal(0, 10, 10, 1), normal(1, 3)
    w1, b1, w2, b2 = normal(2, 3, 3, 1, 2), normal(3, 2), normal(4, 3, 3, 2, 4), normal(5, 4)
    v = normal(6, 4, 3)

    def error(w1, b1, w2, b2, v):
        a1 = jaxcnn.hidden_layer(x[None], w1, b1)
        a2 = jaxcnn.hidden_layer(a1, w2, b2)
        return jaxcnn.squared_error(jaxcnn.dense(a2.reshape(1, -1), v), target[None]).sum()

    found = compiled(jax.grad(error, argnums=(0, 1, 2, 3, 4)))(w1, b1, w2, b2, v)

    a1 = loops.hidden_layer(x, w1, b1, 2)
    a2 = loops.hidden_layer(a1, w2, b2, 2)
    delta_y = 2 * (a2.reshape(-1) @ v - target)
    delta_2, grad_w2, grad_b2 = loops.hidden_layer_delta(a1, w2, b2, 2, (v @ delta_y).reshape(a2.shape))
    _, grad_w1, grad_b1 = loops.hidden_layer_delta(x, w1, b1, 2, delta_2)
    expected = grad_w1, grad_b1, grad_w2, grad_b2, np.outer(a2.reshape(-1), delta_y)
    assert all(np.any(e) for e in expected)  # with this seed, some elements pass every ReLU
    for array, e in zip(found, expected, strict=True):
        close(array, e)
