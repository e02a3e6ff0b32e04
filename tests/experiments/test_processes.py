"""Several processes train as one does, and none waits for one that is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import processes, train
from experiments.errors import RunError
from tests.experiments.test_masks import write as write_masks
from tests.experiments.test_resume import write_images

ROOT = Path(train.__file__).parent.parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Two:
    """Two processes of a training on this machine, connected by options, or by the variables of a Slurm job."""

    def __init__(self, folder: Path, *argv: object, slurm: bool = False) -> None:
        # Compiled without optimization and with a cache for both, because compilation takes most of the time.
        flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
        port = free_port()
        self.logs = [folder / f"{time.monotonic_ns()}-{n}.log" for n in range(2)]
        self.processes = []
        for n, log in enumerate(self.logs):
            options = ["--coordinator", f"localhost:{port}", "--processes", 2, "--process", n]
            variables = {**os.environ, **flags}
            if slurm:
                options = ["--cluster"]
                variables |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
                variables |= {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "JAX_COORDINATOR_PORT": str(port)}
            command = [sys.executable, "-m", "experiments.train", *map(str, [*argv, *options])]
            with log.open("w") as file:
                streams = {"stdout": subprocess.DEVNULL if n else file, "stderr": file}
                self.processes.append(subprocess.Popen(command, cwd=folder, env=variables, **streams))

    def __enter__(self) -> "Two":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, n: int) -> str:
        return self.logs[n].read_text()

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert [process.poll() for process in self.processes] == [None, None], (self.log(0), self.log(1))
            time.sleep(0.02)

    def statuses(self) -> list[int]:
        return [process.wait(timeout=600) for process in self.processes]


def options(images: Path, out: Path, model: str) -> list[object]:
    """72 steps with a small rate, so that rounding errors stay small; a checkpoint after every 9 steps."""
    data = ["--data", "idx", "--data-dir", images, "--batch-size", 8, "--epochs", 8, "--no-report"]
    return [*data, "--model", model, "--optimizer", "sgd", "--learning-rate", 0.005, "--out", out]


def main(argv: list[object]) -> int:
    return train.main([str(arg) for arg in argv])


def assert_equal_runs(one: Path, other: Path, steps: int = 72) -> None:
    """Every metric of every step, and the test results, are equal up to rounding."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert [len(each) for each in lines] == [steps, steps]
    for a, b in zip(*lines, strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
    a, b = (json.loads((run / "config.json").read_text()) for run in (one, other))
    assert (a["end"], a["best_step"], a["test_accuracy"]) == (b["end"], b["best_step"], b["test_accuracy"])
    assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-5)
    assert a.get("test_mean_iou") == b.get("test_mean_iou")


@pytest.mark.slow("starts processes that train")
@pytest.mark.parametrize(
    ("model", "victim", "end"),
    [("lecture", 1, signal.SIGKILL), ("mlp", 0, signal.SIGKILL), ("mlp", 1, signal.SIGSTOP)],
)
def test_a_process_without_its_peer_ends_and_one_process_continues(tmp_path, model, victim, end):
    images = write_images(tmp_path / "images", 28)
    assert main(options(images, tmp_path / "one", model)) == 0
    with Two(tmp_path, *options(images, tmp_path / "two", model)) as two:
        two.wait_for(tmp_path / "two" / "checkpoints" / "00000018")
        two.processes[victim].send_signal(end)
        other = 1 - victim
        assert two.processes[other].wait(timeout=60) == 1
    line = two.log(other).splitlines()[-1]
    command = "python -m experiments.train --resume two"
    beginning = rf"{train.PROG}: process {other} of 2: another process has ended or cannot be reached \(.+\)"
    assert re.fullmatch(f"{beginning}; to continue: {command}", line)
    assert main(["--resume", tmp_path / "two"]) == 0
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow("starts processes that train")
def test_a_signal_to_one_process_ends_both_and_two_processes_continue(tmp_path):
    """The statistics of the batch norm are computed by both. A Slurm job continues the run."""
    images = write_images(tmp_path / "images", 28)
    model, recipe = "tests.other_nets:normalized", ("--augment", "crop", "mixup", "--ema", 0.5)
    assert main([*options(images, tmp_path / "one", model), *recipe]) == 0
    with Two(tmp_path, *options(images, tmp_path / "two", model), *recipe) as two:
        two.wait_for(tmp_path / "two" / "checkpoints" / "00000018")
        two.processes[1].send_signal(signal.SIGTERM)
        assert two.statuses() == [143, 143]
    step = max(int(path.name) for path in (tmp_path / "two" / "checkpoints").iterdir())
    for n in range(2):
        line = f"terminated after step {step}; its checkpoint is saved; to continue: {train.PROG} --resume two"
        assert two.log(n).splitlines()[-1] == f"{train.PROG}: {line}"
    with Two(tmp_path, "--resume", tmp_path / "two", slurm=True) as two:
        assert two.statuses() == [0, 0], (two.log(0), two.log(1))
    assert "each batch is split over 2 of 2 processes" in two.log(0)
    assert f"resumed after step {step} of 72" in two.log(0)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow("starts processes that train")
