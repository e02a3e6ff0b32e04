"""Build the library: python -m jaxcnn.native build."""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax

from jaxcnn.native import library

SOURCE = Path(__file__).with_name("convolution.cc")
#: Packages of the extra "onednn", with the file that each provides.
PACKAGES = {"onednn-devel-cpu-gomp": "dnnl.hpp", "onednn-cpu-gomp": "libdnnl.so"}
COMPILERS = ("c++", "g++", "clang++")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxcnn.native", description="Convolutions in oneDNN (x86 CPUs).")
    parser.add_argument("command", choices=("build", "status"), help="compile the library, or tell whether it is used")
    if parser.parse_args(argv).command == "build":
        missing = build()
        if missing:
            print(f"jaxcnn.native: not built, {missing}; jaxcnn uses its kernels in JAX", file=sys.stderr)
            return 1
    print(f"jaxcnn.native: {'in use' if library.is_enabled() else 'not in use'}, {library.library_path()}")
    return 0


def build() -> str | None:
    """Compile the library for this environment. Return what is missing, or None."""
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))), None)
    if compiler is None:
        return "no C++ compiler"
    folders = [_folder_of(package, name) for package, name in PACKAGES.items()]
    if None in folders:
        return 'oneDNN is not installed (pip install "jaxcnn[onednn]")'
    include, lib = folders
    path = library.library_path()
    partial = path.with_suffix(f".{os.getpid()}")  # a second process never loads a partial file
    command = [
        compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-fopenmp",
        f"-I{include}", "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(partial),
        f"-L{lib}", "-ldnnl", f"-Wl,-rpath,{lib}",
    ]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            print(result.stderr, file=sys.stderr)
            return f"{Path(compiler).name} failed"
        partial.replace(path)
        for other in library.of_other_sources():
            other.unlink()
    finally:
        partial.unlink(missing_ok=True)
    return None


def _folder_of(package: str, name: str) -> Path | None:
    """Return the folder of a file that an installed package provides."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).resolve().parent for file in files if file.name == name), None)


if __name__ == "__main__":
    sys.exit(main())
