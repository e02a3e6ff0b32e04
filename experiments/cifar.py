"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in the binary version: a folder of its files, or the archive itself.

An image is one or two bytes of labels and 3 × 32 × 32 pixels, channels first. The page of the data sets describes the
format: https://www.cs.toronto.edu/~kriz/cifar.html. The archive is compared with its hash, and it is read without being
extracted.
"""

import functools
import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np

from experiments.dataset import Dataset, check_labels, make_dataset
from experiments.downloads import cache_folder, download
from experiments.errors import DataError, bad_value

URL = "https://www.cs.toronto.edu/~kriz/"
CHANNELS, SIDE = 3, 32
MAX_BYTES = 1 << 28
"""Largest size of a decompressed archive; the official ones have 184 MB."""
MAX_NAMES = 1 << 16
"""Largest size of a file of class names."""


@dataclass(frozen=True)
class Version:
    """One of the data sets: its archive, and the files in the archive's folder, with the number of images in each."""

    archive: str
    sha256: str
    folder: str
    train: Mapping[str, int]
    test: Mapping[str, int]
    names: str
    classes: int
    labels: int
    """Number of bytes of labels before the pixels."""
    label: int
    """Position of the label of `names` among them."""

    @property
    def record(self) -> int:
        """Bytes of an image with its labels."""
        return self.labels + CHANNELS * SIDE * SIDE


CIFAR10 = Version(
    "cifar-10-binary.tar.gz",
    # Also in MLDatasets.jl. The page of the data sets has the MD5 c32a1d4ab5d03f1284b67883e8d87530.
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-batches-bin",
    {f"data_batch_{n}.bin": 10_000 for n in range(1, 6)},
    {"test_batch.bin": 10_000},
    "batches.meta.txt",
    classes=10,
    labels=1,
    label=0,
)
_cifar100 = functools.partial(
    Version,
    "cifar-100-binary.tar.gz",
    # Also in MLDatasets.jl. The page of the data sets has the MD5 03b5dce01913d631647c71ecec9e9cb8.
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    "cifar-100-binary",
    {"train.bin": 50_000},
    {"test.bin": 10_000},
    labels=2,
)
VERSIONS = {
    "cifar10": CIFAR10,
    "cifar100": _cifar100("fine_label_names.txt", classes=100, label=1),
    "cifar100-coarse": _cifar100("coarse_label_names.txt", classes=20, label=0),
}


def load_cifar(name: str, folder: Path | None = None) -> Dataset:
    """Load a data set from `folder`, else from the cache or a download.

    Args:
        name: A name in VERSIONS.
        folder: The archive, or a folder that contains it, its folder, or its files.

    Raises:
        DataError: A file is missing, truncated, corrupt or not of this data set, or the download failed.
    """
    version = VERSIONS[name]
    path = _cached(version) if folder is None else _locate(name, version, folder)
    read = _from_archive if path.is_file() else _from_folder
    sizes = {file: count * version.record for file, count in (*version.train.items(), *version.test.items())}
    contents = read(name, version, path, sizes)
    classes = _class_names(path / version.names, contents[version.names], version.classes)
    train, test = (
        _parse(version, path, {file: contents[file] for file in part}) for part in (version.train, version.test)
    )
    return make_dataset(name, str(path), train, test, 255, classes)


SOURCES: Mapping[str, Callable[[Path | None], Dataset]] = {
    name: functools.partial(load_cifar, name) for name in VERSIONS
}
"""The function that loads each set, by its name."""


