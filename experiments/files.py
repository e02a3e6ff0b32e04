"""Atomic writing of files, and the location of the cache."""

import itertools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.errors import WriteError, bad_value

CACHE_VARIABLE = "JAXCNN_CACHE"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it is renamed to `path` if the block succeeds, else deleted.

    The folder is the same because a rename is atomic only within one file system. A reader, or a second writer, sees
    the old file or the new one, never a part of either.

    Raises:
        WriteError: An OSError occurred in the block, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        exists = path.exists() and path.stat().st_size
        hint = "the previous file is unchanged" if exists else "no part of it was written"
        raise bad_value(WriteError, path, "writable", error.strerror or error, hint) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def creating(path: Path) -> Iterator[Path]:
    """Yield a temporary path, as `replacing` does, for a file that does not overwrite another.

    The file becomes `path`, or path-2, path-3, … if that name exists. A changed name is printed.
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
        print(f"{path} was created by another run; writing {free}")
    try:
        with replacing(free) as temporary:
            yield temporary
    except BaseException:
        free.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir(kind: str) -> Path:
    """Return the cache folder for one kind of file: in $JAXCNN_CACHE, else in the system's cache for jaxcnn."""
    import pooch

    return Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("jaxcnn")) / kind
