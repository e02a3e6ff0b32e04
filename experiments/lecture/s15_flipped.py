"""§15: the backward pass flips the kernel, and the effect of omitting the flip."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcnn
from experiments.lecture.drawing import figure, signed
from experiments.lecture.numerical import normal, slopes_by_differences, slopes_by_rule
from experiments.lecture.statement import Result, Statement, at_least, at_most, main, relative
from jaxcnn.ops.signal import convolve, correlate

STATEMENT = Statement(
    name="s15_flipped",
    section="15",
    title="Why the backward pass flips the kernel",
    korean_title="역전파에서 패치를 180도 회전하는 이유",
    korean="patch를 flip을 해서 correlation을 한다 … convolution에 대해서 미분을 하려고 하니까 방향에 대해서 보정을 "
    "해주는 이유",
    claim="In the forward pass, output o reads element o + k of x through element k of the kernel. So δ of x at i "
    "depends on δ of y at i − k: it is the full correlation of δ with the flipped kernel. Without the flip, it "
    "is wrong.",
    formula="δ<sub>x</sub>[i] = Σ<sub>k</sub> δ[i − k]·w[k]: δ with flipped w, channels swapped",
    functions=("jaxcnn/ops/convolution.py: input_grad", "jaxcnn/ops/signal.py: convolve"),
    test="tests/test_rules.py",
)

F = np.array([[1.0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
"""A kernel that the flip changes: the letter F."""


def flipped(delta: Any, w: Any) -> Any:
    """Return the correct δ_x: δ with the flipped kernel."""
    return correlate(delta, w[::-1, ::-1], "full")


def unflipped(delta: Any, w: Any) -> Any:
    """Return the wrong δ_x: δ with the unflipped kernel."""
    return correlate(delta, w, "full")


def show(right: Any = flipped, wrong: Any = unflipped) -> Result:
    """Compare rules for three spikes of δ and the letter F as kernel, then for random δ, kernel and channels."""
    w = jnp.asarray(F)
    delta = jnp.zeros((12, 13)).at[2, 2].set(1.0).at[5, 9].set(-1.0).at[10, 4].set(0.6)
    x = normal(0, (16, 16))[0]

    def slide(x: Any) -> Any:
        return correlate(x, w, "valid")

    (differences,) = slopes_by_differences(slide, (x,), delta)
    images, kernels, delta_y = normal(1, (2, 9, 8, 3), (3, 4, 3, 2), (2, 7, 5, 2))
    delta_x = slopes_by_rule(jaxcnn.conv, (images, kernels), delta_y)[0]
    symmetric = w + w[::-1, ::-1]
    by_channel = sum_over_channels(delta_y, kernels)
    checks = (
        at_least("kernel and flipped kernel, relative difference", relative(F[::-1, ::-1], F), 0.1),
        at_most("δ_x with the flipped kernel and by differences, relative difference",
                relative(right(delta, w), differences), 1e-7),
        at_least("δ_x without the flip and by differences, relative difference",
                 relative(wrong(delta, w), differences), 0.1),
        at_most("convolve(δ, w) and differences, relative difference", relative(convolve(delta, w), differences), 1e-7),
        at_most("conv's rule, 3 channels in and 2 out, and the formula channel by channel",
                relative(delta_x, by_channel), 1e-12),
        at_most("conv's rule and differences, relative difference",
                relative(delta_x, slopes_by_differences(jaxcnn.conv, (images, kernels), delta_y)[0]), 1e-7),
        at_most("with and without the flip, for a kernel that the flip does not change",
                relative(wrong(delta, symmetric), right(delta, symmetric)), 1e-12),
    )  # fmt: skip
    caption = (
        "δ has three spikes. The true δ of x, computed by differences, has a copy of the kernel at each spike. The "
        "rule with the flipped kernel gives the same; without the flip, every F is rotated by 180°."
    )
    return Result(checks, draw(w, delta, differences, right(delta, w), wrong(delta, w)), caption)


def sum_over_channels(delta: Any, w: Any) -> Any:
    """Return δ_x of a layer as a sum of one convolution per input and output channel."""
    channel = jax.vmap(convolve, (0, None))  # over the batch
    inputs, outputs = w.shape[-2:]
    by_input = [sum(channel(delta[..., o], w[:, :, i, o]) for o in range(outputs)) for i in range(inputs)]
    return jnp.stack(by_input, -1)


def draw(w: Any, delta: Any, differences: Any, right: Any, wrong: Any) -> Any:
    """Draw kernel and δ, three versions of δ_x, and the error of the wrong one."""
    fig = figure(10, 6.4)
    top, bottom = fig.subplots(2, 3)
    signed(top[0], w, "the kernel, w", limit=1)
    signed(top[1], delta, "δ of the output", limit=1)
    signed(top[2], differences, "δ of x, by differences", limit=1)
    signed(bottom[0], right, "δ of x, flipped kernel: correct", limit=1)
    signed(bottom[1], wrong, "δ of x, no flip: wrong", limit=1)
    signed(bottom[2], np.asarray(wrong) - np.asarray(differences), "the error without the flip", limit=1)
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
