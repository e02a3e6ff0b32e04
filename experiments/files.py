"""Files appear whole or not at all; what may be kept lies in one cache."""

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
    """Yield a temporary name beside `path`, which becomes `path` if the block ends well and vanishes if not.

    Beside, not in /tmp: a rename is atomic only within one file system. A reader (or a second writer) sees the old
    file or the new one, never a part of either. An OSError in the block, such as that of a full disk, becomes a
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
    """Yield a temporary name, as `replacing` does, for a file that takes the place of no other.

    It becomes `path`, or path-2, path-3, … where another process was faster, which is then printed.
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
    """Return the folder of what is kept of a kind: in $JAXCNN_CACHE, else in the system's cache for jaxcnn."""
    import pooch

    return Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("jaxcnn")) / kind
