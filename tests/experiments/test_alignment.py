import csv
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread

import jaxcnn
from experiments import alignment, data, terminal
from experiments.errors import RunError
from tests.cases import compiled

LOSS = jaxcnn.softmax_cross_entropy_with_integer_labels


def main(*argv: object) -> int:
    return alignment.main([str(arg) for arg in argv])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow("trains")
def test_table_csv_and_plot(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ("--rules", "sign-symmetric", "exact", "--seeds", 2, "--steps", 40, "--batch-size", 32, "--out", out)
    assert main(*argv) == 0
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.csv", "alignment.png", "angles.csv"]
    assert min(imread(out / "alignment.png").shape[:2]) > 250

    angles = read(out / "angles.csv")
    rules, steps = ("exact", "sign-symmetric"), sorted({int(r["step"]) for r in angles})
    assert (len(steps), steps[0], steps[-1]) == (alignment.MEASUREMENTS, 0, 39)
    assert [(r["rule"], r["seed"], int(r["step"]), r["layer"]) for r in angles] == [
        (rule, seed, step, layer)
        for rule in rules for seed in "01" for step in steps for layer in ("conv1", "conv2", "dense1")
    ]  # fmt: skip
    for r in angles:
        if r["rule"] == "exact" or r["layer"] == "dense1":  # its δ comes directly from the loss
            assert float(r["degrees"]) < 0.1
        else:
            assert 1 < float(r["degrees"]) < 90

    accuracies = read(out / "accuracy.csv")
    assert [(r["rule"], r["seed"]) for r in accuracies] == [(rule, seed) for rule in rules for seed in "01"]
    text = capsys.readouterr().out
    for r in accuracies:
        assert float(r["test_accuracy"]) > 0.3  # chance is 0.1
        assert f"{r['rule']:<18} seed {r['seed']}   test accuracy {float(r['test_accuracy']):.4f}" in text
    of_conv2 = [r for r in angles if (r["rule"], r["layer"]) == ("sign-symmetric", "conv2")]
    first, last = (np.mean([float(r["degrees"]) for r in of_conv2 if int(r["step"]) == step]) for step in (0, 39))
    assert f"{first:.1f}° → {last:.1f}°" in text


def fake(trained, stop):
    """Return a `train` that finishes three trainings immediately and then raises `stop`."""

    def train(name, seed, dataset, steps, batch_size, update):
        update(steps, 0.5, 0.25, 100.0)
        if len(trained) == 3:
            raise stop
        trained.append(alignment.Trained(name, seed, {0: {"conv1": 1.0}, 9: {"conv1": 2.0}}, 0.5))
        return trained[-1]

    return train


@pytest.mark.parametrize(
    ("stop", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; 3 of 12 trainings are saved in {out}"),
        (RunError("exact: no"), 1, "exact: no; 3 of 12 trainings are saved in {out}"),
    ],
)
def test_finished_trainings_are_saved(tmp_path, capsys, monkeypatch, stop, status, message):
    monkeypatch.setattr(alignment, "train", fake([], stop))
    out = tmp_path / "out"
    assert main("--seeds", 2, "--out", out) == status
    assert capsys.readouterr().err == f"python -m experiments.alignment: {message.format(out=out)}\n"
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.csv", "alignment.png", "angles.csv"]
    assert [(r["rule"], r["seed"]) for r in read(out / "accuracy.csv")] == [
        ("exact", "0"), ("exact", "1"), ("literal up", "0")
    ]  # fmt: skip
    assert len(read(out / "angles.csv")) == 6


def test_ctrl_c_in_the_first_training_leaves_no_folder(tmp_path, capsys, monkeypatch):
    def train(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(alignment, "train", train)
    assert main("--out", tmp_path / "out") == 130
    assert capsys.readouterr().err == "python -m experiments.alignment: interrupted; nothing was saved\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow("trains")
def test_progress_is_shown_over_all_trainings(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(terminal.PlainLines, "update", lambda self, step, *numbers: seen.append((step, self._total)))
    argv = ("--rules", "exact", "--seeds", 2, "--steps", 3, "--batch-size", 4)
    assert main(*argv, "--out", tmp_path / "out") == 0
    assert seen == [(step, 6) for step in (2, 3, 5, 6)]  # a training's first step compiles


def test_angles_equal_the_definition():
    rng = np.random.default_rng(0)
    one, two = ({"conv1": {"weight": rng.standard_normal((3, 4)), "bias": rng.standard_normal(4)}} for _ in range(2))
    flat = [np.concatenate([tree["conv1"]["weight"].ravel(), tree["conv1"]["bias"]]) for tree in (one, two)]
    expected = np.degrees(np.arccos(flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])))
    assert float(alignment.layer_angles(one, two)["conv1"]) == pytest.approx(expected, rel=1e-4)
    for factor, degrees in ((3.0, 0), (-0.5, 180)):
        scaled = jax.tree.map(lambda a, factor=factor: factor * a, one)
        assert float(alignment.layer_angles(scaled, one)["conv1"]) == pytest.approx(degrees, abs=1e-3)
    nothing = jax.tree.map(np.zeros_like, one)
    assert np.isnan(alignment.layer_angles(nothing, one)["conv1"])


@pytest.mark.slow("compiles whole nets")
@pytest.mark.parametrize("name", alignment.RULES[1:])
def test_every_rule_rotates_the_gradient_and_keeps_the_output(name):
    """Rules rotate gradients by less than 90°, except rules that redirect δ; the outputs are equal."""
    net = alignment.net(10)
    params = net.init(jax.random.key(0), (28, 28, 1))
    sample = data.load("fashion-mnist-sample")
    x, labels = sample.train_images[:32], sample.train_labels[:32]

    @compiled
    def both(params, x, labels):
        def loss(params, rules):
            outputs = net.apply(params, x, rules=rules)
            return LOSS(outputs, labels).mean(), outputs

        return [
            jax.grad(loss, has_aux=True)(params, rules) for rules in (alignment.rules_of(name, 0, 32), None)
        ]  # fmt: skip

    (found, outputs), (true, exact) = both(params, x, labels)
    np.testing.assert_allclose(outputs, exact, rtol=1e-5, atol=1e-6)
    angles = {layer: float(a) for layer, a in alignment.layer_angles(found, true).items()}
    assert angles["conv1"] > 0.1
    if name in ("sign-symmetric", "clipped δ", "8-bit δ"):
        assert max(angles.values()) < 60
    if name in ("literal up", "feedback alignment", "sign-symmetric"):
        assert angles["dense1"] < 0.1


def test_each_seed_has_other_random_kernels():
    w = np.ones((5, 5, 1, 8), np.float32)
    one, two = (alignment.rules_of("feedback alignment", seed, 32)[jaxcnn.Conv].kernel(w) for seed in (0, 1))
    assert not np.allclose(one, two)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--rules", "up"), "--rules: must be one of all, exact, literal up, feedback alignment, "),
        (("--rules", "sign-symetric"), "got 'sign-symetric'; did you mean sign-symmetric?"),
        (("--rules",), "--rules"),
        (("--seeds", 0), "--seeds: must be at least 1, got 0"),
        (("--steps", -3), "--steps: must be at least 1, got -3"),
        (("--batch-size", 10_001), "--batch-size: must be at most 10000, got 10001"),
        (("--step", 3), "unknown option --step, 3; did you mean --steps?"),
    ],
)
def test_an_invalid_option_is_one_line(tmp_path, capsys, argv, expected):
    assert main(*argv, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert expected in line
    assert not (tmp_path / "out").exists()
