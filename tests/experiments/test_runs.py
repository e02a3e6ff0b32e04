import csv
import json
import math
import os
from datetime import datetime
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from experiments.errors import RunError
from experiments.runs import Epoch, Run, choose_folder

ROWS = [
    Epoch(1, 10, 1.0, 0.5, 0.8, 0.6, 2.0, 320.0),
    Epoch(2, 20, 0.7, 0.7, 0.6, 0.75, 1.5, 426.6666667),
]
NOW = datetime(2024, 5, 6, 7, 8, 9)


def test_the_default_folder_has_the_time_and_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = choose_folder(None, "mlp", NOW)
    assert first == tmp_path / "runs" / "20240506-070809-mlp"
    assert not first.parent.exists()
    first.mkdir(parents=True)
    assert choose_folder(None, "mlp", NOW).name == "20240506-070809-mlp-2"


def test_a_given_folder_may_be_new_or_empty(tmp_path, monkeypatch):
    assert choose_folder(tmp_path / "a" / "b", "mlp") == tmp_path / "a" / "b"
    assert choose_folder(tmp_path, "mlp") == tmp_path
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    assert choose_folder(Path("here"), "mlp") == tmp_path / "here"


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match=r"--out .*: expected a folder or nothing, but .*file is a file"):
            choose_folder(out, "mlp")


def test_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="expected a new or empty folder, got one that holds files"):
        choose_folder(tmp_path, "mlp")


def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root, every place is writable
    with pytest.raises(RunError, match="is not writable"):
        choose_folder(tmp_path / "x", "mlp")


def test_what_a_run_leaves_behind(tmp_path):
    run = Run.start(tmp_path / "run", {"model": "mlp", "out": Path("x"), "rate": 0.1})
    run.save(ROWS, {"dense1": {"w": np.ones((2, 2), np.float32)}}, 20)
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
    assert float(table[0]["test_accuracy"]) == 0.6


def test_an_epoch_that_was_not_evaluated_has_empty_cells(tmp_path):
    run = Run.start(tmp_path, {})
    run.save([Epoch(1, 3, 1.0, 0.5, math.nan, math.nan, 1.0, 9.0)], {"w": np.ones(1, np.float32)}, 3)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "1,3,1,0.5,,,1,9"
    run.plot([Epoch(1, 3, 1.0, 0.5, math.nan, math.nan, 1.0, 9.0)], "cut")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_curves_are_a_picture_with_ink_in_both_halves(tmp_path):
    run = Run.start(tmp_path, {})
    run.plot(ROWS, "title")
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    height, width, _ = picture.shape
    assert width > 1.5 * height
    blue = (picture[..., 2] > picture[..., 0] + 0.3).reshape(height, 2, width // 2).sum(axis=(0, 2))
    assert (blue > 100).all()  # the test line, at the left and at the right


def test_nothing_learnt_nothing_drawn(tmp_path):
    Run.start(tmp_path, {}).plot([], "title")
    assert not (tmp_path / "curves.png").exists()
