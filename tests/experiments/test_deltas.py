import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread

import jaxcnn
from experiments import deltas, train
from experiments.lecture import drawing
from experiments.restore import restore
from tests.cases import compiled
from tests.run_folder import untrained


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return untrained("lenet5", tmp_path_factory.mktemp("runs") / "lenet5")


def main(*argv: object) -> int:
    return deltas.main([str(arg) for arg in argv])


@pytest.mark.slow("draws figures")
def test_one_figure_per_image(run, tmp_path, capsys):
    assert main("--run", run, "--images", 3, 0, "--channels", 2, "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["deltas-0.png", "deltas-3.png"]
    shapes = [imread(tmp_path / "out" / f"deltas-{n}.png").shape for n in (0, 3)]
    assert shapes[0] == shapes[1]
    height, width, _ = shapes[0]
    assert height > 1000  # for eleven layers
    assert width > 300
    out = capsys.readouterr().out
    trained = restore(run)
    names, labels = trained.dataset.class_names, trained.dataset.test_labels
    for n in (3, 0):
        assert f"test image {n}: {names[labels[n]]}, predicted " in out
    assert "  conv1                                  28×28×6   max|a| " in out


@pytest.mark.slow("trains")
def test_without_a_run_it_trains_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("--model", "mlp", "--max-steps", 3, "--images", 1, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "run" / "weights.safetensors").exists()
    assert (tmp_path / "out" / "deltas-1.png").exists()
    assert "mlp, 3 steps of 32 images" in capsys.readouterr().out


def finished(run: Path, folder: Path, *, age: float = 0, end: str = "finished") -> None:
    """Copy `run` to `folder` with the given `end`, and make it `age` seconds older."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "end": end}))
    os.utime(folder / "weights.safetensors", (1e9 - age, 1e9 - age))


@pytest.mark.slow("draws figures")
def test_the_newest_finished_run_is_used(run, tmp_path, capsys, monkeypatch):
    """Interrupted runs are skipped, and so are running ones, whose config.json has no end."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    finished(run, runs / "old", age=2)
    finished(run, runs / "a-deltas" / "run", age=1)
    finished(run, runs / "cut", end="interrupted")
    shutil.copytree(run, runs / "under-way")
    (runs / "other" / "x").mkdir(parents=True)
    monkeypatch.setattr(train, "train", lambda config: pytest.fail("trained, though there is a run"))
    assert main("--images", 0, "--channels", 1, "--out", tmp_path / "out") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "lenet5 from runs/a-deltas/run, the newest finished run; --fresh trains a new net"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["deltas-0.png"]


@pytest.mark.parametrize("argv", [("--fresh",), ("--model", "mlp"), ("--epochs", 2), ("--max-steps", 1)])
def test_a_net_is_trained_if_an_option_requests_it(run, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    finished(run, tmp_path / "runs" / "old")
    configs = []
    monkeypatch.setattr(train, "train", lambda config: configs.append(config) or 1)
    assert main(*argv, "--out", tmp_path / "out") == 130
    assert [config.out for config in configs] == [tmp_path / "out" / "run"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow("draws figures")
def test_the_last_layer_has_the_names_of_the_classes(run, tmp_path, monkeypatch):
    figures = []
    make = drawing.figure
    monkeypatch.setattr(drawing, "figure", lambda *size: figures.append(make(*size)) or figures[0])
    assert main("--run", run, "--images", 0, "--channels", 1, "--out", tmp_path / "out") == 0
    names = list(restore(run).dataset.class_names)
    labels = [[tick.get_text() for tick in axes.get_xticklabels()] for axes in figures[0].axes]
    assert labels.count(names) == 3  # the probabilities, the logits, and their δ
    assert [str(n) for n in range(10)] not in labels


def test_delta_equals_autodiff(run):
    """For the logits δ is p − onehot; for an inner layer it is jax.grad of the rest of the net, per image."""
    trained = restore(run)
    images = [5, 7, 2]
    found = deltas.compute(trained, images)
    labels = trained.dataset.test_labels[images]
    logits = found.activations[deltas.last(trained.net)]
    np.testing.assert_allclose(
        logits, compiled(trained.net.apply)(trained.params, trained.dataset.test_images[images]), rtol=1e-4, atol=1e-5
    )
    p = deltas.softmax(logits)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.deltas["dense3"], p - np.eye(10)[labels], atol=1e-6)
    at = [name for name, _ in trained.net.layers].index("conv2") + 1
    rest = jaxcnn.Serial(trained.net.layers[at:])
    loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    gradient = compiled(jax.grad(lambda a, label: loss(rest.apply(trained.params, a[None]), label[None])[0]))
    for a, delta, label in zip(found.activations["conv2"], found.deltas["conv2"], labels, strict=True):
        expected = gradient(a, label)
        np.testing.assert_allclose(delta, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_channels_are_those_with_the_largest_product(run):
    trained = restore(run)
    found = deltas.compute(trained, [4])
    row = deltas.row(trained.net, found, ("conv2",), 0, 3)
    a, delta = found.activations["conv2"][0], found.deltas["conv2"][0]
    size = np.abs(a * delta).sum((0, 1))
    assert row.shape == (10, 10, 16)
    assert list(row.channels) == sorted(range(16), key=lambda c: -size[c])[:3]
    np.testing.assert_array_equal(row.activation, a[..., list(row.channels)])
    np.testing.assert_array_equal(row.delta, delta[..., list(row.channels)])
    assert len(deltas.row(trained.net, found, ("conv1",), 0, 99).channels) == 6
    assert deltas.row(trained.net, found, ("dense1",), 0, 3).channels == ()


def test_every_layer_is_in_a_group():
    net = jaxcnn.serial(
        jaxcnn.residual(jaxcnn.serial(jaxcnn.Conv(1, 1))), jaxcnn.Flatten(), jaxcnn.Dropout(0.5), jaxcnn.Dense(3)
    )
    groups = [
        ("residual1/serial1/conv1", "residual1/serial1"), ("residual1", "flatten1", "dropout1"), ("dense1",)
    ]  # fmt: skip
    assert {name for group in groups for name in group} == {name for name, _ in net.walk()}
    assert deltas.groups(net) == groups
    assert deltas.groups(jaxcnn.serial(jaxcnn.Flatten(), jaxcnn.Dense(3))) == [("flatten1",), ("dense1",)]


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        (("--images", 2000), 2, "--images: must be from 0 to 1999, got 2000"),
        (("--images",), 2, "--images"),
        (("--channels", 0), 2, "--channels: must be at least 1, got 0"),
        (("--channel", 3), 2, "unknown option --channel, 3; did you mean --channels?"),
        (("--fresh",), 2, "--fresh: must be omitted with --run, whose net is already trained, got True"),
        (("--epochs", 3), 2, "--epochs: must be omitted with --run, whose net is already trained, got 3"),
        (("--run", "nowhere"), 1, "config.json: must be the config of a run, got No such file"),
        (("--out", __file__), 1, "must be a new or empty folder, got "),
    ],
)
def test_an_invalid_option_is_one_line(run, tmp_path, capsys, argv, status, expected):
    options = argv if argv[0] == "--run" else ("--run", run, *argv)
    out = () if argv[0] == "--out" else ("--out", tmp_path / "out")
    assert main(*options, *out) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert expected in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(("--model", "mlpp"), "did you mean mlp?"), (("--images", 2000), "--images: must be from 0 to 1999, got 2000")],
)
def test_an_invalid_training_is_reported_before_it_starts(tmp_path, capsys, argv, expected):
    assert main(*argv, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert not (tmp_path / "out").exists()
