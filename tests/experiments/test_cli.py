import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments import cli, errors, train
from experiments.errors import DataError, UsageError


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the test script."""

    name: str = "x"
    """A name."""
    count: int = 1
    """A number."""
    learning_rate: float | None = None
    """Another."""
    out: Path | None = None
    quick: bool = False


def run(argv, body=lambda options: 0):
    return cli.run(Options, body, argv, prog="script")


def test_options_arrive_with_their_types():
    argv = ["--name", "y", "--count", "3", "--learning-rate", "1e-2", "--out", "a/b", "--quick"]
    assert cli.parse(Options, argv, prog="script") == Options("y", 3, 0.01, Path("a/b"), True)
    assert cli.parse(Options, [], prog="script") == Options()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--cuont", "3"], "script: unknown option --cuont, 3; did you mean --count?"),
        (["--cuont=3"], "script: unknown option --cuont=3; did you mean --count?"),
        (["--zzz"], "script: unknown option --zzz"),
        (["stray"], "script: unknown option stray"),
        (["--count"], "script: --count: must be an integer, got nothing"),
        (["--count", "x"], "script: --count: must be an integer, got 'x'"),
        (["--count", "1.5"], "script: --count: must be an integer, got '1.5'"),
        (["--learning-rate", "fast"], "script: --learning-rate: must be a number, got 'fast'"),
        (["--name"], "script: --name: must be text, got nothing"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])  # tyro's box wraps its text
@pytest.mark.parametrize(("encoding", "terminal"), [("utf-8", True), ("utf-8", False), ("ascii", False)])
def test_a_wrong_command_line_is_one_line_and_status_2(
    argv, expected, columns, encoding, terminal, capsys, monkeypatch
):
    # These determine the width, lines and colors of tyro's box.
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(type(sys.stdout), "encoding", encoding, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert run(argv) == 2
    captured = capsys.readouterr()
    assert captured.err == expected + "\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("--a: must be b"), 2, "script: --a: must be b\n"),
        (DataError("file: must be\n  this"), 1, "script: file: must be this\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "script: [Errno 13] Permission denied: '/x'\n"),
        (
            OSError(28, "No space left on device"),
            1,
            "script: standard output: must be writable, got No space left on device\n",
        ),
        (
            ModuleNotFoundError("No module named 'rich'", name="rich.table"),
            1,
            "script: needs the package rich, which is not installed: pip install 'jaxcnn[experiments]'\n",
        ),
        (
            ModuleNotFoundError("No module named 'flax'", name="flax"),
            1,
            "script: needs the package flax, which is not installed: pip install 'jaxcnn[bench]'\n",
        ),
        (KeyboardInterrupt(), 130, "script: interrupted\n"),
    ],
)
def test_errors_become_one_line_and_a_status(error, status, line, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_drop_output", lambda: None)

    def body(options):
        raise error

    assert run([], body) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), RuntimeError("x"), AssertionError(), ModuleNotFoundError("y", name="yy")]
)
def test_a_programming_error_keeps_its_traceback(error):
    def body(options):
        raise error

    with pytest.raises(type(error)):
        run([], body)


def test_the_status_is_what_the_body_returns(capsys):
    assert run([], lambda options: 7) == 7
    assert capsys.readouterr().err == ""


def test_help_lists_every_option_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        run(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--name", "--count", "--learning-rate", "--out", "--quick"):
        assert flag in text


def test_did_you_mean():
    assert cli.did_you_mean("lectur", ["lecture", "mlp"]) == "did you mean lecture?"
    assert cli.did_you_mean("qqq", ["lecture", "mlp"]) == ""


@pytest.mark.parametrize(
    ("got", "nearest"),
    [
        ("--lr", "--learning-rate"),
        ("--learning_rate", "--learning-rate"),
        ("--rate", "--learning-rate"),
        ("--leraning-rate", "--learning-rate"),
        ("--bs", "--batch-size"),
        ("--batch", "--batch-size"),
        ("-batchsize", "--batch-size"),
        ("--steps", "--max-steps"),
        ("--epoch", "--epochs"),
        ("--num-epochs", "--epochs"),
        ("--opt", "--optimizer"),
        ("--seeed", "--seed"),
        ("--output", "--out"),
        ("--dataset", "--data"),
        ("--grads", "--check-grads"),
        # No name is similar, only the dashes match.
        ("--gpu", ""),
        ("--x", ""),
        ("--verbose", ""),
        ("--", ""),
    ],
)
def test_an_option_is_compared_without_its_dashes(got, nearest):
    options = cli._options(train.Config)
    assert cli.did_you_mean(got, options) == (f"did you mean {nearest}?" if nearest else "")


# ---- before a script runs: processes without a package or a platform

ROOT = Path(__file__).parents[2]
HIDDEN = """
import os, sys
for name in os.environ.get("HIDDEN", "").split():
    sys.modules[name] = None
"""


def process(tmp_path, module, *argv, **environment):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", **environment}
    command = [sys.executable, "-m", f"experiments.{module}", *map(str, argv)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize(
    ("module", "hidden", "what"),
    [
        ("train", "tyro", "package tyro, which is"),
        ("alignment", "matplotlib", "package matplotlib, which is"),
        ("deltas", "rich", "package rich, which is"),
        ("predict", "safetensors", "package safetensors, which is"),
        ("attributions", "pooch", "package pooch, which is"),
        ("lecture.s11_flip", "matplotlib", "package matplotlib, which is"),
        ("tutorial", "matplotlib", "package matplotlib, which is"),
        ("benchmarks.memory", "matplotlib pooch", "packages matplotlib, pooch, which are"),
    ],
)
def test_a_missing_package_is_reported_before_any_work(tmp_path, module, hidden, what):
    done = process(tmp_path, module, HIDDEN=hidden)
    assert done.stderr == (
        f"python -m experiments.{module}: needs the {what} not installed: pip install 'jaxcnn[experiments]'\n"
    )
    assert done.stdout == ""
    assert done.returncode in (1, 2)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py"] in ([], ["__pycache__"])


def test_the_packages_of_the_extras_are_listed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("experiments", "bench", "export", "tensorboard"):
        known = {package for package, of in errors.EXTRAS.items() if of == extra}
        assert known == {re.match(r"[\w-]+", requirement)[0] for requirement in extras[extra]}


@pytest.mark.slow("starts a process")
@pytest.mark.parametrize("module", ["train", "tutorial"])
def test_a_missing_platform_is_one_line(tmp_path, module):
    done = process(tmp_path, module, JAX_PLATFORMS="nosuch", MPLBACKEND="")
    assert done.returncode == 1
    assert done.stderr == (
        f"python -m experiments.{module}: JAX_PLATFORMS: must be a platform of this machine and this jaxlib (cpu), "
        "got nosuch; set JAX_PLATFORMS=cpu, or unset it and jax chooses\n"
    )
    assert not list(tmp_path.glob("runs/*-*"))


@pytest.mark.slow("starts processes")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_cannot_be_written_is_named(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "experiments.train", "--model", "mlp", "--out", str(tmp_path / "out")]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == (
        "python -m experiments.train: standard output: must be writable, got No space left on device\n"
    )
    assert not (tmp_path / "out").exists()
