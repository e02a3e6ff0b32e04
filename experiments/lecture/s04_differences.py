"""§4–5: a kernel is one term, and a computer may differentiate by differences."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcnn
from experiments.lecture.drawing import BLUE, DARK, RED, figure, parts, plain, signed
from experiments.lecture.numerical import STEP, as_batch, boot, normal, slopes_by_differences, slopes_by_rule
from experiments.lecture.statement import Result, Statement, at_most, equal, main, relative
from jaxcnn.ops import signal

STATEMENT = Statement(
    name="s04_differences",
    section="4–5",
    title="The derivative with respect to a whole kernel, and finite differences",
    korean_title="패치 전체에 대한 미분, 차에 의한 기울기",
    korean="patch라도 하나의 항으로 봐라 … 컴퓨터가 이해하는 미분의 정의에 입각한 미분방법(차에의한 기울기)",
    claim="The result of a convolution is two-dimensional, and so is its kernel; the derivative is taken with respect "
    "to the whole kernel. Rules and differences agree for every op and each of its inputs.",
    formula="∂E/∂w[k] ≈ (E(w + h·e<sub>k</sub>) − E(w − h·e<sub>k</sub>)) / 2h, for every element k",
    functions=("jaxcnn/ops/convolution.py: conv", "jaxcnn/ops/rule.py: apply_rule"),
    test="tests/test_rules.py",
)

LABEL = 8.5
"""Font size of the op names, in points."""

BOUND = 1e-7
"""Bound of the error of float64 differences with h = 1e-5, relative to the gradient's norm."""


def separated(*shape: int) -> Any:
    """Return shuffled equidistant numbers without 0, so that a small step crosses no corner of ReLU or max pooling."""
    n = int(np.prod(shape))
    return jnp.asarray(np.random.default_rng(n).permutation((np.arange(n) - n / 2 + 0.25) / n * 3).reshape(shape))


ACTIVATIONS = (
    "relu", "leaky_relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "squareplus", "softsign",
    "sigmoid", "log_sigmoid", "hard_sigmoid", "hard_swish", "tanh", "hard_tanh",
)  # fmt: skip

Table = Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]]
"""By name, an op and the inputs with respect to which it is differentiated."""


