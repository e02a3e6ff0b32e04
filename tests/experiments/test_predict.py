import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import data, predict, train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mlp"
    assert train.main(["--model", "mlp", "--max-steps", "100", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def broken(run, tmp_path) -> Path:
    """Copy a run so that a test can corrupt it."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def main(*argv: object) -> int:
    return predict.main([str(arg) for arg in argv])


def test_labels_are_true_and_right_ones_are_counted(run, capsys):
    assert main("--run", run, "--images", 3, 0, 1999) == 0
    title, header, *lines, last = capsys.readouterr().out.splitlines()
    assert title == f"mlp of {run} on test images of fashion-mnist-sample"
    assert header.split() == ["image", "label", "prediction", "probability"]
    sample = data.load("fashion-mnist-sample")
    assert [int(line.split()[0]) for line in lines] == [3, 0, 1999]
    for line, n in zip(lines, (3, 0, 1999), strict=True):
        assert sample.class_names[sample.test_labels[n]] in line
    right = sum("wrong" not in line for line in lines)
    assert last == f"{right} of 3 right"


def test_the_count_over_all_test_images_is_the_accuracy_of_the_run(run, capsys):
    assert main("--run", run, "--images", *range(2000)) == 0
    right = int(re.match(r"(\d+) of 2000 right", capsys.readouterr().out.splitlines()[-1])[1])
    reported = float((run / "metrics.csv").read_text().splitlines()[-1].split(",")[5])
    assert right / 2000 == pytest.approx(reported, abs=1e-6)


def test_the_newest_run_is_the_default(run, tmp_path, monkeypatch, capsys):
    for age, name in enumerate(("new", "old")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for path in run.iterdir():
            copy = tmp_path / "runs" / name / path.name
            copy.write_bytes(path.read_bytes())
            os.utime(copy, (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    assert main() == 0
    assert f"{tmp_path}/runs/new" in capsys.readouterr().out


def failing(capsys, *argv: object) -> tuple[int, str]:
    status = main(*argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return status, line


def test_no_run_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, line = failing(capsys)
    assert status == 2
    assert "--run: expected a run's folder" in line


@pytest.mark.parametrize("n", [-1, 2000])
def test_an_image_that_is_not_there(run, capsys, n):
    status, line = failing(capsys, "--run", run, "--images", n)
    assert status == 2
    assert f"--images: expected 0 to 1999, got {n}" in line


def test_a_folder_that_is_no_run(tmp_path, capsys):
    status, line = failing(capsys, "--run", tmp_path)
    assert status == 1
    assert "config.json: expected a run's config, got No such file" in line


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{", "got no JSON"),
        ("[]", "expected a run's config with data, data_dir, data_sha256, model"),
        ('{"model": "mlp"}', "expected a run's config with data, data_dir, data_sha256, model"),
    ],
)
def test_a_config_that_is_none(broken, capsys, config, expected):
    (broken / "config.json").write_text(config)
    status, line = failing(capsys, "--run", broken)
    assert status == 1
    assert expected in line


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model", "resnet", "model: expected one of lecture, mlp, lenet5, got 'resnet'"),
        ("model", "lecture", "dense1/bias: expected float32 (10,), got float32 (300,)"),
        ("data", "cifar", "data: expected one of"),
        ("data_sha256", "0" * 64, "expected data 000000"),
    ],
)
def test_a_config_that_does_not_go_with_the_weights_or_the_data(broken, capsys, key, value, expected):
    path = broken / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    status, line = failing(capsys, "--run", broken)
    assert status == 1
    assert expected in line


def test_weights_cut_short(broken, capsys):
    path = broken / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    status, line = failing(capsys, "--run", broken)
    assert status == 1
    assert "expected an intact safetensors file" in line


def test_probabilities_are_those_of_the_class_that_is_named(run, capsys):
    assert main("--run", run, "--images", *range(50)) == 0
    found = [float(line.split("  wrong")[0].split()[-1]) for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert len(found) == 50
    assert min(found) >= 0.1  # the largest of ten probabilities
    assert max(found) <= 1
    assert np.std(found) > 0
