"""Image sets for the experiments: located, read, checked, and identified by name and hash.

    load("fashion-mnist-sample")    the 12,000 images in this repository
    load("fashion-mnist")           all 70,000: from a given folder, the system, the cache, or a checked download
    load("digits")                  scikit-learn's 8×8 digits
    load("idx", folder)             any images and labels in idx files with the file names of MNIST
    load("my/images")               a folder of PNG and JPEG files by class, or an .npz file

The contents of a named set are checked against its hash. Every set is returned as float32 images in [0, 1] and int32
labels. Idx files are read by one reader, which validates every size in their headers.
"""

import contextlib
import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, cast

import numpy as np
from tyro.conf import arg

from experiments import cli
from experiments.errors import DataError, UsageError, bad_value
from experiments.files import cache_dir, replacing

Batch = tuple[np.ndarray, np.ndarray]
"""Images (B, H, W, C) float32 and labels (B,) int32."""

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
class DataOptions:
    """Options of the images."""

    data: str = "fashion-mnist-sample"
    """Images: fashion-mnist-sample (10,000, embedded), fashion-mnist (60,000), digits (8×8), idx (your own, in idx
    files), the path of a folder of PNG and JPEG files in one subfolder per class, or the path of an .npz file."""
    size: Annotated[int | None, arg(metavar="INT")] = None
    """Height and width to which the images of a folder are resized; if omitted, all must have one size."""
    data_dir: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of idx files for --data idx or fashion-mnist; if omitted, the system's copy, the cache, or a download."""
    validation: float = 0.1
    """Share of the training images, by class, that choose the best epoch instead of training; 0 for none."""


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
DIGITS_SHA256 = "bbaeaefce84743833997df3ec781527fa96c88aa06b683bb49ca5f68045ebbf2"
"""`Dataset.sha256` of scikit-learn's digits."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labeled images, split into training and test.

    The images (N, H, W, C) are float32 in [0, 1]. The labels (N,) are int32 indices into `class_names`. `source`
    describes the location of the files. `sha256` is the hash of shapes and stored pixels, so it does not depend on file
    format, compression or folder.
    """

    name: str
    source: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    sha256: str
    validation: np.ndarray | None = None
    """Indices of the training images that the set itself reserves for validation, or None."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.train_images.shape[1:]


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
    if not 0 <= options.validation < 1:
        raise bad_value(UsageError, "--validation", "from 0 up to, but not including, 1", options.validation)
    if options.data_dir is not None and options.data not in IN_FOLDERS:
        expected = f"omitted unless --data is {' or '.join(IN_FOLDERS)}"
        raise bad_value(UsageError, "--data-dir", expected, options.data_dir)
    if options.data_dir is None and options.data == "idx":
        raise bad_value(UsageError, "--data-dir", "the folder of the idx files if --data is idx", "none")


def load(name: str, folder: Path | None = None, size: int | None = None) -> Dataset:
    """Load an image set.

    Args:
        name: One of SOURCES, or the path of a folder of images or of an .npz file (see experiments.images).
        size: Height and width to which the images of a folder are resized; None means their own.
        folder: For the sets in IN_FOLDERS, the only location that is searched; None means the default locations.

    Raises:
        DataError: A file is missing, truncated, corrupt, of the wrong kind or from another set, or a package or the
            network is missing.
        KeyError: There is no set with this name.
    """
    if is_path(name):
        from experiments.images import load_path

        return load_path(Path(name), size)
    return SOURCES[name](folder)


def batches(images: np.ndarray, labels: np.ndarray, size: int) -> Iterator[Batch]:
    """Yield all examples in order, `size` at a time; the last batch may be smaller."""
    for start in range(0, len(images), size):
        yield images[start : start + size], labels[start : start + size]


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
        return split_validation(dataset.train_labels, options.validation, seed)
    return np.setdiff1d(np.arange(len(dataset.train_labels)), dataset.validation), dataset.validation


class Batches:
    """The training batches, as a function of the step number alone, so that a run can continue at any step.

    Each epoch has an order of its own, which is drawn from `fold_in(key, step)` with the number of its first step. A
    remainder smaller than a batch is omitted, so that the step compiles once.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        chosen: np.ndarray,
        size: int,
        *,
        seed: int,
        part: slice = slice(None),
    ) -> None:
        self._images, self._labels, self._chosen = images, labels, chosen
        self._size, self._seed, self._part = size, seed, part
        self._first, self._order = -1, chosen

    @property
    def per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return len(self._chosen) // self._size

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0, or the `part` of it that this process reads."""
        first = step - step % self.per_epoch
        if first != self._first:
            self._first, self._order = first, self._chosen[self._permutation(first)]
        start = (step - first) * self._size
        chosen = self._order[start : start + self._size][self._part]
        return self._images[chosen], self._labels[chosen]

    def _permutation(self, first: int) -> np.ndarray:
        import jax

        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), _ORDER), first)
        return np.asarray(jax.random.permutation(key, len(self._chosen)))


_ORDER = 1
"""Number folded into the key of a run for the order of its data; dropout and initial weights use other keys."""


# ---- idx files --------------------------------------------------------------------------------------------------

_MAGIC: Mapping[Kind, int] = {"images": 0x00000803, "labels": 0x00000801}  # 00 00, 08 = uint8, rank 3 or 1
_LARGEST = 1 << 30  # bytes; far above the size of any such image set
_CHUNK = 1 << 20


def read_idx(path: Path, kind: Kind) -> np.ndarray:
    """Read an idx file, gzipped or not: uint8 images (N, H, W) or labels (N,).

    At most one byte more than the header specifies is read, so a small file cannot fill the memory.

    Raises:
        DataError: The file is missing, corrupt or of another kind.
    """
    with _opened(path, f"an idx file of {kind}") as stream:
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
def _opened(path: Path, expected: str, name: object = None) -> Iterator[BinaryIO]:
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
    if labels.max() >= classes:
        first = int(np.argmax(labels >= classes))
        raise bad_value(DataError, path, f"labels from 0 to {classes - 1}", f"{labels[first]} for image {first}")


def dataset_from_arrays(
    name: str,
    source: str,
    train: Batch,
    test: Batch,
    largest: int,
    class_names: tuple[str, ...],
    validation: np.ndarray | None = None,
) -> Dataset:
    """Build a Dataset of uint8 images (N, H, W) or (N, H, W, C), with pixels from 0 to `largest`, and labels (N,)."""
    digest = hashlib.sha256()
    for array in (*train, *test):
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))

    def scale(images: np.ndarray) -> np.ndarray:
        return (images[..., None] if images.ndim == 3 else images) * np.float32(1 / largest)

    return Dataset(
        name=name,
        source=source,
        train_images=scale(train[0]),
        train_labels=train[1].astype(np.int32),
        test_images=scale(test[0]),
        test_labels=test[1].astype(np.int32),
        class_names=class_names,
        sha256=digest.hexdigest(),
        validation=validation,
    )


# ---- locations of the sets --------------------------------------------------------------------------------------


def fashion_mnist_sample(folder: Path | None = None) -> Dataset:
    """Load the first 10,000 training and 2,000 test images of Fashion-MNIST, which are part of this repository."""
    folder = SAMPLE_DIR if folder is None else folder
    return _from_folder("fashion-mnist-sample", folder, SAMPLE_FILES, FASHION_MNIST_CLASSES)


def fashion_mnist(folder: Path | None = None) -> Dataset:
    """Load Fashion-MNIST (60,000 and 10,000 images) from `folder`, else the system's copy, the cache, or a download."""
    if folder is None:
        folder = SYSTEM_DIR if _holds_all(SYSTEM_DIR) else _cached()
    return _from_folder("fashion-mnist", folder, FASHION_MNIST_FILES, FASHION_MNIST_CLASSES)


