"""Files appear whole or not at all; what may be kept lies in one cache."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_VARIABLE = "JAXCNN_CACHE"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which becomes `path` if the block ends well and vanishes if not.

    Beside, not in /tmp: a rename is atomic only within one file system. A reader (or a second writer) sees the old
    file or the new one, never a part of either.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_dir(kind: str) -> Path:
    """Return the folder of what is kept of a kind: in $JAXCNN_CACHE, else in the system's cache for jaxcnn."""
    import pooch

    return Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("jaxcnn")) / kind
