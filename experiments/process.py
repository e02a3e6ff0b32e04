"""Settings of the process, applied before jax is imported: memory allocation and the compilation cache.

XLA's CPU client allocates its buffers at each call, and by default glibc returns large freed buffers to the system.
Every step then causes page faults for its temporaries.
"""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

from experiments.files import cache_dir

ALLOCATORS = ("tuned", "stock")
TUNED: Mapping[str, int] = {
    "MALLOC_MMAP_MAX_": 0,
    "MALLOC_TRIM_THRESHOLD_": 2**31 - 1,
    "MALLOC_TOP_PAD_": 2**28,
    "MALLOC_ARENA_MAX": 1,  # only the main arena can exceed 64 MiB, and XLA's threads would use others
}
"""Environment variables with which glibc keeps freed memory."""

# The constants of mallopt(3).
_PARAMETERS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_MAX_": -4, "MALLOC_ARENA_MAX": -8}


def environment(allocator: str) -> dict[str, str]:
    """Return the environment variables of one of `ALLOCATORS`, for processes to be started."""
    return {name: str(number) for name, number in TUNED.items()} if allocator == "tuned" else {}


def keep_freed_memory() -> bool:
    """Apply `TUNED` to this process, before jax is imported; return whether glibc is present and accepted it."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):  # another system, another C library
        return False
    accepted = [mallopt(_PARAMETERS[name], number) == 1 for name, number in TUNED.items()]
    return all(accepted)


def keep_compiled_programs() -> Path:
    """Enable jax's persistent compilation cache, so that later processes reuse compiled programs; return its folder.

    It is $JAX_COMPILATION_CACHE_DIR if set, else a folder in the cache for jaxcnn.
    """
    import jax

    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_dir("compiled"))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
