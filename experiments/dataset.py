"""Labeled images with their classes, split into training and test, and the facts about them that belong to a net."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.errors import DataError, bad_value

Batch = tuple[Any, Any]
"""Images (B, H, W, C), uint8 or float32, and labels (B,) int32 or masks (B, H, W) uint8."""
IGNORED = 255
"""Value of the pixels of a mask that are not labeled; they count in no loss and no metric."""
MAX_PIXELS = 1 << 20
"""Largest number of pixels in a batch of evaluation, unless one image has more."""
BORDER_IMAGES = 1000
"""Images whose borders are measured."""


class Pixels(Protocol):
    """Images (N, H, W, C), uint8: an array, or files that are decoded when `np.asarray` reads them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, chosen: Any, /) -> Any:
        """Return the chosen images, by an index, a slice or an array of indices."""


@dataclass(frozen=True)
class Inputs:
    """The images that a net takes, and its classes. The config of a run has them, so using a net needs no data set."""

    name: str
    """Name of the data set that the net was trained on."""
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    """(H, W, C)."""
    largest: int
    """The pixel that the net receives as 1."""
    border: float
    """Median brightness, in [0, 1], of the outermost pixels of the training images."""
    task: str = "classification"
    """The name of a task in `experiments.tasks`."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labeled images, split into training and test.

    The pixels (N, H, W, C) are uint8 from 0 to `largest`. The labels (N,) are int32 indices into `class_names`, or they
    are masks (N, H, W), uint8, of such indices and IGNORED.
    `source` describes the location of the files. `sha256` is the hash of shapes and pixels, so it does not depend on
    file format, compression or folder.
    """

    name: str
    source: str
    train_pixels: Pixels
    train_labels: np.ndarray
    test_pixels: Pixels
    test_labels: np.ndarray
    largest: int
    class_names: tuple[str, ...]
    sha256: str
    validation: np.ndarray | None = None
    """Indices of the training images that the set itself reserves for validation, or None."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.train_pixels.shape[1:]

    @property
    def task(self) -> str:
        """The name of a task in `experiments.tasks`: "segmentation" if the labels are masks."""
        return "segmentation" if self.train_labels.ndim == 3 else "classification"

    @functools.cached_property
    def train_images(self) -> np.ndarray:
        """All training images as float32 in [0, 1], in memory."""
        return np.asarray(scaled(np.asarray(self.train_pixels), self.largest))

    @functools.cached_property
    def test_images(self) -> np.ndarray:
        """All test images as float32 in [0, 1], in memory."""
        return np.asarray(scaled(np.asarray(self.test_pixels), self.largest))

    @functools.cached_property
    def inputs(self) -> Inputs:
        """The facts that belong to a net that is trained on these images."""
        first = scaled(np.asarray(self.train_pixels[:BORDER_IMAGES]), self.largest)
        return Inputs(self.name, self.class_names, self.image_shape, self.largest, border(first), self.task)


def scaled(images: Any, largest: int) -> Any:
    """Return images, arrays of NumPy or JAX, as float32 in [0, 1]; those that are not uint8 are not changed.

    Args:
        images: (N, H, W, C).
        largest: The pixel that becomes 1.
    """
    return images * np.float32(1 / largest) if images.dtype == np.uint8 else images


def border(images: np.ndarray) -> float:
    """Return the median brightness of the outermost pixels of images (N, H, W, C)."""
    edges = (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
    return float(np.median(np.concatenate([edge.mean(-1).ravel() for edge in edges])))


def most_images(images: Pixels, count: int) -> int:
    """Return the number of images in a batch of evaluation: `count`, or those that have MAX_PIXELS pixels."""
    return max(1, min(count, MAX_PIXELS // (images.shape[1] * images.shape[2])))


def batches(images: Pixels, labels: np.ndarray, size: int) -> Iterator[Batch]:
    """Yield all examples in order, `size` at a time; the last batch may be smaller."""
    for start in range(0, len(images), size):
        yield np.asarray(images[start : start + size]), labels[start : start + size]


def check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    """Raise DataError for a label (N,), uint8, in a file that is not the number of a class."""
    if labels.max() >= classes:
        first = int(np.argmax(labels >= classes))
        raise bad_value(DataError, path, f"labels from 0 to {classes - 1}", f"{labels[first]} for image {first}")


def make_dataset(
    name: str,
    source: str,
    train: tuple[Pixels, np.ndarray],
    test: tuple[Pixels, np.ndarray],
    largest: int,
    class_names: tuple[str, ...],
    validation: np.ndarray | None = None,
    sha256: str | None = None,
) -> Dataset:
    """Build a Dataset of uint8 images (N, H, W) or (N, H, W, C), with pixels from 0 to `largest`, and their labels.

    Labels are (N,), or masks (N, H, W) uint8. `sha256` is that of the data set; None means that it is computed.
    """
    if sha256 is None:
        digest = hashlib.sha256()
        for array in (*train, *test):
            digest.update(f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        sha256 = digest.hexdigest()

    def with_channels(images: Any) -> Pixels:
        return images[..., None] if len(images.shape) == 3 else images

    def with_dtype(labels: np.ndarray) -> np.ndarray:
        return labels if labels.ndim == 3 else labels.astype(np.int32)

    return Dataset(
        name=name,
        source=source,
        train_pixels=with_channels(train[0]),
        train_labels=with_dtype(train[1]),
        test_pixels=with_channels(test[0]),
        test_labels=with_dtype(test[1]),
        largest=largest,
        class_names=class_names,
        sha256=sha256,
        validation=validation,
    )
