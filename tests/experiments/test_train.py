import csv
import errno
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxcnn
from experiments import (
    augmentation,
    checkpoints,
    data,
    dataset,
    gradients,
    idx_files,
    process,
    recipe,
    report,
    run_folder,
    terminal,
    train,
)
from experiments.models import MODELS

ROOT = Path(train.__file__).parent.parent
LOSS = jaxcnn.softmax_cross_entropy_with_integer_labels


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "run"


def main(*argv: object) -> int:
    return train.main([str(arg) for arg in argv])


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- the main job ----


def test_the_main_job_from_banner_to_weights(out, capsys):
    assert main("--max-steps", 3, "--check-grads", "--seed", 5, "--out", out) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    text = captured.out
    for said in (
        f"jax {jax.__version__}",
        "device ",
        "fashion-mnist-sample: 10,000 training and 2,000 test images 28×28×1",
        "sha256 0e03de1643cd",
        "lecture, 3 steps of 32 images, adam at 0.002",
        "24×24×32",
        "12×12×32",
        "62,346",
        "largest relative difference between rules and autodiff",
        "hidden_layer2/weight",
        f"results in {out}",
    ):
        assert said in text
    assert re.search(r"^seed +5$", text, re.MULTILINE)
    assert re.search(r"^compiling … \d+\.\d s$", text, re.MULTILINE)
    assert re.search(r"^test accuracy 0\.\d{4}$", text, re.MULTILINE)
    differences = [float(line.split()[1]) for line in text.splitlines() if re.match(r"  \w+/(weight|bias) ", line)]
    assert len(differences) == 6
    assert max(differences) <= 1e-5
    assert "\x1b" not in text  # no terminal, no colors
    assert "\r" not in text

    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "environment.json",
        "metrics.csv",
        "metrics.jsonl",
        "weights.safetensors",
    ]
    environment = json.loads((out / "environment.json").read_text())
    assert environment["command"] == shlex.join(sys.orig_argv)
    assert environment["versions"] == terminal.versions()
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [set(step) for step in steps] == [{"step", "loss", "accuracy", "gradient_norm", "update_norm"}] * 3
    assert [step["step"] for step in steps] == [1, 2, 3]
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == "lecture"
    assert config["seed"] == 5
    assert config["learning_rate"] == 0.002
    assert config["data_sha256"].startswith("0e03de1643cd")
    assert config["versions"]["jax"] == jax.__version__
    assert [row["step"] for row in rows(out)] == ["3"]


@pytest.mark.parametrize(("choice", "text"), [("tuned", "freed memory is kept"), ("stock", "the allocator's defaults")])
def test_the_allocator_is_as_chosen(out, capsys, monkeypatch, choice, text):
    calls = []
    monkeypatch.setattr(process, "keep_freed_memory", lambda: calls.append(choice) or True)
    assert main("--model", "mlp", "--max-steps", 1, "--allocator", choice, "--out", out) == 0
    assert calls == ["tuned"] * (choice == "tuned")
    assert re.search(rf"^memory +{text}", capsys.readouterr().out, re.MULTILINE)


def test_compiled_programs_are_kept_where_asked(out, monkeypatch):
    kept = []
    monkeypatch.setattr(process, "keep_compiled_programs", lambda: kept.append(True))
    assert main("--model", "mlp", "--max-steps", 1, "--keep-compiled", "--out", out) == 0
    assert kept == [True]


@pytest.mark.slow("trains")
def test_it_learns_and_its_weights_give_the_accuracy_it_reports(out):
    assert main("--model", "mlp", "--epochs", 2, "--out", out) == 0
    first, last = rows(out)
    assert float(last["train_loss"]) < float(first["train_loss"])
    assert float(last["validation_accuracy"]) > 0.7
    assert last["step"] == "562"

    net, sample = MODELS["mlp"](10), data.load("fashion-mnist-sample")
    like = jax.eval_shape(lambda: net.init(jax.random.key(0), sample.image_shape))
    params = checkpoints.load(out / "weights.safetensors", like)
    again = jaxcnn.evaluate(net, LOSS, params, dataset.batches(sample.test_images, sample.test_labels, 500))
    config = json.loads((out / "config.json").read_text())
    assert config["best_step"] == 562
    assert again["accuracy"] == pytest.approx(config["test_accuracy"], abs=1e-6)
    assert again["loss"] == pytest.approx(config["test_loss"], rel=1e-4)
    assert json.loads(checkpoints.metadata(out / "weights.safetensors")["config"])["model"] == "mlp"


