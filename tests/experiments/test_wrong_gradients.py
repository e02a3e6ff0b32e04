"""Our convolution gradients are correct where `jax.vjp` of the stock convolution is wrong on XLA:CPU."""

import itertools

import numpy as np
import pytest
import torch

from experiments.benchmarks import wrong_gradients
from experiments.benchmarks.wrong_gradients import WRONG, Config, Found
from tests import oracles


@pytest.fixture(scope="module")
def found():
    return list(wrong_gradients.sweep(Config()))


def test_ours_are_right_everywhere(found):
    assert len(found) == 90
    for one in found:
        assert one.ours < 1e-5, str(one)


def test_stock_jax_is_wrong_where_it_asks_for_negative_padding_and_nowhere_else(found):
    """It fails for low padding beyond the kernel's reach with little high padding: 18 of 90 cases on jaxlib 0.10.2."""
    wrong = [one for one in found if one.stock > WRONG]
    if not wrong:
        pytest.skip("this XLA computes them all rightly")
    assert len(wrong) <= 18
    for one in wrong:
        assert one.padding[0] > one.kernel_size - 1, str(one)


@pytest.mark.parametrize(("patch", "lo", "hi"), list(itertools.product((1, 2, 3), (0, 2, 5), (0, 3))))
def test_the_judge_agrees_with_pytorch(patch, lo, hi):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 4, 6, 2)), rng.standard_normal((1, patch, 2, 3))
    there = torch.tensor(x, requires_grad=True)
    y = oracles.conv(there, torch.tensor(w), padding=((0, 0), (lo, hi)))
    delta = rng.standard_normal(tuple(y.shape))
    (expected,) = torch.autograd.grad(y, there, torch.tensor(delta))
    np.testing.assert_allclose(wrong_gradients.delta_x(delta, w, lo, 6), expected, rtol=1e-12, atol=1e-12)


def test_what_is_printed(monkeypatch, capsys):
    rows = [Found(2, (2, 0), 6, float("inf"), 1e-7), Found(1, (0, 0), 6, 1e-7, 1e-7)]
    monkeypatch.setattr(wrong_gradients, "sweep", lambda config: rows)
    assert wrong_gradients.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("patch")] == [str(rows[0])]
    assert lines[-1] == "of 2 convolutions 1 wrong by stock JAX, 0 by jaxcnn"
    rows.append(Found(1, (0, 0), 7, 1e-7, 0.5))
    assert wrong_gradients.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "of 3 convolutions 1 wrong by stock JAX, 1 by jaxcnn"


def test_no_channels_are_refused(capsys):
    assert wrong_gradients.main(["--channels", "0"]) != 0
    assert "--channels: expected 1 or more, got 0" in capsys.readouterr().err
