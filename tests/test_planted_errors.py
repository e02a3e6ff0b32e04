"""The checks catch wrong rules: each wrong rule below fails the checks that the correct rule passes.

A rule is passed as ``rule=``. Where an op takes no rule, or the error is outside the rule, the whole function is wrong.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcnn
from jaxcnn.ops.pooling import max_and_winner, scatter_to_winners
from tests import checks
from tests.cases import Case, positive, row, ties

#: Three independent references; each of them must detect every wrong rule.
THREE = (checks.rule_against_autodiff, checks.rule_against_pytorch, checks.rules_by_differences)
LINEAR = (*THREE, checks.adjoint)


@dataclasses.dataclass(frozen=True)
class Planted:
    """A row of an op, a wrong rule or function, and the checks that must detect it."""

    name: str
    case: Case
    wrong: Callable[..., Any]
    caught_by: tuple[Callable[[Case], None], ...] = THREE
    is_rule: bool = True

    def __str__(self) -> str:
        return self.name

    def spoiled(self) -> Case:
        function = functools.partial(self.case.function, rule=self.wrong) if self.is_rule else self.wrong
        return dataclasses.replace(self.case, function=function)


def with_inputs(call: Any, delta: Any, *inputs: Any) -> Any:
    """Return the exact cotangents at other inputs."""
    return call.at(*inputs).exact(delta)


# ---------------------------------------------------------------------------------------------------------------------
# conv


def flip_left_out(call, delta):
    x, w, b = call.inputs
    _, *others = call.exact(delta)
    return with_inputs(call, delta, x, jnp.flip(w, (0, 1)), b)[0], *others


def channels_swapped(call, delta):
    x, w, b = call.inputs
    _, *others = call.exact(delta)
    return with_inputs(call, delta, x, jnp.swapaxes(w, -1, -2), b)[0], *others


def padding_off_by_one(call, delta):
    delta_x, *others = call.exact(delta)
    return jnp.roll(delta_x, 1, axis=2), *others


def remainder_in_front(call, delta):
    """Treat the remainder after the last window as if it came before the first."""
    delta_x, *others = call.exact(delta)
    win = call.static.window
    return jnp.roll(delta_x, win.shape[0] - win.span[0], axis=1), *others


def remainder_dropped(call, delta):
    """Return ∂E/∂w of the input without its first elements, as many as remain at its end."""
    x, w, b = call.inputs
    delta_x, _, grad_b = call.exact(delta)
    win = call.static.window
    cut = jnp.roll(x, win.span[0] - win.shape[0], axis=1)
    return delta_x, with_inputs(call, delta, cut, w, b)[1], grad_b


def groups_swapped(call, delta):
    delta_x, grad_w, grad_b = call.exact(delta)
    parts = jnp.split(grad_w, call.static.groups, axis=-1)
    return delta_x, jnp.concatenate(parts[::-1], -1), grad_b


def multiplier_first(call, delta):
    """Put output m·C + c of input c where c·M + m is correct."""
    delta_x, grad_w, grad_b = call.exact(delta)
    by_input = grad_w.reshape(*grad_w.shape[:-1], call.static.groups, -1)
    return delta_x, jnp.swapaxes(by_input, -1, -2).reshape(grad_w.shape), grad_b


def mean_of_images(call, delta):
    delta_x, grad_w, grad_b = call.exact(delta)
    return delta_x, grad_w / delta.shape[0], grad_b


def mean_bias_gradient(call, delta):
    delta_x, grad_w, _ = call.exact(delta)
    return delta_x, grad_w, delta.mean(range(delta.ndim - 1))


def first_row_only(call, delta):
    """Return only one row of the kernel's gradient."""
    delta_x, grad_w, grad_b = call.exact(delta)
    return delta_x, grad_w.at[1:].set(0), grad_b


# ---------------------------------------------------------------------------------------------------------------------
# Pooling, up


def winner_off_by_one(call, delta):
    win, (x,) = call.static, call.inputs
    return (scatter_to_winners(win, delta, (max_and_winner(win, x)[1] + np.uint8(1)) % np.uint8(win.entries)),)


def up_to_all(call, delta):
    """The lecture taken literally: up(δ) for max pooling (erratum 3)."""
    return (jaxcnn.kron_up(delta, 2),)


def every_tie_wins(call, delta):
    (x,) = call.inputs
    return (jnp.where(x == jaxcnn.kron_up(call.output, 2), jaxcnn.kron_up(delta, 2), 0),)


def last_tie_wins(call, delta):
    (x,) = call.inputs
    turned = with_inputs(call, jnp.flip(delta, (1, 2)), jnp.flip(x, (1, 2)))
    return (jnp.flip(turned[0], (1, 2)),)