@pytest.mark.slow("trains")
def test_the_seed_decides_everything(tmp_path):
    def weights(name: str, *argv: object) -> dict[str, np.ndarray]:
        assert main("--model", "mlp", "--max-steps", 5, "--out", tmp_path / name, *argv) == 0
        return load_file(tmp_path / name / "weights.safetensors")

    one, same, other = weights("one"), weights("same"), weights("other", "--seed", 1)
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
    assert not np.array_equal(one["dense1/weight"], other["dense1/weight"])


@pytest.mark.slow("trains")
def test_the_lectures_update_learns(out):
    assert main("--model", "mlp", "--optimizer", "sgd", "--epochs", 2, "--out", out) == 0
    assert json.loads((out / "config.json").read_text())["learning_rate"] == 0.05
    first, last = rows(out)
    assert float(last["validation_loss"]) < float(first["validation_loss"])


@pytest.mark.slow("trains")
def test_digits(out, capsys):
    pytest.importorskip("sklearn")
    assert main("--data", "digits", "--model", "mlp", "--max-steps", 2, "--out", out) == 0
    assert "8×8×1" in capsys.readouterr().out


@pytest.mark.slow("trains")
@pytest.mark.skipif(not idx_files.holds_all(idx_files.SYSTEM_DIR), reason="no Fashion-MNIST on this system")
def test_the_full_set(out, capsys):
    assert main("--data", "fashion-mnist", "--model", "mlp", "--max-steps", 2, "--out", out) == 0
    assert "fashion-mnist: 60,000 training and 10,000 test images" in capsys.readouterr().out


def test_the_default_folder_lies_in_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("--model", "mlp", "--max-steps", 1) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-mlp", folder.name)
    assert capsys.readouterr().out.splitlines()[-1] == f"results in {folder}"


# ---- other ways to end ----


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_good_weights(out, capsys):
    # A step of this size makes the weights so large that the next loss overflows.
    argv = ("--model", "mlp", "--optimizer", "sgd", "--learning-rate", 3e38, "--max-steps", 40, "--out", out)
    assert main(*argv) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.search(
        r"loss of step \d+: must be finite, got (nan|inf); try a --learning-rate below 3e\+38; the weights after step",
        line,
    )
    assert re.search(r"; step \d+: .*the first δ is that of dense\d \(norm (nan|inf)", line)
    assert f"results in {out}" in captured.out
    for array in load_file(out / "weights.safetensors").values():
        assert np.isfinite(array).all()


@pytest.mark.slow("trains")
def test_ctrl_c_saves_the_weights(out, capsys, monkeypatch):
    def update(self, step, *numbers):
        if step == 32:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(terminal.PlainLines, "update", update)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main("--model", "mlp", "--out", out) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    captured = capsys.readouterr()
    assert captured.err == (
        "python -m experiments.train: interrupted after step 32; its checkpoint is saved; "
        f"to continue: python -m experiments.train --resume {out}\n"
    )
    (row,) = rows(out)
    assert row["step"] == "32"
    assert row["validation_accuracy"] == ""
    assert "test accuracy not measured, because the run has not finished\n" in captured.out
    assert "nan" not in captured.out
    assert json.loads((out / "config.json").read_text())["end"] == "interrupted"
    assert set(load_file(out / "weights.safetensors")) == {
        f"dense{n}/{p}" for n in (1, 2, 3) for p in ("weight", "bias")
    }
    assert (out / "curves.png").exists()


def test_after_ctrl_c_the_accuracy_is_that_of_the_best_finished_epoch():
    rows = [
        run_folder.Epoch(1, 10, 1.0, 0.5, 0.8, 0.6, 2.0, 320.0),
        run_folder.Epoch(2, 20, 0.7, 0.7, 0.6, 0.75, 1.5, 426.0),
        run_folder.Epoch(3, 25, 0.7, 0.7, math.nan, math.nan, 1.5, 426.0),
    ]
    text = terminal.summarize(rows, 0, 10.0, None)
    assert "\nvalidation accuracy 0.7500 after epoch 2, the best one\n" in text
    assert text.endswith("\ntest accuracy not measured, because the run has not finished")
    assert "trained 25 steps in 5.0 s, 384 images/s; 10.0 s with evaluations and checkpoints\n" in text
    resumed = terminal.summarize(rows, 21, 1.5, None)
    assert "in 5.0 s, 384 images/s; 1.5 s with evaluations and checkpoints since step 21, where the run was" in resumed
    assert terminal.summarize(rows[:2], 0, 10.0, {"accuracy": 0.7}).endswith("\ntest accuracy 0.7000")


