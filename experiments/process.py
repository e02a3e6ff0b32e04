"""What a script may set for its own process, before it imports jax: memory that stays, programs that are kept.

XLA's CPU client asks for its buffers anew at each call, and glibc by default gives large ones back to the system when
they are freed: every step then faults its temporaries in again, page by page.
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
    "MALLOC_ARENA_MAX": 1,  # the only one that grows beyond 64 MiB; XLA's own threads would have others
}
"""glibc's environment variables with which it keeps what is freed, for processes that are still to start."""

# What mallopt(3) calls them.
_PARAMETERS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_MAX_": -4, "MALLOC_ARENA_MAX": -8}


def keep_freed_memory() -> bool:
    """Set `TUNED` in this process; return whether glibc is there and took it. Best before jax is imported."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):  # another system, another C library
        return False
    took = [mallopt(_PARAMETERS[name], number) == 1 for name, number in TUNED.items()]
    return all(took)


def keep_compiled_programs() -> Path:
    """Keep what jax compiles, for the next process that runs the same program; return in which folder.

    That is $JAX_COMPILATION_CACHE_DIR if it is set, else one in the cache for jaxcnn.
    """
    import jax

    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_dir("compiled"))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
