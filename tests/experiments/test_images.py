"""Folders of images and .npz files: what is read, and a message for each that cannot be."""

import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import image_files, images, predict, train
from experiments.data import split
from experiments.errors import DataError

RNG = np.random.default_rng(0)


def write(path: Path, shape: tuple[int, ...] = (6, 5), value: int | None = None, **options) -> np.ndarray:
    """Write one image, and return its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, shape).astype(np.uint8) if value is None else np.full(shape, value, np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten gray images of each of two classes."""
    for n in range(10):
        write(tmp_path / "set" / "cat" / f"{n}.png")
        write(tmp_path / "set" / "dog" / f"{n}.png")
    return tmp_path / "set"


def test_a_folder_by_class(folder):
    pixels = {name: write(folder / name / "0.png") for name in ("cat", "dog")}
    (folder / "cat" / ".DS_Store").write_bytes(b"\0")
    dataset = images.load_path(folder)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.image_shape == (6, 5, 1)
    assert np.bincount(dataset.train_labels).tolist() == [8, 8]
    assert np.bincount(dataset.test_labels).tolist() == [2, 2]
    every = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    for label, name in enumerate(dataset.class_names):
        (n,) = [n for n, image in enumerate(every) if np.allclose(image[..., 0], pixels[name] / 255)]
        assert labels[n] == label
    assert images.load_path(folder).sha256 == dataset.sha256
    write(folder / "dog" / "3.png")
    assert images.load_path(folder).sha256 != dataset.sha256


def test_folders_for_training_validation_and_test(tmp_path):
    for part, count in (("train", 4), ("val", 3), ("test", 2)):
        for label, name in enumerate(("a", "b")):
            for n in range(count):
                write(
                    tmp_path / part / name / f"{n}.jpg",
                    (4, 4, 3),
                    100 * label + {"train": 1, "val": 2, "test": 3}[part],
                )
    dataset = images.load_path(tmp_path)
    assert dataset.image_shape == (4, 4, 3)
    assert len(dataset.test_labels) == 4
    config = train.Config(data=str(tmp_path))
    training, validation = split(config, dataset, seed=0)
    marks = np.round(dataset.train_images.mean((1, 2, 3)) * 255) % 100
    assert set(marks[training]) == {1}
    assert set(marks[validation]) == {2}
    assert len(validation) == 6
    assert set(np.round(dataset.test_images.mean((1, 2, 3)) * 255) % 100) == {3}


def test_gray_color_and_size(tmp_path):
    for n, name in enumerate(("a", "b")):
        for k in range(5):
            write(tmp_path / name / f"{k}.png", (4 + k, 7))
        write(tmp_path / name / "color.jpeg", (5, 5, 3), 50 + 100 * n)
    with pytest.raises(
        DataError, match=r"1\.png: must be an image of size \(4, 7\), as .*0\.png, got \(5, 7\); or choose"
    ):
        images.load_path(tmp_path)
    dataset = images.load_path(tmp_path, size=8)
    assert dataset.image_shape == (8, 8, 3)


