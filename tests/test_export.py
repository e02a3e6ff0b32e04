"""`jax.export` of whole nets with a symbolic batch: serialized, deserialized, and run with several batch sizes."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcnn
from tests.cases import compiled

#: The channels and sizes are above those for which XLA's own convolution is always chosen.
NET = jaxcnn.serial(
    jaxcnn.Conv(16, 5), jaxcnn.LayerNorm(), jaxcnn.Relu(), jaxcnn.MaxPool(2),
    jaxcnn.DepthwiseConv(3, padding="SAME"), jaxcnn.GroupNorm(2), jaxcnn.Gelu(),
    jaxcnn.residual(jaxcnn.Conv(16, 3, padding="SAME", groups=2), jaxcnn.Silu()),
    jaxcnn.HiddenLayer(8, 3), jaxcnn.ConvTranspose(8, 2, stride=2), jaxcnn.BatchNorm(), jaxcnn.AvgPool(2),
    jaxcnn.LpPool(2, stride=1), jaxcnn.AdaptiveMaxPool(1), jaxcnn.Flatten(), jaxcnn.Dense(5),
)  # fmt: skip
SHAPE = (20, 20, 3)
PLATFORMS = ("cpu", "cuda", "tpu")


def draw(batch):
    rng = np.random.default_rng(batch)
    return rng.standard_normal((batch, *SHAPE)), np.arange(batch, dtype=np.int32) % 5


def gradient(params, x, labels):
    """Return the gradient of a training step with masked labels."""

    def error(params):
        each = jaxcnn.softmax_cross_entropy_with_integer_labels(NET.apply(params, x), labels)
        return jnp.where(labels > 0, each, 0).sum()

    return jax.value_and_grad(error)(params)


def exported(f, *args, order=0):
    def of(a):
        return jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype)

    pytest.importorskip("flatbuffers", reason="jax.export writes bytes with it")
    (n,) = jax.export.symbolic_shape("n")
    params, *batched = args
    written = jax.export.export(jax.jit(f), platforms=PLATFORMS)(params, *map(of, batched)).serialize(vjp_order=order)
    return jax.export.deserialize(written)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: a.astype(np.float64), NET.init(jax.random.key(0), SHAPE))


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * max(np.abs(b).max(), 1e-3))


@pytest.mark.slow("compiles the step of a large net four times")
def test_gradient_of_a_step_for_every_batch(params):
    call = exported(gradient, params, *draw(2)).call
    direct = compiled(gradient)
    for batch in (1, 3, 8):
        assert_close(compiled(call)(params, *draw(batch)), direct(params, *draw(batch)))


@pytest.mark.slow("compiles a large net")
def test_net_and_its_vjp_for_every_batch(params):
    def pulled(f, params, x, delta):
        y, pull = jax.vjp(f, params, x)
        return y, pull(delta)

    call = exported(NET.apply, params, draw(2)[0], order=1).call
    x = draw(3)[0]
    delta = np.random.default_rng(9).standard_normal((3, 5))
    found = compiled(lambda *args: pulled(call, *args))(params, x, delta)
    assert_close(found, compiled(lambda *args: pulled(NET.apply, *args))(params, x, delta))


def test_unpooling_for_every_batch():
    y = np.random.default_rng(0).standard_normal((3, 2, 2, 4)).astype(np.float32)
    indices = np.random.default_rng(1).integers(0, 16, y.shape)

    def unpooled(_, y, indices):
        return jaxcnn.max_unpool(y, indices, (4, 4))

    np.testing.assert_array_equal(
        exported(unpooled, np.zeros(()), y, indices).call(np.zeros(()), y, indices), unpooled(None, y, indices)
    )


@pytest.mark.parametrize(
    ("op", "what"),
    [
        (lambda x: jaxcnn.conv(x, np.ones((3, 3, 4, 4))), "conv: x"),
        (lambda x: jaxcnn.conv_transpose(x, np.ones((3, 3, 4, 4))), "conv_transpose: x"),
        (lambda x: jaxcnn.max_pool(x, 2), "max_pool: x"),
        (jaxcnn.global_avg_pool, "global_avg_pool: x"),
        (lambda x: jaxcnn.adaptive_avg_pool(x, 2), "adaptive_avg_pool: x"),
        (lambda x: jaxcnn.kron_up(x, 2), "kron_up: x"),
    ],
)
def test_other_symbols_are_refused_by_name(op, what):
    x = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n, h, w"), 4), np.float64)
    expected = f"{what} must be an array whose sizes are numbers, except for the batch, got shape (n, h, w, 4)"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        jax.eval_shape(op, x)


def test_signals_have_no_batch():
    a = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n"), np.float64)
    expected = "convolve: a must be an array whose sizes are numbers, except for the batch, got shape (n)"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        jax.eval_shape(lambda a: jaxcnn.convolve(a, np.ones(3)), a)
