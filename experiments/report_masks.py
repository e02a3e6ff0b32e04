"""The parts of report.html about masks: the predicted masks, their confusion matrix, and images with both masks."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import report_figures as figures
from experiments.dataset import Pixels
from experiments.mask_files import palette
from experiments.report import Labeled, predicted_classes
from experiments.tasks import confusion

if TYPE_CHECKING:
    from experiments.restore import TrainedNet

FIRST, WORST = 4, 8
"""Number of images to show: the first ones, and those with the lowest accuracy."""
CHUNK = 64
"""Number of images whose pixels are counted at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class MaskExamples(Labeled):
    """Images, their masks (N, H, W), and the masks that the net predicts."""

    predicted: np.ndarray
    classes: int

    unit = "pixels"

    @property
    def counted(self) -> str:
        """What the confusion matrix counts."""
        return f"labeled pixels of the {len(self.labels):,} {self.what}"

    def confusion(self) -> np.ndarray:
        """Return the number of pixels (true class, predicted class)."""
        return self._by_image.sum(0)

    @functools.cached_property
    def _by_image(self) -> np.ndarray:
        import jax

        count = jax.jit(jax.vmap(functools.partial(confusion, classes=self.classes)))
        starts = range(0, len(self.labels), CHUNK)
        parts = [count(self.labels[i : i + CHUNK], self.predicted[i : i + CHUNK]) for i in starts]
        return np.concatenate([np.asarray(part, np.int64) for part in parts])

    def accuracies(self) -> np.ndarray:
        """Return the accuracy of each image; 1 if none of its pixels is labeled."""
        total = self._by_image.sum((1, 2))
        return np.where(total, np.trace(self._by_image, axis1=1, axis2=2) / np.maximum(total, 1), 1)

    def result(self, config: Mapping[str, Any]) -> str:
        """Return the test results of a config.json in words."""
        accuracy, mean = (f"{100 * config[f'test_{name}']:.2f} %" for name in ("accuracy", "mean_iou"))
        return (
            f"the mean IoU of the {len(self.labels):,} {self.what} is <strong>{mean}</strong>, and {accuracy} of their "
            "labeled pixels are classified correctly."
        )


def make_examples(what: str, trained: "TrainedNet", pixels: Pixels, masks: np.ndarray) -> MaskExamples:
    """Predict the masks of images, and return both."""
    predicted = predicted_classes(trained, pixels)
    return MaskExamples(what, pixels, trained.inputs.largest, masks, predicted, len(trained.inputs.class_names))


def section(examples: MaskExamples, names: Sequence[str]) -> str:
    """Return the images with their masks and the predicted ones, and the colors of the classes."""
    accuracies = examples.accuracies()
    worst = [int(n) for n in np.argsort(accuracies, kind="stable")[:WORST]]
    first = [n for n in range(min(FIRST, len(accuracies))) if n not in worst]
    cards = "".join(_card(examples, n, accuracies[n]) for n in (*worst, *first))
    keys = [f'<span style="background: rgb{tuple(map(int, palette()[n]))}"></span>' for n in range(len(names))]
    pairs = zip(keys, names, strict=True)
    colors = " ".join(f'<span class="key">{key}{escape(name)}</span>' for key, name in pairs)
    intro = (
        f"From left to right: the image, its mask, the predicted mask. First the {len(worst)} {examples.what} with the "
        f"lowest accuracy, then {len(first)} others. Pixels that are not labeled are beige."
    )
    return f'<p>{intro}</p><p>{colors}</p><div class="masks">{cards}</div>'


def _card(examples: MaskExamples, n: int, accuracy: float) -> str:
    tiles = [figures.image(examples.images([n])[0]), palette()[examples.labels[n]], palette()[examples.predicted[n]]]
    pixels = figures.png(figures.mosaic(tiles, 3))
    return (
        f'<figure><img src="{pixels}" alt="Image {n}, its mask, and the predicted mask">'
        f'<figcaption>{100 * accuracy:.1f} % <span class="soft">#{n}</span></figcaption></figure>'
    )
