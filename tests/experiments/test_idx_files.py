"""Fashion-MNIST and other idx files: the reader, the named sets, and the download."""

import errno
import functools
import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pooch
import pytest

from experiments import data, downloads, files, idx_files
from experiments.errors import DataError, WriteError
from experiments.make_sample import SIZES, first, same

needs_full_set = pytest.mark.skipif(
    not idx_files.holds_all(idx_files.SYSTEM_DIR), reason="no Fashion-MNIST on this system"
)

IMAGES = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
LABELS = np.array([0, 1, 2, 9, 4], np.uint8)


WRONG = functools.partial(idx_files.check_contents, "0" * 64)


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def write_set(folder: Path, *, pack: Callable[[bytes], bytes] = gzip.compress, suffix: str = ".gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in idx_files.FASHION_MNIST_FILES.values():
        array = IMAGES if file.kind == "images" else LABELS
        (folder / f"{file.name}{suffix}").write_bytes(pack(idx(array)))
    return folder


def message(caught: pytest.ExceptionInfo[DataError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- the embedded sample ----


def test_the_sample_is_ten_thousand_and_two_thousand_real_images():
    sample = data.load("fashion-mnist-sample")
    assert sample.train_images.shape == (10_000, 28, 28, 1)
    assert sample.test_images.shape == (2_000, 28, 28, 1)
    assert sample.image_shape == (28, 28, 1)
    assert sample.train_images.dtype == np.float32
    assert sample.train_labels.dtype == np.int32
    assert sample.train_images.min() == 0
    assert sample.train_images.max() == 1
    assert len(sample.class_names) == 10
    # All ten classes, about a tenth each.
    np.testing.assert_allclose(np.bincount(sample.train_labels) / 10_000, 0.1, atol=0.01)
    assert sample.sha256 == "0e03de1643cd" + sample.sha256[12:]


@needs_full_set
def test_the_sample_is_the_output_of_its_script():
    for part, count in SIZES.items():
        file = idx_files.FASHION_MNIST_FILES[part]
        path = idx_files.SAMPLE_DIR / f"{file.name}.gz"
        content = first(file, count)
        assert same(path, content)
        assert not same(path, content[:-1])


def test_the_license_is_next_to_the_sample():
    text = (idx_files.SAMPLE_DIR / "LICENSE").read_text()
    assert "MIT" in text
    assert "Copyright (c) 2017 Zalando SE" in text


@needs_full_set
def test_the_system_copy_has_the_hashes_of_the_downloads():
    for file in idx_files.FASHION_MNIST_FILES.values():
        path = idx_files.SYSTEM_DIR / f"{file.name}.gz"
        assert idx_files.sha256_inside(path, str(path)) == file.sha256


# ---- the idx reader ----


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(("array", "kind"), [(IMAGES, "images"), (LABELS, "labels")])
def test_reads_the_written_array(tmp_path, pack, array, kind):
    path = tmp_path / "file"
    path.write_bytes(pack(idx(array)))
    got = idx_files.read_idx(path, kind)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, array)


def _header(*sizes: int, magic: int = 0x803) -> bytes:
    return magic.to_bytes(4) + b"".join(size.to_bytes(4) for size in sizes)


GOOD = idx(IMAGES)
BAD_FILES = {
    "empty": (b"", r"must be idx images with magic 0x00000803, got nothing"),
    "not idx": (b"<html>", r"with magic 0x00000803, got 0x3c68746d"),
    "labels as images": (idx(LABELS), r"must be idx images with magic 0x00000803, got 0x00000801 \(idx labels\)"),
    "rank 2": (_header(2, 3, magic=0x802) + bytes(6), r"magic 0x00000803, got 0x00000802"),
    "float32": (_header(1, 1, 1, magic=0xD03) + bytes(4), r"magic 0x00000803, got 0x00000d03"),
    "header cut": (GOOD[:10], r"must be an idx file with a header of 16 bytes, got 10"),
    "payload cut": (GOOD[:-1], r"must be an idx file with 60 bytes of images \(5 × 4 × 3 in the header\), got 59"),
    "payload missing": (GOOD[:16], r"with 60 bytes .*, got 0"),
    "payload longer": (GOOD + b"\0", r"with 60 bytes .*, got more"),
    "no images": (_header(0, 28, 28), r"got 0 × 28 × 28 in the header"),
    "absurd header": (
        _header(2**32 - 1, 2**32 - 1, 2**32 - 1),
        r"with 1 to 1073741824 bytes of images, got 4294967295 × 4294967295 × 4294967295 in the header",
    ),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path, name, pack):
    content, expected = BAD_FILES[name]
    path = tmp_path / "bad"
    path.write_bytes(pack(content))
    with pytest.raises(DataError, match=expected) as caught:
        idx_files.read_idx(path, "images")
    assert message(caught).startswith(f"{path}: must be ")


def test_images_given_as_labels(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(GOOD)
    with pytest.raises(DataError, match=r"must be idx labels with magic 0x00000801, got 0x00000803 \(idx images\)"):
        idx_files.read_idx(path, "labels")


def _flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda gz: gz[:-9],  # truncated stream
        lambda gz: gz[:-4],  # truncated checksum
        lambda gz: gz[:5],  # truncated gzip header
        lambda gz: _flip(gz, len(gz) // 2),
        lambda gz: _flip(gz, len(gz) - 8),  # wrong CRC
        lambda gz: gz + b"garbage",
    ],
)
def test_a_corrupt_gzip_file(tmp_path, spoil):
    noise = np.random.default_rng(0).integers(0, 256, (10, 8, 8), np.uint8)
    path = tmp_path / "x.gz"
    path.write_bytes(spoil(gzip.compress(idx(noise))))
    with pytest.raises(DataError, match="got a truncated or corrupt gzip file") as caught:
        idx_files.read_idx(path, "images")
    message(caught)


def test_a_decompression_bomb_is_read_no_further_than_its_header(tmp_path, monkeypatch):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(_header(1, 2, 2) + bytes(1 << 25), compresslevel=1))
    taken = 0
    read = gzip.GzipFile.read

    def counting(self: gzip.GzipFile, size: int = -1) -> bytes:
        nonlocal taken
        chunk = read(self, size)
        taken += len(chunk)
        return chunk

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    with pytest.raises(DataError, match=r"with 4 bytes of images .* got more"):
        idx_files.read_idx(path, "images")
    assert taken == 16 + 4 + 1


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        idx_files.read_idx(tmp_path / "nothing", "images")
    with pytest.raises(DataError, match="got Is a directory"):
        idx_files.read_idx(tmp_path, "images")


# ---- sets of files ----


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bytes, "")])
def test_a_given_folder_is_read_with_or_without_gz(tmp_path, pack, suffix):
    loaded = data.load("idx", write_set(tmp_path, pack=pack, suffix=suffix))
    assert loaded.source == str(tmp_path)
    np.testing.assert_array_equal(loaded.test_labels, LABELS)
    np.testing.assert_allclose(loaded.train_images[..., 0], IMAGES / 255, rtol=1e-6)