def test_transparent_pixels_are_over_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, is_color = image_files.decode(tmp_path / "a.png")
    white = [255] * 3
    assert image.tolist() == [[[10, 20, 30], white], [white, white]]
    assert is_color


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG whose header declares a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def damage(name: str):
    def text(path):
        path.write_text("not an image")

    def truncated(path):
        write(path, (40, 50))
        path.write_bytes(path.read_bytes()[:-300])

    def flipped(path):
        content = bytearray(path.read_bytes())
        content[45] ^= 0xFF
        path.write_bytes(content)

    def sixteen(path):
        Image.fromarray(np.zeros((6, 5), np.uint16)).save(path)

    return {
        "text": (text, "must be a PNG or JPEG image, got something else"),
        "empty": (lambda path: path.write_bytes(b""), "must be a PNG or JPEG image, got an empty file"),
        "truncated": (truncated, r"must be a PNG or JPEG image, got a damaged file \("),
        "bit-flipped": (flipped, r"must be a PNG or JPEG image, got a damaged file \("),
        "header larger than the file": (lambda path: path.write_bytes(png(6, 5)), r"image, got a damaged file \("),
        "bomb": (lambda path: path.write_bytes(png(5000, 5000)), "at most 16777216 pixels, got 5000 × 5000"),
        "huge bomb": (lambda path: path.write_bytes(png(2**20, 2**20)), "pixels, got 1048576 × 1048576"),
        "large bomb": (lambda path: path.write_bytes(png(10_000, 10_000)), "16777216 pixels, got 10000 × 10000"),
        "gif": (lambda path: Image.new("L", (6, 5)).save(path, "GIF"), "a PNG or JPEG image, got something else"),
        "16 bits": (sixteen, "must be an image with 8 bits per channel, got mode I;16"),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "text",
        "empty",
        "truncated",
        "bit-flipped",
        "header larger than the file",
        "bomb",
        "large bomb",
        "huge bomb",
        "gif",
        "16 bits",
    ],
)
def test_a_file_that_is_not_an_image(folder, name):
    action, expected = damage(name)
    action(folder / "cat" / "4.png")
    with pytest.raises(DataError, match=rf"cat/4\.png: must be .*{expected.removeprefix('must be ')}") as caught:
        images.load_path(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError) as in_files:
        images.load_path(folder, stream=True)
    assert str(in_files.value) == str(caught.value)


def test_folders_that_are_not_image_sets(folder, tmp_path):
    def expect(path, pattern):
        with pytest.raises(DataError, match=pattern):
            images.load_path(path)

    kinds = "a folder of images by class or with masks, or an .npz file"
    subfolders = "a folder with at least two subfolders, one per class, or images and masks"
    expect(tmp_path / "none", f"none: must be {kinds}, got no such folder")
    expect(
        folder / "cat" / "1.png",
        f"1.png: must be {kinds}, got a file",
    )
    expect(
        folder / "cat",
        f"cat: must be {subfolders}, got none",
    )
    (folder / "cow").mkdir()
    expect(folder, "cow: must be a class with at least one image, got none")
    (folder / "cow" / "notes.txt").write_text("moo")
    expect(folder, r"notes.txt: must be a PNG or JPEG image, named \*.png or \*.jpg or \*.jpeg, got another file")
    write(tmp_path / "one" / "cat" / "1.png")
    expect(
        tmp_path / "one",
        f"one: must be {subfolders}, got only cat",
    )
    for name in ("a", "b"):
        write(tmp_path / "parts" / "train" / name / "1.png")
    expect(tmp_path / "parts", "test: must be a folder of images by class, got no such folder")
    write(tmp_path / "parts" / "test" / "c" / "1.png")
    expect(tmp_path / "parts", "test/c: must be one of the classes of train, a, b, got another")


ARRAYS = {
    "train_images": RNG.integers(0, 256, (12, 4, 4)).astype(np.uint8),
    "train_labels": np.arange(12) % 3,
    "test_images": RNG.integers(0, 256, (6, 4, 4)).astype(np.uint8),
    "test_labels": np.arange(6) % 3,
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [images.ARRAYS, images.OTHER_NAMES])
def test_npz(tmp_path, save, names):
    save(tmp_path / "a.npz", **dict(zip(names, ARRAYS.values(), strict=True)))
    dataset = images.load_path(tmp_path / "a.npz")
    np.testing.assert_allclose(dataset.train_images[..., 0] * 255, ARRAYS["train_images"], rtol=1e-6)
    assert dataset.test_labels.tolist() == [0, 1, 2] * 2
    assert dataset.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"train_images": np.zeros((12, 4, 4))}, r"train_images: must be uint8 images .*, got float64 \(12, 4, 4\)"),
        (
            {"train_labels": np.zeros(11, int)},
            r"must be 12 integers, or masks of the size of the images, got int64 \(11,\)",
        ),
        ({"train_labels": np.arange(12) - 1}, "train_labels: must be numbers from 0, got -1"),
        ({"train_labels": np.zeros(12, int)}, "must be at least two classes, each with an image, got labels up to 0"),
        ({"train_labels": np.arange(12) % 2 * 2}, "at least two classes, each with an image, got labels up to 2, of 2"),
        ({"test_labels": np.arange(6)}, "test_labels: must be labels from 0 to 2, got 5"),
        ({"test_images": np.zeros((6, 4, 5), np.uint8)}, r"must be images of shape \(4, 4\), as train_images, got"),
        ({"train_labels": np.array([None] * 12)}, "must be an array of numbers, got pickled objects, which are never"),
    ],
)
def test_wrong_arrays(tmp_path, changed, expected):
    np.savez(tmp_path / "a.npz", **{**ARRAYS, **changed})
    with pytest.raises(DataError, match=expected):
        images.load_path(tmp_path / "a.npz")


