"""Image sets in idx files with the file names of MNIST: Fashion-MNIST, its embedded sample, and those of the user.

Every size in a header is checked before the contents are read. The contents of a named set are compared with its
SHA-256.
"""

import contextlib
import functools
import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np

from experiments.dataset import Dataset, check_labels, make_dataset
from experiments.downloads import cache_folder, download
from experiments.errors import DataError, bad_value

Kind = Literal["images", "labels"]
Part = Literal["train_images", "train_labels", "test_images", "test_labels"]

SAMPLE_DIR = Path(__file__).parent / "data" / "fashion-mnist-sample"
SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class IdxFile:
    """One file of a set: its name without ".gz", and the SHA-256 of its decompressed bytes, or None to accept any."""

    name: str
    kind: Kind
    sha256: str | None


Files = Mapping[Part, IdxFile]


def _files(
    train_images: str | None, train_labels: str | None, test_images: str | None, test_labels: str | None
) -> Files:
    return {
        "train_images": IdxFile("train-images-idx3-ubyte", "images", train_images),
        "train_labels": IdxFile("train-labels-idx1-ubyte", "labels", train_labels),
        "test_images": IdxFile("t10k-images-idx3-ubyte", "images", test_images),
        "test_labels": IdxFile("t10k-labels-idx1-ubyte", "labels", test_labels),
    }


