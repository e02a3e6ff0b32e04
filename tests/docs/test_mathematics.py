"""The residuals of activations that docs/mathematics.md lists are those that the forward pass saves."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcnn
from jaxcnn.rules import autodiff

PAGE = (Path(__file__).parents[2] / "docs" / "mathematics.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE)
BOOL, SLOPE = "x > 0, one bool per element", "g′"
#: Ops listed in the sentence below the table.
OTHERS = {
    "bool": ("relu6", "hard_tanh", "hard_sigmoid"),
    "x": ("hard_swish",),
    SLOPE: ("selu", "celu", "mish", "softsign", "squareplus", "log_sigmoid"),
}
SAVED = [*ROWS, *((op, saved) for saved, ops in OTHERS.items() for op in ops)]


def test_the_table_has_all_rows():
    assert len(ROWS) == 8


@pytest.mark.parametrize(("op", "saved"), SAVED)
def test_the_residual_of_an_activation(op, saved):
    x = jnp.asarray(np.random.default_rng(0).normal(scale=3, size=50))
    g = getattr(jaxcnn, op)
    y, rule = jax.vjp(g, x)
    (residual,) = (leaf for leaf in jax.tree.leaves(rule) if np.shape(leaf) == x.shape)
    if saved in ("x", "y"):
        np.testing.assert_array_equal(residual, {"x": x, "y": y}[saved])
    elif saved == SLOPE:
        slope = jax.vjp(lambda x: g(x, rule=autodiff), x)[1](jnp.ones_like(x))[0]
        np.testing.assert_allclose(residual, slope, rtol=1e-9, atol=1e-12)
    else:
        assert residual.dtype == bool
        if saved == BOOL:
            np.testing.assert_array_equal(residual, x > 0)


@pytest.mark.parametrize(
    ("op", "corner", "slope"),
    [
        ("relu", 0.0, 0), ("leaky_relu", 0.0, 0.01), ("elu", 0.0, 2.0),
        ("selu", 0.0, 1.0507009873554805 * 1.6732632423543772),
        ("relu6", 0.0, 0), ("relu6", 6.0, 0), ("hard_tanh", -1.0, 0), ("hard_tanh", 1.0, 0), ("hard_sigmoid", -3.0, 0),
        ("hard_sigmoid", 3.0, 0), ("hard_swish", -3.0, 0), ("hard_swish", 3.0, 1),
    ],
)  # fmt: skip
def test_the_slope_at_a_corner_is_that_of_the_page(op, corner, slope):
    options = {"alpha": 2.0} if op == "elu" else {}
    found = jax.grad(lambda x: getattr(jaxcnn, op)(x, **options))(jnp.asarray(corner))
    np.testing.assert_allclose(found, slope, rtol=1e-12)
