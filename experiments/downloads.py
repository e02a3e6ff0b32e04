"""Downloads into the cache; a file is kept only if it is the expected one."""

from collections.abc import Callable
from pathlib import Path

from experiments.errors import DataError, bad_value
from experiments.files import cache_dir, replacing

Verify = Callable[[Path, str], None]
"""(path, name in messages) → None; raises DataError for another file than the expected one."""


def cache_folder(kind: str) -> Path:
    """Return the cache folder for one kind of file, and create it; raise DataError if that is not possible."""
    folder = cache_dir(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_value(DataError, folder, "a folder for downloads", error.strerror) from None
    return folder


def download(url: str, path: Path, verify: Verify) -> None:
    """Download `url` to `path`, which is created only if `verify` accepts the file.

    Raises:
        DataError: The download failed, or its bytes are not the expected ones.
    """
    import pooch

    with replacing(path) as temporary:
        try:
            pooch.HTTPDownloader(timeout=30)(url, str(temporary), None)
        except OSError as error:  # an exception of requests is an OSError, and may hold an open connection
            if error.errno is not None:  # an error of the file, not of the network; `replacing` names it
                raise
            if (response := getattr(error, "response", None)) is not None:
                response.close()
            raise DataError(
                f"{url}: download failed ({error}); pass the folder of the files as --data-dir, "
                "or use --data fashion-mnist-sample, which is part of the repository"
            ) from None
        verify(temporary, url)