def test_two_processes_train_on_masks_as_one_does(tmp_path):
    images = write_masks(tmp_path / "images", 40)
    data = ["--data", images, "--model", "tests.other_nets:image_to_image", "--batch-size", 4, "--epochs", 2]
    recipe = ["--optimizer", "sgd", "--learning-rate", 0.005, "--augment", "crop", "flip", "--flip-test", "--no-report"]
    assert main([*data, *recipe, "--out", tmp_path / "one"]) == 0
    with Two(tmp_path, *data, *recipe, "--out", tmp_path / "two") as two:
        assert two.statuses() == [0, 0], (two.log(0), two.log(1))
    assert_equal_runs(tmp_path / "one", tmp_path / "two", steps=14)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["inputs"]["task"] == "segmentation"


def test_a_coordinator_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(processes, "START_TIMEOUT", 1)
    address = f"localhost:{free_port()}"
    expected = "the address of process 0, reachable within 1 s, got Connection refused"
    with pytest.raises(RunError, match=f"^--coordinator {address}: must be {expected}$"):
        processes.start(processes.ProcessOptions(address, 2, 1))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--processes", 0], "--processes: must be at least 1, got 0"),
        (["--processes", 2], "--coordinator: must be HOST:PORT of process 0 with --processes 2, got nothing"),
        (
            ["--processes", 2, "--coordinator", "a:1"],
            "--process: must be the number of this process with --processes 2, got nothing",
        ),
        (["--processes", 2, "--process", 2], "--process: must be from 0 to 1, got 2"),
        (["--process", 1], "--process: must be from 0 to 0, got 1"),
        (["--processes", 2, "--process", 1, "--coordinator", "a"], "--coordinator: must be HOST:PORT, got 'a'"),
        (
            ["--processes", 2, "--process", 1, "--coordinator", "a:65536"],
            "--coordinator: must be HOST:PORT, got 'a:65536'",
        ),
        (["--cluster", "--process", 1], "--process: must be omitted with --cluster, got 1"),
        (["--cluster", "--processes", 2], "--processes: must be omitted with --cluster, got 2"),
        (
            ["--processes", 2, "--process", 1, "--coordinator", "a:1", "--devices", 3],
            "--batch-size: must be a multiple of the 6 devices of 2 processes, got 32",
        ),
        (
            ["--processes", 2, "--process", 1, "--coordinator", "a:1", "--seeds", 2],
            "--seeds: must be 1 with several processes, got 2; start one training per seed",
        ),
    ],
)
def test_invalid_options(argv, message, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err == f"{train.PROG}: {message}\n"


def test_one_process_is_the_first_and_has_its_own_values():
    tree = {"a": np.float32(-0.0)}
    assert (processes.index(), processes.count(), processes.largest(3)) == (0, 1, 3)
    assert processes.from_first(tree) is tree
    assert processes.text_from_first("δ") == "δ"
    processes.start(processes.ProcessOptions())
