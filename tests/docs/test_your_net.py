"""The blocks of docs/your-net.md that use another library run; the others are doctests."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxcnn

PAGE = (Path(__file__).parents[2] / "docs" / "your-net.md").read_text("utf-8")
#: The blocks of the page that are not doctests, in order. Later blocks use names of earlier ones.
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if ">>> " not in block]


def test_the_blocks_of_the_page():
    pytest.importorskip("flax")
    pytest.importorskip("equinox")
    assert len(BLOCKS) == 5
    names = {"jax": jax, "jnp": jnp, "jaxcnn": jaxcnn}
    with jax.enable_x64(False):
        for block in BLOCKS:
            exec(compile(block, "docs/your-net.md", "exec"), names)
    stock = jax.grad(lambda params: names["loss"].__wrapped__(params, names["x"]))(names["params"])
    for a, b in zip(jax.tree.leaves(names["gradients"]), jax.tree.leaves(stock), strict=True):
        assert jnp.allclose(a, b, atol=1e-5)
