"""Errors that the user can fix: one line, and an exit status."""

import errno
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TypeVar

EXTRAS: Mapping[str, str] = {
    **dict.fromkeys(
        ("filelock", "matplotlib", "orbax-checkpoint", "pillow", "pooch", "rich", "safetensors", "tyro"), "experiments"
    ),
    **dict.fromkeys(("equinox", "flax", "keras", "torch"), "bench"),
    "dp-accounting": "private",
    "haiku": "zoo",
    "tensorboardX": "tensorboard",
    "grain": "grain",
    **dict.fromkeys(("flatbuffers", "onnx", "onnxruntime", "onnxscript"), "export"),
}
"""The packages that scripts need beyond the library's own, and the extra of jaxcnn that installs each."""
MODULES: Mapping[str, str] = {"dp-accounting": "dp_accounting", "orbax-checkpoint": "orbax.checkpoint", "pillow": "PIL"}
"""The modules of packages that are imported by another name."""


class ExperimentError(ValueError):
    """An error reported in one line: the file or option that is wrong, what it must be, and what was given.

    `status` is the exit status of the process: 1 for an error at run time, 2 for a wrong command line.
    """

    status = 1


class UsageError(ExperimentError):
    """The command line is invalid: unknown name, number out of range, conflicting options."""

    status = 2


class DataError(ExperimentError):
    """A data file is missing, truncated, corrupt, of the wrong kind or not the expected one."""


class CheckpointError(ExperimentError):
    """A weights file is missing, corrupt or not the weights of this net."""


class RunError(ExperimentError):
    """The run cannot start or continue: no folder for its results, wrong gradients, or a loss that is not finite."""


class WriteError(RunError):
    """A file cannot be written; the message names it and describes what is left in its place."""


Error = TypeVar("Error", bound=ExperimentError)


def bad_value(kind: type[Error], name: object, expected: str, got: object, hint: str = "") -> Error:
    """Return an error with the message "name: must be <expected>, got <got>; <hint>".

    Args:
        kind: The class of the error.
        name: The option with its dashes, the path of a file, or another name of the value.
        expected: Completes "must be".
        got: The given value, or a text that describes it.
        hint: What to do instead; "" for none.
    """
    return kind(_message(name, expected, got, hint))


def _message(name: object, expected: str, got: object, hint: str = "") -> str:
    return f"{name}: must be {expected}, got {got}" + (f"; {hint}" if hint else "")


def explain(error: BaseException) -> str | None:
    """Return a description of the error in one line, or None for a programming error, whose traceback is needed.

    Args:
        error: An exception that a script did not handle.
    """
    if isinstance(error, ExperimentError):
        return _joined(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ModuleNotFoundError):
        top = (error.name or "").partition(".")[0]
        package = next((name for name, module in MODULES.items() if module.partition(".")[0] == top), top)
        return _missing([package]) if package in EXTRAS else None
    if isinstance(error, OSError):
        # Files are named where they are opened and written. Only printing can fill a disk without a file name.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        if error.filename is None and full:
            return _message("standard output", "writable", error.strerror)
        return _joined(error)
    if isinstance(error, RuntimeError | AssertionError) and _platform_is_missing():
        return _no_platform(error)
    return None


def check_packages(extra: str = "experiments") -> None:
    """Raise UsageError if packages of an extra are missing, so that a script ends before its work and not after it.

    Args:
        extra: One of the values of EXTRAS.
    """
    check_installed(*(package for package, of in EXTRAS.items() if of == extra))


def check_installed(*packages: str) -> None:
    """Raise UsageError if some of the packages, which are in EXTRAS, are missing."""
    missing = [package for package in packages if not is_installed(package)]
    if missing:
        raise UsageError(_missing(missing))


def is_installed(package: str) -> bool:
    """Whether a package, or the module of a dotted name, can be imported."""
    try:
        return importlib.util.find_spec(MODULES.get(package, package)) is not None
    except (ValueError, ModuleNotFoundError):  # sys.modules marks the package as absent; there is no parent package
        return False


def _missing(packages: Sequence[str]) -> str:
    noun, verb = ("package", "is") if len(packages) == 1 else ("packages", "are")
    names = ", ".join(packages)
    return f"needs the {noun} {names}, which {verb} not installed: pip install 'jaxcnn[{EXTRAS[packages[0]]}]'"


def _joined(error: BaseException) -> str:
    return " ".join(str(error).split())


def _platform_is_missing() -> bool:
    """Whether jax was imported and cannot initialize the requested platforms.

    It is initialized again here, because jax removes its own frames from tracebacks, and its message is not part of its
    interface.
    """
    if "jax" not in sys.modules:
        return False
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        return True
    return False


def _no_platform(error: BaseException) -> str:
    """Return a message with the missing platform, the available ones, and how to choose."""
    import jax

    requested = jax.config.values["jax_platforms"]
    if not requested:
        return f"jax: no device was found ({_joined(error) or 'no message'})"
    try:
        jax.config.update("jax_platforms", "")
        available = sorted({"cpu", *(device.platform for device in jax.devices())})
    except (RuntimeError, AssertionError):
        available = ["cpu"]
    finally:
        jax.config.update("jax_platforms", requested)
    return _message(
        "JAX_PLATFORMS",
        f"a platform of this machine and this jaxlib ({', '.join(available)})",
        requested,
        f"set JAX_PLATFORMS={available[-1]}, or unset it and jax chooses",
    )


def one_line_for_scripts() -> None:
    """In a process started as `python -m experiments.…`, print errors that `explain` recognizes as one line only.

    `cli.run` does that for errors while a script runs. This hook is for earlier ones: a package that is missing while
    the script's modules are imported, or Ctrl-C.
    """
    command = sys.orig_argv
    module = command[command.index("-m") + 1] if "-m" in command[:-1] else "experiments"

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        line = explain(error)
        if line is None:
            sys.__excepthook__(kind, error, traceback)
        else:
            print(f"python -m {module}: {line}", file=sys.stderr)

    sys.excepthook = hook
