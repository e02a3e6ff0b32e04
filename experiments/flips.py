"""A net whose outputs are averaged over an image and its mirror image, for evaluation and prediction."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcnn import Serial

if TYPE_CHECKING:
    from experiments.tasks import Task


def averaged_over_flips(net: Serial, task: "Task") -> Serial:
    """Return a net of the same parameters whose outputs are the logarithms of averaged probabilities.

    p(x) = (softmax y(x) + softmax y(x′)) / 2, where x′ is x mirrored left and right. The masks of x′ are mirrored back.

    Args:
        net: A net for images (N, H, W, C).
        task: What the net predicts.
    """
    return _Averaged(net.layers, net=net, task=task)


@dataclasses.dataclass(frozen=True)
class _Averaged(Serial):
    net: Serial = dataclasses.field(kw_only=True)
    task: "Task" = dataclasses.field(kw_only=True)

    def apply(self, params: Any, x: Any, **options: Any) -> Array:
        """Return log p(x)."""
        plain = self.net.apply(params, x, **options)
        mirrored = self.task.mirrored_back(self.net.apply(params, x[:, :, ::-1], **options))
        return jnp.logaddexp(jax.nn.log_softmax(plain), jax.nn.log_softmax(mirrored)) - math.log(2)