def test_fewer_labels_than_images(tmp_path):
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(LABELS[:-1]))
    with pytest.raises(
        DataError, match=r"train-labels.*: must be 5 labels, one for each image in .*train-images.*, got 4"
    ) as caught:
        data.load("idx", tmp_path)
    message(caught)


def test_a_label_out_of_range(tmp_path):
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.array([0, 1, 10, 200, 3], np.uint8)))
    with pytest.raises(DataError, match=r"t10k-labels.*: must be labels from 0 to 9, got 10 for image 2"):
        data.load("idx", tmp_path)


def test_test_images_of_another_size(tmp_path):
    write_set(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(idx(IMAGES.reshape(5, 3, 4)))
    with pytest.raises(DataError, match=r"t10k-images.*: must be images of size \(4, 3\) as in .*got \(3, 4\)"):
        data.load("idx", tmp_path)


def test_a_given_folder_is_the_only_one_searched(tmp_path):
    write_set(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"must be a folder that contains t10k-images.*\.gz or .*, got neither"):
        data.load("idx", tmp_path)
    with pytest.raises(DataError, match="must be the folder of idx, got no such folder"):
        data.load("idx", tmp_path / "nowhere")
    with pytest.raises(DataError, match="must be the folder of idx, got a file"):
        data.load("idx", tmp_path / "t10k-labels-idx1-ubyte.gz")


def test_classes_of_idx_files_are_numbers(tmp_path):
    loaded = data.load("idx", write_set(tmp_path))
    assert loaded.class_names == tuple("0123456789")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(np.array([0, 1, 2, 2, 1], np.uint8)))
    with pytest.raises(DataError, match=r"t10k-labels.*: must be labels from 0 to 2, got 9 for image 3"):
        data.load("idx", tmp_path)
    with pytest.raises(DataError, match="idx: must be read from a folder, got none"):
        data.load("idx")


