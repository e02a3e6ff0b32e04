"""Image sets for the experiments: located, read, checked, and identified by name and hash.

    load("fashion-mnist-sample")    the 12,000 images in this repository
    load("fashion-mnist")           all 70,000: from a given folder, the system, the cache, or a checked download
    load("digits")                  scikit-learn's 8×8 digits
    load("idx", folder)             any images and labels in idx files with the file names of MNIST
    load("cifar10")                 60,000 color images in 10 classes; cifar100 has 100, and cifar100-coarse 20
    load("my/images")               a folder of PNG and JPEG files by class or with masks, or an .npz file

The contents of a named set are checked against its hash. Images stay uint8 in memory; the compiled step and evaluation
convert them to float32 in [0, 1].
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import FlagCreatePairsOff, arg

from experiments import cifar, cli, idx_files
from experiments.dataset import Batch, Dataset, Pixels, make_dataset
from experiments.errors import DataError, UsageError, bad_value, check_packages


@dataclass(frozen=True)
class DataOptions:
    """Options of the images."""

    data: str = "fashion-mnist-sample"
    """Images: fashion-mnist-sample (10,000, embedded), fashion-mnist (60,000), digits (8×8), cifar10, cifar100,
    cifar100-coarse, idx (your own, in idx files), the path of a folder of PNG and JPEG files in one subfolder per
    class, or in the subfolders images and masks, or the path of an .npz file."""
    size: Annotated[int | None, arg(metavar="INT")] = None
    """Height and width to which the images of a folder are resized; if omitted, all must have one size."""
    stream: FlagCreatePairsOff[bool] = False
    """Leave the images of a folder in their files, and read batches ahead of their steps; for images that do not fit
    into memory. Needs the extra grain."""
    data_dir: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the files for --data idx, fashion-mnist or cifar, or the archive of cifar; if omitted, the system's
    copy, the cache, or a download."""
    validation: float = 0.1
    """Share of the training images, by class, that choose the best epoch instead of training; 0 for none."""


DIGITS_SHA256 = "bbaeaefce84743833997df3ec781527fa96c88aa06b683bb49ca5f68045ebbf2"
"""`Dataset.sha256` of scikit-learn's digits."""


def is_path(name: str) -> bool:
    """Whether `name` is that of a folder or an .npz file, not one of SOURCES."""
    return name not in SOURCES and ("/" in name or os.sep in name or name.endswith(".npz") or Path(name).is_dir())


def check(options: DataOptions) -> None:
    """Raise UsageError for an option that is invalid, before anything is read."""
    if not is_path(options.data):
        cli.check_choice("--data", options.data, SOURCES)
    cli.check_count("--size", options.size)
    if options.size is not None and not is_path(options.data):
        raise bad_value(UsageError, "--size", "omitted unless --data is a folder of images", options.size)
    if options.stream:
        if not is_path(options.data) or options.data.endswith(".npz"):
            raise bad_value(UsageError, "--stream", "omitted unless --data is a folder of images", "it")
        check_packages("grain")
    if not 0 <= options.validation < 1:
        raise bad_value(UsageError, "--validation", "from 0 up to, but not including, 1", options.validation)
    if options.data_dir is not None and options.data not in IN_FOLDERS:
        expected = f"omitted unless --data is one of {', '.join(IN_FOLDERS)}"
        raise bad_value(UsageError, "--data-dir", expected, options.data_dir)
    if options.data_dir is None and options.data == "idx":
        raise bad_value(UsageError, "--data-dir", "the folder of the idx files if --data is idx", "none")


def load(name: str, folder: Path | None = None, size: int | None = None, stream: bool = False) -> Dataset:
    """Load an image set.

    Args:
        name: One of SOURCES, or the path of a folder of images or of an .npz file (see experiments.images).
        size: Height and width to which the images of a folder are resized; None means their own.
        stream: Whether the images of a folder stay in their files.
        folder: For the sets in IN_FOLDERS, the only location that is searched; None means the default locations.

    Raises:
        DataError: A file is missing, truncated, corrupt, of the wrong kind or from another set, or a package or the
            network is missing.
        KeyError: There is no set with this name.
    """
    if is_path(name):
        from experiments.images import load_path

        return load_path(Path(name), size, stream)
    return SOURCES[name](folder)


