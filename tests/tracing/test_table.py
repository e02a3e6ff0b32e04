"""The table of operations, and compile time."""

import jax
import jax.numpy as jnp
from jax import lax

import jaxcnn
from tests.tracing.agreement import random


def net(params, x):
    with jax.named_scope("net"):
        x = lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + params["b"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jnp.sort(x.reshape(2, -1) @ params["out"])
    return lax.scan(lambda c, _: (jnp.tanh(c @ params["square"]), None), x, length=3)[0] @ params["square"]


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float64)


PARAMS = {"w": shape(3, 3, 1, 4), "b": shape(4), "out": shape(64, 5), "square": shape(5, 5)}

TABLE = """\
name       op        input    output   parameters   FLOPs  in JAX because
net/conv1  conv      2×8×8×1  2×8×8×4          40   9,216
net/relu1  relu      2×8×8×4  2×8×8×4           0     512
max_pool1  max_pool  2×8×8×4  2×4×4×4           0     384
dense1     dense     2×64     2×5             320   1,270  as fast there
           sort      2×5      2×5               0       0  no op of the library
dense2     dense     2×5      2×5              25     270  as fast there
tanh1      tanh      2×5      2×5               0      30  as fast there
dense3     dense     2×5      2×5               0      90  as fast there
total                                         385  11,772"""


def test_table():
    table = jaxcnn.operations(net)(PARAMS, shape(2, 8, 8, 1))
    assert str(table) == TABLE
    assert (table.parameters, table.flops) == (385, 11772)
    conv, *_, last = table.rows
    assert conv.input_shapes == ((2, 8, 8, 1), (3, 3, 1, 4), (4,))
    assert (conv.replaced, conv.recognized, conv.reason) == (True, True, "")
    assert (last.replaced, last.recognized, last.reason) == (False, True, "as fast there")


def test_empty_table():
    assert jaxcnn.operations(lambda x: x + 1)(1.0).rows == ()


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def deep(ws, x):
    for w in ws:
        x = jax.nn.relu(conv(x, w))
    return x.sum()


def test_random_numbers_are_not_operations():
    """`jax.random.uniform` takes a maximum with its lower bound, and `truncated_normal` clips, without reading data."""

    def fun(x, key):
        noise = jax.random.truncated_normal(key, -1.0, 1.0, x.shape)
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), jax.nn.relu(x + noise) / 0.5, 0)

    assert [row.op for row in jaxcnn.operations(fun)(random(2, 3), jax.random.key(0)).rows] == ["add", "relu"]


def test_equal_calls_are_lowered_once():
    """The program of a deep net of equal layers has a fixed number of functions."""
    x, w = random(2, 6, 6, 4), random(3, 3, 4, 4)

    def functions(depth):
        lowered = jax.jit(jax.value_and_grad(jaxcnn.explicit(deep))).lower([w] * depth, x)
        return lowered.as_text().count("func.func")

    assert functions(12) == functions(4)
