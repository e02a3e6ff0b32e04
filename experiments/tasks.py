"""What a net predicts: the class of each image, or of each pixel. A task has its loss and metrics."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.dataset import IGNORED, Batch, Dataset
from experiments.errors import DataError, UsageError, bad_value

if TYPE_CHECKING:  # importing jax takes a second, and --help does not need it
    import jax

    from experiments.private import PrivacyOptions
    from experiments.recipe import RecipeOptions
    from jaxcnn import Serial
    from jaxcnn.net import Loss

Evaluator = Callable[[Any, Iterable[Batch]], dict[str, float]]
"""Returns the metrics of parameters on batches."""


class Task:
    """Classification: each image has a label. The metrics are loss and accuracy."""

    images = "the images of {}"
    """Describes the images of a data set in messages."""

    def output_shape(self, shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
        """Return the shape of a net's output for one image of a shape."""
        del shape
        return (classes,)

    def check(
        self, recipe: "RecipeOptions", privacy: "PrivacyOptions", dataset: Dataset, validation: np.ndarray
    ) -> None:
        """Raise UsageError for an option that the task does not have, or DataError for labels that it cannot use.

        Args:
            recipe: The options of the training.
            privacy: Its options of privacy.
            dataset: The images.
            validation: Indices of the training images for validation.
        """

    def loss(self, smoothing: float) -> "Loss":
        """Return the cross-entropy, of targets that are smoothed by a share `smoothing`."""
        from experiments.recipe import make_loss

        return make_loss(smoothing)

    def mirrored_back(self, outputs: "jax.Array") -> "jax.Array":
        """Return the outputs for images, given those for the mirror images."""
        return outputs

    def evaluator(self, net: "Serial") -> Evaluator:
        """Return a function that computes the mean loss, without smoothing, and the other metrics."""
        import jaxcnn

        return functools.partial(jaxcnn.evaluate, net, jaxcnn.softmax_cross_entropy_with_integer_labels)


class Segmentation(Task):
    """Segmentation: each image has a mask. The metrics are loss, accuracy of the pixels, and mean IoU.

    The loss of an image is the mean over its labeled pixels, those that are not IGNORED.
    """

    images = "the images and masks of {}"

    def output_shape(self, shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
        """Return the shape of a net's output for one image of a shape."""
        return (*shape[:2], classes)

    def check(
        self, recipe: "RecipeOptions", privacy: "PrivacyOptions", dataset: Dataset, validation: np.ndarray
    ) -> None:
        """Raise UsageError for an option that masks do not have, or DataError if they do not label any pixel."""
        for name, masks in (("validation", dataset.train_labels[validation]), ("test", dataset.test_labels)):
            if len(masks) and (masks == IGNORED).all():
                expected = f"masks with at least one pixel that is not {IGNORED}"
                raise bad_value(DataError, f"{name} images of {dataset.name}", expected, "none")
        if other := [name for name in recipe.augment if name not in ("crop", "flip")]:
            raise bad_value(UsageError, "--augment", "crop or flip for images with masks", other[0])
        if privacy.private:
            raise bad_value(UsageError, "--private", "omitted for images with masks", "it")

    def loss(self, smoothing: float) -> "Loss":
        """Return the cross-entropy of pixels (…, H, W), whose mean over an image is that over its labeled pixels."""
        import jax
        import jax.numpy as jnp

        of_labels = super().loss(smoothing)

        def loss(logits: Any, masks: Any) -> jax.Array:
            labeled = masks != IGNORED
            losses = of_labels(logits, jnp.where(labeled, masks, 0).astype(jnp.int32))
            share = labeled.mean((-2, -1), keepdims=True)
            return jnp.where(labeled, losses, 0) / jnp.where(share > 0, share, 1)

        return loss

    def mirrored_back(self, outputs: "jax.Array") -> "jax.Array":
        """Return the outputs (N, H, W, classes) for images, given those for the mirror images."""
        return outputs[:, :, ::-1]

    def evaluator(self, net: "Serial") -> Evaluator:
        """Return a function that computes the mean loss, without smoothing, and the other metrics."""
        import jax

        loss = self.loss(0.0)

        @jax.jit
        def run(params: Any, images: Any, masks: Any) -> tuple[jax.Array, jax.Array]:
            logits = net.apply(params, images)
            return loss(logits, masks).mean((1, 2)).sum(), confusion(masks, logits.argmax(-1), logits.shape[-1])

        def evaluate(params: Any, batches: Iterable[Batch]) -> dict[str, float]:
            total, images, counts = 0.0, 0, np.zeros((), np.int64)
            for x, masks in batches:
                loss_of_batch, counts_of_batch = run(params, x, masks)
                total, images = total + float(loss_of_batch), images + len(x)
                counts = counts + np.asarray(counts_of_batch, np.int64)
            return {
                "loss": total / images,
                "accuracy": float(np.trace(counts) / counts.sum()),
                "mean_iou": float(np.nanmean(intersection_over_union(counts))),
            }

        return evaluate


TASKS: Mapping[str, Task] = {"classification": Task(), "segmentation": Segmentation()}
"""The tasks by their names in `experiments.dataset.Inputs`."""


def task_of(data: Any) -> Task:
    """Return the task of a data set or of the facts about it."""
    return TASKS[data.task]


def confusion(masks: Any, predicted: Any, classes: int) -> Any:
    """Return the number of pixels (true class, predicted class), int32, without those that are IGNORED.

    Args:
        masks: (N, H, W) uint8.
        predicted: The predicted classes (N, H, W) of any integer dtype.
        classes: Number of classes.
    """
    import jax.numpy as jnp

    pairs = classes * masks.astype(jnp.int32) + predicted.astype(jnp.int32)
    pairs = jnp.where(masks == IGNORED, classes**2, pairs)
    return jnp.bincount(pairs.ravel(), length=classes**2 + 1)[:-1].reshape(classes, classes)


def intersection_over_union(counts: np.ndarray) -> np.ndarray:
    """Return |A ∩ B| / |A ∪ B| by class for pixels A of the class and pixels B that are predicted as it.

    NaN for a class that has neither.

    Args:
        counts: The confusion matrix (classes, classes).
    """
    both = np.diag(counts)
    either = counts.sum(0) + counts.sum(1) - both
    return np.divide(both, either, out=np.full(len(counts), np.nan), where=either > 0)
