"""Image sets with masks: a folder of images and of PNG masks, or the arrays of an .npz file.

    FOLDER/images/<stem>.png, FOLDER/masks/<stem>.png       a fifth of the images is the test set
    FOLDER/train/images, FOLDER/train/masks, FOLDER/test/…  and FOLDER/val/… if there is one
    FOLDER/classes.txt                                      names of the classes, one per line; optional

A mask has one channel or a palette. Its values are the numbers of classes, or IGNORED. All images have one size, or are
resized; masks are resized to the nearest pixel.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data import split_validation
from experiments.dataset import IGNORED, Dataset, make_dataset
from experiments.errors import DataError, UsageError, bad_value
from experiments.image_files import SUFFIXES, decode_masks, read, size_of

IMAGES, MASKS, CLASSES = "images", "masks", "classes.txt"
TEST_SHARE = 0.2


def is_folder_with_masks(path: Path) -> bool:
    """Whether a folder, or its folder train, has a folder of images and one of masks."""
    return any((folder / IMAGES).is_dir() and (folder / MASKS).is_dir() for folder in (path, path / "train"))


def load_folder(path: Path, size: int | None = None, stream: bool = False) -> Dataset:
    """Load images and their masks.

    Args:
        path: The folder.
        size: Height and width to which images and masks are resized; None means that all have one size.
        stream: Refused if it is true, because masks are read into memory.

    Raises:
        DataError: A file is missing, damaged, too large, not an image or not a mask.
        UsageError: `stream` is true.
    """
    if stream:
        raise bad_value(UsageError, "--stream", "omitted for images with masks, which are read into memory", "it")
    validation = None
    if not (path / "train").is_dir():
        files = _pairs(path)
        training, test = split_validation(np.zeros(len(files), np.int32), TEST_SHARE, seed=0)
        if not len(training) or not len(test):
            raise bad_value(DataError, path / IMAGES, "a folder with at least two images", len(files))
    else:
        parts = [_pairs(path / name) for name in ("train", "val", "test") if name != "val" or (path / name).is_dir()]
        files = [pair for part in parts for pair in part]
        ends = np.cumsum([len(part) for part in parts])
        training, test = np.arange(ends[-2]), np.arange(ends[-2], ends[-1])
        validation = np.arange(ends[0], ends[1]) if len(parts) == 3 else None
    for image, mask in files:
        if size_of(mask) != size_of(image):
            raise bad_value(DataError, mask, f"a mask of size {size_of(image)}, as {image}", size_of(mask))
    images = read([image for image, _ in files], path, size)
    masks = decode_masks([mask for _, mask in files], size)
    where = path / "train" if (path / "train").is_dir() else path
    names = check_classes(f"{where / MASKS}", masks[training], _names(path / CLASSES))
    for (_, mask), values in zip(files, masks, strict=True):
        check_numbers(f"{mask}", values, len(names))
    train, tested = ((images[part], masks[part]) for part in (training, test))
    return make_dataset(path.name, str(path.absolute()), train, tested, 255, names, validation)


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Return the image and the mask of each stem, in the order of the stems."""
    members = [_by_stem(folder / name) for name in (IMAGES, MASKS)]
    images, masks = members
    for own, others, name, what in ((images, masks, MASKS, "mask"), (masks, images, IMAGES, "image")):
        if missing := sorted(own.keys() - others.keys()):
            expected = f"a file with {'an' if what == 'image' else 'a'} {what} of the same name in {folder / name}"
            raise bad_value(DataError, own[missing[0]], expected, "none")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise bad_value(DataError, folder, "a folder of images or of their masks", "no such folder")
    result: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() not in SUFFIXES:
            expected = f"a PNG or JPEG image, named *{' or *'.join(SUFFIXES)}"
            raise bad_value(DataError, path, expected, "another file or a folder")
        if path.stem in result:
            raise bad_value(DataError, path, "the only file of its name", f"{result[path.stem].name} as well")
        result[path.stem] = path
    if not result:
        raise bad_value(DataError, folder, "a folder with at least one image", "none")
    return result


def _names(path: Path) -> tuple[str, ...] | None:
    """Return the names of the classes in a file, or None if it does not exist."""
    if not path.exists():
        return None
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise bad_value(DataError, path, "a text file with one name per line", error) from None
    if not 2 <= len(names) <= IGNORED or len(set(names)) < len(names):
        got = ", ".join(names) if len(names) < IGNORED else f"{len(names)} names"
        raise bad_value(DataError, path, f"from 2 to {IGNORED} different names, one per line", got or "none")
    return names


@functools.cache
def palette() -> np.ndarray:
    """Return the colors (256, 3) uint8 of class numbers, those of Pascal VOC: black for 0, beige for IGNORED."""
    bits = np.arange(256)[:, None] >> 3 * np.arange(8)  # three bits of the number at a time, one for each color
    return (((bits[..., None] >> np.arange(3)) & 1) << (7 - np.arange(8))[:, None]).sum(1).astype(np.uint8)


def check_classes(name: str, masks: np.ndarray, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the classes; raise DataError unless training masks have at least two classes without gaps.

    Args:
        name: The name of the masks in messages.
        masks: (N, H, W) uint8.
        names: The names of the classes, which then may have gaps; None means that the names are the numbers.
    """
    present = np.flatnonzero(np.bincount(masks.ravel(), minlength=IGNORED)[:IGNORED])
    if names is not None and len(present):
        return tuple(names)
    if len(present) < 2 or present[-1] != len(present) - 1:
        got = ", ".join(map(str, present[:10])) + (", …" if len(present) > 10 else "")
        expected = f"masks of at least two classes, with numbers from 0 without gaps ({IGNORED}: not labeled)"
        raise bad_value(DataError, name, expected, got or "none")
    return tuple(map(str, present))


def check_numbers(name: str, mask: np.ndarray, classes: int) -> None:
    """Raise DataError for a value in a mask that is not the number of a class, nor IGNORED."""
    wrong = mask[(mask >= classes) & (mask != IGNORED)]
    if wrong.size:
        raise bad_value(DataError, name, f"a mask of numbers from 0 to {classes - 1}, or {IGNORED}", int(wrong.max()))


def masks_of_arrays(name: str, masks: np.ndarray) -> np.ndarray:
    """Return the masks (N, H, W) uint8 of an integer array (N, H, W) or (N, H, W, 1), whose name is in messages."""
    if masks.min() < 0 or masks.max() > IGNORED:
        raise bad_value(DataError, name, f"masks of numbers from 0 to {IGNORED}", f"{masks.min()} to {masks.max()}")
    return masks.reshape(masks.shape[:3]).astype(np.uint8)
