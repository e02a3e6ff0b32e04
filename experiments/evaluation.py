"""The parameters that a training evaluates and saves: averaged over steps, with the statistics of batch norms."""

import functools
from typing import Any

import jax
import numpy as np

import jaxcnn
from experiments import own_nets
from experiments.dataset import Pixels, batches, most_images, scaled
from experiments.devices import Placement
from experiments.flips import averaged_over_flips
from experiments.recipe import RecipeOptions, averaged_params
from experiments.tasks import Task
from jaxcnn import Serial, TrainState

EVALUATION_BATCH = 1000
CALIBRATION_IMAGES = 2000
"""Largest number of training images from which the statistics of batch norms are computed."""
CALIBRATION_BATCH = 500


class Evaluation:
    """Evaluates the states of a training."""

    def __init__(
        self,
        net: Serial,
        task: Task,
        options: RecipeOptions,
        training_images: Pixels,
        largest: int,
        placement: Placement,
    ) -> None:
        """Evaluate a net.

        Args:
            net: The net.
            task: What the net predicts.
            options: The options of the averages over steps and over mirror images.
            training_images: Training images (N, H, W, C) without augmentation.
            largest: The pixel that the net receives as 1.
            placement: Where to put the batches.
        """
        self._net, self._options, self._placement = net, options, placement
        self._evaluate = task.evaluator(averaged_over_flips(net, task) if options.flip_test else net)
        self._scaled = jax.jit(functools.partial(scaled, largest=largest))
        needed = not isinstance(net, own_nets.OwnNet) and own_nets.has_batch_norm(net)
        size = min(most_images(training_images, CALIBRATION_BATCH), len(training_images))
        count = min(CALIBRATION_IMAGES, len(training_images)) // size * size if needed else 0
        parts = batches(training_images[:count], np.empty(count), size)
        self._images = [(self._scaled(placement.split((x,))[0]), None) for x, _ in parts]
        self._last: tuple[TrainState, Any] | None = None

    def params(self, state: TrainState) -> Any:
        """Return the parameters to evaluate after a step, which are computed once for each state."""
        if self._last is None or self._last[0] is not state:
            params = averaged_params(self._options, state)
            if self._images:
                params = jaxcnn.calibrate(self._net, params, self._images)
            self._last = state, params
        return self._last[1]

    def evaluate(self, params: Any, images: Pixels, labels: np.ndarray) -> dict[str, float]:
        """Return the loss, without label smoothing, and the other metrics of parameters from `params`."""
        placed = map(self._placement.split, batches(images, labels, most_images(images, EVALUATION_BATCH)))
        return self._evaluate(params, ((self._scaled(x), y) for x, y in placed))
