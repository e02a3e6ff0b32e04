"""Fold batch norms into adjacent layers: in evaluation both are one affine map.

With statistics of the training data m and v in the parameters (`jaxcnn.calibrate`), batch norm is

    y = a·x + c        a = γ/√(v + ε)        c = β − a·m

channel by channel. After a layer x·w + b, this is a layer with w·a and b·a + c. Before a layer, it is a layer with a·w
and b + c·w, as long as there is no zero padding between them.
"""

import copy
import dataclasses
from collections.abc import Container, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcnn.arguments import bad_type, bad_value
from jaxcnn.branches import Branches, is_branches
from jaxcnn.geometry import PADDING_MODES
from jaxcnn.layers import BatchNorm, ConvTranspose, DepthwiseConv, Layer, Params
from jaxcnn.net import Serial, expect_net, in_a_row, is_custom, layers_of
from jaxcnn.ops.normalization import scale_and_shift

#: Layers into which the next batch norm can be folded, and the previous one.
_ABSORBS_NEXT = layers_of("affine")
_ABSORBS_PREVIOUS = tuple(layer for layer in layers_of("affine", "hidden") if layer is not ConvTranspose)


def fold_batch_norm(net: Serial, params: Params, *, leave: Container[str] = ()) -> tuple[Serial, Params]:
    """Return an equivalent net for evaluation with each batch norm folded into an adjacent layer, and its parameters.

    A batch norm is folded into the convolution (of any kind) or dense layer before it; otherwise into the one after it,
    if that has no zero padding. A batch norm without such a neighbor is kept. Folding works under jit, with ``params``
    traced.

    A layer or net with a custom ``apply`` is kept with everything inside it. So is a net in which two layers have the
    same name and share parameters.

    Args:
        net: from `serial`; inner nets are folded as well.
        params: parameters with statistics, from `calibrate`.
        leave: full names of batch norms to keep.

    Returns:
        The net and its parameters. Layers keep their names. A layer that had no bias gets one.

    Raises:
        ValueError: if a batch norm has no calibrated statistics, because with batch statistics it is not affine.
        TypeError: if net or params has the wrong type.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Conv(4, 3, bias=False), jaxcnn.BatchNorm(), jaxcnn.Relu())
    >>> x = jax.random.normal(jax.random.key(1), (8, 6, 6, 1))
    >>> params = jaxcnn.calibrate(net, net.init(jax.random.key(0), (6, 6, 1)), [(x, None)])
    >>> folded, folded_params = jaxcnn.fold_batch_norm(net, params)
    >>> [name for name, _ in folded.walk()], sorted(folded_params["conv1"])
    (['conv1', 'relu1'], ['bias', 'weight'])
    >>> bool(jnp.allclose(folded.apply(folded_params, x), net.apply(params, x), atol=1e-5))
    True
    """
    expect_net("fold_batch_norm", net)
    _check_dict("fold_batch_norm", params)
    return _fold(net, params, "", leave) if in_a_row(net) or is_branches(net) else (net, params)