def scale_forgotten(call, delta):
    return jax.tree.map(lambda c: 4 * c, call.exact(delta))


def padding_counted(call, delta):
    (x,) = call.inputs
    pooled = functools.partial(jaxcnn.avg_pool, window=3, stride=2, padding=1, count_include_pad=True)
    return jax.vjp(pooled, x)[1](delta)


def mean_of_block(call, delta):
    return jax.tree.map(lambda c: c / 4, call.exact(delta))


def kron_turned_round(call, delta):
    """The rule of kron(b, a): blocks and elements are exchanged."""
    a, b = call.inputs
    delta_b, delta_a = with_inputs(call, delta, b, a)
    return delta_a, delta_b


# ---------------------------------------------------------------------------------------------------------------------
# Activations, dense, dropout, the hidden layer


def passed_at_zero(call, delta):
    return (jnp.where(call.inputs[0] >= 0, delta, 0),)


def slope_of_x(call, delta):
    """Use g(1 − g) with x in place of g."""
    (x,) = call.inputs
    return (delta * x * (1 - x),)


def not_transposed(call, delta):
    _, w, _ = call.inputs
    _, *others = call.exact(delta)
    return delta @ w, *others


def dropout_scale_forgotten(call, delta):
    return call.exact(delta)[0] * (1 - call.static), None


def another_mask(call, delta):
    _, key = call.inputs
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - call.static, delta.shape), 2 * delta, 0), None


def slope_left_out(call, delta):
    """up(w ∗ δ) without ∘ g'(x)."""

    def without_relu(x, w, b):
        return jaxcnn.max_pool(jaxcnn.conv(x, w, b), 2)

    return jax.vjp(without_relu, *call.inputs)[1](delta)


# ---------------------------------------------------------------------------------------------------------------------
# Transposed convolution, unpooling, power pooling, adaptive pooling


def turned_twice(call, delta):
    """Apply conv with the kernel flipped, where the rule uses it unflipped."""
    x, w, b = call.inputs
    _, *others = call.exact(delta)
    return with_inputs(call, delta, x, jnp.flip(w, (0, 1)), b)[0], *others


def padding_of_the_other_end(call, delta):
    """Treat the elements that output_padding adds as if they came first."""
    delta_x, *others = call.exact(jnp.roll(delta, 1, axis=1))
    return delta_x, *others


def channels_of_other_groups(call, delta):
    delta_x, grad_w, grad_b = call.exact(delta)
    return delta_x, jnp.concatenate(jnp.split(grad_w, call.static.groups, axis=-1)[::-1], -1), grad_b


def index_of_next(call, delta):
    y, index = call.inputs
    return with_inputs(call, delta, y, (index + 1) % delta[0, ..., 0].size)


def power_left_out(call, delta):
    """Use the rule of p = 2, δ_x = x ∘ up(δ/y), for p = 3."""
    (x,) = call.inputs
    return jax.vjp(functools.partial(jaxcnn.lp_pool, window=2), x)[1](delta)


def one_count_for_all(call, delta):
    """Divide by the mean window size where the sizes differ."""
    count = call.static.count()
    return (call.exact(delta * count / count.mean())[0],)


# ---------------------------------------------------------------------------------------------------------------------
# Normalization


def statistics_held_fixed(call, delta):
    """δ_x = δ·γ·r, as if the batch's mean and variance did not depend on x."""
    x, scale, _ = call.inputs
    _, *others = call.exact(delta)
    over = tuple(range(x.ndim - 1))
    return delta * scale / jnp.sqrt(x.var(over) + call.static.eps), *others


def variance_held_fixed(call, delta):
    """Leave out the term x̂·mean(g·x̂)."""
    x, scale, _ = call.inputs
    _, *others = call.exact(delta)
    over = tuple(range(x.ndim - 1))
    g, r = delta * scale, 1 / jnp.sqrt(x.var(over) + call.static.eps)
    return r * (g - g.mean(over)), *others


def grad_scale_of_x(call, delta):
    """Σ δ·x instead of Σ δ·x̂."""
    x, *_ = call.inputs
    delta_x, _, grad_bias = call.exact(delta)
    return delta_x, (delta * x).sum(tuple(range(x.ndim - 1))), grad_bias


def over_the_whole_image(call, delta):
    """The rule of one group where there are two."""
    return jax.vjp(functools.partial(jaxcnn.group_norm, groups=1), *call.inputs)[1](delta)


# ---------------------------------------------------------------------------------------------------------------------
# Losses, which take no rule=


def wrong_loss(of_loss: Callable[..., Any], cotangents: Callable[..., Any]) -> Callable[..., Any]:
    """Return the op with another backward pass, ``cotangents(δ, *inputs)``."""
    wrong = jax.custom_vjp(lambda *inputs: of_loss(*inputs))
    wrong.defvjp(lambda *inputs: (of_loss(*inputs), inputs), lambda inputs, delta: cotangents(delta, *inputs))
    return wrong


