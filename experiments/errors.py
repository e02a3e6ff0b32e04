"""Errors that the user can fix: one line, and an exit status."""

import errno
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType

EXTRAS: Mapping[str, str] = {
    **dict.fromkeys(("matplotlib", "pooch", "rich", "safetensors", "tyro"), "experiments"),
    **dict.fromkeys(("equinox", "flax", "keras", "torch"), "bench"),
}
"""The packages that scripts need beyond the library's own, and the extra of jaxcnn that installs each."""


class ExperimentError(ValueError):
    """An error reported in one line: what is wrong (file or argument), what was expected, and what was given.

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
    """The run cannot start or continue: no place for its results, gradients that differ, a loss that is not finite."""


class WriteError(RunError):
    """A file cannot be written; the message names it and describes what is left in its place."""


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
        package = (error.name or "").partition(".")[0]
        return _missing([package]) if package in EXTRAS else None
    if isinstance(error, OSError):
        # Files are named where they are opened and written. Only printing can fill a disk without a file name.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        if error.filename is None and full:
            return f"standard output: must be writable, got {error.strerror}"
        return _joined(error)
    if isinstance(error, RuntimeError | AssertionError) and _platform_is_missing():
        return _no_platform(error)
    return None


def check_packages(extra: str = "experiments") -> None:
    """Raise UsageError if packages of an extra are missing, so that a script ends before its work and not after it.

    Args:
        extra: One of the values of EXTRAS.
    """
    missing = [package for package, of in EXTRAS.items() if of == extra and not _is_installed(package)]
    if missing:
        raise UsageError(_missing(missing))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules marks the package as absent
        return False


def _missing(packages: Sequence[str]) -> str:
    what = f"package {packages[0]}, which is" if len(packages) == 1 else f"packages {', '.join(packages)}, which are"
    return f"needs the {what} not installed: pip install 'jaxcnn[{EXTRAS[packages[0]]}]'"


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

    asked = jax.config.values["jax_platforms"]
    if not asked:
        return f"jax: must find a device, got {_joined(error) or 'none'}"
    try:
        jax.config.update("jax_platforms", "")
        here = sorted({"cpu", *(device.platform for device in jax.devices())})
    except (RuntimeError, AssertionError):
        here = ["cpu"]
    finally:
        jax.config.update("jax_platforms", asked)
    return (
        f"JAX_PLATFORMS={asked}: must name a platform that this machine and this jaxlib have ({', '.join(here)}), "
        f"got {asked}; set JAX_PLATFORMS={here[-1]}, or unset it and jax chooses"
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
