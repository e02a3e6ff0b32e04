"""The optional library of `jaxcnn.native`: how it is built, found and turned off.

`tests/kernels/test_lowerings.py` tests its results.
"""

from importlib import metadata

import numpy as np
import pytest

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import onednn
from jaxcnn.native import __main__ as command
from jaxcnn.native import library

C = Correlation(Window((32, 32), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), 1, np.dtype(np.float32))


def chosen(cpu="xla", image=(8, 32, 32, 16), dtype=np.float32):
    return onednn.choose_native("correlate", cpu, C, image, 32, np.dtype(dtype))


def test_build_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert command.main(["build"]) == 1
    expected = "jaxcnn.native: not built, no C++ compiler; jaxcnn uses its kernels in JAX\n"
    assert capsys.readouterr() == ("", expected)


def test_build_without_onednn(monkeypatch, tmp_path, capsys):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr(command.shutil, "which", lambda name: name)
    assert command.main(["build"]) == 1
    _, message = capsys.readouterr()
    assert message.startswith('jaxcnn.native: not built, oneDNN is not installed (pip install "jaxcnn[onednn]");')


def test_a_failed_build_leaves_no_file(monkeypatch, tmp_path, capsys):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho broken >&2; exit 1")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(command, "_folder_of", lambda package, name: tmp_path)
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "library.so")
    assert command.main(["build"]) == 1
    expected = "broken\n\njaxcnn.native: not built, c++ failed; jaxcnn uses its kernels in JAX\n"
    assert capsys.readouterr().err == expected
    assert list(tmp_path.iterdir()) == [compiler]


def test_without_a_library_nothing_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "library.so")
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    monkeypatch.setenv(library.OPTION, "1")
    assert library.load() is None
    assert chosen() is None


def test_a_library_that_cannot_be_loaded_is_reported(monkeypatch, tmp_path):
    path = tmp_path / "library.so"
    path.write_text("not a library")
    monkeypatch.setattr(library, "library_path", lambda: path)
    with pytest.warns(UserWarning, match=r"^jaxcnn\.native: the library was built but cannot be loaded: "):
        assert library.load.__wrapped__() is None


@pytest.mark.skipif(library.load() is None, reason="needs `python -m jaxcnn.native build`")
def test_when_it_is_chosen(monkeypatch):
    monkeypatch.setenv(library.OPTION, "1")
    assert chosen() == chosen(dtype=np.float16) == "onednn"
    assert chosen(dtype=np.float64) is None
    assert chosen("winograd") is None
    monkeypatch.setenv(library.OPTION, "0")
    assert chosen() is None
