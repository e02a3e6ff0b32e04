"""Norms of the gradients, updates, activations and δ of a training step, and the layer in which a number overflowed."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxcnn
from experiments.dataset import Batch, scaled
from experiments.own_nets import trained
from experiments.training_loop import Metrics, Step
from jaxcnn import BackpropResult, Serial, TrainState
from jaxcnn.net import Loss


def make_step(
    net: Serial,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    by_layer: bool,
    dtype: str = "float32",
    microbatch: int | None = None,
    largest: int = 255,
) -> Step:
    """Return the step of `jaxcnn.make_train_step`, whose metrics also have norms.

    The metrics are "loss", "accuracy", "gradient_norm" and "update_norm", the 2-norms over all parameters.

    Args:
        net: The net.
        loss: A loss per example.
        optimizer: From optax.
        by_layer: Whether the metrics also have "gradient_norms" by parameter, and "delta_norms" and "activation_norms"
            by layer. This reads every activation and δ once more, and is not possible with `microbatch`.
        dtype: Dtype of activations and δ.
        microbatch: Number of examples that pass through the net at a time; None means all.
        largest: The pixel of uint8 images that the net receives as 1.
    """
    measure = functools.partial(norms_by_layer if by_layer else norms, net)
    compute_dtype = None if dtype == "float32" else dtype
    take = jaxcnn.make_train_step(
        net, loss, optimizer, microbatch=microbatch, compute_dtype=compute_dtype, measure=measure
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        images, targets = batch
        state, metrics = take(state, (scaled(images, largest), targets))
        predicted = metrics.pop("predicted", None)
        if "accuracy" not in metrics:  # the targets are probabilities, and the whole batch has passed at once
            metrics["accuracy"] = jnp.mean(predicted == targets.argmax(-1))
        metrics["accuracy"] = jnp.nan_to_num(metrics["accuracy"])  # NaN if no pixel of the batch is labeled
        return state, metrics

    return step


def norms(net: Serial, result: BackpropResult, updates: Any) -> Metrics:
    """Return "gradient_norm" and "update_norm", the 2-norms over all parameters, and the "predicted" classes.

    With microbatches, activations are not kept and "predicted" is omitted.
    """
    outputs = result.activations.get(net.layers[-1][0])
    predicted = {} if outputs is None else {"predicted": outputs.argmax(-1)}
    return {"gradient_norm": norm(trained(net, result.gradients)), "update_norm": norm(updates), **predicted}


def norms_by_layer(net: Serial, result: BackpropResult, updates: Any) -> Metrics:
    """Return the results of `norms`, the norms of gradients by parameter, and those of activations and δ by layer."""
    paths = jax.tree_util.tree_leaves_with_path(result.gradients)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {
        **norms(net, result, updates),
        "gradient_norms": {name(path): norm(leaf) for path, leaf in paths},
        "delta_norms": {layer: norm(delta) for layer, delta in result.deltas.items()},
        "activation_norms": {layer: norm(a) for layer, a in result.activations.items()},
    }


def norm(tree: Any) -> jax.Array:
    """Return the 2-norm of all numbers in a tree, in float32; squares that overflow do not make it infinite."""
    leaves = [jnp.abs(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree)]
    largest = functools.reduce(jnp.maximum, [leaf.max(initial=0) for leaf in leaves], jnp.float32(0))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(sum(jnp.sum((leaf / scale) ** 2) for leaf in leaves))


def locate(
    net: Serial, step: Step, state: TrainState, batches: Callable[[int], Batch], first_step: int, last_step: int
) -> str:
    """Repeat steps until a number is not finite; return a description of the layer where it appeared first, or "".

    Args:
        net: The net.
        step: A step that measures `norms_by_layer`.
        state: The state after `first_step` steps; it is copied, because a step reuses its memory.
        batches: Returns the batch of a step, counted from 0.
        first_step: Number of steps taken.
        last_step: Number of the last step to repeat, counted from 1.
    """
    before: Metrics = {}
    state = jax.tree.map(jnp.copy, state)
    for number in range(first_step, last_step):
        state, metrics = step(state, batches(number))
        metrics = jax.tree.map(float, jax.device_get(metrics))
        if text := first_not_finite([name for name, _ in net.walk()], metrics, before):
            return f"step {number + 1}: {text}"
        before = metrics
    return ""


def first_not_finite(layers: list[str], metrics: Metrics, before: Metrics) -> str:
    """Describe the first layer in the backward pass whose δ is not finite, or the first activation; "" if all are.

    Args:
        layers: The names of the layers in forward order.
        metrics: The norms of a step.
        before: The norms of the step before, or an empty dictionary.
    """
    activation = _first(layers, metrics["activation_norms"])
    delta = _first(layers[::-1], metrics["delta_norms"])
    parts = []
    if activation:
        parts.append(f"the first activation that is not finite is that of {activation}")
    if delta:
        norms = metrics["delta_norms"][delta], before.get("delta_norms", {}).get(delta)
        earlier = "" if norms[1] is None else f", {norms[1]:.3g} in the step before"
        parts.append(f"the first δ is that of {delta} (norm {norms[0]:.3g}{earlier})")
    if not parts and not math.isfinite(metrics["gradient_norm"]):
        name = next(name for name, value in metrics["gradient_norms"].items() if not math.isfinite(value))
        parts.append(f"every δ is finite, and the gradient of {name} is not")
    return ", and ".join(parts)


def _first(layers: list[str], norms: Mapping[str, float]) -> str:
    return next((layer for layer in layers if layer in norms and not math.isfinite(norms[layer])), "")
