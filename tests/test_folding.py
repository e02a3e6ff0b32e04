"""Folding a batch norm into its neighbor keeps the outputs; those that cannot be folded stay or raise an error."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcnn
from jaxcnn import (
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DepthwiseConv,
    Dropout,
    Flatten,
    HiddenLayer,
    Relu,
    fold_batch_norm,
    residual,
    serial,
)
from jaxcnn.net import layers_of
from tests.cases import compiled

SHAPE = (7, 6, 4)
FOLDED = {
    # name: (net, number of batch norms that remain)
    "conv": (serial(Conv(6, 3), BatchNorm(), Relu()), 0),
    "conv, groups, padding, no bias": (serial(Conv(6, 3, 2, 1, groups=2, bias=False), BatchNorm(), Relu()), 0),
    "depthwise": (serial(DepthwiseConv(3, 2, padding=1), BatchNorm()), 0),
    "transposed": (serial(ConvTranspose(6, 3, 2, groups=2), BatchNorm()), 0),
    "transposed, padding, no bias": (serial(ConvTranspose(6, 3, 2, 1, groups=2, bias=False), BatchNorm()), 0),
    "dense": (serial(Flatten(), Dense(5), BatchNorm()), 0),
    "no scale": (serial(Conv(6, 3), BatchNorm(scale=False)), 0),
    "no bias": (serial(Conv(6, 3), BatchNorm(bias=False, eps=0.1)), 0),
    "two": (serial(Conv(6, 3), BatchNorm(), BatchNorm()), 0),
    "nested, residual": (
        serial(serial(Conv(4, 3, padding=1), BatchNorm()), residual(Conv(4, 1), BatchNorm(), name="block")), 0,
    ),
    "before conv": (serial(BatchNorm(), Conv(6, 3, 2, groups=2)), 0),
    "before conv, no bias, padding repeats": (serial(BatchNorm(), Conv(6, 3, padding="REFLECT", bias=False)), 0),
    "before depthwise": (serial(BatchNorm(), DepthwiseConv(3, 2)), 0),
    "before dense": (serial(Flatten(), BatchNorm(), Dense(5, bias=False)), 0),
    "before a hidden layer": (serial(BatchNorm(), HiddenLayer(6, 3, 2, groups=2)), 0),
    "before, residual": (serial(residual(BatchNorm(), Conv(4, 1))), 0),
    "before zeros": (serial(BatchNorm(), Conv(6, 3, padding=1)), 1),
    "before zeros of a window's": (serial(BatchNorm(), Conv(6, 3, padding="SAME")), 1),
    "before a transposed": (serial(BatchNorm(), ConvTranspose(6, 3)), 1),
    "behind a ReLU": (serial(Conv(4, 3), Relu(), BatchNorm(), Relu()), 1),
    "across a border of nets": (serial(serial(Conv(4, 3)), BatchNorm(), Relu()), 1),
    "a ReLU between": (serial(BatchNorm(), Relu(), Conv(4, 3)), 1),
    "after a hidden layer": (serial(HiddenLayer(6, 3), BatchNorm()), 1),
    "none": (serial(Conv(4, 3), Dropout(0.5)), 0),
}  # fmt: skip


def drawn(net, dtype=jnp.float64):
    """Draw nontrivial parameters and statistics, inputs, and other inputs for the statistics."""
    rng = np.random.default_rng(0)
    x, others = rng.standard_normal((2, 5, *SHAPE)).astype(dtype)
    params = net.init(jax.random.key(1), SHAPE, dtype)
    params = jax.tree.map(lambda a: a if a.ndim > 1 else a + 0.5 * rng.standard_normal(a.shape).astype(dtype), params)
    return jaxcnn.calibrate(net, params, [(2 * others + 1, None)]), x


def norms(net):
    return [name for name, layer in net.walk() if isinstance(layer, BatchNorm)]


@pytest.mark.parametrize(("net", "stay"), FOLDED.values(), ids=FOLDED)
def test_the_outputs_are_the_same(net, stay):
    params, x = drawn(net)
    folded, folded_params = fold_batch_norm(net, params)
    assert len(norms(folded)) == stay
    assert type(folded) is type(net)
    names = [name for name, _ in net.walk() if name in norms(folded) or name not in norms(net)]
    assert [name for name, _ in folded.walk()] == names
    y = compiled(net.apply)(params, x)
    again = compiled(folded.apply)(folded_params, x)
    np.testing.assert_allclose(again, y, rtol=1e-12, atol=1e-13 * np.abs(y).max())
    shapes = jax.eval_shape(lambda: folded.init(jax.random.key(0), SHAPE, jnp.float64))
    if not stay:  # exactly the parameters that the folded net itself creates
        assert jax.tree.map(jnp.shape, folded_params) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize("kind", layers_of("affine", "hidden"))
def test_every_layer_that_may_absorb_a_norm_has_a_row(kind):
    """The table above covers each layer type that `fold_batch_norm` reads from the table of kinds."""
    nets = [[type(layer) for _, layer in net.walk()] for net, _ in FOLDED.values()]
    assert any((kind, BatchNorm) in itertools.pairwise(types) for types in nets)
    assert any((BatchNorm, kind) in itertools.pairwise(types) for types in nets)


def test_the_parameters_are_not_changed():
    net, _ = FOLDED["nested, residual"]
    params, _ = drawn(net)
    before = jax.tree.map(np.array, params)
    fold_batch_norm(net, params)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_under_jit_and_in_float32():
    net, _ = FOLDED["conv, groups, padding, no bias"]
    params, x = drawn(net, jnp.float32)
    folded, _ = fold_batch_norm(net, params)
    folded_params = jax.jit(lambda params: fold_batch_norm(net, params)[1])(params)
    assert {a.dtype for a in jax.tree.leaves(folded_params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(folded.apply(folded_params, x), net.apply(params, x), rtol=1e-4, atol=1e-5)


def test_norms_can_be_kept():
    net, _ = FOLDED["nested, residual"]
    params, x = drawn(net)
    folded, folded_params = fold_batch_norm(net, params, leave={"block/batch_norm1"})
    assert norms(folded) == ["block/batch_norm1"]
    np.testing.assert_allclose(folded.apply(folded_params, x), net.apply(params, x), rtol=1e-12)


def test_without_statistics():
    net, _ = FOLDED["nested, residual"]
    params = net.init(jax.random.key(0), SHAPE)
    expected = "params must be those of jaxcnn.calibrate, with mean and var, got bias, scale"
    with pytest.raises(ValueError, match=f"^{re.escape('fold_batch_norm: serial1/batch_norm1: ' + expected)}$"):
        fold_batch_norm(net, params)
    bare = serial(Conv(4, 3), BatchNorm(scale=False, bias=False, name="bn"))
    with pytest.raises(ValueError, match=r"^fold_batch_norm: bn: params must be .*, got none$"):
        fold_batch_norm(bare, bare.init(jax.random.key(0), SHAPE))