def ops() -> Table:
    """Return every op with its inputs; integer inputs and options are bound."""
    x, y, w, b, line, few = normal(0, (2, 6, 5, 2), (2, 3, 4), (3, 2, 2, 3), (3,), (9,), (4,))
    image, template, probabilities = jnp.asarray(separated(7, 6)), separated(3, 2), jax.nn.softmax(-y)
    activations = {name: (getattr(jaxcnn, name), {"x": separated(3, 4)}) for name in ACTIVATIONS}
    distinct = {"x": separated(2, 6, 5, 2)}
    up, each = normal(2, (3, 2, 3, 2), (3, 2, 1, 4))
    scale, shift = normal(3, (2,), (2,))
    norm = {"x": x, "scale": scale, "bias": shift}
    indices = jaxcnn.max_pool_with_indices(distinct["x"], 2)[1]
    labels, key = np.array([[0, 1, 3], [2, 2, 0]]), jax.random.key(0)
    by_logits = functools.partial(_swapped, jaxcnn.softmax_cross_entropy_with_integer_labels, labels)
    return {
        "conv": (functools.partial(jaxcnn.conv, padding="SAME"), {"x": x, "w": w, "b": b}),
        "conv_transpose": (functools.partial(jaxcnn.conv_transpose, stride=2), {"x": x, "w": up, "b": b}),
        "depthwise_conv": (jaxcnn.depthwise_conv, {"x": x, "w": each, "b": normal(4, (4,))[0]}),
        "max_pool": (functools.partial(jaxcnn.max_pool, window=2), distinct),
        "max_pool_with_indices": (lambda x: jaxcnn.max_pool_with_indices(x, 2)[0], distinct),
        "max_unpool": (lambda y: jaxcnn.max_unpool(y, indices, (6, 5)), {"y": normal(5, indices.shape)[0]}),
        "avg_pool": (functools.partial(jaxcnn.avg_pool, window=2), {"x": x}),
        "lp_pool": (functools.partial(jaxcnn.lp_pool, window=2), {"x": x}),
        "global_max_pool": (jaxcnn.global_max_pool, distinct),
        "global_avg_pool": (jaxcnn.global_avg_pool, {"x": x}),
        "adaptive_max_pool": (lambda x: jaxcnn.adaptive_max_pool(x, 4), distinct),
        "adaptive_avg_pool": (lambda x: jaxcnn.adaptive_avg_pool(x, 4), {"x": x}),
        "hidden_layer": (jaxcnn.hidden_layer, {**distinct, "w": w, "b": b}),
        "kron": (jaxcnn.kron, {"a": y[0], "b": w[0, :, :, 0]}),
        "kron_up": (functools.partial(jaxcnn.kron_up, factor=2), {"x": x}),
        "block_sum": (functools.partial(jaxcnn.block_sum, factor=(2, 5)), {"x": x}),
        "dense": (jaxcnn.dense, {"x": y, "w": normal(1, (4, 3))[0], "b": b}),
        "dropout": (lambda x: jaxcnn.dropout(x, 0.5, key), {"x": y}),
        **activations,
        "batch_norm": (jaxcnn.batch_norm, norm),
        "layer_norm": (jaxcnn.layer_norm, {"x": y, "scale": few, "bias": few[::-1]}),
        "group_norm": (functools.partial(jaxcnn.group_norm, groups=2), norm),
        "squared_error": (jaxcnn.squared_error, {"y": y, "target": y[::-1]}),
        "softmax_cross_entropy": (jaxcnn.softmax_cross_entropy, {"logits": y, "targets": probabilities}),
        "softmax_cross_entropy_with_integer_labels": (by_logits, {"logits": y}),
        "convolve": (signal.convolve, {"a": line, "v": few}),
        "correlate": (signal.correlate, {"a": line, "v": few}),
        "autocorrelate": (signal.autocorrelate, {"a": line}),
        "match_template": (signal.match_template, {"image": image, "template": template}),
    }


def _swapped(f: Callable[..., Any], second: Any, first: Any) -> Any:
    return f(first, second)


def show(table: Table | None = None) -> Result:
    """Compare rule and differences for every op and input of `table`; None means `ops()`."""
    by_op = distances(ops() if table is None else table)
    kernel = kernel_slopes()
    pairs = [(distance, f"{argument} of {name}") for name, row in by_op.items() for argument, distance in row.items()]
    distance, largest = max(pairs)
    checks = (
        equal("shape of the derivative with respect to a 5×5 kernel", kernel["rule"].shape, kernel["w"].shape),
        at_most("rule and differences for that kernel", relative(kernel["rule"], kernel["differences"]), BOUND),
        at_most(f"{len(by_op)} ops, {len(pairs)} inputs; the largest difference is that of {largest}", distance, BOUND),
        equal(
            "inputs with a larger difference", ", ".join(name for d, name in pairs if not d <= BOUND) or "none", "none"
        ),
    )
    return Result(
        checks,
        draw(kernel, by_op),
        "Left: E as a function of one element of a kernel, the tangent by the rule, and the line through two "
        f"evaluations, which is parallel because E is a parabola here (h is 0.6 in the figure, {STEP:g} in the "
        f"checks). Below: the slopes of all 25 elements. Right: {len(by_op)} ops with one dot per input; the remaining "
        "difference is the error of the differences.",
    )


