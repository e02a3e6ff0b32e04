"""The command line of a script: parses a frozen dataclass and reports errors in one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

import tyro

from experiments.errors import ExperimentError, UsageError, bad_value, check_packages, explain

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as in shells."""

MIN_SIMILARITY = 0.6
"""Smallest similarity of a name that is suggested."""

Config = TypeVar("Config")


def run(
    config_type: type[Config],
    body: Callable[[Config], int],
    argv: Sequence[str] | None,
    *,
    prog: str,
    defaults: Callable[[Config], Config | None] | None = None,
) -> int:
    """Parse `argv` into `config_type`, call `body` with it, and return the exit status.

    An error that the user can fix is printed as one line on stderr, and the status is 1 or 2. A programming error keeps
    its traceback. `--help` raises SystemExit(0), as in argparse.

    Args:
        config_type: The frozen dataclass whose fields are the options.
        body: The script.
        argv: The command line; None means the process's own.
        prog: The name of the program in messages.
        defaults: Returns the options that apply where the command line has none, for the options that were parsed, or
            None for those of `config_type`.
    """
    try:
        config = parse(config_type, argv, prog=prog)
        check_packages()
        if defaults is not None and (default := defaults(config)) is not None:
            config = parse(config_type, argv, prog=prog, default=default)
        status = body(config)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of the output has closed the pipe, as `head` does. This is not an error.
        _drop_output()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        line = explain(error)
        if line is None:
            raise
        if isinstance(error, OSError) and error.filename is None:
            _drop_output()
        print(f"{prog}: {line}", file=sys.stderr)
        if isinstance(error, ExperimentError):
            return error.status
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _drop_output() -> None:
    """Discard the interpreter's final flush of stdout, which would fail again."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(config_type: type[Config], argv: Sequence[str] | None, *, prog: str, default: Config | None = None) -> Config:
    """Parse `argv` into a `config_type`; raise UsageError, in one line, where tyro would draw a box and exit."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            if default is not None:
                return tyro.cli(config_type, prog=prog, args=argv, default=default)
            return tyro.cli(config_type, prog=prog, args=argv)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UsageError(_one_line(box.getvalue(), _options(config_type))) from None


def did_you_mean(got: str, names: Iterable[str]) -> str:
    """Return "did you mean X?" for the name most similar to `got`, or "" if none is similar.

    Args:
        got: The name that was given.
        names: The valid names. Leading dashes are not compared, so that options are compared by their words.
    """
    names = list(names)
    nearest = max(names, key=lambda name: _similarity(got, name), default="")
    return f"did you mean {nearest}?" if nearest and _similarity(got, nearest) >= MIN_SIMILARITY else ""


def _similarity(got: str, name: str) -> float:
    """Return the similarity of two names, from 0 to 1; initials, prefixes and whole words count more than letters."""
    one, two = (text.lstrip("-").replace("_", "-").lower() for text in (got, name))
    words = [word for word in re.split(r"[- ]", two) if word]
    ratio = difflib.SequenceMatcher(None, one, two).ratio()
    if len(one) > 1 and one == "".join(word[0] for word in words):
        return 0.9 + ratio / 10
    if len(one) > 1 and (two.startswith(one) or one in words or (len(two) > 2 and one.startswith(two))):
        return 0.8 + ratio / 10
    return min(ratio, 0.95)


def check_choice(flag: str, got: str, known: Iterable[str]) -> None:
    """Raise UsageError unless `got` is one of the names that a flag accepts."""
    known = list(known)
    if got not in known:
        raise bad_value(UsageError, flag, f"one of {', '.join(known)}", repr(got), did_you_mean(got, known))


def check_count(flag: str, number: int | None) -> None:
    """Raise UsageError for a number below 1; None is a flag that was not given."""
    if number is not None and number < 1:
        raise bad_value(UsageError, flag, "at least 1", number)


def _options(config_type: type) -> dict[str, str]:
    """Return {"--learning-rate": "a number", …}: the flags of a dataclass and the kind of value that each takes."""
    expected = {int: "an integer", float: "a number", Path: "a path", str: "text"}
    hints = get_type_hints(config_type)
    options = {}
    for field in dataclasses.fields(config_type):
        kinds = {hints[field.name], *get_args(hints[field.name])}
        options["--" + field.name.replace("_", "-")] = next((expected[k] for k in expected if k in kinds), "a value")
    return options


def _one_line(box: str, options: Mapping[str, str]) -> str:
    """Return the first paragraph of tyro's message, which is drawn as a box, in the form of our other errors."""
    words: list[str] = []
    for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]:  # without colors and title
        text = line.strip("│╰─╯ ")
        if text.strip("-"):
            words += text.split()
        elif words:  # a separator after text: help and suggestions follow
            break
    text = " ".join(words)
    # The wording of tyro's messages is not part of its interface: unrecognized text is passed on unchanged.
    if match := re.fullmatch(r"Unrecognized options: (.*)", text):
        unknown = match[1].split(", ")[0].split("=")[0]
        hint = did_you_mean(unknown, options) if unknown.startswith("-") else ""
        return f"unknown option {match[1]}" + (f"; {hint}" if hint else "")
    if match := re.fullmatch(r"Missing value for argument '(--[\w-]+)'.*", text):
        return str(bad_value(UsageError, match[1], options[match[1]], "nothing"))
    if match := re.fullmatch(r"Error parsing (--[\w-]+): .*('.*')\]?\.?", text):
        return str(bad_value(UsageError, match[1], options[match[1]], match[2]))
    return text or "cannot read the command line"