def idx(folder: Path | None = None) -> Dataset:
    """Load the images of `folder`, in idx files with the file names of MNIST; class names are numbers."""
    if folder is None:
        raise bad_value(DataError, "idx", "read from a folder", "none")
    return _from_folder("idx", folder, _files(None, None, None, None), None)


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
    dataset = dataset_from_arrays(
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
    "fashion-mnist-sample": fashion_mnist_sample,
    "fashion-mnist": fashion_mnist,
    "digits": digits,
    "idx": idx,
}
IN_FOLDERS = ("fashion-mnist", "idx")
"""Sets that can be read from a folder that the user chooses."""


def download(url: str, path: Path, sha256: str | None) -> None:
    """Download `url` to `path`, which is created only if its decompressed bytes have this SHA-256.

    Raises:
        DataError: The download failed, or its bytes are not the expected ones.
    """
    import pooch

    with replacing(path) as temporary:
        try:
            pooch.HTTPDownloader(timeout=30)(url, str(temporary), None)
        except OSError as error:  # an exception of requests is an OSError, and may hold an open connection
            if error.errno is not None:  # an error of the file, not of the network; `replacing` names it
                raise
            if (response := getattr(error, "response", None)) is not None:
                response.close()
            raise DataError(
                f"{url}: download failed ({error}); pass the folder of the files as --data-dir, "
                "or use --data fashion-mnist-sample, which is part of the repository"
            ) from None
        got = _sha256_inside(temporary, url)
        if got != sha256:
            raise bad_value(DataError, url, f"a file whose decompressed bytes have SHA-256 {sha256}", got)


def _sha256_inside(path: Path, name: str) -> str:
    digest, seen = hashlib.sha256(), 0
    with _opened(path, "an intact idx file", name) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            seen += len(chunk)
            if seen > _LARGEST:
                raise bad_value(DataError, name, f"at most {_LARGEST} decompressed bytes", "more")
    return digest.hexdigest()


def _cached() -> Path:
    folder = cache_dir("fashion-mnist")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_value(DataError, folder, "a folder for downloads", error.strerror) from None
    for file in FASHION_MNIST_FILES.values():
        if _locate(folder, file) is None:
            download(f"{FASHION_MNIST_URL}{file.name}.gz", folder / f"{file.name}.gz", file.sha256)
    return folder


def _locate(folder: Path, file: IdxFile) -> Path | None:
    paths = (folder / f"{file.name}.gz", folder / file.name)
    return next((path for path in paths if path.exists()), None)


def _holds_all(folder: Path) -> bool:
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
    return dataset_from_arrays(name, str(folder), train, test, largest=255, class_names=class_names)
