"""Image sets of the user: a folder of PNG and JPEG files by class, or one .npz file.

    FOLDER/<class>/<image>                    a fifth of each class is the test set
    FOLDER/train/<class>/<image>, FOLDER/test/<class>/<image>, and FOLDER/val/<class>/<image> if there is one
    FILE.npz                                  uint8 images and int labels or masks, named as in `ARRAYS`

Folders of images with masks are in `experiments.mask_files`.

With `stream`, the images of a folder stay in their files until a batch needs them. Sizes are checked before anything is
decoded, so a small file cannot fill the memory. Nothing is unpickled.
"""

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from experiments import mask_files
from experiments.data import split_validation
from experiments.dataset import Dataset, make_dataset
from experiments.errors import DataError, bad_value
from experiments.image_files import MAX_BYTES, read, scan

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
OTHER_NAMES = ("x_train", "y_train", "x_test", "y_test")
"""Names of the arrays in the files that Keras distributes."""
TEST_SHARE = 0.2


def load_path(path: Path, size: int | None = None, stream: bool = False) -> Dataset:
    """Load the images of a folder or of an .npz file.

    Args:
        path: The folder or the file.
        size: Height and width to which the images of a folder are resized; None means that all have one size.
        stream: Whether the images of a folder stay in their files.

    Raises:
        DataError: A file or folder is missing, damaged, too large, or not an image.
    """
    if path.suffix == ".npz" and not path.is_dir():
        return load_npz(path)
    if not path.is_dir():
        got = "a file" if path.exists() else "no such folder"
        raise bad_value(DataError, path, "a folder of images by class or with masks, or an .npz file", got)
    if mask_files.is_folder_with_masks(path):
        return mask_files.load_folder(path, size, stream)
    validation = None
    if not (path / "train").is_dir():
        classes = _classes(path)
        files, labels = _files(path, classes)
        training, test = split_validation(labels, TEST_SHARE, seed=0)
    else:
        classes = _classes(path / "train")
        names = ("train", "val", "test") if (path / "val").is_dir() else ("train", "test")
        parts = [_files(path / name, classes) for name in names]
        files, labels = [file for of_part, _ in parts for file in of_part], np.concatenate([y for _, y in parts])
        ends = np.cumsum([len(y) for _, y in parts])
        training, test = np.arange(ends[-2]), np.arange(ends[-2], ends[-1])
        validation = np.arange(ends[0], ends[1]) if len(parts) == 3 else None
    train, tested = (training, labels[training]), (test, labels[test])
    images: Any
    images, sha256 = scan(files, size, (train, tested)) if stream else (read(files, path, size), None)
    source = str(path.absolute())
    return make_dataset(
        path.name,
        source,
        (images[training], labels[training]),
        (images[test], labels[test]),
        255,
        classes,
        validation,
        sha256,
    )


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if len(names) < 2:
        got = f"only {names[0]}" if names else "none"
        expected = "a folder with at least two subfolders, one per class, or images and masks"
        raise bad_value(DataError, folder, expected, got)
    return names


