import dataclasses
import sys
from pathlib import Path

import pytest

from experiments import cli
from experiments.errors import DataError, UsageError


@dataclasses.dataclass(frozen=True)
class Options:
    """What the test script does."""

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
        (["--count"], "script: --count: expected a whole number, got nothing"),
        (["--count", "x"], "script: --count: expected a whole number, got 'x'"),
        (["--count", "1.5"], "script: --count: expected a whole number, got '1.5'"),
        (["--learning-rate", "fast"], "script: --learning-rate: expected a number, got 'fast'"),
        (["--name"], "script: --name: expected a value, got nothing"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])  # tyro's box wraps its text
@pytest.mark.parametrize(("encoding", "terminal"), [("utf-8", True), ("utf-8", False), ("ascii", False)])
def test_a_wrong_command_line_is_one_line_and_status_2(
    argv, expected, columns, encoding, terminal, capsys, monkeypatch
):
    # The looks of tyro's box depend on these: its width, its lines, its colours.
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
        (UsageError("--a: expected b"), 2, "script: --a: expected b\n"),
        (DataError("file: expected\n  this"), 1, "script: file: expected this\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "script: [Errno 13] Permission denied: '/x'\n"),
        (KeyboardInterrupt(), 130, "script: interrupted\n"),
    ],
)
def test_errors_become_one_line_and_a_status(error, status, line, capsys):
    def body(options):
        raise error

    assert run([], body) == status
    assert capsys.readouterr().err == line


def test_a_programming_error_keeps_its_traceback():
    def body(options):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([], body)


def test_the_status_is_what_the_body_returns(capsys):
    assert run([], lambda options: 7) == 7
    assert capsys.readouterr().err == ""


def test_help_tells_every_option_and_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        run(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--name", "--count", "--learning-rate", "--out", "--quick"):
        assert flag in text


def test_did_you_mean():
    assert cli.did_you_mean("lectur", ["lecture", "mlp"]) == "; did you mean lecture?"
    assert cli.did_you_mean("qqq", ["lecture", "mlp"]) == ""