# ---- a named data set is verified ----


def test_other_images_are_refused_under_the_name_of_a_set(tmp_path):
    """Files with MNIST's format and names but other images: the message has the file, both hashes, and the fix."""
    write_set(tmp_path)
    for name, of in (
        ("fashion-mnist", idx_files.FASHION_MNIST_FILES),
        ("fashion-mnist-sample", idx_files.SAMPLE_FILES),
    ):
        with pytest.raises(DataError) as caught:
            data.SOURCES[name](tmp_path)
        assert message(caught) == (
            f"{tmp_path / 'train-images-idx3-ubyte.gz'}: must be the file of {name}, whose decompressed bytes have "
            f"SHA-256 {of['train_images'].sha256}, got {hashlib.sha256(idx(IMAGES)).hexdigest()}; "
            "use --data idx for other images in files of these names"
        )


@pytest.mark.parametrize("part", idx_files.FASHION_MNIST_FILES)
def test_one_different_file_is_detected(tmp_path, part):
    """One different pixel or label is detected; recompressed files are the same data set."""
    for file in idx_files.SAMPLE_FILES.values():
        content = gzip.decompress((idx_files.SAMPLE_DIR / f"{file.name}.gz").read_bytes())
        (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(content, compresslevel=1, mtime=1))
    assert idx_files.fashion_mnist_sample(tmp_path).sha256 == data.load("fashion-mnist-sample").sha256
    path = tmp_path / f"{idx_files.SAMPLE_FILES[part].name}.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.unlink()
    path.with_suffix("").write_bytes(content)  # not compressed
    with pytest.raises(DataError, match=f"{path.stem}: must be the file of fashion-mnist-sample, .*SHA-256"):
        idx_files.fashion_mnist_sample(tmp_path)


@needs_full_set
def test_the_full_set_is_accepted_in_any_folder_and_compression(tmp_path):
    for file in idx_files.FASHION_MNIST_FILES.values():
        (tmp_path / file.name).write_bytes(gzip.decompress((idx_files.SYSTEM_DIR / f"{file.name}.gz").read_bytes()))
    loaded = data.load("fashion-mnist", tmp_path)
    assert loaded.train_images.shape == (60_000, 28, 28, 1)
    assert loaded.source == str(tmp_path)


# ---- the download, from a server on this machine ----


def small_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        part: idx_files.IdxFile(
            file.name, file.kind, hashlib.sha256(idx(IMAGES if file.kind == "images" else LABELS)).hexdigest()
        )
        for part, file in idx_files.FASHION_MNIST_FILES.items()
    }
    monkeypatch.setattr(idx_files, "FASHION_MNIST_FILES", files)


