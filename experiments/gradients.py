"""Compare hand-written rules with autodiff, on the net and the batch that are about to be trained."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.checkpoints import Params, flatten
from experiments.data import Batch
from jaxcnn import Serial, rules

TOLERANCE = 1e-5
"""What two right ways to the same gradient may differ by in float32, relative to its largest entry."""

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""From logits (B, C) and labels (B,) to a loss per example (B,)."""


def compare(net: Serial, loss: Loss, params: Params, batch: Batch, key: jax.Array) -> dict[str, float]:
    """Return max|rule - autodiff| / max|autodiff| of the mean loss's gradient for each parameter, by name.

    Both are computed in training mode with the same dropout `key`. NaN if either gradient has a NaN.
    """
    # On CPU, the same arithmetic as in training. Elsewhere float32 products are rounded by default.
    precision = None if jax.default_backend() == "cpu" else "highest"

    def gradient(backward: Any) -> dict[str, np.ndarray]:
        def mean_loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
            return loss(net.apply(params, images, key=key, rules=backward), labels).mean()

        with jax.default_matmul_precision(precision):
            return flatten(jax.jit(jax.grad(mean_loss))(params, *batch))

    ours, reference = gradient(None), gradient(rules.autodiff)
    return {name: _relative(ours[name], reference[name]) for name in reference}


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    difference, size = np.max(np.abs(got - expected)), np.max(np.abs(expected))
    return float(difference / size if size else difference)
