import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from experiments import checkpoints, data, export, predict, train
from tests.experiments.test_images import png


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


@pytest.mark.slow("evaluates a data set")
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


def test_a_folder_for_no_heat_maps(run, tmp_path, capsys):
    draw(tmp_path / "a.png")
    status, line = failing(capsys, tmp_path / "a.png", "--run", run, "--out", tmp_path / "x")
    assert status == 2
    assert line.endswith(f"--out: must be omitted without --explain, got {tmp_path / 'x'}")


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
        ("model", "resnets", "model: must be one of lecture, mlp, lenet5, small"),
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


def test_using_a_net_needs_no_data_set(broken, tmp_path, capsys):
    path, image = broken / "config.json", draw(tmp_path / "a.png")
    config = json.loads(path.read_text())
    assert (config["inputs"]["name"], config["inputs"]["image_shape"]) == ("fashion-mnist-sample", [28, 28, 1])
    assert (config["inputs"]["largest"], config["inputs"]["border"]) == (255, 0)
    assert json.loads(checkpoints.metadata(broken / "weights.safetensors")["config"])["inputs"] == config["inputs"]
    gone = {**config, "data": "idx", "data_dir": str(tmp_path / "gone")}
    path.write_text(json.dumps(gone))
    assert main(image, "--run", broken) == 0
    assert "trained on fashion-mnist-sample" in capsys.readouterr().out
    assert export.main([str(broken)]) == 0
    capsys.readouterr()
    assert "gone: must be the folder of idx, got no such folder" in failing(capsys, "--run", broken)[1]
    inputs = config["inputs"]
    for value, expected in [
        (None, "inputs: must be the name, class_names, image_shape, largest, border, task of the images, which a"),
        ({"name": "x"}, "of this version has, got {'name': 'x'}"),
        ({**inputs, "class_names": []}, "inputs: class_names: must be a list of names, got []"),
        ({**inputs, "image_shape": [28, "28", 1]}, "inputs: image_shape: must be a list of sizes, got [28, '28', 1]"),
        ({**inputs, "border": "dark"}, "inputs: border: must be a number, got dark"),
        ({**inputs, "image_shape": [14, 14, 1]}, "dense1/weight: must be float32 (196, 300), got float32 (784, 300)"),
    ]:
        path.write_text(json.dumps({**gone, "inputs": value}))
        assert expected in failing(capsys, image, "--run", broken)[1]


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


# ---- image files ----


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert (
        train.main(["--model", "mlp", "--data", "digits", "--epochs", "40", "--batch-size", "64", "--out", str(folder)])
        == 0
    )
    return folder


def draw(path, size=160, ink=0, paper=255, mode="L", wide=1.0):
    """Draw a zero: an ellipse on a sheet of paper, off the proportions of the net's images if `wide` is not 1."""
    image = Image.new("L", (round(size * wide), size), paper)
    x, y = image.width / 2, size / 2
    box = [x - 0.27 * size, y - 0.42 * size, x + 0.27 * size, y + 0.42 * size]
    ImageDraw.Draw(image).ellipse(box, outline=ink, width=round(0.13 * size))
    if mode == "RGBA":  # ink on a transparent sheet, whose own color is black
        alpha = Image.eval(image, lambda value: 255 - value)
        image = Image.merge("RGBA", [*Image.new("RGB", image.size, "black").split(), alpha])
    image.convert(mode).save(path)
    return path


@pytest.mark.slow("trains")
def test_a_zero_drawn_by_hand(digits, tmp_path, capsys):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    draw(drawn / "a.png")
    draw(drawn / "b.jpg", 500, mode="RGB")
    draw(drawn / "c.png", 90, 255, 0)
    draw(drawn / "d.PNG", 200, mode="RGBA")
    draw(drawn / "e.png", 64, wide=0.9)
    (drawn / "notes.txt").write_text("ignored")
    (drawn / ".hidden.png").write_text("ignored")
    assert main(drawn, drawn / "a.png", "--run", digits, "--explain", "--out", tmp_path / "maps") == 0
    head, *lines = filter(None, capsys.readouterr().out.splitlines())
    assert head == f"mlp from {digits}, trained on digits"
    titles = [line for line in lines if not line.startswith("  ")][:-1]
    assert titles == [
        f"{drawn / name}{note}"
        for name, note in [
            *(("a.png", ", inverted"), ("b.jpg", ", inverted"), ("c.png", ""), ("d.PNG", ", inverted")),
            *(("e.png", ", inverted"), ("a.png", ", inverted")),
        ]
    ]
    for title in titles:
        rows = lines[lines.index(title) + 1 :][:3]
        assert {len(row.split()) for row in rows} <= {2, 3}  # the bar of a small probability is empty
        assert rows[0].split()[0] == "0"
        shares = [float(row.split()[-1].removesuffix("%")) for row in rows]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 100.2
        assert abs(rows[0].count("█") - shares[0] / 100 * predict.BAR) <= 1
    assert lines[-1].endswith(f"in {tmp_path / 'maps'}")
    names = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert names == ["1-a.png", "2-b.png", "3-c.png", "4-d.png", "5-e.png", "6-a.png"]
    with Image.open(tmp_path / "maps" / "1-a.png") as shown:
        assert shown.width > 400
    assert main(drawn / "a.png", "--run", digits, "--invert", "never", "--top", 1) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:]] != ["0"]