def _fold(net: Serial, params: Params, path: str, leave: Container[str]) -> tuple[Any, Params]:
    """Fold the batch norms of one net, its layers from first to last."""
    layers: list[tuple[str, Layer]] = []
    folded_params = {name: value for name, value in params.items() if name not in dict(net.layers)}
    unfolded_norm = ""  # name of the previous layer, if it is a batch norm that the layer before it cannot absorb
    for name, layer in net.layers:
        layer_params: Any = params.get(name, {})
        _check_dict(f"fold_batch_norm: {path}{name}", layer_params)
        if in_a_row(layer) or is_branches(layer):
            layer, layer_params = _fold(layer, layer_params, f"{path}{name}/", leave)
        elif isinstance(net, Branches):
            pass  # no layer precedes another
        elif _is_library_layer(layer, BatchNorm) and f"{path}{name}" not in leave:
            _check_statistics(f"{path}{name}", layer_params)
            previous_name, previous = layers[-1] if layers else ("", layer)
            if _is_library_layer(previous, *_ABSORBS_NEXT) and "weight" in folded_params.get(previous_name, {}):
                layers[-1] = previous_name, _with_bias(previous)
                scale_and_shift = _scale_and_shift(layer, layer_params)
                folded_params[previous_name] = _fold_next(previous, folded_params[previous_name], *scale_and_shift)
                continue
            layers.append((name, layer))
            folded_params[name] = layer_params
            unfolded_norm = name
            continue
        elif (
            unfolded_norm
            and _is_library_layer(layer, *_ABSORBS_PREVIOUS)
            and not _pads_zeros(layer)
            and "weight" in layer_params
        ):
            _, norm = layers.pop()
            scale_and_shift = _scale_and_shift(norm, folded_params.pop(unfolded_norm))
            layer_params = _fold_previous(layer, layer_params, *scale_and_shift)
            layer = _with_bias(layer)
        unfolded_norm = ""
        layers.append((name, layer))
        if layer_params:
            folded_params[name] = layer_params
    folded = copy.copy(net)  # of a subclass with any __init__
    object.__setattr__(folded, "layers", tuple(layers))
    return folded, folded_params


def _is_library_layer(layer: Layer, *types: type[Layer]) -> bool:
    """Whether ``layer`` is exactly of one of these types, without a custom ``apply``, and channels-last."""
    return type(layer) in types and not is_custom(layer) and getattr(layer, "dimension_numbers", None) is None


def _check_dict(where: str, params: Any) -> None:
    if not isinstance(params, Mapping):
        raise bad_type(where, "params", "a dict as init makes it", type(params).__name__)


def _check_statistics(name: str, params: Params) -> None:
    if params.get("mean") is None or params.get("var") is None:
        got = ", ".join(sorted(params)) or "none"
        raise bad_value(f"fold_batch_norm: {name}", "params", "those of jaxcnn.calibrate, with mean and var", got)


def _scale_and_shift(norm: Any, params: Params) -> tuple[Array, Array]:
    """Return a and c of y = a·x + c."""
    return scale_and_shift(norm.eps, params.get("scale"), params.get("bias"), params["mean"], params["var"])


def _fold_next(layer: Any, params: Params, a: Array, c: Array) -> Params:
    """Return the parameters w·a and b·a + c, with one a per output channel."""
    w, b = params["weight"], params.get("bias")
    scale = a
    if isinstance(layer, ConvTranspose):  # (*K, O/groups, I): groups of input and output channels correspond
        scale = jnp.repeat(a.reshape(layer.groups, -1), w.shape[-1] // layer.groups, axis=0).T
    scale = jnp.expand_dims(scale, range(w.ndim - scale.ndim))
    return {**params, "weight": (w * scale).astype(w.dtype), "bias": (c if b is None else b * a + c).astype(w.dtype)}


def _fold_previous(layer: Any, params: Params, a: Array, c: Array) -> Params:
    """Return the parameters a·w and b + c·w, with one a per input channel."""
    w, b = params["weight"], params.get("bias")
    groups = len(a) if isinstance(layer, DepthwiseConv) else getattr(layer, "groups", 1)

    def per_input(a: Array) -> Array:
        """Return ``(1, …, I/groups, O)``: for each output channel, the values of its input channels."""
        return jnp.expand_dims(jnp.repeat(a.reshape(groups, -1), w.shape[-1] // groups, axis=0).T, range(w.ndim - 2))

    shift = (w * per_input(c)).sum(range(w.ndim - 1))
    return {
        **params,
        "weight": (w * per_input(a)).astype(w.dtype),
        "bias": (shift if b is None else b + shift).astype(w.dtype),
    }


def _with_bias(layer: Any) -> Any:
    return dataclasses.replace(layer, bias=True) if getattr(layer, "bias", True) is False else layer


def _pads_zeros(layer: Any) -> bool:
    """Whether the layer zero-pads, in which case folding would miss the shift c in the padding."""
    padding = getattr(layer, "padding", "VALID")
    if isinstance(padding, str):
        return padding not in ("VALID", *PADDING_MODES)
    return bool(np.any(np.asarray(padding) != 0))