def kernel_slopes() -> dict[str, Any]:
    """Return the slopes of E = mean((image ⋆ w)²) with respect to the elements of w, and E along one of them."""
    x, w = as_batch(boot()), normal(2, (5, 5))[0]

    def loss(w: Any) -> Any:
        return jaxcnn.squared_error(jaxcnn.conv(x, w[:, :, None, None]), jnp.zeros((1, 24, 24, 1))).mean()

    element = jnp.zeros((5, 5)).at[1, 3].set(1.0)
    shifts = jnp.linspace(-1, 1, 41)
    (differences,) = slopes_by_differences(loss, (w,), jnp.ones(()))
    return {
        "w": w,
        "rule": jax.grad(loss)(w),
        "differences": differences,
        "shifts": np.asarray(shifts),
        "losses": np.asarray(jax.vmap(lambda shift: loss(w + shift * element))(shifts)),
    }


def distances(table: Table) -> dict[str, dict[str, float]]:
    """Return the relative difference between rule and differences for each op and input, with a random δ."""
    inputs = {name: tuple(arguments.values()) for name, (_, arguments) in table.items()}
    deltas = {name: normal(7, jax.eval_shape(op, *inputs[name]).shape)[0] for name, (op, _) in table.items()}

    # One program for all ops compiles twice as fast as one program per op.
    @jax.jit
    def slopes(inputs: Any, deltas: Any) -> Any:
        return {
            name: [method(op, inputs[name], deltas[name]) for method in (slopes_by_rule, slopes_by_differences)]
            for name, (op, _) in table.items()
        }

    results = slopes(inputs, deltas)
    return {
        name: dict(zip(arguments, map(relative, *results[name]), strict=True)) for name, (_, arguments) in table.items()
    }


def draw(kernel: Mapping[str, Any], by_op: Mapping[str, Mapping[str, float]]) -> Any:
    """Draw E with its tangent, the slopes of a kernel, and a row per op with a dot per input."""
    fig = figure(10.6, 0.19 * len(by_op) + 1.2)
    left, right = parts(fig, 1, 2, width_ratios=(1, 1.25))
    top, bottom = parts(left, 2, 1, height_ratios=(1.25, 1))
    curve(top.subplots(), kernel)
    limit = float(np.abs(kernel["rule"]).max())
    for axes, name, title in zip(
        bottom.subplots(1, 2), ("rule", "differences"), ("by the rule", "by differences"), strict=True
    ):
        signed(axes, kernel[name], rf"$\partial E/\partial w$ {title}", limit=limit)
    axes = right.subplots()
    plain(axes, "difference between rule and finite differences", "relative difference (L2)", "")
    for i, row in enumerate(by_op.values()):
        axes.plot([max(value, 1e-16) for value in row.values()], [i] * len(row), "o", color=BLUE, markersize=4.5)
    axes.axvline(BOUND, color=DARK, linestyle="--", linewidth=1)
    axes.annotate("bound", (BOUND, 0), (-3, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
    axes.set(xscale="log", xlim=(1e-13, 1e-6), ylim=(len(by_op) - 0.4, -0.6), xticks=[1e-13, 1e-11, 1e-9, 1e-7])
    short = {"softmax_cross_entropy_with_integer_labels": "… with_integer_labels"}
    axes.set_yticks(range(len(by_op)), [f"{short.get(name, name)}: {', '.join(row)}" for name, row in by_op.items()])
    axes.tick_params("y", labelsize=LABEL)
    return fig


def curve(axes: Any, kernel: Mapping[str, Any]) -> None:
    """Draw E along one element of the kernel, the tangent by the rule, and the line through two evaluations."""
    shifts, losses, slope = kernel["shifts"], kernel["losses"], float(kernel["rule"][1, 3])
    center, h = losses[len(losses) // 2], shifts[-9]
    plain(axes, "E along one element of the kernel", r"change of $w[1,3]$", r"$E$")
    axes.plot(shifts, losses, color=DARK, linewidth=2)
    axes.plot(shifts, center + slope * shifts, color=RED, linewidth=1.6, label="tangent by the rule")
    ends = losses[[8, -9]]
    axes.plot([-h, h], ends, "o-", color=BLUE, linewidth=1.6, label=r"$(E(w + h) - E(w - h))\,/\,2h$")
    axes.plot(0, center, "o", color=RED)
    axes.legend(frameon=False, fontsize=8.5)


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
