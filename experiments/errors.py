"""Errors that the reader of the terminal can mend: one line, and an exit status."""

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
    """A mistake told in one line: what (file or argument), what was expected, what was got.

    `status` is what the process exits with: 1 while running, 2 for a wrong command line.
    """

    status = 1


class UsageError(ExperimentError):
    """The command line cannot mean anything: unknown name, number out of range, options that clash."""

    status = 2


class DataError(ExperimentError):
    """A data file is missing, truncated, corrupt, of the wrong kind or not what was promised."""


class CheckpointError(ExperimentError):
    """A weights file is missing, corrupt or not the weights of this net."""


class RunError(ExperimentError):
    """The run itself cannot start or go on: no place for its results, gradients that differ, a loss not finite."""


class WriteError(RunError):
    """A file cannot be written; the message names it, and says what is left in its place."""


def explain(error: BaseException) -> str | None:
    """Return what happened in one line, or None for a programming error, whose traceback is needed.

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
        # Files are named where they are opened and written; only printing fills a disk without a name.
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
    except ValueError:  # sys.modules says that there is none
        return False


def _missing(packages: Sequence[str]) -> str:
    what = f"package {packages[0]}, which is" if len(packages) == 1 else f"packages {', '.join(packages)}, which are"
    return f"needs the {what} not installed: pip install 'jaxcnn[{EXTRAS[packages[0]]}]'"


def _joined(error: BaseException) -> str:
    return " ".join(str(error).split())


def _platform_is_missing() -> bool:
    """Whether jax, if it was imported, cannot start the platforms that it was asked for.

    Tried again, because jax removes its own frames from tracebacks, and its message is not part of its interface.
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
    """Return which platform is missing, which ones there are, and how to choose."""
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
    """In a process started as `python -m experiments.…`, end on an error that `explain` knows with its line alone.

    `cli.run` does that for what happens while a script runs. This is for what happens before: a package that is
    missing while the script's modules are imported, or Ctrl-C.
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
