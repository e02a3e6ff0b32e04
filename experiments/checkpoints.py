"""Weights on disk: a safetensors file whose names are paths in the parameter tree, such as "conv1/weight"."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialize

from experiments.errors import CheckpointError, bad_value
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
    # safetensors writes a noncontiguous view in memory order, not in index order.
    arrays = {name: np.ascontiguousarray(array) for name, array in flatten(params).items()}
    with replacing(path) as temporary:
        temporary.write_bytes(serialize(arrays, dict(metadata or {})))


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of the safetensors file `path`, or an empty dictionary if no such file can be read."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays in a safetensors file by name; raise CheckpointError if it cannot be read."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        raise bad_value(CheckpointError, path, "a safetensors file", "no such file") from None
    except OSError as error:
        raise bad_value(CheckpointError, path, "a safetensors file", error.strerror) from None
    except SafetensorError as error:
        raise bad_value(CheckpointError, path, "an intact safetensors file", error) from None


def load(path: Path, like: Params) -> Params:
    """Read NumPy arrays from `path`.

    Args:
        path: A safetensors file.
        like: The expected tree, shapes and dtypes, as arrays or jax.ShapeDtypeStructs.

    Raises:
        CheckpointError: The file cannot be read, or a parameter is missing, unexpected, or of another shape or dtype.
    """
    arrays = read(path)
    leaves = dict(_walk(like))
    for name in (*leaves, *arrays):
        expected = f"{leaves[name].dtype} {leaves[name].shape}" if name in leaves else "absent"
        got = f"{arrays[name].dtype} {arrays[name].shape}" if name in arrays else "no such parameter"
        if got != expected:
            raise bad_value(CheckpointError, f"{path}: {name}", expected, got)
    return _rebuild(like, arrays)
