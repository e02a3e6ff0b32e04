"""Second derivatives through `lax.scan` and `lax.fori_loop`, compared with the unrolled loop in stock JAX."""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcnn
from jaxcnn.ops.rule import custom_vjp
from tests.cases import compiled

X = np.random.default_rng(0).standard_normal((2, 8, 8, 8))
W = np.random.default_rng(1).standard_normal((3, 3, 8, 8)) / 6
SCALE = np.random.default_rng(2).standard_normal(8)

#: Steps that keep the shape of x. The convolutions are not small, so the platform determines their lowerings.
STEPS = {
    "conv": (functools.partial(jaxcnn.conv, padding="SAME"), W),
    "conv_transpose": (functools.partial(jaxcnn.conv_transpose, padding="SAME"), W),
    "depthwise_conv": (functools.partial(jaxcnn.depthwise_conv, padding="SAME"), W[:, :, :1]),
    "grouped": (functools.partial(jaxcnn.conv, padding="SAME", groups=2), W[:, :, :4]),
    "hidden_layer": (
        lambda x, w, rule: jaxcnn.hidden_layer(
            x, w, np.zeros(8), window=2, pool_stride=1, pool_padding=((0, 1), (0, 1)), padding="SAME", rule=rule
        ),
        W,
    ),
    "batch_norm": (jaxcnn.batch_norm, SCALE),
    "layer_norm": (jaxcnn.layer_norm, SCALE),
    "group_norm": (functools.partial(jaxcnn.group_norm, groups=2), SCALE),
    "max_pool": (lambda x, w, rule: jaxcnn.max_pool(x * w, 3, stride=1, padding="SAME", rule=rule), SCALE),
    "lp_pool": (lambda x, w, rule: jaxcnn.lp_pool(x * w, 3, stride=1, padding="SAME", rule=rule), SCALE),
    "dense": (jaxcnn.dense, W[0, 0]),
}


def scanned(step, x, w):
    return lax.scan(lambda x, _: (jnp.tanh(step(x, w)), None), x, None, length=3)[0]


def counted(step, x, w):
    return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(step(x, w)), x)


def unrolled(step, x, w):
    for _ in range(3):
        x = jnp.tanh(step(x, w))
    return x


def product(loop, step, x, w, v):
    """Return v times the Hessian, with respect to w, of a random projection of the loop's result."""

    def error(w):
        y = loop(step, x, w)
        return jnp.vdot(y, jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return jax.grad(lambda w: jnp.vdot(jax.grad(error)(w), v))(w)


@pytest.mark.slow("compiles two programs of second order per case")
@pytest.mark.parametrize(("name", "loop"), [*((name, scanned) for name in STEPS), ("conv", counted)])
def test_hessian_products_through_loops_equal_those_without(name, loop):
    step, w = STEPS[name]
    v = np.random.default_rng(3).standard_normal(w.shape)
    found = compiled(functools.partial(product, loop, functools.partial(step, rule=None)))(X, w, v)
    stock = functools.partial(step, rule=jaxcnn.rules.autodiff)
    expected = compiled(functools.partial(product, unrolled, stock))(X, w, v)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10 * np.abs(expected).max())


def test_equations_without_inputs_do_not_shift_residuals():
    """The smallest case, in docs/mathematics.md: with `jax.custom_vjp`, JAX 0.10 gives 1944."""

    @custom_vjp
    def times(_, x, w):
        return x * w + jnp.zeros(3)

    times.defvjp(
        lambda _, x, w: (times(None, x, w), (x, w)), lambda _, s, d: (times(None, d, s[1]), times(None, d, s[0]))
    )

    def f(w):
        return jnp.sum(lax.scan(lambda x, _: (times(None, x, w), None), jnp.full(3, 2.0), None, length=3)[0])

    found = jax.grad(lambda w: jnp.sum(jax.grad(f)(w) ** 2))(jnp.full(3, 3.0))
    np.testing.assert_allclose(found, np.full(3, 3888.0), rtol=1e-6)  # E = 2w³: d(6w²)²/dw = 144w³


def test_no_op_is_made_by_jax_itself():
    """`jaxcnn.ops.rule.custom_vjp` is the only place that calls `jax.custom_vjp`."""
    package = pathlib.Path(jaxcnn.__file__).parent
    found = [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "custom_vjp"
    ]
    assert found == ["ops/rule.py"]


def test_no_conditional_is_left_in_a_program_for_one_platform():
    def gradient(x, w):
        return jax.grad(lambda w: scanned(functools.partial(jaxcnn.conv, padding="SAME"), x, w).sum())(w)

    text = compiled(gradient).lower(X, W).compile().as_text()
    assert "conditional(" not in text
