"""Weights on disk: a safetensors file whose names are paths in the parameter tree, such as "conv1/weight"."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from experiments.errors import CheckpointError
from experiments.files import replacing

Params = Any
"""A tree of dictionaries with arrays as leaves: {"conv1": {"weight": …, "bias": …}, …}."""


def flatten(params: Params) -> dict[str, np.ndarray]:
    """Return {"conv1/weight": array, …} for {"conv1": {"weight": array, …}, …}."""
    return {name: np.asarray(leaf) for name, leaf in _walk(params)}


def _walk(params: Params, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value


def _rebuild(like: Params, arrays: Mapping[str, np.ndarray], path: str = "") -> Params:
    return {
        name: _rebuild(value, arrays, f"{path}{name}/") if isinstance(value, Mapping) else arrays[f"{path}{name}"]
        for name, value in like.items()
    }


def save(path: Path, params: Params, metadata: Mapping[str, str] | None = None) -> None:
    """Write `params` to `path` atomically."""
    # A noncontiguous view would be written in memory order, not in index order.
    arrays = {name: np.ascontiguousarray(array) for name, array in flatten(params).items()}
    with replacing(path) as temporary:
        temporary.write_bytes(serialise(arrays, dict(metadata or {})))


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of the safetensors file `path`, or an empty dictionary if no such file can be read."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def load(path: Path, like: Params) -> Params:
    """Read NumPy arrays from `path`, with the tree, shapes and dtypes of `like` (arrays or jax.ShapeDtypeStructs).

    Raises CheckpointError, which names the file and the first parameter that is missing, unexpected or of another
    shape.
    """
    try:
        arrays = parse(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a safetensors file, got no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a safetensors file, got {error.strerror}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: expected an intact safetensors file, got {error}") from None

    wanted = dict(_walk(like))
    for name in (*wanted, *arrays):
        expected = f"{wanted[name].dtype} {wanted[name].shape}" if name in wanted else "no such parameter"
        got = f"{arrays[name].dtype} {arrays[name].shape}" if name in arrays else "no such parameter"
        if got != expected:
            raise CheckpointError(f"{path}: {name}: expected {expected}, got {got}")
    return _rebuild(like, arrays)
