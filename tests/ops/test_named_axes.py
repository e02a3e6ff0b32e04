"""`batch_norm` over named axes of devices, compared with PyTorch's on the whole batch."""

import functools

import jax
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, PartitionSpec

import jaxcnn
from jaxcnn import BatchNorm, Conv, serial
from tests import oracles

DEVICES = 2
RNG = np.random.default_rng(0)
X, SCALE, BIAS = 3 + RNG.standard_normal((4, 3, 2)), RNG.standard_normal(2), RNG.standard_normal(2)
FACTOR, DIRECTION = RNG.standard_normal(X.shape), RNG.standard_normal(X.shape)


def loss(norm, x, scale, bias, factor):
    """Return a loss that is nonlinear in the norm's result, so that its second derivative has every term."""
    y = norm(x, scale, bias)
    return (y * factor).sum() + (y**3).sum()


def parts(a):
    return a.reshape(DEVICES, -1, *a.shape[1:])


def by_shard_map(norm, check_vma=True):
    """Return a function that sums the losses of all devices."""
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("i"), PartitionSpec()
    return jax.shard_map(
        lambda *args: jax.lax.psum(loss(norm, *args), "i"),
        mesh=mesh, in_specs=(split, whole, whole, split), out_specs=whole, check_vma=check_vma,
    )  # fmt: skip


def by_map(norm, over):
    run = over(functools.partial(loss, norm), axis_name="i", in_axes=(0, None, None, 0))
    return lambda x, scale, bias, factor: run(parts(x), scale, bias, parts(factor)).sum()


TRANSFORMS = {
    "shard_map": by_shard_map,
    "shard_map, unchecked": functools.partial(by_shard_map, check_vma=False),
    "vmap": functools.partial(by_map, over=jax.vmap),
    "pmap": functools.partial(by_map, over=jax.pmap),
}


def expected():
    """Compute value, gradients, and the derivative of δ_x along a direction for the whole batch in PyTorch."""
    leaves = [torch.tensor(a, requires_grad=True) for a in (X, SCALE, BIAS)]
    total = loss(lambda *args: oracles.batch_norm(*args), *leaves, torch.tensor(FACTOR))
    found = torch.autograd.grad(total, leaves, create_graph=True)
    second = torch.autograd.grad((found[0] * torch.tensor(DIRECTION)).sum(), leaves)
    return [total.item(), *(g.detach().numpy() for g in (*found, *second))]


@pytest.mark.parametrize("rule", [None, jaxcnn.rules.autodiff], ids=["exact", "autodiff"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_over_named_axes_equal_those_of_the_whole_batch(transform, rule):
    run = TRANSFORMS[transform](functools.partial(jaxcnn.batch_norm, axis_name="i", rule=rule))

    def both(*args):
        value, found = jax.value_and_grad(run, (0, 1, 2))(*args, FACTOR)
        second = jax.grad(lambda *args: (jax.grad(run)(*args, FACTOR) * DIRECTION).sum(), (0, 1, 2))(*args)
        return [value, *found, *second]

    found = (both if transform == "pmap" else jax.jit(both))(X, SCALE, BIAS)
    for ours, theirs in zip(found, expected(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


def test_several_axes():
    run = jax.vmap(jax.vmap(functools.partial(jaxcnn.batch_norm, axis_name=("i", "j")), axis_name="j"), axis_name="i")
    np.testing.assert_allclose(run(X.reshape(2, 2, 1, 3, 2)).reshape(X.shape), jaxcnn.batch_norm(X), rtol=1e-12)


def test_a_layer_accepts_named_axes():
    """The layer can be initialized, summarized and calibrated outside the named axes."""
    named, plain = (serial(Conv(2, 1), BatchNorm(axis_name=name)) for name in ("i", None))
    params = named.init(jax.random.key(0), (3, 2), np.float64)
    assert named.summary((3, 2)).parameters == plain.summary((3, 2)).parameters
    key = jax.random.key(1)
    run = jax.vmap(lambda x: named.apply(params, x, key=key), axis_name="i")
    np.testing.assert_allclose(run(parts(X)).reshape(X.shape), plain.apply(params, X, key=key), rtol=1e-10)
    calibrated = jaxcnn.calibrate(named, params, [(X, None)])
    np.testing.assert_allclose(named.apply(calibrated, X), plain.apply(calibrated, X), rtol=1e-12)


def test_unbound_axes_are_refused():
    with pytest.raises(ValueError, match=r"batch_norm: axis_name must be an axis of shard_map.* got 'i'"):
        jaxcnn.batch_norm(X, axis_name="i")
    with pytest.raises(TypeError, match="batch_norm: axis_name must be a str, several of them or None, got 3"):
        jaxcnn.batch_norm(X, axis_name=3)
