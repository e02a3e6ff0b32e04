"""Losses, where backpropagation starts.

They return one value per example (unreduced), as in optax. Optax's other losses work as well.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxcnn.arguments import arrays, bad_value, check_range, integers
from jaxcnn.kernels.dtypes import to_accumulator
from jaxcnn.kernels.elementwise import weighted
from jaxcnn.kernels.reductions import element_at, softmax
from jaxcnn.ops.rule import Rule, apply_rule, custom_vjp


def squared_error(y: ArrayLike, target: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Elementwise squared error: ``E = (y − target)²``.

    Backward: ``δ_y = 2δ(y − target)``, ``δ_target = −δ_y``.

    Args:
        y: predictions of any shape and float dtype.
        target: targets of the same shape and dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of y.

    Raises:
        ValueError: if the shapes differ.
        TypeError: if y or target is not an array of a float dtype, or the dtypes differ.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0]))
    Array([1., 4.], dtype=float32)
    """
    y, target = arrays("squared_error", y=y, target=target)
    if y.shape != target.shape:
        raise bad_value("squared_error", "y and target", "of one shape", f"y {y.shape}, target {target.shape}")
    return apply_rule(_squared_error, rule, squared_error_reference)(None, y, target)


@custom_vjp
def _squared_error(static: None, y: Array, target: Array) -> Array:
    return squared_error_reference(None, y, target)


def _squared_error_fwd(static: None, y: Array, target: Array) -> Any:
    return squared_error_reference(None, y, target), y - target


def _squared_error_bwd(static: None, difference: Array, delta: Array) -> Any:
    """δ_y = 2δ(y − target), δ_target = −δ_y."""
    delta_y = weighted(2 * delta, difference, delta.dtype)
    return delta_y, -delta_y


_squared_error.defvjp(_squared_error_fwd, _squared_error_bwd)


def squared_error_reference(static: None, y: Array, target: Array) -> Array:
    """Squared error in stock JAX."""
    return jnp.square(y - target)


# ---------------------------------------------------------------------------------------------------------------------