@pytest.mark.slow("trains")
def test_an_image_of_the_set_is_predicted_as_in_the_set(run, tmp_path, capsys):
    sample = data.load("fashion-mnist-sample")
    Image.fromarray(np.round(255 * sample.test_images[5, ..., 0]).astype(np.uint8)).save(tmp_path / "5.png")
    assert main(tmp_path / "5.png", "--run", run, "--top", 1) == 0
    name, share = re.match(r"  (\S.*?)  .* (\S+)%$", capsys.readouterr().out.splitlines()[-1]).groups()
    assert main("--run", run, "--images", 5) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert name in line
    assert float(re.search(r"0\.\d+", line)[0]) == pytest.approx(float(share) / 100, abs=1e-3)


def test_files_that_cannot_be_predicted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "note.txt").write_text("not an image")
    draw(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-60])
    (tmp_path / "bomb.png").write_bytes(png(2**20, 2**20))
    (tmp_path / "large.png").write_bytes(png(5000, 5000))
    for argv, status, expected in [
        (["none.png"], 1, "none.png: must be a PNG or JPEG image, got No such file or directory"),
        (["text.png"], 1, "text.png: must be a PNG or JPEG image, got something else"),
        (["note.txt"], 1, "note.txt: must be a PNG or JPEG image, named *.png or *.jpg or *.jpeg, got another file or"),
        (["good.png", "cut.png"], 1, "cut.png: must be a PNG or JPEG image, got a damaged file ("),
        (["bomb.png"], 1, "bomb.png: must be an image of at most 16777216 pixels, got 1048576 × 1048576"),
        (["large.png"], 1, "large.png: must be an image of at most 16777216 pixels, got 5000 × 5000"),
        (["empty"], 1, "empty: must be a folder with at least one file *.png or *.jpg or *.jpeg, got none"),
        (["good.png"], 1, "config.json: must be the config of a run, got No such file or directory"),
        (["good.png", "--images", "3"], 2, "--images: must be omitted with files, got 3"),
        (["good.png", "--top", "0"], 2, "--top: must be at least 1, got 0"),
        (["good.png", "--invert", "maybe"], 2, "--invert: must be one of auto, always, never, got 'maybe'"),
        (["--explain"], 2, "--explain: must be given with image files, got no file"),
        (["--out", "x"], 2, "--out: must be omitted without image files, got x"),
    ]:
        assert main(*argv, "--run", "nowhere") == status
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith(f"{predict.PROG}: ")
        assert expected in line
    assert not (tmp_path / "runs").exists()


def test_proportions_and_polarity():
    image = np.full((10, 40, 3), 200, np.uint8)
    image[2:8, 5:35] = 0
    x = predict.to_input(image, (20, 20, 1), stretch=False, invert=False)
    assert x.shape == (20, 20, 1)
    np.testing.assert_allclose(x[:7], 200 / 255, rtol=1e-6)  # padded above and below in the color of the border
    np.testing.assert_allclose(x[13:], 200 / 255, rtol=1e-6)
    assert x[9:11, 4:16].max() < 0.1
    stretched = predict.to_input(image, (20, 20, 1), stretch=True, invert=True)
    assert stretched[6:14, 5:15].min() > 0.9
    assert stretched[0].max() < 0.25
    color = np.zeros((4, 4, 3), np.uint8)
    color[..., 0] = 255
    np.testing.assert_array_equal(predict.to_input(color, (4, 4, 3), False, False), color / 255)
    dark, light = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    gray = np.full((4, 4, 3), 128, np.uint8)
    for image, shape, usual, expected in [
        (light, (4, 4, 1), 0.0, True),
        (dark, (4, 4, 1), 1.0, True),
        (dark, (4, 4, 1), 0.0, False),
        (gray, (4, 4, 1), 0.0, False),
        (light, (4, 4, 3), 0.0, False),
    ]:
        assert predict.inverts("auto", image, shape, usual) is expected
        assert predict.inverts("always", image, shape, usual)
        assert not predict.inverts("never", image, shape, usual)
