"""Runs over several devices, and several runs over seeds."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import devices, train
from experiments.devices import DeviceOptions
from tests.experiments.test_resume import write_images


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images")


def run(images: Path, out: Path, *more: object) -> list[dict]:
    """Train a few steps, and return the metrics of each."""
    options = ("--data", "idx", "--data-dir", images, "--batch-size", 8, "--max-steps", 5, "--norms-every", 0)
    argv = (*options, "--out", out, *more)
    assert train.main([str(arg) for arg in argv]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow("trains")
@pytest.mark.parametrize("model", ["mlp", "tests.other_nets:Linen"])
def test_several_devices_compute_what_one_computes(tmp_path, images, model, capsys):
    """The batch norm of the Linen net has the statistics of the whole batch.

    SGD, because Adam scales up the rounding errors of a gradient that is 0, such as that of a bias before a batch norm.
    """
    options = ("--model", model, "--optimizer", "sgd")
    one = run(images, tmp_path / "one", *options)
    four = run(images, tmp_path / "four", *options, "--devices", 4, "--device", "cpu")
    assert "each batch is split over 4" in capsys.readouterr().out
    for a, b in zip(one, four, strict=True):
        assert set(a) == set(b)
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
    tested = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "four")]
    assert tested[0]["test_loss"] == pytest.approx(tested[1]["test_loss"], rel=1e-5)


@pytest.mark.slow("trains")
@pytest.mark.parametrize("model", ["mlp", "tests.other_nets:pair"])
def test_microbatches_compute_what_the_batch_computes(tmp_path, images, model, capsys):
    """Norms by layer are not measured, because no activations of the whole batch exist."""
    options = ("--model", model, "--optimizer", "sgd", "--augment", "flip", "--label-smoothing", 0.1)
    whole = run(images, tmp_path / "whole", *options)
    parts = run(images, tmp_path / "parts", *options, "--microbatch", 4, "--norms-every", 1)
    two = run(images, tmp_path / "two", *options, "--microbatch", 2, "--devices", 2, "--device", "cpu")
    assert "4 images at a time" in capsys.readouterr().out
    for a, b, c in zip(whole, parts, two, strict=True):
        assert set(a) == set(b) == set(c)
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
            assert a[name] == pytest.approx(c[name], rel=1e-5, abs=1e-6), name


def test_a_batch_is_split_if_the_devices_divide_it():
    placement = devices.choose(DeviceOptions(devices=4))
    x, labels = placement.split((np.ones((8, 2)), np.arange(8)))
    assert [shard.data.shape for shard in x.addressable_shards] == [(2, 2)] * 4
    assert len(labels.sharding.device_set) == 4
    assert placement.split((np.ones((6, 2)), np.arange(6)))[0].shape == (6, 2)
    replicated = placement.replicate({"a": np.ones(3)})["a"]
    assert [shard.data.shape for shard in replicated.addressable_shards] == [(3,)] * 4
    assert devices.choose(DeviceOptions()).replicate("unchanged") == "unchanged"


def test_a_platform_that_is_missing_leaves_the_configuration_unchanged():
    before = jax.config.values["jax_platforms"]
    with pytest.raises(devices.UsageError, match=r"^--device: must be .*, got gpu, which jax does not find; "):
        devices.choose(DeviceOptions(device="gpu"))
    assert jax.config.values["jax_platforms"] == before


@pytest.mark.slow("trains")
def test_several_seeds_are_several_runs_and_a_summary(tmp_path, images, capsys):
    argv = ("--data", "idx", "--data-dir", images, "--model", "mlp", "--batch-size", 8, "--max-steps", 2, "--seeds", 2)
    assert train.main([str(arg) for arg in (*argv, "--seed", 3, "--out", tmp_path / "runs")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    configs = [json.loads((tmp_path / "runs" / f"seed-{n}" / "config.json").read_text()) for n in (3, 4)]
    assert [(config["seed"], config["seeds"], config["end"]) for config in configs] == [
        (3, 1, "finished"),
        (4, 1, "finished"),
    ]
    values = [config["test_accuracy"] for config in configs]
    expected = f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}, mean and standard deviation of 2 seeds"
    assert line.startswith(f"test accuracy {expected}")
    assert train.main([str(arg) for arg in (*argv, "--seed", 4, "--out", tmp_path / "runs")]) == 1
    assert re.search(r"seed-4: must be a new or empty folder, got one that contains files", capsys.readouterr().err)
    assert not (tmp_path / "runs" / "seed-5").exists()
