"""Images that stay in their files: the same data, batches and results as in memory, and files that change."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import data, errors, image_files, terminal, train
from experiments.data import training_batches
from experiments.errors import DataError
from experiments.image_files import ImageFiles

RNG = np.random.default_rng(0)


def write(path: Path, *shape: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, shape).astype(np.uint8)).save(path)


def write_set(folder: Path, *, color: bool, count: int = 12) -> Path:
    """Write gray images of two classes; with `color` the last one in the test set has colors."""
    for part, n in (("train", count), ("val", 3), ("test", 4)):
        for name in ("cat", "dog"):
            for k in range(n):
                write(folder / part / name / f"{k}.png", 6, 5)
    if color:
        write(folder / "test" / "dog" / "3.png", 6, 5, 3)
    return folder


@pytest.fixture
def grain():
    return pytest.importorskip("grain", reason="the extra grain is not installed")


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("flat", [False, True])
def test_images_in_files_are_those_in_memory(tmp_path, color, size, flat):
    folder = write_set(tmp_path, color=color) / ("test" if flat else "")
    memory, files = (data.load(f"{folder}/", size=size, stream=stream) for stream in (False, True))
    assert isinstance(files.train_pixels, ImageFiles)
    assert memory.sha256 == files.sha256
    assert memory.image_shape == files.image_shape == ((size or 6), (size or 5), 3 if color else 1)
    assert memory.inputs == files.inputs
    for a, b in ((memory.train_pixels, files.train_pixels), (memory.test_pixels, files.test_pixels)):
        assert isinstance(a, np.ndarray)
        assert a.flags.c_contiguous
        assert (a.shape, a.dtype, len(a)) == (b.shape, b.dtype, len(b))
        some = np.array([1, 0, 1])
        for chosen in (slice(None), slice(1, 3), some, 1, np.int64(0)):
            np.testing.assert_array_equal(np.asarray(b[chosen]), a[chosen])
        np.testing.assert_array_equal(np.asarray(b[some][1:]), a[some][1:])
    np.testing.assert_array_equal(files.test_images, memory.test_images)
    for name in ("train_labels", "test_labels", "validation"):
        np.testing.assert_array_equal(getattr(files, name), getattr(memory, name))


def test_batches_are_those_in_memory_at_any_step(tmp_path, grain):
    folder = write_set(tmp_path, color=False)
    chosen = np.delete(np.arange(24), [3, 8])
    memory, files = (
        training_batches(data.load(f"{folder}/", stream=stream), chosen, 5, seed=1) for stream in (False, True)
    )
    assert type(files) is not type(memory)
    assert memory.per_epoch == files.per_epoch == 4
    for step in (0, 1, 2, 3, 4, 5, 3, 4, 17, 18, 19, 20):
        (a, labels), (b, same) = memory(step), files(step)
        assert b.dtype == np.uint8
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(labels, same)


def test_files_that_change_are_named(tmp_path, grain):
    folder = write_set(tmp_path, color=False)
    dataset = data.load(f"{folder}/", stream=True)
    write(folder / "train" / "cat" / "1.png", 7, 5)
    batches = training_batches(dataset, np.arange(2), 2, seed=0)
    with pytest.raises(
        DataError, match=r"cat/1.png: must be an image of size \(6, 5\), as it was at first, got \(7, 5\)"
    ):
        batches(0)
    (folder / "train" / "cat" / "0.png").unlink()
    with pytest.raises(DataError, match=r"cat/0.png: must be a PNG or JPEG image, got No such file"):
        np.asarray(dataset.train_pixels[:1])
    with pytest.raises(
        DataError, match=r"10.png: must be an image of size \(7, 5\), as .*1.png, got \(6, 5\); or choose"
    ):
        data.load(f"{folder}/train", stream=True)


def test_more_images_than_fit_into_memory(tmp_path, monkeypatch):
    folder = write_set(tmp_path, color=False)
    monkeypatch.setattr(image_files, "MAX_BYTES", 1000)
    expected = "must be at most 1000 bytes of images, got more; choose --stream or a smaller --size"
    with pytest.raises(DataError, match=expected):
        data.load(f"{folder}/")
    assert len(data.load(f"{folder}/", stream=True).train_labels) == 30


@pytest.mark.slow("trains and resumes")
def test_a_training_has_the_same_results_and_resumes(tmp_path, grain, monkeypatch):
    """The streamed run is interrupted in its second epoch, and resumes from files; the other one is in memory."""
    folder = write_set(tmp_path / "set", color=False)
    argv = ["--data", str(folder), "--model", "mlp", "--batch-size", "5", "--epochs", "5", "--norms-every", "0"]
    assert train.main([*argv, "--out", str(tmp_path / "memory")]) == 0

    def update(self, step, *numbers):
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(terminal.PlainLines, "update", update)
            assert train.main([*argv, "--stream", "--out", str(tmp_path / "files")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert train.main(["--resume", str(tmp_path / "files")]) == 0
    for name in ("metrics.jsonl", "weights.safetensors"):
        memory, files = ((tmp_path / run / name).read_bytes() for run in ("memory", "files"))
        if name == "weights.safetensors":  # the config before them differs
            memory, files = memory[-100_000:], files[-100_000:]
        assert memory == files


def test_a_file_that_is_gone_ends_the_run_with_the_command_that_continues_it(tmp_path, grain, monkeypatch, capsys):
    folder = write_set(tmp_path / "set", color=False)

    def update(self, step, *numbers):
        (folder / "train" / "cat" / "5.png").unlink(missing_ok=True)

    monkeypatch.setattr(terminal.PlainLines, "update", update)
    argv = ["--data", str(folder), "--stream", "--model", "mlp", "--batch-size", "5", "--epochs", "9"]
    assert train.main([*argv, "--norms-every", "0", "--out", str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cat/5.png: must be a PNG or JPEG image, got No such file or directory; the weights after step" in line
    assert line.endswith(f"to continue: python -m experiments.train --resume {tmp_path / 'run'}")


def test_options(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (["--stream"], ["--stream", "--data", "a.npz"], ["--stream", "--data", "digits"]):
        assert train.main(argv) == 2
        assert "--stream: must be omitted unless --data is a folder of images, got it" in capsys.readouterr().err
    monkeypatch.setattr(errors, "is_installed", lambda package: package != "grain")
    assert train.main(["--stream", "--data", "./set"]) == 2
    assert "needs the package grain, which is not installed: pip install 'jaxcnn[grain]'" in capsys.readouterr().err
