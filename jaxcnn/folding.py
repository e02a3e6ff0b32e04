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

from jaxcnn.arguments import bad_type, fail
from jaxcnn.geometry import PADDING_MODES
from jaxcnn.layers import BatchNorm, Conv, ConvTranspose, Dense, DepthwiseConv, HiddenLayer, Layer, Params
from jaxcnn.net import Serial, expect_net, in_a_row

#: Layers that can absorb a batch norm after them, and before them.
_TAKE_AFTER = (Conv, DepthwiseConv, ConvTranspose, Dense)
_TAKE_BEFORE = (Conv, DepthwiseConv, Dense, HiddenLayer)


def fold_batch_norm(net: Serial, params: Params, *, leave: Container[str] = ()) -> tuple[Serial, Params]:
    """Return an equivalent net for evaluation with each batch norm folded into an adjacent layer, and its parameters.

    A batch norm is folded into the convolution (of any kind) or dense layer before it; otherwise into the one after it,
    if that has no zero padding. A batch norm without such a neighbor is kept. Both ways work under jit, with ``params``
    traced.

    A layer or net with an overridden ``apply`` is kept with everything inside it. So is a net in which two layers have
    the same name and share parameters.

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
    >>> folded, of_folded = jaxcnn.fold_batch_norm(net, params)
    >>> [name for name, _ in folded.walk()], sorted(of_folded["conv1"])
    (['conv1', 'relu1'], ['b', 'w'])
    >>> bool(jnp.allclose(folded.apply(of_folded, x), net.apply(params, x), atol=1e-5))
    True
    """
    expect_net("fold_batch_norm", net)
    _check_dict("fold_batch_norm", params)
    return _folded(net, params, "", leave) if in_a_row(net) else (net, params)


def _folded(net: Serial, params: Params, path: str, leave: Container[str]) -> tuple[Any, Params]:
    """Fold the batch norms of one net, its layers from first to last."""
    kept: list[tuple[str, Layer]] = []
    found = {name: own for name, own in params.items() if name not in dict(net.layers)}
    waiting = ""  # the previous layer, if it is a batch norm that no layer before it could absorb
    for name, layer in net.layers:
        own: Any = params.get(name, {})
        _check_dict(f"fold_batch_norm: {path}{name}", own)
        if in_a_row(layer):
            layer, own = _folded(layer, own, f"{path}{name}/", leave)
        elif _is(layer, BatchNorm) and f"{path}{name}" not in leave:
            _check_statistics(f"{path}{name}", own)
            before, of_before = kept[-1] if kept else ("", layer)
            if _is(of_before, *_TAKE_AFTER) and "weight" in found.get(before, {}):
                kept[-1] = before, _with_bias(of_before)
                found[before] = _after(of_before, found[before], *_affine(layer, own))
                continue
            kept.append((name, layer))
            found[name] = own
            waiting = name
            continue
        elif waiting and _is(layer, *_TAKE_BEFORE) and not _pads_zeros(layer) and "weight" in own:
            _, norm = kept.pop()
            own = _before(layer, own, *_affine(norm, found.pop(waiting)))
            layer = _with_bias(layer)
        waiting = ""
        kept.append((name, layer))
        if own:
            found[name] = own
    folded = copy.copy(net)  # of a subclass with any __init__
    object.__setattr__(folded, "layers", tuple(kept))
    return folded, found


def _is(layer: Layer, *kinds: type[Layer]) -> bool:
    """Whether ``layer`` is exactly of one of these types, with its original ``apply`` and channels last."""
    plain = "apply" not in vars(layer) and getattr(layer, "dimension_numbers", None) is None
    return type(layer) in kinds and plain


def _check_dict(where: str, params: Any) -> None:
    if not isinstance(params, Mapping):
        raise bad_type(where, "params", "a dict as init makes it", type(params).__name__)


def _check_statistics(name: str, own: Params) -> None:
    if own.get("mean") is None or own.get("var") is None:
        expected = "expected statistics from jaxcnn.calibrate beside its parameters"
        fail("fold_batch_norm", f"{name}: {expected}, got {', '.join(sorted(own)) or 'none'}")


def _affine(norm: Any, own: Params) -> tuple[Array, Array]:
    """Return the factors a and c."""
    a = 1 / jnp.sqrt(own["var"] + norm.eps)
    a = a if own.get("scale") is None else a * own["scale"]
    c = -a * own["mean"]
    return a, c if own.get("bias") is None else c + own["bias"]


def _after(layer: Any, own: Params, a: Array, c: Array) -> Params:
    """Return w·a and b·a + c, with one a per output channel."""
    w, b = own["weight"], own.get("bias")
    scale = a
    if isinstance(layer, ConvTranspose):  # (*K, O/groups, I): groups of input and output channels correspond
        scale = jnp.repeat(a.reshape(layer.groups, -1), w.shape[-1] // layer.groups, axis=0).T
    scale = jnp.expand_dims(scale, range(w.ndim - scale.ndim))
    return {**own, "weight": (w * scale).astype(w.dtype), "bias": (c if b is None else b * a + c).astype(w.dtype)}


def _before(layer: Any, own: Params, a: Array, c: Array) -> Params:
    """Return a·w and b + c·w, with one a per input channel."""
    w, b = own["weight"], own.get("bias")
    groups = len(a) if isinstance(layer, DepthwiseConv) else getattr(layer, "groups", 1)

    def beside(each: Array) -> Array:
        """Return ``(1, …, I/groups, O)``: for each output channel, the values of its input channels."""
        return jnp.expand_dims(jnp.repeat(each.reshape(groups, -1), w.shape[-1] // groups, axis=0).T, range(w.ndim - 2))

    shift = (w * beside(c)).sum(range(w.ndim - 1))
    return {
        **own,
        "weight": (w * beside(a)).astype(w.dtype),
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
