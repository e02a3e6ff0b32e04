import csv
import errno
import json
import math
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from experiments.errors import RunError
from experiments.run_folder import Epoch, Run, check_folder, draw_curves, new_folder

ROOT = Path(__file__).parents[2]

ROWS = [
    Epoch(1, 10, 1.0, 0.5, 0.8, 0.6, 2.0, 320.0),
    Epoch(2, 20, 0.7, 0.7, 0.6, 0.75, 1.5, 426.6666667),
]
NOW = datetime(2024, 5, 6, 7, 8, 9)


def new(out, now=NOW):
    """Make a folder with one file in it, and return it."""
    with new_folder(out, "mlp", now) as folder:
        (folder / "config.json").write_text("{}")
    return folder


def test_the_default_folder_has_the_time_and_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_folder(None)
    assert list(tmp_path.iterdir()) == []
    assert [new(None).relative_to(tmp_path / "runs") for _ in range(3)] == [
        Path("20240506-070809-mlp"), Path("20240506-070809-mlp-2"), Path("20240506-070809-mlp-3")
    ]  # fmt: skip


def test_a_given_folder_may_be_new_or_empty(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "a" / "b", tmp_path / "empty"):
        check_folder(out)
        assert new(out) == out
        assert [path.name for path in out.iterdir()] == ["config.json"]
    monkeypatch.chdir(tmp_path)
    assert new(Path("here")) == tmp_path / "here"


STARTS = """
import sys
from datetime import datetime
from pathlib import Path
from experiments.errors import RunError
from experiments.run_folder import new_folder

out = Path(sys.argv[1]) if len(sys.argv) > 1 else None
print("ready", flush=True)
input()
try:
    with new_folder(out, "mlp", datetime(2024, 5, 6, 7, 8, 9)) as folder:
        (folder / "config.json").open("x").close()
        print(folder.name, flush=True)
        input()
except RunError as error:
    print(f"refused: {error}", flush=True)
"""


def started_together(count, folder, *out):
    """Start `count` processes that make their folders at the same time, and return their output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", STARTS, *out], cwd=folder, env=environment, **pipes)
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        lines = [process.stdout.readline().strip() for process in processes]
        for process in processes:
            process.communicate("\n", timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return lines


def test_runs_started_in_the_same_second_have_separate_folders(tmp_path):
    names = started_together(4, tmp_path)
    assert sorted(names) == [f"20240506-070809-mlp{end}" for end in ("", "-2", "-3", "-4")]
    for name in names:
        assert [path.name for path in (tmp_path / "runs" / name).iterdir()] == ["config.json"]


@pytest.mark.parametrize("there", [False, True])
def test_only_the_first_of_several_runs_gets_the_folder(tmp_path, there):
    if there:
        (tmp_path / "one").mkdir()
    lines = sorted(started_together(4, tmp_path, "one"))
    assert lines[0] == "one"
    for line in lines[1:]:
        assert line.startswith("refused: --out ")
        assert line.endswith("a new or empty folder, got one that another run is using")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["config.json"]


def test_a_folder_that_nothing_was_written_to_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "made", "mlp"):
        raise ZeroDivisionError
    assert not (tmp_path / "made").exists()
    (tmp_path / "found").mkdir()
    with new_folder(tmp_path / "found", "mlp"):
        pass
    assert list((tmp_path / "found").iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match=r"--out .*: must be a new or empty folder, got .*file, which is a file"):
            check_folder(out)


def test_runs_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("x")
    with pytest.raises(RunError, match=r"must be a new or empty folder, got .*runs, which is a file"):
        check_folder(None)


def test_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="must be a new or empty folder, got one that contains files"):
        check_folder(tmp_path)


def test_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root, everything is writable
    with pytest.raises(RunError, match=r"must be in a writable folder, got .*, which is not writable"):
        check_folder(tmp_path / "x")


def test_a_folder_that_cannot_be_created_is_named(tmp_path, monkeypatch):
    def full(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RunError, match=rf"got No space left on device: {tmp_path}"), new_folder(tmp_path / "a", "mlp"):
        pass


def test_the_files_of_a_run(tmp_path):
    run = Run.start(tmp_path / "run", {"model": "mlp", "out": Path("x"), "rate": 0.1})
    run.save(ROWS, {"dense1": {"weight": np.ones((2, 2), np.float32)}}, 20)
    run.plot(ROWS, "title")
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "config.json",
        "curves.png",
        "metrics.csv",
        "weights.safetensors",
    ]
    assert json.loads((run.folder / "config.json").read_text()) == {"model": "mlp", "out": "x", "rate": 0.1}
    with (run.folder / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["epoch"] for row in table] == ["1", "2"]
    assert float(table[1]["images_per_second"]) == pytest.approx(426.667)
    assert float(table[0]["validation_accuracy"]) == 0.6


def test_an_epoch_that_was_not_evaluated_has_empty_cells(tmp_path):
    run = Run.start(tmp_path, {})
    run.save([Epoch(1, 3, 1.0, 0.5, math.nan, math.nan, 1.0, 9.0)], {"weight": np.ones(1, np.float32)}, 3)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "1,3,1,0.5,,,1,9"
    run.plot([Epoch(1, 3, 1.0, 0.5, math.nan, math.nan, 1.0, 9.0)], "cut")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_curves_are_drawn_left_and_right(tmp_path):
    run = Run.start(tmp_path, {})
    run.plot(ROWS, "title")
    image = matplotlib.image.imread(tmp_path / "curves.png")
    height, width, _ = image.shape
    assert width > 1.5 * height
    blue = (image[..., 2] > image[..., 0] + 0.3).reshape(height, 2, width // 2).sum(axis=(0, 2))
    assert (blue > 100).all()  # the validation curves of loss and accuracy


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_curves_have_whole_epochs_and_a_key_that_hides_nothing(count):
    rows = [Epoch(n, 10 * n, 1 / n, 0.5 + n / 100, 1.1 / n, 0.6 + n / 100, 2.0, 320.0) for n in range(1, count + 1)]
    figure = draw_curves(rows, "title")
    figure.canvas.draw()
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == [
        "training, mean over the epoch",
        "validation, at the end of the epoch",
    ]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) and 1 <= tick <= count for tick in ticks)
        assert axes.get_legend() is None
        assert not key.get_window_extent().overlaps(axes.get_window_extent())
        for line in axes.lines:  # every dot is well inside
            inside = axes.transAxes.inverted().transform(axes.transData.transform(line.get_xydata()))
            assert (inside > 0.02).all()
            assert (inside < 0.98).all()


def test_no_epoch_no_curves(tmp_path):
    Run.start(tmp_path, {}).plot([], "title")
    assert not (tmp_path / "curves.png").exists()
