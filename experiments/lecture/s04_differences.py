"""§4–5: a patch is one term, and a computer may differentiate by differences."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcnn
from experiments.lecture.drawing import BLUE, DARK, RED, figure, parts, plain, signed
from experiments.lecture.numerical import STEP, as_picture, boot, drawn, slopes_by_differences, slopes_by_rule
from experiments.lecture.statement import Shown, Statement, at_most, equal, main, relative
from jaxcnn.ops import signal

STATEMENT = Statement(
    name="s04_differences",
    section="4–5",
    title="Differentiating by a whole patch, and by differences",
    korean_title="패치 전체에 대한 미분, 차에 의한 기울기",
    korean="patch라도 하나의 항으로 봐라 … 컴퓨터가 이해하는 미분의 정의에 입각한 미분방법(차에의한 기울기)",
    claim="The result of a convolution is a quantity in two dimensions, and so is its patch; one differentiates by the "
    "whole patch. What the rules say agrees with differences, for every op and each of its inputs.",
    formula="∂E/∂w[k] ≈ (E(w + h·e<sub>k</sub>) − E(w − h·e<sub>k</sub>)) / 2h, for every entry k",
    functions=("jaxcnn/ops/convolution.py: conv", "jaxcnn/ops/rule.py: apply_rule"),
    test="tests/test_rules.py",
)

LABEL = 8.5
"""Size of the ops' names, in points."""

BOUND = 1e-7
"""What differences in float64 with h = 1e-5 may be off by, relative to the gradient's norm."""


def apart(*shape: int) -> Any:
    """Return equidistant numbers, none of them 0, shuffled: a small step crosses no kink of ReLU or max pooling."""
    n = int(np.prod(shape))
    return jnp.asarray(np.random.default_rng(n).permutation((np.arange(n) - n / 2 + 0.25) / n * 3).reshape(shape))


ACTIVATIONS = (
    "relu", "leaky_relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "squareplus", "softsign",
    "sigmoid", "log_sigmoid", "hard_sigmoid", "hard_swish", "tanh", "hard_tanh",
)  # fmt: skip

Table = Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]]
"""An op's name, the op, the inputs it is differentiated by."""


