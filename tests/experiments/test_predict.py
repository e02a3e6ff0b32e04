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
    for path in filter(Path.is_file, run.iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def main(*argv: object) -> int:
    return predict.main([str(arg) for arg in argv])


@pytest.mark.slow("trains")
def test_labels_are_true_and_correct_predictions_are_counted(run, capsys):
    assert main("--run", run, "--images", 3, 0, 1999) == 0
    title, header, *lines, last = capsys.readouterr().out.splitlines()
    assert title == f"mlp from {run}, test images of fashion-mnist-sample"
    assert header.split() == ["image", "label", "prediction", "probability"]
    sample = data.load("fashion-mnist-sample")
    assert [int(line.split()[0]) for line in lines] == [3, 0, 1999]
    for line, n in zip(lines, (3, 0, 1999), strict=True):
        assert sample.class_names[sample.test_labels[n]] in line
    correct = sum("wrong" not in line for line in lines)
    assert last == f"{correct} of 3 correct"


def test_the_count_over_all_test_images_is_the_accuracy_of_the_run(run, capsys):
    assert main("--run", run, "--images", *range(2000)) == 0
    correct = int(re.match(r"(\d+) of 2000 correct", capsys.readouterr().out.splitlines()[-1])[1])
    reported = json.loads((run / "config.json").read_text())["test_accuracy"]
    assert correct / 2000 == pytest.approx(reported, abs=1e-6)


def test_the_newest_run_is_the_default(run, tmp_path, monkeypatch, capsys):
    for age, name in enumerate(("new", "old")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for path in filter(Path.is_file, run.iterdir()):
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
    assert f"--run: must be the folder of a run, got none, and {tmp_path}/runs contains no run" in line


@pytest.mark.parametrize("n", [-1, 2000])
def test_a_missing_image(run, capsys, n):
    status, line = failing(capsys, "--run", run, "--images", n)
    assert status == 2
    assert f"--images: must be from 0 to 1999, got {n}" in line


def test_a_folder_without_a_run(tmp_path, capsys):
    status, line = failing(capsys, "--run", tmp_path)
    assert status == 1
    assert "config.json: must be the config of a run, got No such file" in line


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{", "must be the config of a run, got invalid JSON"),
        ("[]", "must be the config of a run, with data, data_dir, data_sha256, model, got list"),
        ('{"model": "mlp"}', "must be the config of a run, with data, data_dir, data_sha256, model, got model"),
    ],
)
def test_an_invalid_config(broken, capsys, config, expected):
    (broken / "config.json").write_text(config)
    status, line = failing(capsys, "--run", broken)
    assert status == 1
    assert expected in line


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model", "resnet", "model: must be one of lecture, mlp, lenet5, got 'resnet'"),
        ("model", "lecture", "dense1/bias: must be float32 (10,), got float32 (300,)"),
        ("data", "cifar", "data: must be one of"),
        ("data_sha256", "0" * 64, ": must be the set with SHA-256 000000"),
    ],
)
def test_a_config_that_does_not_match_the_weights_or_the_data(broken, capsys, key, value, expected):
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
    assert "must be an intact safetensors file" in line


def test_probabilities_are_those_of_the_predicted_class(run, capsys):
    assert main("--run", run, "--images", *range(50)) == 0
    probabilities = [float(line.split("  wrong")[0].split()[-1]) for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert len(probabilities) == 50
    assert min(probabilities) >= 0.1  # the largest of ten probabilities
    assert max(probabilities) <= 1
    assert np.std(probabilities) > 0
