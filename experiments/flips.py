"""A net whose outputs are averaged over an image and its mirror image, for evaluation and prediction."""

import dataclasses
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
        outputs = (self.net.apply(params, x, **options), self._of_mirrored(params, x, options))
        return jnp.logaddexp(*map(jax.nn.log_softmax, outputs)) - jnp.log(2).astype(outputs[0].dtype)

    def _of_mirrored(self, params: Any, x: Any, options: Any) -> Array:
        return self.task.mirrored_back(self.net.apply(params, x[:, :, ::-1], **options))
