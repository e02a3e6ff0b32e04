"""Compare hand-written rules with autodiff, on the net to be trained and its first batch."""

from typing import Any

import jax
import numpy as np

from experiments.checkpoints import Params, flatten
from experiments.dataset import Batch
from experiments.errors import RunError, bad_value
from jaxcnn import Serial, rules
from jaxcnn.net import Loss

TOLERANCE = 1e-5
"""Largest difference of two correct float32 gradients, relative to the largest element."""
SMALL = 0.1
"""Size of the smallest gradients, relative to the largest of the net: float32 rounds their sums by 8 ε of the largest,
which is TOLERANCE of this."""


def check(net: Serial, loss: Loss, params: Params, batch: Batch, key: jax.Array) -> None:
    """Print the difference between rules and autodiff for each parameter; raise RunError if any is too large."""
    differences = compare(net, loss, params, batch, key)
    print("largest relative difference between rules and autodiff")
    print("\n".join(f"  {name:<16} {difference:.1e}" for name, difference in differences.items()), end="\n\n")
    wrong = [name for name, difference in differences.items() if not difference <= TOLERANCE]
    if wrong:
        got = f"{max(differences[name] for name in wrong):.1e} for {', '.join(wrong)}"
        raise bad_value(RunError, "gradient differences", f"at most {TOLERANCE:g}", got)


def compare(net: Serial, loss: Loss, params: Params, batch: Batch, key: jax.Array) -> dict[str, float]:
    """Return max|rule − autodiff| / max|autodiff| of the gradient of the mean loss, by parameter name.

    The maximum counts as at least `SMALL` times that of all parameters, because some gradients are 0 up to rounding,
    such as that of a bias before a batch norm. Both gradients are computed in training mode with the same dropout
    `key`. The result is NaN if either contains a NaN.
    """
    # CPU: the same arithmetic as in training. Other devices round float32 products by default.
    precision = None if jax.default_backend() == "cpu" else "highest"

    def gradient(rule: Any) -> dict[str, np.ndarray]:
        def mean_loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
            return loss(net.apply(params, images, key=key, rules=rule), labels).mean()

        with jax.default_matmul_precision(precision):
            return flatten(jax.jit(jax.grad(mean_loss))(params, *batch))

    ours, reference = gradient(None), gradient(rules.autodiff)
    least = SMALL * max(float(np.max(np.abs(gradient))) for gradient in reference.values())
    return {name: _relative(ours[name], reference[name], least) for name in reference}


def _relative(got: np.ndarray, expected: np.ndarray, least: float) -> float:
    difference, size = np.max(np.abs(got - expected)), max(np.max(np.abs(expected)), least)
    return float(difference / size if size else difference)
