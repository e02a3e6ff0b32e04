"""PNG and JPEG files: one is decoded, or many are read in worker threads, into memory or when they are needed.

The size of an image is checked before it is decoded, so a small file cannot fill the memory.
"""

import contextlib
import functools
import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.errors import DataError, bad_value

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 24
"""Largest number of pixels of one image file."""
MAX_BYTES = 1 << 32
"""Largest size of all images together, as bytes, unless they are streamed."""
SUFFIXES = (".png", ".jpg", ".jpeg")
GRAY, COLOR = ("1", "L", "LA"), ("P", "RGB", "RGBA", "CMYK", "YCbCr")
ORIENTATION = 0x0112
"""The tag of EXIF that rotates an image; 5 to 8 exchange height and width."""
CHUNK = 64
"""Files that are decoded ahead of the one that is used."""


class ImageFiles:
    """Images (N, H, W, C), uint8, in files that are decoded when `np.asarray` reads them.

    An index, a slice or an array of indices selects images and decodes none, as the same type. So a training holds the
    pixels of a few batches only, and images need not fit into memory.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, paths: Sequence[Path], shape: tuple[int, ...], size: int | None) -> None:
        """Describe images.

        Args:
            paths: The files.
            shape: (H, W, C) of every image.
            size: Height and width to which the images are resized; None means that all have this shape.
        """
        self._paths, self._each, self._size = paths, shape, size

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self._paths), *self._each)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, chosen: Any) -> "ImageFiles | np.ndarray":
        if isinstance(chosen, slice):
            return ImageFiles(self._paths[chosen], self._each, self._size)
        if isinstance(chosen, int | np.integer):
            return np.asarray(ImageFiles([self._paths[int(chosen)]], self._each, self._size))[0]
        return ImageFiles([self._paths[n] for n in chosen], self._each, self._size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        result = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for n, (path, (image, _)) in enumerate(zip(self._paths, decoded(self._paths, self._size), strict=True)):
            if image.shape[:2] != self._each[:2]:
                expected = f"an image of size {self._each[:2]}, as it was at first"
                raise bad_value(DataError, path, expected, image.shape[:2])
            result[n] = image[..., : self._each[2]]
        return result


def read(paths: Sequence[Path], folder: Path, size: int | None) -> np.ndarray:
    """Return the images (N, H, W, C) of files, uint8; C is 1 if all are gray.

    Args:
        paths: The files.
        folder: Their folder, for messages.
        size: Height and width to which they are resized; None means that all have one size.

    Raises:
        DataError: A file is damaged, of another size, or not an image, or all together are too large.
    """
    result, color = np.empty(0, np.uint8), False
    for n, (image, is_color) in enumerate(_of_one_size(paths, size)):
        if n == 0:
            if math.prod(image.shape) * len(paths) > MAX_BYTES:
                hint = "choose --stream or a smaller --size"
                raise bad_value(DataError, folder, f"at most {MAX_BYTES} bytes of images", "more", hint)
            result = np.empty((len(paths), *image.shape), np.uint8)
        result[n] = image
        color |= is_color
    return result if color else np.ascontiguousarray(result[..., :1])


def scan(
    paths: Sequence[Path], size: int | None, parts: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[ImageFiles, str]:
    """Return the images of files, and the hash of the data set, which is that of the same images in memory.

    Every file is decoded once, so a damaged one is found before a training starts.

    Args:
        paths: The files.
        size: Height and width to which they are resized; None means that all have one size.
        parts: Indices (n,) of the images of each part of the data set, and their labels (n,).
    """
    digests, color, shape = {1: hashlib.sha256(), 3: hashlib.sha256()}, False, (0, 0)
    parts = list(parts)
    images = _of_one_size([paths[n] for chosen, _ in parts for n in chosen], size)
    for chosen, labels in parts:
        for n in range(len(chosen)):
            image, is_color = next(images)
            color, shape = color or is_color, image.shape[:2]
            for channels, digest in digests.items():
                if n == 0:
                    digest.update(f"{(len(chosen), *shape, channels)}".encode())
                if channels == 3 or not color:
                    digest.update(np.ascontiguousarray(image[..., :channels]))
        for digest in digests.values():
            digest.update(f"{labels.shape}".encode())
            digest.update(np.ascontiguousarray(labels))
    channels = 3 if color else 1
    return ImageFiles(paths, (*shape, channels), size), digests[channels].hexdigest()


def _of_one_size(paths: Sequence[Path], size: int | None) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield the results of `decode`; raise DataError for an image of another size than the first."""
    shape: tuple[int, ...] | None = None
    for path, (image, is_color) in zip(paths, decoded(paths, size), strict=True):
        shape = image.shape[:2] if shape is None else shape
        if image.shape[:2] != shape:
            expected = f"an image of size {shape}, as {paths[0]}"
            raise bad_value(DataError, path, expected, image.shape[:2], "or choose --size")
        yield image, is_color