def _files(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], np.ndarray]:
    """Return the files and labels (N,) int32 of the classes, in the order of the file names."""
    if not folder.is_dir():
        raise bad_value(DataError, folder, "a folder of images by class", "no such folder")
    if extra := {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")} - set(classes):
        raise bad_value(DataError, folder / min(extra), f"one of the classes of train, {', '.join(classes)}", "another")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        members = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        members = [path for path in members if not path.name.startswith(".")]
        if not members:
            raise bad_value(DataError, folder / name, "a class with at least one image", "none")
        files += members
        labels += [label] * len(members)
    return files, np.array(labels, np.int32)


def load_npz(path: Path) -> Dataset:
    """Load an .npz file of uint8 images (N, H, W) or (N, H, W, C), and labels (N,) of any integer dtype.

    Labels in the shape of the images, (N, H, W) or (N, H, W, 1), are masks.
    """
    expected = "an .npz file"
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {info.filename.removesuffix(".npy"): _member(path, archive, info) for info in archive.infolist()}
    except FileNotFoundError:
        raise bad_value(DataError, path, expected, "no such file") from None
    except OSError as error:
        raise bad_value(DataError, path, expected, error.strerror or error) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        got = "an empty file" if path.stat().st_size == 0 else f"a damaged file ({error})"
        raise bad_value(DataError, path, expected, got) from None
    names = next((names for names in (ARRAYS, OTHER_NAMES) if set(names) <= set(arrays)), None)
    if names is None:
        got = ", ".join(sorted(arrays)) or "none"
        raise bad_value(DataError, path, f"an .npz file with the arrays {', '.join(ARRAYS)}", got)
    train, test = ((arrays[names[n]], arrays[names[n + 1]]) for n in (0, 2))
    for (images, labels), (name, label_name) in ((train, names[:2]), (test, names[2:])):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
            got = f"{images.dtype} {images.shape}"
            raise bad_value(DataError, f"{path}: {name}", "uint8 images (N, H, W) or (N, H, W, C)", got)
        masks = labels.shape in (images.shape[:3], (*images.shape[:3], 1))
        if not np.issubdtype(labels.dtype, np.integer) or (labels.shape != (len(images),) and not masks):
            got = f"{labels.dtype} {labels.shape}"
            expected = f"{len(images)} integers, or masks of the size of the images"
            raise bad_value(DataError, f"{path}: {label_name}", expected, got)
        if labels.min() < 0:
            raise bad_value(DataError, f"{path}: {label_name}", "numbers from 0", labels.min())
    if test[0].shape[1:] != train[0].shape[1:]:
        expected = f"images of shape {train[0].shape[1:]}, as {names[0]}"
        raise bad_value(DataError, f"{path}: {names[2]}", expected, test[0].shape[1:])
    if train[1].ndim > 1 or test[1].ndim > 1:
        return _with_masks(path, names, train, test)
    count = int(train[1].max()) + 1
    present = np.bincount(train[1].astype(np.int64), minlength=count) if count <= 1 << 16 else np.zeros(1)
    if count < 2 or not present.all():
        got = f"labels up to {count - 1}, of {int((present > 0).sum())} classes"
        raise bad_value(DataError, f"{path}: {names[1]}", "at least two classes, each with an image", got)
    if test[1].max() >= count:
        raise bad_value(DataError, f"{path}: {names[3]}", f"labels from 0 to {count - 1}", test[1].max())
    train, test = ((images, labels.astype(np.int32)) for images, labels in (train, test))
    return make_dataset(path.name, str(path.absolute()), train, test, 255, tuple(map(str, range(count))))


def _with_masks(path: Path, names: Sequence[str], *parts: tuple[np.ndarray, np.ndarray]) -> Dataset:
    """Return the data set of the images and masks in an .npz file, whose arrays have these names."""
    train_name, test_name = (f"{path}: {names[n]}" for n in (1, 3))
    if parts[0][1].ndim == 1 or parts[1][1].ndim == 1:
        got = f"{parts[0][1].shape} and {parts[1][1].shape}"
        raise bad_value(DataError, f"{train_name} and {names[3]}", "both labels or both masks", got)
    train, test = (
        (images, mask_files.masks_of_arrays(name, masks))
        for name, (images, masks) in zip((train_name, test_name), parts, strict=True)
    )
    classes = mask_files.check_classes(train_name, train[1])
    mask_files.check_numbers(test_name, test[1], len(classes))
    return make_dataset(path.name, str(path.absolute()), train, test, 255, classes)


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Return one array of an .npz file. At most as many bytes are read as its header and the archive declare."""
    name = f"{path}: {info.filename}"
    if "/" in info.filename or "\\" in info.filename or ".." in info.filename:
        raise bad_value(DataError, name, "the name of an array", "a path")
    if info.file_size > MAX_BYTES:
        raise bad_value(DataError, name, f"at most {MAX_BYTES} bytes", info.file_size)
    with archive.open(info) as file:
        shape, fortran, dtype = _header(name, file)
        if dtype.hasobject:
            raise bad_value(DataError, name, "an array of numbers", "pickled objects, which are never read")
        size, declared = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if size != declared:
            raise bad_value(DataError, name, f"an array of {size} bytes ({shape} {dtype} in its header)", declared)
        content = file.read(size)
    array = np.frombuffer(content, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _header(name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise bad_value(DataError, name, "an array in NumPy's format", f"something else ({error})") from None
    return shape, fortran, dtype