def test_a_second_ctrl_c_reports_the_saved_weights(out, capsys, monkeypatch):
    def update(self, step, *numbers):
        if step == 16:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.PlainLines, "update", update)
    assert main("--model", "mlp", "--out", out) == 130
    expected = "python -m experiments.train: interrupted; no weights were saved yet; to continue: python -m "
    assert capsys.readouterr().err == f"{expected}experiments.train --resume {out}\n"


@pytest.mark.slow("trains")
@pytest.mark.parametrize("file", ["metrics.csv", "weights.safetensors"])
def test_a_full_disk_names_the_file_and_the_saved_weights(out, capsys, monkeypatch, file):
    """The disk fills up in the second epoch."""
    replace = Path.replace
    written = []

    def full(self, target):
        written.append(target.name)
        if target.name == file and written.count(file) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    assert main("--model", "mlp", "--batch-size", 2500, "--epochs", 2, "--out", out) == 1
    step = 3 if file == "weights.safetensors" else 6
    assert capsys.readouterr().err == (
        f"python -m experiments.train: {out / file}: must be writable, got No space left on device; "
        "the previous file is unchanged; "
        f"the weights after step {step} are in {out / 'weights.safetensors'}; "
        f"to continue: python -m experiments.train --resume {out}\n"
    )
    assert checkpoints.metadata(out / "weights.safetensors")["step"] == str(step)
    expected = {"checkpoints", "config.json", "environment.json", "metrics.csv", "metrics.jsonl", "weights.safetensors"}
    assert {path.name for path in out.iterdir()} == expected
    monkeypatch.undo()
    assert main("--resume", out) == 0  # there is space again
    assert [row["step"] for row in rows(out)] == ["3", "6"]


@pytest.mark.parametrize("part", ["curves", "report"])
def test_a_report_that_fails_does_not_change_how_the_training_ended(out, capsys, monkeypatch, part):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "x.png")

    def wrong(*args):
        raise KeyError("a programming error")

    where, name, raises = {"curves": (run_folder, "plot_curves", full), "report": (report, "write", wrong)}[part]
    monkeypatch.setattr(where, name, raises)
    assert main("--model", "mlp", "--max-steps", 1, "--out", out) == 0
    reason = {
        "curves": f"{out}/curves.png: must be writable, got No space left on device; no part of it was written",
        "report": "KeyError: 'a programming error'",
    }[part]
    captured = capsys.readouterr()
    command = f"python -m experiments.report {out}"
    line = f"python -m experiments.train: the report was not written ({reason}); to write it: {command}\n"
    assert captured.err == line
    assert captured.out.endswith(f"results in {out}\n")
    assert json.loads((out / "config.json").read_text())["end"] == "finished"


def test_the_banner_names_the_device_that_is_used():
    used = terminal.describe_device()
    assert used.startswith(jax.devices()[0].device_kind)
    assert used.endswith(f", the first of {len(jax.devices())}")  # tests/conftest.py creates several
    assert "×" not in used


def test_rules_that_differ_from_autodiff_stop_the_run_before_it_begins(out, capsys, monkeypatch):
    monkeypatch.setattr(
        gradients, "compare", lambda *args: {"conv1/weight": 2e-5, "conv1/bias": 1e-7, "conv2/weight": float("nan")}
    )
    assert main("--model", "mlp", "--check-grads", "--out", out) == 1
    captured = capsys.readouterr()
    assert "conv1/bias       1.0e-07" in captured.out
    assert captured.err.startswith("python -m experiments.train: gradient differences: must be at most 1e-05, got ")
    assert captured.err.endswith("for conv1/weight, conv2/weight\n")
    assert not out.exists()


