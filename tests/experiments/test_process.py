"""Process-wide settings, observed in separate processes."""

import os
import platform
import subprocess
import sys

import pytest

from experiments import process

HELD = """
import ctypes
from experiments import process

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p

def taken_and_freed():
    held = libc.malloc(1 << 26)
    by_mmap = libc.mallinfo2().hblks
    libc.free(ctypes.c_void_p(held))
    return by_mmap, libc.mallinfo2().keepcost >= 1 << 26

print(*taken_and_freed(), process.keep_freed_memory(), *taken_and_freed())
"""


def run(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment or None
    )
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is nothing to set")
def test_freed_memory_is_kept():
    by_mmap, kept, took, by_mmap_after, kept_after = run(HELD)
    assert (int(by_mmap) >= 1, kept) == (True, "False")
    assert (took, int(by_mmap_after), kept_after) == ("True", int(by_mmap) - 1, "True")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.undo()

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(process.ctypes, "CDLL", missing)
    assert process.keep_freed_memory() is False


COMPILED = """
from experiments import process
folder = process.keep_compiled_programs()
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1.0)
print(folder, len(list(folder.iterdir())) > 0)
"""


@pytest.mark.slow("starts processes")
def test_compiled_programs_are_kept(tmp_path, monkeypatch):
    assert run(COMPILED, **os.environ | {"JAXCNN_CACHE": str(tmp_path)}) == [str(tmp_path / "compiled"), "True"]
    own = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"), "JAXCNN_CACHE": str(tmp_path)}
    assert run(COMPILED, **own) == [str(tmp_path / "own"), "True"]
