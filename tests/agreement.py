"""Entry by entry against PyTorch, also where entries are NaN or infinite, which a norm over all of them cannot tell."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

#: float64, of sums in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def random_delta(y: Any, seed: int = 1) -> np.ndarray:
    """A δ with no symmetry that could hide a mistake."""
    return np.random.default_rng(seed).standard_normal(y.shape).astype(y.dtype)


@functools.partial(jax.jit, static_argnums=0)
def pulled(f: Callable, arrays: tuple[np.ndarray, ...], delta: np.ndarray) -> Any:
    """``f(*arrays)``, and the cotangent of δ for each of them: both halves as one compiled program."""
    y, pull = jax.vjp(f, *arrays)
    return y, pull(delta)


def pulled_in_torch(
    f: Callable, arrays: tuple[np.ndarray, ...], delta: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    leaves = [torch.tensor(np.asarray(a), requires_grad=True) for a in arrays]
    y = f(*leaves)
    return y.detach().numpy(), [g.numpy() for g in torch.autograd.grad(y, leaves, torch.tensor(delta))]


def assert_agrees(
    ours: Callable,
    theirs: Callable,
    *arrays: np.ndarray,
    options: Mapping[str, Any] | None = None,
    delta: np.ndarray | None = None,
    **tolerance: float,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same value and, for a random δ, the same cotangents, in the dtypes of ``arrays``; returns ours."""
    ours, theirs = (functools.partial(f, **(options or {})) for f in (ours, theirs))
    delta = random_delta(jax.eval_shape(ours, *arrays)) if delta is None else delta
    y, found = pulled(ours, arrays, delta)
    expected_y, expected = pulled_in_torch(theirs, arrays, delta)
    assert y.dtype == arrays[0].dtype
    np.testing.assert_allclose(y, expected_y, err_msg="value", **(tolerance or CLOSE))
    for i, (a, got, want) in enumerate(zip(arrays, found, expected, strict=True)):
        assert got.dtype == a.dtype
        np.testing.assert_allclose(got, want, err_msg=f"cotangent {i}", **(tolerance or CLOSE))
    return np.asarray(y), [np.asarray(c) for c in found]
