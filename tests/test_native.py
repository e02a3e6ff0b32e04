"""The optional library of `jaxcnn.native`: how it is built, found and turned off.

`tests/kernels/test_lowerings.py` tests its results.
"""

import functools
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import onednn
from jaxcnn.kernels.correlate import correlate
from jaxcnn.native import __main__ as command
from jaxcnn.native import library
from tests import oracles

ROOT = Path(__file__).parents[1]
C = Correlation(Window((32, 32), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), 1, np.dtype(np.float32))

needs_library = pytest.mark.skipif(library.load() is None, reason="needs `python -m jaxcnn.native build`")


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


@pytest.mark.parametrize(
    ("cpu", "ratio", "expected"),
    [("xla", 0.9, "onednn"), ("xla", 1.1, None), ("unrolled", 1.1, "onednn"), ("unrolled", 1.4, None)],
)
def test_a_sum_with_written_out_terms_must_be_faster_than_a_call(monkeypatch, cpu, ratio, expected):
    monkeypatch.setattr(library, "is_enabled", lambda: True)
    monkeypatch.setattr(onednn, "cost", lambda p, lowering: 100.0)
    monkeypatch.setattr(onednn, "native_cost", lambda p: 100.0 * ratio)
    assert chosen(cpu) == expected


def test_a_library_that_cannot_be_loaded_is_reported(monkeypatch, tmp_path):
    path = tmp_path / "library.so"
    path.write_text("not a library")
    monkeypatch.setattr(library, "library_path", lambda: path)
    with pytest.warns(UserWarning, match=r"^jaxcnn\.native: the library was built but cannot be loaded: "):
        assert library.load.__wrapped__() is None


def test_a_library_of_other_sources_is_not_loaded_and_the_next_build_deletes_it(monkeypatch, tmp_path):
    path = tmp_path / library.library_path().name
    old, of_other_jaxlib = tmp_path / f"convolution-0-{library.SUFFIX}", tmp_path / "convolution-0-jaxlib-0.9.so"
    monkeypatch.setattr(library, "library_path", lambda: path)
    of_other_jaxlib.touch()
    assert library.load.__wrapped__() is None  # no warning: each version of jaxlib may have its own
    old.touch()
    message = rf"^jaxcnn\.native: {old.name} belongs to another version of jaxcnn .*python -m jaxcnn\.native build$"
    with pytest.warns(UserWarning, match=message):
        assert library.load.__wrapped__() is None

    def compile_it(arguments, **_):
        Path(arguments[arguments.index("-o") + 1]).touch()
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(command, "_folder_of", lambda package, name: tmp_path)
    monkeypatch.setattr(command.shutil, "which", lambda name: name)
    monkeypatch.setattr(command.subprocess, "run", compile_it)
    assert command.build() is None
    assert sorted(tmp_path.iterdir()) == sorted([path, of_other_jaxlib])


def test_the_name_of_the_library_changes_with_its_sources(monkeypatch, tmp_path):
    folder = Path(library.__file__).parent
    for source in (*folder.glob("*.cc"), *folder.glob("*.h")):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    name = library.library_path.__wrapped__().name
    assert name == library.library_path().name
    with open(tmp_path / "dense.h", "a") as file:
        file.write("\n")
    assert library.library_path.__wrapped__().name != name


@needs_library
def test_when_it_is_chosen(monkeypatch):
    monkeypatch.setenv(library.OPTION, "1")
    assert chosen() == chosen(dtype=np.float16) == "onednn"
    assert chosen(dtype=np.float64) is None
    assert chosen("winograd") is None
    monkeypatch.setenv(library.OPTION, "0")
    assert chosen() is None


def correlation(side, kernel, stride=1, padding=0, groups=1):
    win = Window((side, side + 3), (kernel, kernel), (stride, stride), ((padding, padding),) * 2, (1, 1))
    return Correlation(win, groups, np.dtype(np.float32))


#: Numbers of channels around those of one vector and of two, for AVX2 and for AVX-512: inputs, outputs, correlation.
KERNELS = [
    *((3, outputs, correlation(11, 3, padding=1)) for outputs in (1, 7, 8, 9, 16, 17, 24, 31, 32, 33, 40, 48, 65)),
    *((inputs, 16, correlation(9, 2, stride=2)) for inputs in (1, 5, 8, 13)),
    *((channels, channels, correlation(10, 5, 1, 2, channels)) for channels in (8, 9, 16, 31, 33, 64, 72, 85)),
]


def factors(inputs, outputs, c):
    rng = np.random.default_rng(inputs + 100 * outputs)
    return (
        rng.normal(size=(3, *shape, n)).astype(np.float32)
        for shape, n in ((c.window.shape, inputs), (c.window.out, outputs))
    )


def kernel_grads():
    """Return the name of the code of each kernel gradient, and the gradients."""
    names = [onednn.implementation("kernel_grad", c, (3, *c.window.shape, i), o) for i, o, c in KERNELS]
    return names, [np.asarray(onednn.kernel_grad(c, *factors(i, o, c))) for i, o, c in KERNELS]


def write(path):
    names, gradients = kernel_grads()
    np.savez(path, *gradients, names=np.array(names))


@needs_library
@pytest.mark.parametrize(("rows", "asks"), [(9, False), (10, True)])
def test_a_large_result_of_xla_has_large_pages(monkeypatch, rows, asks):
    """The kernel is copied into the program's memory once; results, also of `jax.vmap`, are those without the copy."""
    monkeypatch.setenv(library.OPTION, "1")
    monkeypatch.setattr(onednn, "choose_native", lambda *_: None)
    monkeypatch.setattr(onednn, "LARGE_RESULT", 4 * 10 * 11 * 3 * 5)
    c = Correlation(Window((rows, 11), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)), 1, np.dtype(np.float32))
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((3, rows, 11, 2), (1, 1, 2, 5)))
    lowered = jax.jit(functools.partial(correlate, c)).lower(x, w)
    assert lowered.as_text().count(f"@{library.COPY_TARGET}(") == asks
    assert library.TARGET not in lowered.as_text()
    expected = np.einsum("nhwi,io->nhwo", x, w[0, 0])
    np.testing.assert_allclose(lowered.compile()(x, w), expected, rtol=1e-5, atol=1e-5)
    each = jax.vmap(functools.partial(correlate, c), (None, 0))(x, np.stack([w, 2 * w]))
    np.testing.assert_allclose(each, np.stack([expected, 2 * expected]), rtol=1e-5, atol=1e-5)
    exported = jax.export.export(jax.jit(functools.partial(correlate, c)))(x, w)
    assert library.COPY_TARGET not in exported.mlir_module()


@needs_library
@pytest.mark.slow("starts a process")
def test_kernel_gradients_with_avx2_and_with_all_instructions(tmp_path):
    """A processor with AVX-512 tests both, since `ONEDNN_MAX_CPU_ISA` excludes the newer instructions."""
    path = tmp_path / "avx2.npz"
    code = f"from tests import test_native; test_native.write({str(path)!r})"
    variables = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", library.OPTION: "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=variables)
    names, gradients = kernel_grads()
    with np.load(path) as written:
        assert {name.partition(":")[2] for name in written["names"]} == {"avx2"}
        assert [name.partition(":")[0] for name in names] == [name.partition(":")[0] for name in written["names"]]
        for n, (inputs, outputs, c) in enumerate(KERNELS):
            x, y = (a.astype(np.float64) for a in factors(inputs, outputs, c))
            expected = oracles.kernel_grad(c, x, y)
            for gradient in (gradients[n], written[f"arr_{n}"]):
                np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