def member(shape: str, data: bytes) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def test_files_that_are_not_npz(tmp_path):
    path = tmp_path / "a.npz"

    def expect(pattern):
        with pytest.raises(DataError, match=pattern):
            images.load_path(path)

    def archive(name, content):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(name, content)

    expect("a.npz: must be an .npz file, got no such file")
    path.write_bytes(b"")
    expect("must be an .npz file, got an empty file")
    path.write_bytes(pickle.dumps(ARRAYS))
    expect("must be an .npz file, got a damaged file")
    np.savez(path, **ARRAYS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    expect("must be an .npz file, got a damaged file")
    flipped = bytearray(whole)
    flipped[300] ^= 1
    path.write_bytes(flipped)
    expect("must be an .npz file, got a damaged file .*CRC")
    np.savez(path, train_images=ARRAYS["train_images"])
    expect("with the arrays train_images, train_labels, test_images, test_labels, got train_images$")
    archive("../train_images.npy", b"x")
    expect(r"\.\./train_images.npy: must be the name of an array, got a path")
    archive("train_images.npy", b"x" * 100)
    expect("train_images.npy: must be an array in NumPy's format, got something else")
    archive("train_images.npy", member("(1000000, 1000, 1000)", b"x"))
    expect("must be an array of 1000000000000 bytes .* in its header., got 1$")
    archive("train_images.npy", member("(2, 2)", b"x" * 1_000_000))
    expect("must be an array of 4 bytes .* in its header., got 1000000$")


def test_a_zip_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", train_images=np.zeros((100, 100), np.uint8))
    with pytest.raises(DataError, match=r"train_images\.npy: must be at most 1000 bytes, got 10128"):
        images.load_path(tmp_path / "a.npz")


@pytest.mark.slow("trains")
def test_a_folder_is_trained_on_and_read_again(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", "set", "--model", "mlp", "--batch-size", "4", "--max-steps", "3", "--out", "run"]) == 0
    assert re.search(
        r"^data +set: 16 training and 4 test images 6×5×1, 2 classes", capsys.readouterr().out, re.MULTILINE
    )
    monkeypatch.chdir("/")
    assert predict.main(["--run", str(tmp_path / "run"), "--images", "0"]) == 0
    assert "test images of set" in capsys.readouterr().out
    write(folder / "cat" / "0.png")
    assert predict.main(["--run", str(tmp_path / "run"), "--images", "0"]) == 1


def test_options_of_folders(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv, status, expected in [
        (["--size", "8"], 2, "--size: must be omitted unless --data is a folder of images, got 8\n"),
        (["--data", "./x", "--size", "0"], 2, "--size: must be at least 1, got 0\n"),
        (
            ["--data", "./x"],
            1,
            "a folder of images by class or with masks, or an .npz file, got no such folder\n",
        ),
        (["--data", "x.npz"], 1, "x.npz: must be an .npz file, got no such file\n"),
    ]:
        assert train.main(argv) == status
        assert capsys.readouterr().err.endswith(expected)
    assert list(tmp_path.iterdir()) == []