def ops() -> Table:
    """Return every op with the inputs with respect to which it is differentiated."""
    x, y, w, b, line, few = drawn(0, (2, 6, 5, 2), (2, 3, 4), (3, 2, 2, 3), (3,), (9,), (4,))
    picture, template, probabilities = jnp.asarray(apart(7, 6)), apart(3, 2), jax.nn.softmax(-y)
    activations = {name: (getattr(jaxcnn, name), {"x": apart(3, 4)}) for name in ACTIVATIONS}
    of_pictures = {"x": apart(2, 6, 5, 2)}
    up, each = drawn(2, (3, 2, 3, 2), (3, 2, 1, 4))
    scale, shift = drawn(3, (2,), (2,))
    norm = {"x": x, "scale": scale, "bias": shift}
    places = jaxcnn.max_pool_with_indices(of_pictures["x"], 2)[1]
    labels, key = np.array([[0, 1, 3], [2, 2, 0]]), jax.random.key(0)
    of_labels = functools.partial(_swapped, jaxcnn.softmax_cross_entropy_with_integer_labels, labels)
    return {
        "conv": (functools.partial(jaxcnn.conv, padding="SAME"), {"x": x, "weight": w, "bias": b}),
        "conv_transpose": (functools.partial(jaxcnn.conv_transpose, stride=2), {"x": x, "weight": up, "bias": b}),
        "depthwise_conv": (jaxcnn.depthwise_conv, {"x": x, "weight": each, "bias": drawn(4, (4,))[0]}),
        "max_pool": (functools.partial(jaxcnn.max_pool, window=2), of_pictures),
        "max_pool_with_indices": (lambda x: jaxcnn.max_pool_with_indices(x, 2)[0], of_pictures),
        "max_unpool": (lambda y: jaxcnn.max_unpool(y, places, (6, 5)), {"y": drawn(5, places.shape)[0]}),
        "avg_pool": (functools.partial(jaxcnn.avg_pool, window=2), {"x": x}),
        "lp_pool": (functools.partial(jaxcnn.lp_pool, window=2), {"x": x}),
        "global_max_pool": (jaxcnn.global_max_pool, of_pictures),
        "global_avg_pool": (jaxcnn.global_avg_pool, {"x": x}),
        "adaptive_max_pool": (functools.partial(jaxcnn.adaptive_max_pool, size=4), of_pictures),
        "adaptive_avg_pool": (functools.partial(jaxcnn.adaptive_avg_pool, size=4), {"x": x}),
        "hidden_layer": (jaxcnn.hidden_layer, {**of_pictures, "weight": w, "bias": b}),
        "kron": (jaxcnn.kron, {"a": y[0], "bias": w[0, :, :, 0]}),
        "kron_up": (functools.partial(jaxcnn.kron_up, factor=2), {"x": x}),
        "block_sum": (functools.partial(jaxcnn.block_sum, factor=(2, 5)), {"x": x}),
        "dense": (jaxcnn.dense, {"x": y, "weight": drawn(1, (4, 3))[0], "bias": b}),
        "dropout": (lambda x: jaxcnn.dropout(x, 0.5, key), {"x": y}),
        **activations,
        "batch_norm": (jaxcnn.batch_norm, norm),
        "layer_norm": (jaxcnn.layer_norm, {"x": y, "scale": few, "bias": few[::-1]}),
        "group_norm": (functools.partial(jaxcnn.group_norm, groups=2), norm),
        "squared_error": (jaxcnn.squared_error, {"y": y, "target": y[::-1]}),
        "softmax_cross_entropy": (jaxcnn.softmax_cross_entropy, {"logits": y, "targets": probabilities}),
        "softmax_cross_entropy_with_integer_labels": (of_labels, {"logits": y}),
        "convolve": (signal.convolve, {"a": line, "v": few}),
        "correlate": (signal.correlate, {"a": line, "v": few}),
        "autocorrelate": (signal.autocorrelate, {"a": line}),
        "match_template": (signal.match_template, {"image": picture, "template": template}),
    }


def _swapped(f: Callable[..., Any], second: Any, first: Any) -> Any:
    return f(first, second)


def show(table: Table | None = None) -> Shown:
    """Compare rule and differences for every op and input of a table, by default `ops`."""
    found = distances(ops() if table is None else table)
    patch = by_patch()
    pairs = [(distance, f"{name} by {argument}") for name, row in found.items() for argument, distance in row.items()]
    distance, furthest = max(pairs)
    checks = (
        equal("the derivative by a 5×5 patch has its shape", patch["rule"].shape, patch["weight"].shape),
        at_most("rule against differences for that patch", relative(patch["rule"], patch["differences"]), BOUND),
        at_most(f"{len(found)} ops, {len(pairs)} inputs; the furthest apart: {furthest}", distance, BOUND),
        equal(
            "inputs that are further apart", ", ".join(name for d, name in pairs if not d <= BOUND) or "none", "none"
        ),
    )
    return Shown(
        checks,
        draw(patch, found),
        "Left: E over one entry of a patch, with the slope by the rule and the two evaluations that give it by "
        f"differences: parallel, as E is a parabola here (h is 0.6 for the eye, {STEP:g} in the checks). Below, the "
        f"slopes of all 25. Right: {len(found)} ops, in the row of each a dot for each of its inputs; what is left is "
        "the differences' own error.",
    )


