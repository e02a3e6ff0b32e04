"""CIFAR's binary files: what is read from a folder, an archive and a download, and a message for each bad file."""

import dataclasses
import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from experiments import cifar, data, files, train
from experiments.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
LABELS = np.arange(16) % 10
"""Fine labels; the coarse one is their half."""


def record(n: int, coarse: bool) -> bytes:
    labels = [LABELS[n] // 2, LABELS[n]] if coarse else [LABELS[n]]
    return bytes(labels) + PIXELS[n].transpose(2, 0, 1).tobytes()  # channels first


def contents(name: str) -> dict[str, bytes]:
    """Return the files of a data set with two or ten images in each."""
    version = cifar.VERSIONS[name]
    result, n = {}, 0
    for file, count in (*version.train.items(), *version.test.items()):
        result[file] = b"".join(record(n + i, version.labels == 2) for i in range(count))
        n += count
    if version.labels == 1:
        return {**result, "batches.meta.txt": "".join(f"class {n}\n" for n in range(10)).encode() + b"\n"}
    fine, coarse = ("".join(f"{what} {n}\n" for n in range(count)) for what, count in (("fine", 10), ("coarse", 5)))
    return {**result, "fine_label_names.txt": fine.encode(), "coarse_label_names.txt": coarse.encode()}


def archive(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    """Write a .tar.gz; a TarInfo is a member without contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                file.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def packed(path: Path, name: str) -> Path:
    folder = cifar.VERSIONS[name].folder
    return archive(
        path, {f"{folder}/readme.html": b"ignored", **{f"{folder}/{f}": b for f, b in contents(name).items()}}
    )


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make the data sets small: five files of two images and one of six, or a file of ten and one of six."""
    for name, classes in (("cifar10", 10), ("cifar100", 10), ("cifar100-coarse", 5)):
        version = cifar.VERSIONS[name]
        train = dict.fromkeys(version.train, 2 if name == "cifar10" else 10)
        changed = dataclasses.replace(version, train=train, test=dict.fromkeys(version.test, 6), classes=classes)
        monkeypatch.setitem(cifar.VERSIONS, name, changed)


def trust(monkeypatch, name: str, path: Path) -> None:
    """Make the hash of an archive the expected one."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(cifar.VERSIONS, name, dataclasses.replace(cifar.VERSIONS[name], sha256=digest))


def write(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    for file, content in contents(name).items():
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize(("name", "of"), [("cifar10", "class"), ("cifar100", "fine"), ("cifar100-coarse", "coarse")])
def test_a_folder_and_an_archive_are_the_same_data(tmp_path, monkeypatch, name, of):
    version = cifar.VERSIONS[name]
    folder = write(tmp_path / "all" / version.folder, name)
    path = packed(tmp_path / "packed" / version.archive, name)
    trust(monkeypatch, name, path)
    sets = [data.load(name, place) for place in (folder, folder.parent, path, path.parent)]
    assert [each.source for each in sets] == [str(place) for place in (folder, folder, path, path)]
    assert len({each.sha256 for each in sets}) == 1
    got = sets[-1]
    np.testing.assert_array_equal(got.train_pixels, PIXELS[:10])
    np.testing.assert_array_equal(got.test_pixels, PIXELS[10:])
    labels = LABELS // 2 if of == "coarse" else LABELS
    np.testing.assert_array_equal(np.concatenate([got.train_labels, got.test_labels]), labels)
    assert got.class_names == tuple(f"{of} {n}" for n in range(labels.max() + 1))
    np.testing.assert_array_equal(got.test_images, PIXELS[10:] * np.float32(1 / 255))


def test_the_official_sizes_are_those_of_the_page():
    for version in (cifar.CIFAR10, cifar._cifar100("fine_label_names.txt", classes=100, label=1)):
        assert (sum(version.train.values()), sum(version.test.values())) == (50_000, 10_000)
    assert (cifar.CIFAR10.record, cifar.VERSIONS["cifar100"].record) == (3073, 3074)


def test_a_download_is_kept_if_it_is_the_archive(served, monkeypatch):
    path = packed(served / cifar.CIFAR10.archive, "cifar10")
    with pytest.raises(
        DataError, match=r"http://.*gz: must be the archive .* with SHA-256 c4a38c50.*, got [0-9a-f]{64}$"
    ):
        data.load("cifar10")
    assert list(files.cache_dir("cifar").iterdir()) == []
    trust(monkeypatch, "cifar10", path)
    downloaded = data.load("cifar10")
    path.unlink()  # a second load does not need the server
    assert data.load("cifar10").sha256 == downloaded.sha256
    assert downloaded.source == str(files.cache_dir("cifar") / cifar.CIFAR10.archive)
    with pytest.raises(DataError, match=r"download failed .*404.*--data-dir"):
        data.load("cifar100")


def expect(pattern: str, path: Path, name: str = "cifar10") -> None:
    with pytest.raises(DataError, match=pattern) as caught:
        data.load(name, path)
    assert "\n" not in str(caught.value)


def test_bad_files_in_a_folder(tmp_path):
    expect("nowhere: must be the folder or the archive of cifar10, got no such folder", tmp_path / "nowhere")
    expect("must be a folder that contains cifar-10-binary.tar.gz, cifar-10-batches-bin or data_batch_1.bin", tmp_path)
    folder = write(tmp_path / "set", "cifar10")
    good = contents("cifar10")
    for file, content, pattern in [
        ("data_batch_2.bin", good["data_batch_2.bin"][:-1], "must be 6146 bytes, 2 images of 3073 bytes, got 6145$"),
        ("data_batch_2.bin", b"", "data_batch_2.bin: must be 6146 bytes, 2 images of 3073 bytes, got 0$"),
        ("data_batch_2.bin", good["data_batch_2.bin"] * 2, "must be 6146 bytes, 2 images of 3073 bytes, got 12292$"),
        ("data_batch_2.bin", bytes(3073) + b"\x0a" + bytes(3072), "must be labels from 0 to 9, got 10 for image 1$"),
        ("batches.meta.txt", b"cat\ndog\n", "must be the names of 10 classes, one per line, got 2 names$"),
        ("batches.meta.txt", b"x" * 70_000, "must be a file of class names with at most 65536 bytes, got 70000$"),
        ("test_batch.bin", None, "test_batch.bin: must be a file of cifar10, got no such file$"),
    ]:
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)
        expect(f"{file}: {pattern.removeprefix(f'{file}: ')}", folder)
        (folder / file).write_bytes(good[file])
    assert len(data.load("cifar10", folder).train_labels) == 10


def test_bad_archives(tmp_path, monkeypatch):
    path = tmp_path / cifar.CIFAR10.archive
    folder = cifar.CIFAR10.folder

    def refused(pattern: str, members: Mapping[str, bytes | tarfile.TarInfo]) -> None:
        archive(path, members)
        trust(monkeypatch, "cifar10", path)
        expect(pattern, path)

    link = tarfile.TarInfo(f"{folder}/data_batch_1.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    refused(r"gz: \.\./data_batch_1.bin: must be a path inside of the archive, got one", {"../data_batch_1.bin": b""})
    refused(r"x/\.\./\.\./y: must be a path inside", {f"{folder}/x/../../y": b""})
    refused("gz: /etc/passwd: must be a path inside", {"/etc/passwd": b""})
    refused("data_batch_1.bin: must be a file, got a link, a folder or a device", {"": link})
    refused(r"must be 6146 bytes, 2 images of 3073 bytes, got 1000000", {f"{folder}/data_batch_1.bin": bytes(10**6)})
    refused("must be an archive of cifar10, which contains cifar-10-batches-bin/data_batch_1.bin, got no", {"x": b""})
    assert list(tmp_path.iterdir()) == [path]  # nothing was extracted

    # A header that declares more than the archive has.
    packed(path, "cifar10")
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:5000]))
    trust(monkeypatch, "cifar10", path)
    expect("must be the archive cifar-10-binary.tar.gz, got a truncated or corrupt one", path)
    for broken in (gzip.compress(whole)[:-2000], b"not an archive", b""):
        path.write_bytes(broken)
        trust(monkeypatch, "cifar10", path)
        expect("must be the archive cifar-10-binary.tar.gz, got a truncated or corrupt one", path)

    monkeypatch.setattr(cifar, "MAX_BYTES", 1 << 16)
    refused("must be an archive of at most 65536 decompressed bytes, got more", {"zeros": bytes(10**6)})
    monkeypatch.undo()
    path.write_bytes(b"another archive")
    expect(rf"{re.escape(str(path))}: must be the archive .* with SHA-256 c4a38c50.*, got [0-9a-f]{{64}}$", path)


@pytest.mark.slow("trains")
def test_it_is_trained_on(tmp_path, capsys):
    folder = write(tmp_path / "set", "cifar10")
    argv = ["--data", "cifar10", "--data-dir", str(folder), "--model", "mlp", "--batch-size", "5", "--max-steps", "1"]
    assert train.main([*argv, "--validation", "0", "--norms-every", "0", "--out", str(tmp_path / "run")]) == 0
    assert "cifar10: 10 training and 6 test images 32×32×3, 10 classes" in capsys.readouterr().out
