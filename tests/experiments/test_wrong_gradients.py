"""Our convolution gradients are correct where `jax.vjp` of the stock convolution is wrong on XLA:CPU."""

import itertools

import numpy as np
import pytest
import torch

from experiments.benchmarks import wrong_gradients
from experiments.benchmarks.wrong_gradients import WRONG, Config, Measured
from tests import oracles


@pytest.fixture(scope="module")
def all_results():
    return list(wrong_gradients.measure_all(Config()))


def test_ours_are_correct_everywhere(all_results):
    assert len(all_results) == 90
    for one in all_results:
        assert one.ours < 1e-5, str(one)


def test_stock_jax_is_wrong_only_for_negative_padding(all_results):
    """It fails for low padding beyond the kernel's reach with little high padding: 18 of 90 cases on jaxlib 0.10.2."""
    wrong = [one for one in all_results if one.stock > WRONG]
    if not wrong:
        pytest.skip("this XLA computes them all correctly")
    assert len(wrong) <= 18
    for one in wrong:
        assert one.padding[0] > one.kernel_size - 1, str(one)


@pytest.mark.parametrize(("kernel_size", "lo", "hi"), list(itertools.product((1, 2, 3), (0, 2, 5), (0, 3))))
def test_the_reference_agrees_with_pytorch(kernel_size, lo, hi):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 4, 6, 2)), rng.standard_normal((1, kernel_size, 2, 3))
    x_torch = torch.tensor(x, requires_grad=True)
    y = oracles.conv(x_torch, torch.tensor(w), padding=((0, 0), (lo, hi)))
    delta = rng.standard_normal(tuple(y.shape))
    (expected,) = torch.autograd.grad(y, x_torch, torch.tensor(delta))
    np.testing.assert_allclose(wrong_gradients.delta_x(delta, w, lo, 6), expected, rtol=1e-12, atol=1e-12)


def test_the_output(monkeypatch, capsys):
    rows = [Measured(2, (2, 0), 6, float("inf"), 1e-7), Measured(1, (0, 0), 6, 1e-7, 1e-7)]
    monkeypatch.setattr(wrong_gradients, "measure_all", lambda config: rows)
    assert wrong_gradients.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("kernel")] == [str(rows[0])]
    assert lines[-1] == "2 convolutions: 1 wrong by stock JAX, 0 by jaxcnn"
    rows.append(Measured(1, (0, 0), 7, 1e-7, 0.5))
    assert wrong_gradients.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "3 convolutions: 1 wrong by stock JAX, 1 by jaxcnn"


def test_no_channels_are_an_error(capsys):
    assert wrong_gradients.main(["--channels", "0"]) != 0
    assert "--channels: must be at least 1, got 0" in capsys.readouterr().err