def test_downloads_land_in_the_cache_and_are_used_from_there(served, monkeypatch):
    small_hashes(monkeypatch)
    write_set(served)
    downloaded = data.load("fashion-mnist")
    assert downloaded.source == str(files.cache_dir("fashion-mnist"))
    np.testing.assert_array_equal(downloaded.train_labels, LABELS)
    names = sorted(path.name for path in files.cache_dir("fashion-mnist").iterdir())
    assert names == sorted(f"{file.name}.gz" for file in idx_files.FASHION_MNIST_FILES.values())

    for path in served.iterdir():
        path.unlink()  # a second load does not need the server
    assert data.load("fashion-mnist").sha256 == downloaded.sha256


def test_another_compression_of_the_same_bytes_is_the_same_data(served, monkeypatch):
    small_hashes(monkeypatch)
    write_set(served, pack=lambda content: gzip.compress(content, compresslevel=1, mtime=1))
    np.testing.assert_array_equal(data.load("fashion-mnist").test_labels, LABELS)


def test_wrong_bytes_are_not_saved(served):
    write_set(served)  # valid idx files, but not Fashion-MNIST
    with pytest.raises(
        DataError, match=r"must be a file whose decompressed bytes have SHA-256 c59f468a.*, got [0-9a-f]{64}"
    ) as caught:
        data.load("fashion-mnist")
    message(caught)
    assert list(files.cache_dir("fashion-mnist").iterdir()) == []


def test_a_file_that_the_server_does_not_have(served):
    with pytest.raises(DataError, match=r"download failed .*404.*--data-dir") as caught:
        data.load("fashion-mnist")
    message(caught)
    assert list(files.cache_dir("fashion-mnist").iterdir()) == []


def test_a_missing_server(served, monkeypatch):
    monkeypatch.setattr(idx_files, "FASHION_MNIST_URL", "http://127.0.0.1:1/")
    with pytest.raises(DataError, match="download failed"):
        data.load("fashion-mnist")
    assert list(files.cache_dir("fashion-mnist").iterdir()) == []


def test_a_corrupt_file_from_the_server(served):
    write_set(served, pack=lambda content: gzip.compress(content)[:-6])
    with pytest.raises(DataError, match=r"http://.*: .*got a truncated or corrupt gzip file") as caught:
        data.load("fashion-mnist")
    message(caught)
    assert list(files.cache_dir("fashion-mnist").iterdir()) == []


def test_a_connection_that_ends_early(served, tmp_path):
    (served / "cut").write_bytes(b"x" * 100)
    url = f"{idx_files.FASHION_MNIST_URL}cut"
    with pytest.raises(DataError, match="download failed"):
        downloads.download(url, tmp_path / "landed", WRONG)
    assert not (tmp_path / "landed").exists()


def test_a_good_file_in_the_cache_survives_a_bad_download(served, tmp_path):
    write_set(served)
    target = tmp_path / "kept"
    target.write_bytes(b"before")
    with pytest.raises(DataError):
        downloads.download(f"{idx_files.FASHION_MNIST_URL}train-labels-idx1-ubyte.gz", target, WRONG)
    assert target.read_bytes() == b"before"


def test_a_cached_file_that_is_not_of_the_set_is_refused(served, monkeypatch):
    folder = write_set(files.cache_dir("fashion-mnist"))
    with pytest.raises(DataError, match=rf"{folder}/train-images.*: must be the file of fashion-mnist,"):
        data.load("fashion-mnist")


def test_a_disk_that_is_full_while_downloading_is_named(served, tmp_path, monkeypatch):
    def full(self, url, path, pooch):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    with pytest.raises(WriteError, match=rf"{tmp_path / 'x'}: must be writable, got No space left on device"):
        downloads.download("http://127.0.0.1/x", tmp_path / "x", WRONG)


def test_a_cache_that_is_a_file(served, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DataError, match="must be a folder for downloads"):
        data.load("fashion-mnist")