def squared_error_sign(delta, y, target):
    return 2 * delta * (target - y), 2 * delta * (y - target)


def targets_sum_to_one(delta, logits, targets):
    log_p = jax.nn.log_softmax(logits)
    return delta[:, None] * (jnp.exp(log_p) - targets), -delta[:, None] * log_p


# ---------------------------------------------------------------------------------------------------------------------
# Errors of another kind, which only one check looks for


def not_differentiated_again(call, delta):
    return lax.stop_gradient(call.exact(delta))


def residual_cut_off(call, delta):
    """Correct in first order, but the residual hides that y depends on x, so the second order is wrong."""
    return (delta * (1 - jnp.square(lax.stop_gradient(call.output))),)


def float32_cotangent(x):
    wrong = jax.custom_vjp(jaxcnn.relu)
    wrong.defvjp(
        lambda x: (jaxcnn.relu(x), x > 0), lambda kept, delta: (jnp.where(kept, delta, 0).astype(jnp.float32),)
    )
    return wrong(x)


def float64_on_the_way(x):
    return jaxcnn.relu(x.astype(np.float64)).astype(x.dtype)


def summed_in_16_bits(x):
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, (1, 48, 48, 1), (1, 48, 48, 1), "VALID")


def deaf_to_rule(x, *, rule=None):
    return jaxcnn.relu(x)


class Stateful:
    """A forward pass that counts its calls; only the first result is correct."""

    def __init__(self) -> None:
        self.calls = itertools.count(1)

    def __call__(self, x):
        return jaxcnn.relu(x) * float(next(self.calls))


