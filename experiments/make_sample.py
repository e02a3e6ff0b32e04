"""Write the embedded sample from the full Fashion-MNIST, or check that it equals the output of this script.

    python -m experiments.make_sample            check the files; the exit status is 1 if they differ
    python -m experiments.make_sample --write    write the files

The source is the idx.gz files in experiments.idx_files.SYSTEM_DIR (Debian: dataset-fashion-mnist). The compressed bytes
depend on the version of zlib, so the check compares the decompressed contents.
"""

import argparse
import gzip
import sys
from pathlib import Path

from experiments.files import replacing
from experiments.idx_files import FASHION_MNIST_FILES, SAMPLE_DIR, SYSTEM_DIR, IdxFile, Part, idx_bytes, read_idx

SIZES: dict[Part, int] = {"train_images": 10_000, "train_labels": 10_000, "test_images": 2_000, "test_labels": 2_000}


def first(file: IdxFile, count: int) -> bytes:
    """Return the first `count` items of `file` of the full set, as an idx file."""
    array = read_idx(SYSTEM_DIR / f"{file.name}.gz", file.kind)[:count]
    return idx_bytes(array)


def same(path: Path, content: bytes) -> bool:
    """Whether the gzip file `path` holds exactly `content`."""
    return path.exists() and gzip.decompress(path.read_bytes()) == content


def main() -> int:
    """Write or check the four files; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.make_sample", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the files instead of checking them")
    write = parser.parse_args().write
    differ = False
    for part, count in SIZES.items():
        file = FASHION_MNIST_FILES[part]
        path, content = SAMPLE_DIR / f"{file.name}.gz", first(file, count)
        if write:
            with replacing(path) as temporary:
                temporary.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
        equal = same(path, content)
        differ |= not equal
        print(f"{path.name}: {count} items, {'equal to' if equal else 'DIFFERENT from'} those in {SYSTEM_DIR}")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