def _parse(version: Version, path: Path, contents: Mapping[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 32, 32, 3) and labels (N,), uint8."""
    for name, content in contents.items():
        labels = np.frombuffer(content, np.uint8)[version.label :: version.record]
        check_labels(path / name, labels, version.classes)
    records = np.frombuffer(b"".join(contents.values()), np.uint8).reshape(-1, version.record)
    images = records[:, version.labels :].reshape(-1, CHANNELS, SIDE, SIDE)
    return np.ascontiguousarray(np.moveaxis(images, 1, -1)), records[:, version.label].copy()


def _class_names(path: Path, content: bytes, count: int) -> tuple[str, ...]:
    names = tuple(line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip())
    if len(names) != count:
        raise bad_value(DataError, path, f"the names of {count} classes, one per line", f"{len(names)} names")
    return names


# ---- locations ----


def _cached(version: Version) -> Path:
    path = cache_folder("cifar") / version.archive
    if not path.exists():
        download(URL + version.archive, path, functools.partial(_check_archive, version))
    return path


def _locate(name: str, version: Version, folder: Path) -> Path:
    """Return the folder of the files, or the archive."""
    if not folder.exists():
        raise bad_value(DataError, folder, f"the folder or the archive of {name}", "no such folder")
    if folder.is_file():
        return folder
    first = next(iter(version.train))
    for path in (folder, folder / version.folder):
        if (path / first).exists():
            return path
    if (folder / version.archive).exists():
        return folder / version.archive
    expected = f"a folder that contains {version.archive}, {version.folder} or {first}"
    raise bad_value(DataError, folder, expected, "none of them")


def _from_folder(name: str, version: Version, folder: Path, sizes: Mapping[str, int]) -> dict[str, bytes]:
    """Return the contents of the files in a folder. Their sizes are checked before they are read."""
    contents = {}
    for file in (*sizes, version.names):
        path = folder / file
        try:
            _check_size(version, path, path.stat().st_size, sizes.get(file))
            contents[file] = path.read_bytes()
        except OSError as error:
            got = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or error
            raise bad_value(DataError, path, f"a file of {name}", got) from None
    return contents


def _check_size(version: Version, name: object, size: int, expected: int | None) -> None:
    """Raise DataError for a wrong size of a file of images, or of one of class names, for which `expected` is None."""
    if expected is None and size > MAX_NAMES:
        raise bad_value(DataError, name, f"a file of class names with at most {MAX_NAMES} bytes", size)
    if expected is not None and size != expected:
        count = expected // version.record
        raise bad_value(DataError, name, f"{expected} bytes, {count} images of {version.record} bytes", size)


# ---- the archive ----


def _check_archive(version: Version, path: Path, name: str) -> None:
    """Raise DataError unless a file, which messages call `name`, is the archive of a version."""
    try:
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise bad_value(DataError, name, f"the archive {version.archive}", error.strerror) from None
    if got != version.sha256:
        raise bad_value(DataError, name, f"the archive {version.archive} with SHA-256 {version.sha256}", got)


class _Limited:
    """A stream that raises DataError after MAX_BYTES, so that a small archive cannot fill the memory."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path, self._stream, self._taken = path, stream, 0

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._taken += len(content)
        if self._taken > MAX_BYTES:
            raise bad_value(DataError, self._path, f"an archive of at most {MAX_BYTES} decompressed bytes", "more")
        return content


def _from_archive(name: str, version: Version, path: Path, sizes: Mapping[str, int]) -> dict[str, bytes]:
    """Return the contents of the files in the archive. Nothing is written to the disk.

    The hash is compared first. Names and sizes are checked nevertheless, because a hash does not make code safe.
    """
    _check_archive(version, path, str(path))
    contents: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream:
            limited = cast(Any, _Limited(path, cast(IO[bytes], stream)))
            with tarfile.open(fileobj=limited, mode="r|") as archive:
                for member in archive:
                    parts = PurePosixPath(member.name).parts
                    label = f"{path}: {member.name}"
                    if ".." in parts or member.name.startswith("/"):
                        raise bad_value(DataError, label, "a path inside of the archive", "one that leaves it")
                    if parts[:-1] != (version.folder,) or parts[-1] not in (*sizes, version.names):
                        continue
                    if not member.isreg():
                        raise bad_value(DataError, label, "a file", "a link, a folder or a device")
                    _check_size(version, label, member.size, sizes.get(parts[-1]))
                    contents[parts[-1]] = cast(IO[bytes], archive.extractfile(member)).read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        got = f"a truncated or corrupt one ({error})"
        raise bad_value(DataError, path, f"the archive {version.archive}", got) from None
    except OSError as error:
        raise bad_value(DataError, path, f"the archive {version.archive}", error.strerror or error) from None
    for file in (*sizes, version.names):
        if file not in contents:
            expected = f"an archive of {name}, which contains {version.folder}/{file}"
            raise bad_value(DataError, path, expected, "no such member")
    return contents