def decoded(paths: Sequence[Path], size: int | None) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield the results of `decode` for files, in order; worker threads decode CHUNK files at a time."""
    for start in range(0, len(paths), CHUNK):
        yield from _pool().map(functools.partial(decode, size=size), paths[start : start + CHUNK])


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), "decode")


def decode(path: Path, size: int | None = None) -> tuple[np.ndarray, bool]:
    """Return the image (H, W, 3) uint8 in a file, and whether it has colors. Transparent pixels are over white.

    Args:
        path: A PNG or JPEG file.
        size: Height and width to which the image is resized; None means its own.

    Raises:
        DataError: The file is missing, damaged, too large, or not an image.
    """
    from PIL import Image, ImageOps

    with _opened(path) as image:
        if image.mode not in (*GRAY, *COLOR):
            raise bad_value(DataError, path, "an image with 8 bits per channel", f"mode {image.mode}")
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            layer = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        pixels = upright.convert("L" if image.mode in GRAY else "RGB")
        if size is not None:
            pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(pixels.convert("RGB")), image.mode in COLOR


def decode_mask(path: Path, size: int | None = None) -> np.ndarray:
    """Return the values (H, W) uint8 of a PNG of one channel, or the indices of one with a palette.

    Args:
        path: The file.
        size: Height and width to which the mask is resized, to the nearest pixel; None means its own.

    Raises:
        DataError: The file is missing, damaged, too large, or not a mask.
    """
    from PIL import Image, ImageOps

    with _opened(path, "a PNG mask", (".png",), ("PNG",)) as image:
        if image.mode not in ("1", "L", "P"):
            expected = "a mask of one channel or with a palette, and 8 bits"
            raise bad_value(DataError, path, expected, f"mode {image.mode}")
        upright = ImageOps.exif_transpose(image)
        if size is not None:
            upright = upright.resize((size, size), Image.Resampling.NEAREST)
        return np.asarray(upright).astype(np.uint8)


def decode_masks(paths: Sequence[Path], size: int | None) -> np.ndarray:
    """Return the masks (N, H, W) uint8 of files, which have one size unless they are resized."""
    masks = list(_pool().map(functools.partial(decode_mask, size=size), paths))
    return np.stack(masks)


def size_of(path: Path) -> tuple[int, int]:
    """Return the height and width of an upright image, from its header; raise DataError if it is not an image."""
    with _opened(path) as image:
        on_its_side = image.getexif().get(ORIENTATION, 1) >= 5
        return (image.width, image.height) if on_its_side else (image.height, image.width)


@contextlib.contextmanager
def _opened(
    path: Path,
    expected: str = "a PNG or JPEG image",
    suffixes: Sequence[str] = SUFFIXES,
    formats: tuple[str, ...] = ("PNG", "JPEG"),
) -> "Iterator[Image.Image]":
    """Yield an image that is not decoded yet; raise DataError if it is not one, or if decoding it fails."""
    from PIL import Image, UnidentifiedImageError

    if path.is_dir() or path.suffix.lower() not in suffixes:
        raise bad_value(DataError, path, f"{expected}, named *{' or *'.join(suffixes)}", "another file or a folder")
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit first prints a warning; the one below is smaller
    try:
        with path.open("rb") as file, Image.open(file, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                got = f"{image.width} × {image.height}"
                raise bad_value(DataError, path, f"an image of at most {MAX_PIXELS} pixels", got)
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        got = "an empty file" if path.stat().st_size == 0 else "something else"
        raise bad_value(DataError, path, expected, got) from None
    except (OSError, SyntaxError, ValueError, zlib.error) as error:  # Pillow raises all of them for damaged files
        got = getattr(error, "strerror", None) or f"a damaged file ({error})"
        raise bad_value(DataError, path, expected, got) from None
