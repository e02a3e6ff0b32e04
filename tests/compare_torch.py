"""Elementwise comparison with PyTorch, including NaN and infinite elements, which a norm cannot compare.

It also builds nets in PyTorch with the same layers and parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

import jaxcnn
from tests import oracles
from tests.cases import compiled

#: For float64 sums in a different order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def random_delta(y: Any, seed: int = 1) -> np.ndarray:
    """Return a random δ, without any symmetry that could hide an error."""
    return np.random.default_rng(seed).standard_normal(y.shape).astype(y.dtype)


def pulled(f: Callable, arrays: tuple[Any, ...], delta: np.ndarray) -> Any:
    """Return ``f(*arrays)`` and the cotangents of the arrays for δ, compiled as one program."""
    return both_halves(f)(arrays, delta)


@functools.lru_cache(maxsize=8)
def both_halves(f: Callable) -> Callable:
    @compiled
    def run(arrays: tuple[Any, ...], delta: np.ndarray) -> Any:
        y, pull = jax.vjp(f, *arrays)
        return y, pull(delta)

    return run


def pulled_in_torch(
    f: Callable, arrays: tuple[np.ndarray, ...], delta: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    y, pull = in_torch(f, arrays)
    return y, pull(delta)


def in_torch(f: Callable, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, Callable[..., list[np.ndarray]]]:
    """Return ``f(*arrays)`` and a function that returns the cotangents of the arrays for a δ."""
    leaves = [torch.tensor(np.asarray(a), requires_grad=True) for a in arrays]
    y = f(*leaves)

    def pull(delta: np.ndarray) -> list[np.ndarray]:
        return [g.numpy() for g in torch.autograd.grad(y, leaves, torch.tensor(delta))]

    return y.detach().numpy(), pull


def assert_agrees(
    ours: Callable,
    theirs: Callable,
    *arrays: np.ndarray,
    options: Mapping[str, Any] | None = None,
    delta: np.ndarray | None = None,
    **tolerance: float,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Assert that value, cotangents for a random δ, and dtypes agree with PyTorch; return our value and cotangents."""
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


#: The parameters of a layer, in the order of its op's arguments.
ARRAYS = ("weight", "scale", "bias", "mean", "var")


def net_in_torch(net: jaxcnn.Serial, params: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """Compute ``net.apply(params, x)`` at evaluation, with tensors as parameters."""
    y = x
    for name, layer in net.layers:
        own = params.get(name, {})
        options = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
        options = {
            k: v
            for k, v in options.items()
            if k not in ("name", "features", "kernel_size", "multiplier", "scale", "bias", "init_weight", "init_bias")
        }
        match layer:
            case jaxcnn.Serial():
                y = net_in_torch(layer, own, y)
            case jaxcnn.Flatten():
                y = y.flatten(1)
            case jaxcnn.Dropout():
                pass
            case _:  # the op named like the layer
                op = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(layer).__name__).lstrip("_")
                y = getattr(oracles, op)(y, *(own[k] for k in ARRAYS if k in own), **options)
    return x + y if type(net).__name__ == "Residual" else y


def tensors(tree: Any) -> Any:
    """Convert leaves to tensors that require a gradient."""
    return jax.tree.map(lambda a: torch.tensor(np.asarray(a), requires_grad=True), tree)


def numbers(tree: Any) -> Any:
    """Copy leaves to NumPy arrays, which remain valid when the originals are donated."""
    return jax.tree.map(lambda a: a.detach().numpy().copy() if isinstance(a, torch.Tensor) else np.array(a), tree)
