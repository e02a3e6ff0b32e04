"""§6, erratum 7: g is the ReLU, and its slope at 0."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcnn
from experiments.lecture.drawing import BLUE, DARK, RED, figure, gray, parts, plain, signed
from experiments.lecture.numerical import as_batch, boot, normal, slopes_by_differences, slopes_by_rule
from experiments.lecture.statement import Result, Statement, at_most, equal, main, relative
from jaxcnn.ops.signal import convolve

STATEMENT = Statement(
    name="s06_relu",
    section="6",
    title="Convolution replaces the matrix product, and g is the ReLU",
    korean_title="행렬곱 대신 합성곱, g는 ReLU",
    korean="CNN에서는 weight와 δ를 행렬곱이 아니라 convolution 연산을 한다",
    claim="In a CNN, the backward pass convolves δ with the kernel and then multiplies it elementwise by g′, which is "
    "1 where x > 0 and 0 elsewhere.",
    formula="δ<sub>l</sub> = w ∗ δ<sub>l+1</sub> ∘ g′(x)",
    functions=("jaxcnn/ops/activation.py: relu", "jaxcnn/ops/convolution.py: conv"),
    test="tests/test_rules.py",
    errata=(
        (
            7,
            "At 0 the ReLU has no derivative: its slope is 0 from the left and 1 from the right, and central "
            "differences give the mean, ½. The rule uses 0, as other libraries do.",
        ),
    ),
)


def show(relu: Any = jaxcnn.relu) -> Result:
    """Check the slope near and at 0, and δ_l of a ReLU before a convolution, by formula and differences."""
    slope = jax.vmap(jax.grad(relu))
    h = 1e-5
    at_zero = (relu(jnp.array(h)) - relu(jnp.array(-h))) / (2 * h)

    first, w, delta = normal(4, (5, 5, 1, 1), (5, 5, 1, 1), (1, 20, 20, 1))
    x = jaxcnn.conv(
        as_batch(boot()), first, jnp.array([0.1])
    )  # the bias, because the black background would give exactly 0

    def above(x: Any) -> Any:
        return jaxcnn.conv(relu(x), w)

    (delta_l,) = slopes_by_rule(above, (x,), delta)
    convolved = as_batch(convolve(delta[0, :, :, 0], w[:, :, 0, 0]))
    by_differences = slopes_by_differences(above, (x,), delta)[0]
    checks = (
        equal("g′ at −1, −0.1, 0, 0.1, 1", slope(jnp.array([-1, -0.1, 0, 0.1, 1])), np.array([0.0, 0, 0, 1, 1])),
        at_most("slope at 0 by differences: distance from ½", abs(float(at_zero) - 0.5), 1e-9),
        at_most(
            "δ_l by the rules and w ∗ δ ∘ g′(x), relative difference", relative(delta_l, convolved * (x > 0)), 1e-12
        ),
        at_most("δ_l by the rules and by differences, relative difference", relative(delta_l, by_differences), 1e-7),
    )
    caption = "Top: the ReLU and its slope, which is undefined only at 0. Bottom: δ in the backward pass."
    return Result(checks, draw(relu, slope, x, [delta, convolved, x > 0, delta_l]), caption)


def draw(relu: Any, slope: Any, x: Any, steps: list[Any]) -> Any:
    """Draw the ReLU and its slope around 0, and δ, w ∗ δ, g′(x), δ_l."""
    fig = figure(9.2, 5.6)
    top, bottom = parts(fig, 2, 1)
    left, right = top.subplots(1, 2)
    t = np.linspace(-1, 1, 401)
    plain(left, "g(x), the ReLU", "x", "")
    left.plot(t, relu(jnp.asarray(t)), color=DARK, linewidth=2)
    plain(right, "g′(x), by the rule", "x", "")
    for part in (t[t < 0], t[t > 0]):
        right.plot(part, slope(jnp.asarray(part)), color=RED, linewidth=2)
    right.plot(0, slope(jnp.zeros(1))[0], "o", color=RED, markersize=7, label="at 0, by the rule: 0")
    right.plot(0, 1, "o", markerfacecolor="white", color=RED, markersize=7)
    right.plot(0, 0.5, "D", color=BLUE, markersize=6, label="at 0, by differences: ½")
    right.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(0, 0.72))
    delta, convolved, mask, delta_l = (np.asarray(p)[0, :, :, 0] for p in steps)
    panels = bottom.subplots(1, 4)
    limit = float(np.abs(convolved).max())
    signed(panels[0], delta, r"$\delta_{l+1}$", limit=float(np.abs(delta).max()))
    signed(panels[1], convolved, r"$w * \delta_{l+1}$", limit=limit)
    gray(panels[2], mask, r"$g'(x)$: white is 1")
    signed(panels[3], delta_l, r"$\delta_l = w * \delta_{l+1} \circ g'(x)$", limit=limit)
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