PLANTED = [
    Planted("conv: flip left out", row("conv", (2, 5, 6, 3), (3, 2, 3, 4), (4,)), flip_left_out, LINEAR),
    Planted("conv: channels of the patch swapped", row("conv", (2, 5, 6, 3), (3, 2, 3, 3)), channels_swapped, LINEAR),
    Planted("conv: padding off by one", row("conv", (2, 5, 6, 3), (3, 2, 3, 4), padding=1), padding_off_by_one, LINEAR),
    Planted("conv: remainder in front", row("conv", (2, 8, 9, 3), (3, 2, 3, 4), stride=2), remainder_in_front, LINEAR),
    Planted("conv: remainder dropped", row("conv", (2, 8, 9, 3), (3, 2, 3, 4), stride=2), remainder_dropped, LINEAR),
    Planted("conv: groups swapped", row("conv", (2, 5, 6, 4), (3, 2, 2, 6), groups=2), groups_swapped, LINEAR),
    Planted("conv: multiplier first", row("conv", (2, 5, 6, 3), (3, 2, 1, 6), groups=3), multiplier_first, LINEAR),
    Planted("conv: mean of images", row("conv", (2, 5, 6, 3), (3, 2, 3, 4)), mean_of_images, LINEAR),
    Planted("conv: mean bias gradient", row("conv", (2, 5, 6, 3), (3, 2, 3, 4), (4,)), mean_bias_gradient, LINEAR),
    Planted("conv: one row of the patch", row("conv", (2, 5, 6, 3), (3, 2, 3, 4)), first_row_only, LINEAR),
    Planted("max_pool: winner off by one", row("max_pool", (2, 4, 6, 3), window=2), winner_off_by_one),
    Planted("max_pool: up to all", row("max_pool", (2, 4, 6, 3), window=2), up_to_all),
    Planted("max_pool: every tie wins", row("max_pool", (2, 4, 6, 3), window=2, draw=ties), every_tie_wins, THREE[:2]),
    Planted("max_pool: last tie wins", row("max_pool", (2, 4, 6, 3), window=2, draw=ties), last_tie_wins, THREE[:2]),
    Planted("avg_pool: scale forgotten", row("avg_pool", (2, 4, 6, 3), window=2), scale_forgotten, LINEAR),
    Planted(
        "avg_pool: padding counted",
        row("avg_pool", (2, 5, 6, 3), window=3, stride=2, padding=1, count_include_pad=False), padding_counted, LINEAR,
    ),
    Planted("kron_up: mean of a block", row("kron_up", (2, 3, 2, 3), factor=2), mean_of_block, LINEAR),
    Planted("block_sum: mean of a block", row("block_sum", (2, 4, 6, 3), factor=2), mean_of_block, LINEAR),
    Planted("kron: turned round", row("kron", (2, 3), (4, 2)), kron_turned_round, LINEAR),
    Planted("relu: passed at zero", row("relu", (4, 6), draw=ties), passed_at_zero, THREE[:2]),
    Planted("sigmoid: slope of x", row("sigmoid", (4, 3)), slope_of_x),
    Planted("dense: not transposed", row("dense", (4, 3), (3, 3), (3,)), not_transposed, LINEAR),
    Planted("dense: mean bias gradient", row("dense", (4, 3), (3, 5), (5,)), mean_bias_gradient, LINEAR),
    Planted("dropout: scale forgotten", row("dropout", (4, 6), rate=0.5), dropout_scale_forgotten, LINEAR),
    Planted("dropout: another mask", row("dropout", (4, 6), rate=0.5), another_mask, LINEAR),
    Planted("hidden_layer: slope left out", row("hidden_layer", (2, 6, 6, 2), (3, 3, 2, 4), (4,)), slope_left_out),
    Planted(
        "conv_transpose: patch turned", row("conv_transpose", (2, 3, 4, 3), (3, 2, 4, 3), (4,)), turned_twice, LINEAR,
    ),
    Planted(
        "conv_transpose: padded at the other end",
        row("conv_transpose", (2, 3, 4, 3), (3, 2, 4, 3), (4,), stride=2, output_padding=1), padding_of_the_other_end,
        LINEAR,
    ),
    Planted(
        "conv_transpose: groups swapped", row("conv_transpose", (2, 3, 4, 4), (3, 2, 3, 4), groups=2),
        channels_of_other_groups, LINEAR,
    ),
    Planted("max_unpool: index off by one", row("max_unpool", (2, 3, 2), spatial_shape=(7,)), index_of_next, LINEAR),
    Planted("lp_pool: power left out", row("lp_pool", (2, 4, 6, 3), window=2, p=3, draw=positive), power_left_out),
    Planted(
        "adaptive_avg_pool: one count", row("adaptive_avg_pool", (2, 8, 3), output_size=3), one_count_for_all, LINEAR
    ),
    Planted("batch_norm: statistics held fixed", row("batch_norm", (4, 3, 2), (2,), (2,)), statistics_held_fixed),
    Planted("batch_norm: variance held fixed", row("batch_norm", (4, 3, 2), (2,), (2,)), variance_held_fixed),
    Planted("batch_norm: Σ δ·x", row("batch_norm", (4, 3, 2), (2,), (2,)), grad_scale_of_x, LINEAR),
    Planted("group_norm: one group instead of several", row("group_norm", (2, 3, 4), groups=2), over_the_whole_image),
    Planted(
        "squared_error: sign", row("squared_error", (4, 3), (4, 3)),
        wrong_loss(jaxcnn.squared_error, squared_error_sign), is_rule=False,
    ),
    Planted(
        "softmax_cross_entropy: targets taken to sum to 1", row("softmax_cross_entropy", (4, 5), (4, 5)),
        wrong_loss(jaxcnn.softmax_cross_entropy, targets_sum_to_one), is_rule=False,
    ),
    Planted(
        "conv: not differentiated again", row("conv", (2, 5, 6, 3), (3, 2, 3, 4)), not_differentiated_again,
        (checks.rule_of_rule_against_autodiff, checks.rule_of_rule_against_pytorch, checks.rules_by_differences),
    ),
    Planted(
        "tanh: residual cut off", row("tanh", (4, 3)), residual_cut_off,
        (checks.rule_of_rule_against_autodiff, checks.rule_of_rule_against_pytorch, checks.rules_by_differences),
    ),
    Planted(
        "conv: mean of no images", row("conv", (2, 5, 6, 3), (3, 2, 3, 4), (4,)), mean_bias_gradient,
        (checks.no_images_no_gradient,),
    ),
    Planted(
        "relu: cotangent in float32", row("relu", (4, 3)), float32_cotangent,
        (checks.shapes_and_dtypes,), is_rule=False,
    ),
    Planted(
        "relu: float64 on the way", row("relu", (4, 3)), float64_on_the_way,
        (checks.float32_stays_float32,), is_rule=False,
    ),
    Planted(
        "block_sum: summed in 16 bits", row("block_sum", (2, 48, 48, 2), factor=48), summed_in_16_bits,
        (checks.sixteen_bits_are_float32_rounded,), is_rule=False,
    ),
    Planted("relu: rule= not heard", row("relu", (4, 3)), deaf_to_rule, (checks.rule_is_used,), is_rule=False),
    Planted(
        "relu: a state", row("relu", (4, 3)), Stateful(),
        (checks.jit_equals_eager, checks.vmap_equals_a_loop, checks.scan_and_checkpoint_equal_a_loop), is_rule=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_caught(planted):
    spoiled = planted.spoiled()
    for check in planted.caught_by:
        check(planted.case)
        with pytest.raises(AssertionError):
            check(spoiled)