# Hashes of the decompressed bytes, because a recompressed file is the same data set.
FASHION_MNIST_FILES = _files(
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
SAMPLE_FILES = _files(
    "ed2e37ed5a3a57d212141a69fe0a0de5a7126ffba14ac3f7e76f5f52cc04b1f0",
    "a69f2dad024ca220a8c4d85f621fdf929042d40c444abde2868903e9220ad517",
    "862035b0a96959b614c9574f4c2b0ae9584ca234813e8d6d7adb7838b12ca46b",
    "aa3f574d30afaf0d4d9da084a6f8541771e20693d6a97fae6e9a4953fca8f078",
)
_MAGIC: Mapping[Kind, int] = {"images": 0x00000803, "labels": 0x00000801}  # 00 00, 08 = uint8, rank 3 or 1
_LARGEST = 1 << 30  # bytes; far above the size of any such image set
_CHUNK = 1 << 20


def read_idx(path: Path, kind: Kind) -> np.ndarray:
    """Read an idx file, gzipped or not: uint8 images (N, H, W) or labels (N,).

    At most one byte more than the header specifies is read, so a small file cannot fill the memory.

    Raises:
        DataError: The file is missing, corrupt or of another kind.
    """
    with opened(path, f"an idx file of {kind}") as stream:
        return _parse_idx(stream, path, kind)


def _parse_idx(stream: BinaryIO, path: Path, kind: Kind) -> np.ndarray:
    magic, expected = stream.read(4), _MAGIC[kind]
    if magic != expected.to_bytes(4):
        got = f"0x{magic.hex()}" if magic else "nothing"
        other = next((f" (idx {k})" for k, m in _MAGIC.items() if magic == m.to_bytes(4)), "")
        raise bad_value(DataError, path, f"idx {kind} with magic 0x{expected:08x}", f"{got}{other}")
    rank = magic[3]
    sizes = stream.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise bad_value(DataError, path, f"an idx file with a header of {4 + 4 * rank} bytes", 4 + len(sizes))
    shape = tuple(int.from_bytes(sizes[4 * i : 4 * i + 4]) for i in range(rank))
    in_header, size = f"{' × '.join(map(str, shape))} in the header", math.prod(shape)
    if not 0 < size <= _LARGEST:
        raise bad_value(DataError, path, f"an idx file with 1 to {_LARGEST} bytes of {kind}", in_header)
    payload = bytearray()
    while len(payload) <= size and (chunk := stream.read(min(_CHUNK, size + 1 - len(payload)))):
        payload += chunk
    if len(payload) != size:
        got = "more" if len(payload) > size else f"{len(payload)}"
        raise bad_value(DataError, path, f"an idx file with {size} bytes of {kind} ({in_header})", got)
    return np.frombuffer(payload, np.uint8).reshape(shape)


@contextlib.contextmanager
def opened(path: Path, expected: str, name: object = None) -> Iterator[BinaryIO]:
    """Yield the decompressed bytes of `path`; an error while reading becomes a DataError about `name`."""
    name = path if name is None else name
    try:
        with path.open("rb") as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            # GzipFile has the methods of a BinaryIO, but is not declared as one.
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if gzipped else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise bad_value(DataError, name, expected, f"a truncated or corrupt gzip file ({error})") from None
    except FileNotFoundError:
        raise bad_value(DataError, name, expected, "no such file") from None
    except OSError as error:
        raise bad_value(DataError, name, expected, error.strerror or error) from None


def idx_bytes(array: np.ndarray) -> bytes:
    """Return the bytes of an idx file of uint8 images or labels."""
    return bytes([0, 0, 0x08, array.ndim]) + b"".join(size.to_bytes(4) for size in array.shape) + array.tobytes()


def _check_hash(path: Path, file: IdxFile, array: np.ndarray, name: str) -> None:
    """Raise DataError if `array`, read from `path`, is not the content of `file` in the set called `name`."""
    if file.sha256 is not None and (got := hashlib.sha256(idx_bytes(array)).hexdigest()) != file.sha256:
        raise bad_value(
            DataError,
            path,
            f"the file of {name}, whose decompressed bytes have SHA-256 {file.sha256}",
            got,
            "use --data idx for other images in files of these names",
        )


def _check_labels(path: Path, labels: np.ndarray, images_path: Path, images: np.ndarray, classes: int) -> None:
    """Raise DataError if images (N, H, W) and labels (N,), uint8, do not match."""
    if len(labels) != len(images):
        raise bad_value(DataError, path, f"{len(images)} labels, one for each image in {images_path}", len(labels))
    check_labels(path, labels, classes)


def fashion_mnist_sample(folder: Path | None = None) -> Dataset:
    """Load the first 10,000 training and 2,000 test images of Fashion-MNIST, which are part of this repository."""
    folder = SAMPLE_DIR if folder is None else folder
    return _from_folder("fashion-mnist-sample", folder, SAMPLE_FILES, FASHION_MNIST_CLASSES)


def fashion_mnist(folder: Path | None = None) -> Dataset:
    """Load Fashion-MNIST (60,000 and 10,000 images) from `folder`, else the system's copy, the cache, or a download."""
    if folder is None:
        folder = SYSTEM_DIR if holds_all(SYSTEM_DIR) else _cached()
    return _from_folder("fashion-mnist", folder, FASHION_MNIST_FILES, FASHION_MNIST_CLASSES)


def idx(folder: Path | None = None) -> Dataset:
    """Load the images of `folder`, in idx files with the file names of MNIST; class names are numbers."""
    if folder is None:
        raise bad_value(DataError, "idx", "read from a folder", "none")
    return _from_folder("idx", folder, _files(None, None, None, None), None)


def check_contents(sha256: str | None, path: Path, name: str) -> None:
    """Raise DataError unless the decompressed bytes of a file have this SHA-256."""
    if (got := sha256_inside(path, name)) != sha256:
        raise bad_value(DataError, name, f"a file whose decompressed bytes have SHA-256 {sha256}", got)


def sha256_inside(path: Path, name: str) -> str:
    """Return the SHA-256 of the decompressed bytes of a file, which messages call `name`."""
    digest, seen = hashlib.sha256(), 0
    with opened(path, "an intact idx file", name) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            seen += len(chunk)
            if seen > _LARGEST:
                raise bad_value(DataError, name, f"at most {_LARGEST} decompressed bytes", "more")
    return digest.hexdigest()


def _cached() -> Path:
    folder = cache_folder("fashion-mnist")
    for file in FASHION_MNIST_FILES.values():
        if _locate(folder, file) is None:
            verify = functools.partial(check_contents, file.sha256)
            download(f"{FASHION_MNIST_URL}{file.name}.gz", folder / f"{file.name}.gz", verify)
    return folder


def _locate(folder: Path, file: IdxFile) -> Path | None:
    paths = (folder / f"{file.name}.gz", folder / file.name)
    return next((path for path in paths if path.exists()), None)


def holds_all(folder: Path) -> bool:
    """Whether a folder has the files of Fashion-MNIST."""
    return all(_locate(folder, file) for file in FASHION_MNIST_FILES.values())


def _from_folder(name: str, folder: Path, files: Files, class_names: tuple[str, ...] | None) -> Dataset:
    """Read the set called `name`; if `class_names` is None, they are numbers up to the largest training label."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise bad_value(DataError, folder, f"the folder of {name}", got)
    paths: dict[Part, Path] = {}
    for part, file in files.items():
        path = _locate(folder, file)
        if path is None:
            raise bad_value(DataError, folder, f"a folder that contains {file.name}.gz or {file.name}", "neither")
        paths[part] = path
    arrays = {part: read_idx(paths[part], file.kind) for part, file in files.items()}
    for part, file in files.items():
        _check_hash(paths[part], file, arrays[part], name)
    if class_names is None:
        class_names = tuple(map(str, range(int(arrays["train_labels"].max()) + 1)))
    train, test = (
        (arrays["train_images"], arrays["train_labels"]),
        (arrays["test_images"], arrays["test_labels"]),
    )
    _check_labels(paths["train_labels"], train[1], paths["train_images"], train[0], len(class_names))
    _check_labels(paths["test_labels"], test[1], paths["test_images"], test[0], len(class_names))
    if test[0].shape[1:] != train[0].shape[1:]:
        expected = f"images of size {train[0].shape[1:]} as in {paths['train_images']}"
        raise bad_value(DataError, paths["test_images"], expected, test[0].shape[1:])
    return make_dataset(name, str(folder), train, test, largest=255, class_names=class_names)