def softmax_cross_entropy(logits: ArrayLike, targets: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Cross entropy between ``targets`` and p = softmax(logits): ``E = −Σ_c targets_c·log p_c``.

    Backward: ``δ_logits = δ(p·Σ targets − targets)``, ``δ_targets = −δ·log p``.

    Args:
        logits: array ``(…, C)``, any float dtype.
        targets: probabilities ``(…, C)``, of the same dtype; they need not sum to 1.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The losses ``(…)``.

    Raises:
        ValueError: if the shapes differ or there are no classes.
        TypeError: if logits or targets is not an array of a float dtype, or the dtypes differ.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.softmax_cross_entropy(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))
    Array([0.6931472], dtype=float32)
    """
    logits, targets = arrays("softmax_cross_entropy", logits=logits, targets=targets)
    if logits.shape != targets.shape or logits.ndim < 1:
        raise bad_value(
            "softmax_cross_entropy",
            "logits and targets",
            "of one shape (…, C)",
            f"logits {logits.shape}, targets {targets.shape}",
        )
    if logits.shape[-1] < 1:
        raise bad_value("softmax_cross_entropy", "logits", "(…, C) with C >= 1", f"shape {logits.shape}")
    return apply_rule(_softmax_cross_entropy, rule, softmax_cross_entropy_reference)(None, logits, targets)


@custom_vjp
def _softmax_cross_entropy(static: None, logits: Array, targets: Array) -> Array:
    return softmax_cross_entropy_reference(None, logits, targets)


def _softmax_cross_entropy_fwd(static: None, logits: Array, targets: Array) -> Any:
    log_p = _log_softmax(logits)
    return softmax_cross_entropy_reference(None, logits, targets), (softmax(logits, log_p), log_p, targets)


def _softmax_cross_entropy_bwd(static: None, saved: Any, delta: Array) -> Any:
    """δ_logits = δ(p·Σ targets − targets); δ_targets = −δ·log p."""
    p, log_p, targets = saved
    dtype, delta, targets = targets.dtype, to_accumulator(delta)[..., None], to_accumulator(targets)
    delta_logits = weighted(delta, p * targets.sum(-1, keepdims=True) - targets, dtype)
    return delta_logits, weighted(delta, log_p, dtype, negative=True)


_softmax_cross_entropy.defvjp(_softmax_cross_entropy_fwd, _softmax_cross_entropy_bwd)


def softmax_cross_entropy_reference(static: None, logits: Array, targets: Array) -> Array:
    """Cross entropy in stock JAX."""
    log_p = _log_softmax(logits)
    return -weighted(to_accumulator(targets), log_p, log_p.dtype).sum(-1).astype(logits.dtype)


def _log_softmax(logits: Array) -> Array:
    """Return log p, in float32 for 16-bit logits."""
    return jax.nn.log_softmax(to_accumulator(logits))


# ---------------------------------------------------------------------------------------------------------------------


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, *, rule: Rule | None = None
) -> Array:
    """Cross entropy of the true class, p = softmax(logits): ``E = −log p[label]``.

    Backward: ``δ_logits = δ(p − onehot(label))``.

    Under jit the values of the labels cannot be checked. A label that is out of range gives NaN in the loss and in
    δ_logits, except that a δ of 0 gives 0. ``jnp.where(labels >= 0, loss, 0)`` therefore ignores negative labels, as in
    optax.

    Args:
        logits: array ``(…, C)``, any float dtype.
        labels: integers ``(…)`` in 0 … C − 1.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The losses ``(…)``.

    Raises:
        ValueError: if shapes do not fit, there are no classes, or a concrete label is out of range.
        TypeError: if logits is not an array of a float dtype, or labels is not an array of integers.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.softmax_cross_entropy_with_integer_labels(jnp.zeros((1, 2)), jnp.array([1]))
    Array([0.6931472], dtype=float32)
    """
    op = "softmax_cross_entropy_with_integer_labels"
    (logits,) = arrays(op, logits=logits)
    at = integers(op, "labels", labels)
    if logits.ndim < 1 or at.shape != logits.shape[:-1]:
        got = f"logits {logits.shape}, labels {at.shape}"
        raise bad_value(op, "logits and labels", "(…, C) and (…)", got)
    classes = logits.shape[-1]
    if classes < 1:
        raise bad_value(op, "logits", "(…, C) with C >= 1", f"shape {logits.shape}")
    check_range(op, "labels", labels, classes)
    return apply_rule(_cross_entropy_of_labels, rule, cross_entropy_of_labels_reference, op)(None, logits, at)


@custom_vjp
def _cross_entropy_of_labels(static: None, logits: Array, labels: Array) -> Array:
    return cross_entropy_of_labels_reference(None, logits, labels)


def _cross_entropy_of_labels_fwd(static: None, logits: Array, labels: Array) -> Any:
    return cross_entropy_of_labels_reference(None, logits, labels), (jax.nn.softmax(to_accumulator(logits)), labels)


def _cross_entropy_of_labels_bwd(static: None, saved: Any, delta: Array) -> Any:
    """δ_logits = δ(p − onehot(label))."""
    p, labels = saved
    onehot = lax.broadcasted_iota(labels.dtype, p.shape, p.ndim - 1) == labels[..., None]
    slope = jnp.where(_in_range(labels, p), jnp.where(onehot, p - 1, p), jnp.nan)
    return weighted(to_accumulator(delta)[..., None], slope, delta.dtype), None


_cross_entropy_of_labels.defvjp(_cross_entropy_of_labels_fwd, _cross_entropy_of_labels_bwd)


def cross_entropy_of_labels_reference(static: None, logits: Array, labels: Array) -> Array:
    """Cross entropy of the true class in stock JAX: ``log Σ exp(logits − m) − (logits[label] − m)``, m the largest.

    m is subtracted from both terms before they are combined: with logits near 10⁴, adding m back would round log 3
    away.
    """
    wide = to_accumulator(logits)
    m = lax.stop_gradient(wide.max(-1, keepdims=True))
    of_label = element_at(wide, labels) - m
    loss = jnp.log(jnp.exp(wide - m).sum(-1, keepdims=True)) - of_label
    return jnp.where(_in_range(labels, wide), loss, jnp.nan)[..., 0].astype(logits.dtype)


def _in_range(labels: Array, logits: Array) -> Array:
    """Return a mask ``(…, 1)`` of the labels that number a class."""
    return ((labels >= 0) & (labels < logits.shape[-1]))[..., None]
