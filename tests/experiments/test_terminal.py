import io
import math

import numpy as np
import pytest

from experiments import terminal
from experiments.dataset import make_dataset
from experiments.run_folder import Epoch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_versions_name_the_packages_that_results_depend_on():
    versions = terminal.versions()
    assert {"python", "jaxcnn", "jax", "optax"} <= set(versions)
    assert versions["numpy"] == np.__version__


def test_a_package_that_is_not_installed_is_marked(monkeypatch):
    monkeypatch.setattr(terminal, "PACKAGES", ("no-such-package-anywhere",))
    assert terminal.versions()["no-such-package-anywhere"] == "(not installed)"


def test_the_data_are_described_with_sizes_and_hash():
    images, labels = np.zeros((3, 4, 5), np.uint8), np.zeros(3, np.uint8)
    dataset = make_dataset("name", "/place", (images, labels), (images[:2], labels[:2]), 255, ("a", "b"))
    text = terminal.describe_data(dataset)
    assert text.startswith("name: 3 training and 2 test images 4×5×1, 2 classes, sha256 ")
    assert dataset.sha256[:12] in text
    assert text.endswith("from /place")


def test_the_banner_is_two_columns():
    assert terminal.banner({"a": "1", "long": "2"}) == "a     1\nlong  2"


def test_an_epoch_in_one_line():
    row = Epoch(3, 30, 0.5, 0.75, 0.4, 0.8, 2.0, 1234.5)
    line = terminal.describe_epoch(row, 10)
    assert " ".join(line.split()) == (
        "epoch 3/10 train loss 0.5000 accuracy 0.7500 validation loss 0.4000 accuracy 0.8000 2.0 s, 1,234 images/s"
    )
    cut = terminal.describe_epoch(Epoch(3, 30, 0.5, 0.75, math.nan, math.nan, 2.0, 1.0), 10)
    assert "not evaluated" in cut
    assert "nan" not in cut


def test_no_terminal_gets_plain_lines_and_not_too_many(monkeypatch):
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with terminal.progress(1000, stream) as progress:
        for step in range(1, 101):  # one step per second
            now += 1
            progress.update(step, 0.5, 0.25, 64.0)
        progress.line("epoch 1")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert " ".join(lines[0].split()) == "step 10/1000 loss 0.5000 accuracy 0.2500 64 images/s, 990 s left"
    assert lines[-1] == "epoch 1"
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_the_remaining_time_does_not_count_compiling(monkeypatch):
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with terminal.progress(100, stream) as progress:
        now = 60.0  # a minute to compile, then two seconds per step
        progress.update(1, 0.5, 0.25, 64.0)
        now = 80.0
        progress.update(11, 0.5, 0.25, 64.0)
    first, second = stream.getvalue().splitlines()
    assert first.endswith("64 images/s")
    assert second.endswith("64 images/s, 178 s left")


@pytest.mark.parametrize("text", ["epoch 1   accuracy 0.9000", "[brackets] are no markup"])
def test_a_terminal_gets_a_bar_and_the_lines_that_stay(text, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with terminal.progress(10, stream) as progress:
        progress.update(5, 0.5, 0.25, 64.0)
        progress.line(text)
    shown = stream.getvalue()
    assert text in shown
    assert "5/10" in shown
    assert "loss 0.500 accuracy 0.250" in shown
    assert "ETA" in shown
