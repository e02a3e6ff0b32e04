"""A run that was interrupted, killed or damaged continues to the same results, or names the problem."""

import contextlib
import csv
import errno
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import chaos, idx_files, terminal, train, training_run, training_state
from experiments.run_folder import CLAIM, Epoch

ROOT = Path(train.__file__).parent.parent
PROG = "python -m experiments.train"


def write_images(folder: Path, size: int = 8, seed: int = 0) -> Path:
    """Write 80 training and 20 test images of four classes as idx files."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for name, count in (("train", 80), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 4
        images = rng.integers(0, 100, (count, size, size)).astype(np.uint8) + 40 * labels[:, None, None]
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx_files.idx_bytes(images.astype(np.uint8)))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx_files.idx_bytes(labels))
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images")


def options(images: Path, *more: object) -> list[str]:
    argv = ["--data", "idx", "--data-dir", images, "--model", "mlp", "--batch-size", 4, "--epochs", 2, *more]
    return [str(arg) for arg in argv]


def main(*argv: object) -> int:
    return train.main([str(arg) for arg in argv])


def results(folder: Path) -> tuple:
    """Return the results of a run that do not depend on time: losses, weights, and rows without seconds."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [
            [row[name] for name in row if name not in ("seconds", "images_per_second")] for row in csv.DictReader(file)
        ]
    weights = {name: array.tobytes() for name, array in load_file(folder / "weights.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    tested = [config[name] for name in ("end", "steps", "best_step", "test_loss", "test_accuracy")]
    state = training_state.verify(training_state.list_checkpoints(folder / "checkpoints")[0])
    return rows, weights, tested, (folder / "metrics.jsonl").read_text(), state["step"], state["leaves"]


@contextlib.contextmanager
def interrupting() -> Iterator[Callable[[int], None]]:
    """Yield a function that makes Ctrl-C arrive at a given step."""
    at = []
    original = training_run.compiled_step

    def compiled_step(training, state, first_step):
        step = original(training, state, first_step)
        numbers = itertools.count(first_step)

        def taken(state, batch):
            if next(numbers) in at:
                at.clear()
                os.kill(os.getpid(), signal.SIGINT)
            return step(state, batch)

        return taken

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_run, "compiled_step", compiled_step)
            yield at.append
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupt():
    with interrupting() as at:
        yield at


def interrupted_run(images: Path, out: Path, interrupt, at: int = 25, *more: object) -> None:
    """Run until Ctrl-C; there are checkpoints after steps 18 (the first epoch) and at + 1."""
    interrupt(at)
    assert main(*options(images, "--out", out, *more)) == 130


@pytest.fixture(scope="module")
def copy_of_run(tmp_path_factory):
    """Return a function that copies a run, finished or interrupted after a step; each is trained once for all tests."""
    folder = tmp_path_factory.mktemp("runs")
    images = write_images(folder / "images")

    @functools.cache
    def trained(at: int | None) -> Path:
        if at is None:
            assert main(*options(images, "--out", folder / "whole")) == 0
            return folder / "whole"
        with interrupting() as interrupt:
            interrupted_run(images, folder / str(at), interrupt, at)
        return folder / str(at)

    def copy_to(out: Path, at: int | None = None) -> None:
        shutil.copytree(trained(at), out)

    return copy_to


# ---- exact ----


@pytest.mark.slow("trains and resumes")
@pytest.mark.parametrize(
    ("size", "cuts", "more"),
    [
        (8, 2, ()),
        (8, 1, ("--optimizer", "sgd", "--save-every", 5, "--norms-every", 7, "--keep", 1)),
        (28, 1, ("--model", "lecture", "--batch-size", 16)),  # dropout
        (8, 1, ("--validation", 0)),
        (8, 1, ("--optimizer", "adamw", "--warmup", 1, "--ema", 0.9, "--clip-norm", 1, "--augment", "crop", "mixup")),
    ],
)
def test_a_resumed_run_has_the_results_of_an_undisturbed_one(tmp_path, interrupt, size, cuts, more, capsys):
    images = write_images(tmp_path / "images", size)
    assert main(*options(images, "--out", tmp_path / "whole", *more)) == 0
    steps = len((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
    for at in (steps // 2, steps - 1)[:cuts]:
        cut = tmp_path / f"cut{at}"
        interrupt(at)
        assert main(*options(images, "--out", cut, *more)) == 130
        line = capsys.readouterr().err
        assert line.endswith(
            f"interrupted after step {at + 1}; its checkpoint is saved; to continue: {PROG} --resume {cut}\n"
        )
        assert main("--resume", cut) == 0
        assert results(cut) == results(tmp_path / "whole")
        assert len(json.loads((cut / "environment.json").read_text())["resumed"]) == 1
        config = json.loads((cut / "config.json").read_text())
        assert (config["resume"], config["out"]) == (None, str(cut))


@pytest.mark.slow("trains and resumes")
def test_a_run_without_a_checkpoint_starts_again(tmp_path, images, capsys, monkeypatch):
    def update(self, step, *numbers):
        raise KeyboardInterrupt  # at the first check, as after a second Ctrl-C

    assert main(*options(images, "--out", tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(terminal.PlainLines, "update", update)
        assert main(*options(images, "--out", tmp_path / "cut")) == 130
    assert not (tmp_path / "cut" / "checkpoints").exists()
    assert (tmp_path / "cut" / "metrics.jsonl").read_text()
    assert main("--resume", tmp_path / "cut") == 0
    assert "resumed after step 0 of 36\n" in capsys.readouterr().out
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


@pytest.mark.slow("trains and resumes")
def test_sigterm_saves_and_prints_the_command_to_continue(tmp_path, images):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = options(images, "--out", tmp_path / "runs" / "a", "--epochs", 100_000)
    command = [sys.executable, "-m", "experiments.train", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=env, **pipes) as process:
        while not process.stdout.readline().startswith("epoch"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    match = re.fullmatch(
        rf"{PROG}: terminated after step (\d+); its checkpoint is saved; to continue: {PROG} --resume runs/a\n", err
    )
    assert training_state.list_checkpoints(tmp_path / "runs" / "a" / "checkpoints")[0].name == f"{int(match[1]):08d}"


@pytest.mark.slow("test_a_resumed_run_has_the_results_of_an_undisturbed_one covers the same code without processes")
def test_killed_at_random_moments(tmp_path, images, capsys):
    argv = ["--kills", 2, "--data", "idx", "--data-dir", images, "--epochs", 20, "--batch-size", 8, "--save-every", 3]
    assert chaos.main([str(arg) for arg in (*argv, "--out", tmp_path / "chaos")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\nkill  2 of 2: \d\.\d\d s after the start, (while saving|after step \d+)\n", text)
    assert re.search(r"\n2 SIGKILLs in \d runs?, \d of them .* losses of all 180 steps, .* equal the undisturbed", text)


def test_chaos_finds_a_difference(tmp_path, monkeypatch, capsys):
    computed = iter([{"losses": [1.0], "weights": {}}, {"losses": [1.5], "weights": {}}])
    monkeypatch.setattr(chaos, "finish", lambda config, run, folder: None)
    monkeypatch.setattr(chaos, "killed", lambda *args: {"seconds": 0.1, "step": 1, "saving": True})
    monkeypatch.setattr(chaos, "results", lambda run: next(computed))
    assert chaos.main(["--kills", "1", "--out", str(tmp_path / "chaos")]) == 1
    line = capsys.readouterr().err
    assert "a killed and resumed run: must be equal to the undisturbed one, got different losses in " in line
    assert chaos.main(["--kills", "0"]) == 2


# ---- damaged checkpoints ----


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": (Path.unlink, "No such file or directory|no such file"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"bytes, which are not those|invalid JSON"),
    "bit-flipped": (flip, r"bytes, which are not those|other contents than were saved|invalid JSON"),
    "pickled": (lambda path: path.write_bytes(b"\x80\x04N."), r"4 bytes, which are not those|invalid JSON"),
}


@pytest.mark.slow("trains and resumes")
@pytest.mark.parametrize("file", ["checkpoint.json", "state/manifest.ocdbt"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, copy_of_run, capsys, damage, file):
    copy_of_run(tmp_path / "whole")
    copy_of_run(tmp_path / "cut", 25)
    newest, before = training_state.list_checkpoints(tmp_path / "cut" / "checkpoints")
    action, expected = DAMAGE[damage]
    action(newest / file)
    capsys.readouterr()
    assert main("--resume", tmp_path / "cut") == 0
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"warning: {newest / file}: must be an intact checkpoint, got ")
    assert re.search(expected, line)
    assert line.endswith("; the checkpoint before it is used")
    assert f"resumed after step {int(before.name)} of 36" in captured.out
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


@pytest.mark.slow("resumes often")
def test_every_file_of_a_checkpoint_is_checked(tmp_path, copy_of_run):
    copy_of_run(tmp_path / "cut", 25)
    newest = training_state.list_checkpoints(tmp_path / "cut" / "checkpoints")[0]
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 4
    for path in files:
        content = path.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 20)):
            changed = bytearray(content)
            changed[position] ^= 4
            path.write_bytes(changed)
            with pytest.raises(training_state.CheckpointError, match="must be an intact checkpoint"):
                training_state.verify(newest)
        path.write_bytes(content)
    training_state.verify(newest)
    (newest / "state" / "more").write_text("x")
    with pytest.raises(training_state.CheckpointError, match="more: must be absent, got a file that was not saved"):
        training_state.verify(newest)


def test_no_intact_checkpoint(tmp_path, copy_of_run, capsys):
    copy_of_run(tmp_path / "cut", 25)
    for path in training_state.list_checkpoints(tmp_path / "cut" / "checkpoints"):
        (path / "checkpoint.json").unlink()
    capsys.readouterr()
    assert main("--resume", tmp_path / "cut") == 1
    *_, line = capsys.readouterr().err.splitlines()
    folder = tmp_path / "cut" / "checkpoints"
    assert line == f"{PROG}: {folder}: must contain an intact checkpoint, got 2 damaged ones"


# ---- another training than the run's ----


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--batch-size", 8), "--batch-size: must be 4, as in the run to resume, or omitted, got 8"),
        (("--batch-size", 32), "--batch-size: must be 4, as in the run to resume, or omitted, got 32"),  # the default
        (("--model", "lenet5"), "--model: must be mlp, as in the run to resume, or omitted, got lenet5"),
        (("--ema", 0.5), "--ema: must be 0.0, as in the run to resume, or omitted, got 0.5"),
        (("--augment", "flip"), "--augment: must be (), as in the run to resume, or omitted, got ('flip',)"),
        (("--seeds", 2), "--seeds: must be omitted with --resume, which continues one run, got 2"),
        (("--optimizer", "sgd"), "--optimizer: must be adam, as in the run to resume, or omitted, got sgd"),
        (("--data", "digits"), "--data-dir: must be omitted unless --data is one of fashion-mnist, idx, cifar10"),
        (("--epochs", 3), "--epochs: must be 2, as in the run to resume, or omitted, got 3"),
        (("--learning-rate", "0.1"), "--learning-rate: must be 0.002, as in the run to resume, or omitted, got 0.1"),
        (("--learning-rate", "nan"), "--learning-rate: must be a finite number > 0, got nan"),
        (("--out", "x"), "--out: must be omitted with --resume, which continues in the run's folder, got x"),
    ],
)
def test_other_options_than_those_of_the_run(tmp_path, copy_of_run, capsys, argv, expected):
    copy_of_run(tmp_path / "cut", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main("--resume", tmp_path / "cut", *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{PROG}: {expected}")
    assert {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model", "lenet5", r"\d{8}: model: must be lenet5, got mlp"),
        ("optimizer", "sgd", r"\d{8}: optimizer: must be sgd, got adam"),
        ("batch_size", 8, r"\d{8}: batch_size: must be 8, got 4"),
        ("seed", 1, r"\d{8}: seed: must be 1, got 0"),
    ],
)
def test_a_checkpoint_of_other_options_than_the_config(tmp_path, interrupt, capsys, key, value, expected):
    images = write_images(tmp_path / "images", 28)
    interrupted_run(images, tmp_path / "cut", interrupt, 2)
    path = tmp_path / "cut" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert main("--resume", tmp_path / "cut") == 1
    assert re.search(expected, capsys.readouterr().err)


def test_a_checkpoint_with_other_arrays(tmp_path):
    state = {"params": {"weight": np.zeros(3, np.float32)}}
    training_state.save(tmp_path, state, 1, training_state.History(), {}, keep=1)
    for like, expected in [
        ({"params": {"weight": np.zeros(4, np.float32)}}, r"params.weight: must be float32 \(4,\), got float32 \(3,\)"),
        ({"params": {"weight": np.zeros(3, np.int32)}}, r"params.weight: must be int32 \(3,\), got float32 \(3,\)"),
        ({"params": {}}, r"params.weight: must be absent, got float32 \(3,\)"),
        ({"params": {"bias": np.zeros(3, np.float32)}}, r"params.bias: must be float32 \(3,\), got no such array"),
    ]:
        with pytest.raises(training_state.CheckpointError, match=expected):
            training_state.restore_newest(tmp_path, like, {})


def test_changed_data(tmp_path, images, interrupt, capsys):
    interrupted_run(images, tmp_path / "cut", interrupt, 2)
    write_images(images, seed=1)
    assert main("--resume", tmp_path / "cut") == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert re.search(r"data of .*cut: must be the set with SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}$", line)


@pytest.mark.slow("trains and resumes")
def test_data_that_have_moved(tmp_path, images, interrupt):
    interrupted_run(images, tmp_path / "cut", interrupt, 2)
    images.rename(tmp_path / "moved")
    assert main("--resume", tmp_path / "cut") == 1
    assert main("--resume", tmp_path / "cut", "--data-dir", tmp_path / "moved") == 0


# ---- the folder ----


def test_what_cannot_be_resumed(tmp_path, images, capsys):
    (tmp_path / "empty").mkdir()
    assert main(*options(images, "--out", tmp_path / "done", "--max-steps", 1)) == 0
    (tmp_path / "old").mkdir()
    config = json.loads((tmp_path / "done" / "config.json").read_text())
    del config["keep"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    for folder, status, expected in [
        ("none", 2, f"--resume {tmp_path / 'none'}: must be the folder of a run, got no such folder"),
        (
            "empty",
            1,
            f"{tmp_path / 'empty' / 'config.json'}: must be the config of a run, got No such file or directory",
        ),
        ("done", 2, f"--resume {tmp_path / 'done'}: must be a run that has not finished, got one that has"),
        (
            "old",
            1,
            f"{tmp_path / 'old' / 'config.json'}: must be the config of a run of this version, got one without keep",
        ),
    ]:
        assert main("--resume", tmp_path / folder) == status
        assert capsys.readouterr().err.startswith(f"{PROG}: {expected}")


@pytest.mark.slow("trains and resumes")
def test_two_writers(tmp_path, copy_of_run, capsys):
    copy_of_run(tmp_path / "cut", 2)
    capsys.readouterr()
    with (tmp_path / "cut" / CLAIM).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main("--resume", tmp_path / "cut") == 1
    expected = f"{tmp_path / 'cut'}: must be a run that no other process is writing, got one that another run is using"
    assert capsys.readouterr().err == f"{PROG}: {expected}\n"
    assert main("--resume", tmp_path / "cut") == 0  # the lock ended with its owner, and its file was not removed


def test_a_read_only_folder(tmp_path, copy_of_run, capsys, monkeypatch):
    def read_only(self, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    copy_of_run(tmp_path / "cut", 2)
    capsys.readouterr()
    monkeypatch.setattr(filelock.FileLock, "acquire", read_only)  # for root, everything is writable
    assert main("--resume", tmp_path / "cut") == 1
    expected = f"{PROG}: {tmp_path / 'cut'}: must be a writable folder, got Permission denied\n"
    assert capsys.readouterr().err == expected


@pytest.mark.slow("trains and resumes")
def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, images, copy_of_run, capsys, monkeypatch):
    copy_of_run(tmp_path / "whole")
    sync, calls = training_state.sync, []

    def full(path):
        calls.append(path)
        if len(calls) == 3:  # the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    capsys.readouterr()
    monkeypatch.setattr(training_state, "sync", full)
    assert main(*options(images, "--out", tmp_path / "cut")) == 1
    path = tmp_path / "cut" / "checkpoints" / "00000036"
    expected = (
        f"{PROG}: {path}: must be writable, got No space left on device; the earlier checkpoints are unchanged; "
        r"the weights after step (18|36) are in "
    )
    assert re.match(expected, capsys.readouterr().err)
    assert [entry.name for entry in path.parent.iterdir()] == ["00000018"]
    assert main("--resume", tmp_path / "cut") == 0
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


# ---- which checkpoints are kept ----


def test_the_newest_and_the_best_are_kept(tmp_path):
    history, state = training_state.History(), {"weight": np.zeros(1, np.float32)}
    for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.4, 0.5], 1):
        row = Epoch(step, step, 1.0, 0.5, 1.0, accuracy, 1.0, 1.0)
        history = training_state.History([*history.epochs, row])
        training_state.save(tmp_path, state, step, history, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000004", "00000005"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    state = {"weight": np.zeros(1, np.float32)}
    training_state.save(tmp_path, state, 1, training_state.History(), {}, keep=2)
    (tmp_path / ".00000002.abc" / "state").mkdir(parents=True)
    assert training_state.restore_newest(tmp_path, state, {}).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