def shuffled_batches(images: np.ndarray, labels: np.ndarray, size: int, *, seed: int, epoch: int) -> Iterator[Batch]:
    """Yield one epoch in an order that depends only on (seed, epoch); a remainder smaller than `size` is omitted.

    All batches then have one shape, so the step compiles once. Each epoch omits different examples.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(images))
    for start in range(0, len(images) - size + 1, size):
        chosen = order[start : start + size]
        yield images[chosen], labels[chosen]


def split_validation(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted indices of training and of validation examples; each class gives the same share.

    The split depends only on the labels, `fraction` and `seed`. If `fraction` > 0, each class with at least two
    examples has at least one in each part.

    Args:
        labels: (N,) int.
        fraction: The share of the validation examples, in [0, 1).
        seed: The seed of the choice.
    """
    chosen = [np.empty(0, np.intp)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = round(fraction * len(members))
        if fraction > 0:
            count = min(max(count, 1), len(members) - 1)
        chosen.append(np.random.default_rng([seed, int(label)]).permutation(members)[:count])
    validation = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def split(options: DataOptions, dataset: Dataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the images for training and for validation: the set's own, or those of --validation."""
    if dataset.validation is None or not options.validation:
        # Images with masks have no classes by which to divide them.
        labels = dataset.train_labels if dataset.train_labels.ndim == 1 else np.zeros(len(dataset.train_labels), int)
        return split_validation(labels, options.validation, seed)
    return np.setdiff1d(np.arange(len(dataset.train_labels)), dataset.validation), dataset.validation


class Batches:
    """The training batches, as a function of the step number alone, so that a run can continue at any step.

    Each epoch has an order of its own, which is drawn from `fold_in(key, step)` with the number of its first step. A
    remainder smaller than a batch is omitted, so that the step compiles once.
    """

    def __init__(
        self,
        images: Pixels,
        labels: np.ndarray,
        chosen: np.ndarray,
        size: int,
        *,
        seed: int,
        part: slice = slice(None),
    ) -> None:
        self._images, self._labels, self._chosen = images, labels, chosen
        self._size, self._seed, self._part = size, seed, part
        self._order = functools.lru_cache(maxsize=2)(self._new_order)  # of threads that read ahead into a new epoch

    @property
    def per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return len(self._chosen) // self._size

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0, or the `part` of it that this process reads."""
        first = step - step % self.per_epoch
        start = (step - first) * self._size
        chosen = self._order(first)[start : start + self._size][self._part]
        return np.asarray(self._images[chosen]), self._labels[chosen]

    def _new_order(self, first: int) -> np.ndarray:
        import jax

        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), _ORDER), first)
        return self._chosen[np.asarray(jax.random.permutation(key, len(self._chosen)))]


def training_batches(
    dataset: Dataset, chosen: np.ndarray, size: int, *, seed: int, part: slice = slice(None)
) -> Batches:
    """Return the batches of the training images `chosen`, `size` images at a time, or the `part` of each."""
    kind = Batches
    if not isinstance(dataset.train_pixels, np.ndarray):
        from experiments.streaming import StreamedBatches

        kind = StreamedBatches
    return kind(dataset.train_pixels, dataset.train_labels, chosen, size, seed=seed, part=part)


_ORDER = 1
"""Number folded into the key of a run for the order of its data; dropout and initial weights use other keys."""


def digits(folder: Path | None = None) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits, 8×8: the first 1,437 for training, the last 360 for testing.

    `folder` is not used, because the images are part of scikit-learn.
    """
    del folder
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataError("digits: needs the package scikit-learn, which is not installed") from None
    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
    split = 1437
    dataset = make_dataset(
        "digits",
        "scikit-learn",
        (images[:split], labels[:split]),
        (images[split:], labels[split:]),
        largest=16,
        class_names=tuple(map(str, range(10))),
    )
    if dataset.sha256 != DIGITS_SHA256:
        expected = f"scikit-learn's 1,797 digits, with SHA-256 {DIGITS_SHA256}"
        raise bad_value(DataError, "digits", expected, dataset.sha256)
    return dataset


SOURCES: Mapping[str, Callable[[Path | None], Dataset]] = {
    "fashion-mnist-sample": idx_files.fashion_mnist_sample,
    "fashion-mnist": idx_files.fashion_mnist,
    "digits": digits,
    "idx": idx_files.idx,
    **cifar.SOURCES,
}
IN_FOLDERS = ("fashion-mnist", "idx", *cifar.SOURCES)
"""Sets that can be read from a folder that the user chooses."""