# ---- bad input ----


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        (
            ["--model", "lectur"],
            2,
            "--model: must be one of lecture, mlp, lenet5, small, small-resnet, resnet, resnet-gn, vgg, mobile, unet, "
            "got 'lectur'; did you mean lecture?",
        ),
        (
            ["--data", "fashion-minst"],
            2,
            "--data: must be one of fashion-mnist-sample, fashion-mnist, digits, idx, cifar10, cifar100, "
            "cifar100-coarse, got 'fashion-minst'; did you mean fashion-mnist?",
        ),
        (
            ["--optimizer", "lions"],
            2,
            "--optimizer: must be one of adam, adamw, sgd, lion, got 'lions'; did you mean lion?",
        ),
        (["--schedule", "linear"], 2, "--schedule: must be one of cosine, step, one-cycle, constant, got 'linear'"),
        (["--augment", "flip", "rotate"], 2, "--augment: must be one of crop, flip, cutout, mixup, got 'rotate'"),
        (["--augment", "flip", "flip"], 2, "--augment: must be different names, got flip flip"),
        (["--warmup", "-1"], 2, "--warmup: must be a finite number >= 0, got -1.0"),
        (["--warmup", "10"], 2, "--warmup: must be less than the 10 epochs, got 10.0"),
        (
            ["--warmup", "1", "--schedule", "one-cycle"],
            2,
            "--warmup: must be 0 with --schedule one-cycle, which has its own, got 1.0",
        ),
        (["--weight-decay", "nan"], 2, "--weight-decay: must be a finite number >= 0, got nan"),
        (
            ["--weight-decay", "0.1"],
            2,
            "--weight-decay: must be 0 with --optimizer adam, got 0.1; choose --optimizer adamw",
        ),
        (["--clip-norm", "inf"], 2, "--clip-norm: must be a finite number >= 0, got inf"),
        (["--label-smoothing", "1"], 2, "--label-smoothing: must be from 0 up to, but not including, 1, got 1.0"),
        (["--ema", "-0.5"], 2, "--ema: must be from 0 up to, but not including, 1, got -0.5"),
        (["--seeds", "0"], 2, "--seeds: must be at least 1, got 0"),
        (["--seed", "4294967295", "--seeds", "2"], 2, "--seed: must be from 0 to 4294967294, got 4294967295"),
        (["--device", "gpv"], 2, "--device: must be one of cpu, gpu, tpu, got 'gpv'; did you mean gpu?"),
        (
            ["--device", "tpu"],
            2,
            "--device: must be a platform of this machine and this jaxlib, got tpu, which jax does not find; "
            "pip install 'jaxcnn[tpu]' on a machine with a TPU, or choose --device cpu",
        ),
        (["--devices", "0"], 2, "--devices: must be at least 1, got 0"),
        (["--devices", "3"], 2, "--batch-size: must be a multiple of the 3 devices, got 32"),
        (["--devices", "4", "--microbatch", "6"], 2, "--microbatch: must be a multiple of the 4 devices, got 6"),
        (["--microbatch", "0"], 2, "--microbatch: must be at least 1, got 0"),
        (
            ["--microbatch", "8", "--augment", "mixup"],
            2,
            "--microbatch: must be omitted with mixup, whose accuracy needs all outputs of a step, got 8",
        ),
        (
            ["--devices", "16"],
            2,
            "--devices: must be at most 8, the devices of platform cpu, got 16; "
            "set JAX_NUM_CPU_DEVICES to divide the CPU",
        ),
        (
            ["--dtype", "float23"],
            2,
            "--dtype: must be one of float32, bfloat16, float16, got 'float23'; did you mean float32?",
        ),
        (
            ["--dtype", "bfloat16", "--model", "experiments.models:mlp"],
            2,
            "--dtype: must be float32 with a net of your own, got bfloat16",
        ),
        (["--allocator", "mine"], 2, "--allocator: must be one of tuned, stock, got 'mine'"),
        (["--epochs", "0"], 2, "--epochs: must be at least 1, got 0"),
        (["--epochs", "-3"], 2, "--epochs: must be at least 1, got -3"),
        (["--epochs", "many"], 2, "--epochs: must be an integer, got 'many'"),
        (["--batch-size", "0"], 2, "--batch-size: must be at least 1, got 0"),
        (["--save-every", "0"], 2, "--save-every: must be at least 1, got 0"),
        (["--keep", "0"], 2, "--keep: must be at least 1, got 0"),
        (["--norms-every", "-1"], 2, "--norms-every: must be at least 0, got -1"),
        (["--validation", "1"], 2, "--validation: must be from 0 up to, but not including, 1, got 1.0"),
        (["--validation", "-0.1"], 2, "--validation: must be from 0 up to, but not including, 1, got -0.1"),
        (["--validation", "nan"], 2, "--validation: must be from 0 up to, but not including, 1, got nan"),
        (["--max-steps", "0"], 2, "--max-steps: must be at least 1, got 0"),
        (["--seed", "-1"], 2, "--seed: must be from 0 to 4294967295, got -1"),
        (["--seed", "4294967296"], 2, "--seed: must be from 0 to 4294967295, got 4294967296"),
        (["--learning-rate", "0"], 2, "--learning-rate: must be a finite number > 0, got 0.0"),
        (["--learning-rate", "nan"], 2, "--learning-rate: must be a finite number > 0, got nan"),
        (["--learning-rate", "inf"], 2, "--learning-rate: must be a finite number > 0, got inf"),
        (["--learning-rate", "fast"], 2, "--learning-rate: must be a number, got 'fast'"),
        (
            ["--data-dir", "x"],
            2,
            "--data-dir: must be omitted unless --data is one of fashion-mnist, idx, cifar10, cifar100, "
            "cifar100-coarse, got x",
        ),
        (["--data", "idx"], 2, "--data-dir: must be the folder of the idx files if --data is idx, got none"),
        (["--lr", "3"], 2, "unknown option --lr, 3; did you mean --learning-rate?"),
        (["--epoch", "3"], 2, "unknown option --epoch, 3; did you mean --epochs?"),
        (["lecture"], 2, "unknown option lecture"),
    ],
)
def test_a_wrong_command_line_is_an_error_before_anything_is_read_or_created(
    argv, status, expected, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", lambda *args: pytest.fail("the data were read before the check"))
    assert main(*argv) == status
    captured = capsys.readouterr()
    assert captured.err == f"python -m experiments.train: {expected}\n"
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow("builds every net")
def test_a_net_that_does_not_fit_the_images(out, capsys):
    pytest.importorskip("sklearn")
    assert main("--data", "digits", "--out", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m experiments.train: --model: must be a net for the images of digits (mlp, small, ")
    assert not out.exists()


def test_a_batch_larger_than_the_data(out, capsys):
    assert main("--batch-size", 9_001, "--out", out) == 2
    expected = (
        "--batch-size: must be at most 9000, the training images of fashion-mnist-sample without those for validation, "
        "got 9001\n"
    )
    assert capsys.readouterr().err.endswith(expected)
    assert not out.exists()


def test_an_output_folder_that_is_a_file(out, capsys, monkeypatch):
    out.write_text("mine")
    monkeypatch.setattr(train, "load", lambda *args: pytest.fail("the data were read before the check"))
    assert main("--out", out) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--out {out}: must be a new or empty folder, got {out}, which is a file")
    assert out.read_text() == "mine"


def test_data_that_cannot_be_read(tmp_path, out, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in idx_files.FASHION_MNIST_FILES.values():
        (folder / f"{file.name}.gz").write_bytes((idx_files.SAMPLE_DIR / f"{file.name}.gz").read_bytes()[:-100])
    assert main("--data", "fashion-mnist", "--data-dir", folder, "--out", out) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "train-images-idx3-ubyte.gz: must be an idx file of images, got a truncated or corrupt gzip file" in line
    assert not out.exists()


# ---- as a process ----


def python(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_help_names_every_choice_and_needs_no_jax():
    ran = python("-X", "importtime", "-m", "experiments.train", "--help")
    assert ran.returncode == 0
    rates = [f"{default.learning_rate:g}" for default in recipe.OPTIMIZERS.values()]
    assert all(rate in ran.stdout for rate in rates)
    for name in (*MODELS, *data.SOURCES, *recipe.OPTIMIZERS, *recipe.SCHEDULES, *augmentation.AUGMENTATIONS):
        assert name in ran.stdout
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "tyro" in imported
    assert not imported & {"jax", "matplotlib", "optax", "sklearn"}


@pytest.mark.slow("trains")
def test_a_process_that_fails_says_one_line_and_no_traceback(tmp_path):
    ran = python("-m", "experiments.train", "--model", "mlpp", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert "did you mean mlp?" in ran.stderr
