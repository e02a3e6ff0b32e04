"""The compiled library: where it is, how it is loaded, and what it can compute."""

import ctypes
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib.version

#: Name of the custom call, and of its symbol in the library.
TARGET = "jaxcnn_convolution"

#: Environment variable; "0" turns the library off.
OPTION = "JAXCNN_NATIVE"

#: The products, in the order of the enum in convolution.cc.
PRODUCTS = ("correlate", "input_grad", "kernel_grad")


def library_path() -> Path:
    """Return the path of the library, which is compiled for one version of jaxlib."""
    return Path(__file__).with_name(f"convolution-jaxlib-{jaxlib.version.__version__}.so")


def is_enabled() -> bool:
    """Whether the library is built, can be loaded, and is not turned off."""
    return os.environ.get(OPTION) != "0" and load() is not None


@functools.cache
def load() -> ctypes.CDLL | None:
    """Load the library and register its custom call; None without a library."""
    path = library_path()
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(f"jaxcnn.native: the library was built but cannot be loaded: {error}", stacklevel=2)
        return None
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.jaxcnn_convolution), platform="cpu")
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