def by_patch() -> dict[str, Any]:
    """Return, for E = ‖w ∗ image‖² as a function of one kernel, the slopes of its elements, and E along one of them."""
    x, w = as_picture(boot()), drawn(2, (5, 5))[0]

    def error(w: Any) -> Any:
        return jaxcnn.squared_error(jaxcnn.conv(x, w[:, :, None, None]), jnp.zeros((1, 24, 24, 1))).mean()

    entry = jnp.zeros((5, 5)).at[1, 3].set(1.0)
    shifts = jnp.linspace(-1, 1, 41)
    (differences,) = slopes_by_differences(error, (w,), jnp.ones(()))
    return {
        "weight": w,
        "rule": jax.grad(error)(w),
        "differences": differences,
        "shifts": np.asarray(shifts),
        "errors": np.asarray(jax.vmap(lambda shift: error(w + shift * entry))(shifts)),
    }


def distances(table: Table) -> dict[str, dict[str, float]]:
    """Return the distance between rule and differences for each op and input, with a random δ."""
    inputs = {name: tuple(given.values()) for name, (_, given) in table.items()}
    deltas = {name: drawn(7, jax.eval_shape(op, *inputs[name]).shape)[0] for name, (op, _) in table.items()}

    # One program for all ops compiles in half the time of one program per op.
    @jax.jit
    def slopes(inputs: Any, deltas: Any) -> Any:
        return {
            name: [by(op, inputs[name], deltas[name]) for by in (slopes_by_rule, slopes_by_differences)]
            for name, (op, _) in table.items()
        }

    found = slopes(inputs, deltas)
    return {name: dict(zip(given, map(relative, *found[name]), strict=True)) for name, (_, given) in table.items()}


def draw(patch: Mapping[str, Any], found: Mapping[str, Mapping[str, float]]) -> Any:
    """Draw a parabola and its slope, the slopes of a kernel, and a row per op with a dot per input."""
    fig = figure(10.6, 0.19 * len(found) + 1.2)
    left, right = parts(fig, 1, 2, width_ratios=(1, 1.25))
    top, bottom = parts(left, 2, 1, height_ratios=(1.25, 1))
    curve(top.subplots(), patch)
    limit = float(np.abs(patch["rule"]).max())
    for axes, name, title in zip(
        bottom.subplots(1, 2), ("rule", "differences"), ("by the rule", "by differences"), strict=True
    ):
        signed(axes, patch[name], rf"$\partial E/\partial w$ {title}", limit=limit)
    axes = right.subplots()
    plain(axes, "how far rule and differences are apart", "relative distance (L2)", "")
    for place, row in enumerate(found.values()):
        axes.plot([max(value, 1e-16) for value in row.values()], [place] * len(row), "o", color=BLUE, markersize=4.5)
    axes.axvline(BOUND, color=DARK, linestyle="--", linewidth=1)
    axes.annotate("allowed", (BOUND, 0), (-3, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
    axes.set(xscale="log", xlim=(1e-13, 1e-6), ylim=(len(found) - 0.4, -0.6), xticks=[1e-13, 1e-11, 1e-9, 1e-7])
    short = {"softmax_cross_entropy_with_integer_labels": "… with_integer_labels"}
    axes.set_yticks(range(len(found)), [f"{short.get(name, name)}: {', '.join(row)}" for name, row in found.items()])
    axes.tick_params("y", labelsize=LABEL)
    return fig


def curve(axes: Any, patch: Mapping[str, Any]) -> None:
    """Draw E over one element of the kernel, the tangent by the rule, and two points with the line through them."""
    shifts, errors, slope = patch["shifts"], patch["errors"], float(patch["rule"][1, 3])
    here, h = errors[len(errors) // 2], shifts[-9]
    plain(axes, "E over one entry of the patch", r"$w[1,3]$, less its value", r"$E$")
    axes.plot(shifts, errors, color=DARK, linewidth=2)
    axes.plot(shifts, here + slope * shifts, color=RED, linewidth=1.6, label="slope by the rule")
    ends = errors[[8, -9]]
    axes.plot([-h, h], ends, "o-", color=BLUE, linewidth=1.6, label=r"$(E(w + h) - E(w - h))\,/\,2h$")
    axes.plot(0, here, "o", color=RED)
    axes.legend(frameon=False, fontsize=8.5)


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
