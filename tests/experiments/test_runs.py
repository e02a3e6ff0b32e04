import fcntl
import json
import os
from pathlib import Path

import matplotlib.image
import pytest

from experiments import runs
from experiments.run_folder import CLAIM, Epoch, Run

BASE = {"data": "digits", "data_dir": None, "data_sha256": "0", "optimizer": "adam", "learning_rate": 0.002}


def write(folder: Path, age: int, model: str = "mlp", count: int = 3, **config) -> None:
    run = Run.start(folder, {**BASE, "model": model, "batch_size": 32, "seed": 1, **config})
    rows = [Epoch(n, 10 * n, 1 / n, 0.5, 1.1 / n, [0.6, 0.8, 0.7][n - 1], 1.0, 9.0) for n in range(1, count + 1)]
    run.save_metrics(rows)
    os.utime(folder / "config.json", (1e9 - age, 1e9 - age))


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "runs" / "old", 2, end="finished", steps=30, test_accuracy=0.75)
    write(tmp_path / "runs" / "new", 1, model="lenet5", count=2)
    write(tmp_path / "runs" / "first", 3, count=0)
    (tmp_path / "runs" / "other").mkdir()
    return tmp_path / "runs"


def test_runs_are_listed(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    with (folder / "first" / CLAIM).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert runs.main([]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "run",
        "model",
        "data",
        "optimizer",
        "rate",
        "batch",
        "seed",
        "steps",
        "validation",
        "test",
        "end",
    ]
    assert [line.split() for line in lines] == [
        ["new", "lenet5", "digits", "adam", "0.002", "32", "1", "20", "0.8000", "killed"],
        ["old", "mlp", "digits", "adam", "0.002", "32", "1", "30", "0.8000", "0.7500", "finished"],
        ["first", "mlp", "digits", "adam", "0.002", "32", "1", "0", "running"],
    ]
    assert lines[0].index("killed") == lines[1].index("finished")


def test_curves_of_chosen_runs(folder, capsys, tmp_path):
    assert runs.main([str(folder / "old"), str(folder / "new"), "--plot", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:-1]] == ["new", "old"]
    assert out[-1] == f"curves in {tmp_path / 'a.png'}"
    image = matplotlib.image.imread(tmp_path / "a.png")
    blue = (image[..., 2] > image[..., 0] + 0.3).sum()
    orange = (image[..., 0] > image[..., 2] + 0.3).sum()
    assert blue > 100
    assert orange > 100


def test_a_damaged_table_is_no_obstacle(folder, capsys):
    (folder / "old" / "metrics.csv").write_text("epoch,step\n1,many\n")
    (folder / "new" / "config.json").write_text(json.dumps(BASE)[:-5])
    assert runs.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["old", "first"]


def test_no_runs(tmp_path, capsys):
    assert runs.main([str(tmp_path / "none")]) == 2
    expected = f"python -m experiments.runs: folders: must be folders that contain runs, got {tmp_path / 'none'}\n"
    assert capsys.readouterr().err == expected
