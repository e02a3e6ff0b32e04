"""Atomic writing of files, and the location of the cache."""

import itertools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.errors import WriteError

CACHE_VARIABLE = "JAXCNN_CACHE"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the folder of `path`; it is renamed to `path` if the block succeeds, else deleted.

    The folder is the same because a rename is atomic only within one file system. A reader (or a second writer) sees
    the old file or the new one, never a part of either. An OSError in the block, such as that of a full disk, becomes a
    WriteError that names `path`.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        left = (
            "the file that was there before is kept"
            if path.exists() and path.stat().st_size
            else "no part of it is left"
        )
        raise WriteError(f"{path}: must be writable, got {error.strerror or error}; {left}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def creating(path: Path) -> Iterator[Path]:
    """Yield a temporary name, as `replacing` does, for a file that does not overwrite another.

    It becomes `path`, or path-2, path-3, … if another process has created that name first; the new name is then
    printed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free = path
    for number in itertools.count(2):
        try:
            free.open("x").close()
            break
        except FileExistsError:
            free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    if free != path:
        print(f"{path} is another run's by now: {free}")
    try:
        with replacing(free) as temporary:
            yield temporary
    except BaseException:
        free.unlink(missing_ok=True)
        raise


def cache_dir(kind: str) -> Path:
    """Return the cache folder of one kind of file: in $JAXCNN_CACHE, else in the system's cache for jaxcnn."""
    import pooch

    return Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("jaxcnn")) / kind
