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


@pytest.mark.slow("imports and compiles nets of five libraries")
def test_the_blocks_of_the_page(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    for package in ("flax", "equinox", "haiku", "keras"):
        pytest.importorskip(package)
    assert len(BLOCKS) == 10
    names = {"jax": jax, "jnp": jnp, "jaxcnn": jaxcnn}
    compared = 0
    with jax.enable_x64(False), jax.legacy_prng_key("allow"):  # Keras makes keys of the old kind
        for block in BLOCKS:
            exec(compile(block, "docs/your-net.md", "exec"), names)
            if "gradients = " not in block:
                continue
            inputs = ("weights", "state", "x") if "weights = " in block else ("params", "x")
            stock = jax.grad(names["loss"].__wrapped__, has_aux="state" in inputs)(*(names[name] for name in inputs))
            stock = stock[0] if "state" in inputs else stock
            for a, b in zip(jax.tree.leaves(names["gradients"]), jax.tree.leaves(stock), strict=True):
                assert jnp.allclose(a, b, atol=1e-5)
                compared += 1
    assert compared > 10
