"""The compiled library: where it is, how it is loaded, and what it can compute."""

import ctypes
import functools
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib.version

#: Names of the custom calls, and of their symbols in the library.
TARGET, COPY_TARGET = "jaxcnn_convolution", "jaxcnn_copy_to_large_pages"

#: Environment variable; "0" turns the library off.
OPTION = "JAXCNN_NATIVE"

#: The products, in the order of the enum in convolution.cc.
PRODUCTS = ("correlate", "input_grad", "kernel_grad")

#: End of the name of a library for this version of jaxlib.
SUFFIX = f"jaxlib-{jaxlib.version.__version__}.so"


@functools.cache
def library_path() -> Path:
    """Return the path of the library, which is compiled from these sources for one version of jaxlib."""
    here = Path(__file__).parent
    sources = sorted(path for path in here.iterdir() if path.suffix in (".cc", ".h"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return here / f"convolution-{digest[:8]}-{SUFFIX}"


def of_other_sources() -> list[Path]:
    """Return the libraries for this version of jaxlib that were compiled from other sources."""
    path = library_path()
    return [other for other in path.parent.glob(f"convolution-*{SUFFIX}") if other != path]


def is_enabled() -> bool:
    """Whether the library is built, can be loaded, and is not turned off."""
    return os.environ.get(OPTION) != "0" and load() is not None


@functools.cache
def load() -> ctypes.CDLL | None:
    """Load the library and register its custom calls; None without a library.

    Warns if there is only one that was compiled from other sources.
    """
    path = library_path()
    if not path.exists():
        if others := [other.name for other in of_other_sources()]:
            warnings.warn(
                f"jaxcnn.native: {', '.join(others)} belongs to another version of jaxcnn and is not used; to replace "
                "it: python -m jaxcnn.native build",
                stacklevel=2,
            )
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(f"jaxcnn.native: the library was built but cannot be loaded: {error}", stacklevel=2)
        return None
    for target in (TARGET, COPY_TARGET):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return library


@functools.lru_cache(maxsize=4096)
def implementation(
    product: str,
    image: tuple[int, ...],
    kernel: tuple[int, ...],
    result: tuple[int, ...],
    stride: tuple[int, ...],
    low: tuple[int, ...],
    high: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> str:
    """Return oneDNN's name of its kernel for a product, such as "jit:avx2"; "" if it has none."""
    library = load()
    if library is None:
        return ""
    name = ctypes.create_string_buffer(64)
    lists = map(_int64s, (image, kernel, result, stride, low, high, dilation))
    number, ndim = ctypes.c_int64(PRODUCTS.index(product)), ctypes.c_int64(len(stride))
    library.jaxcnn_implementation(number, ndim, *lists, ctypes.c_int64(groups), name, ctypes.c_int64(len(name)))
    return name.value.decode()


def _int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
