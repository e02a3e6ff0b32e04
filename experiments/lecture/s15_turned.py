"""§15: in the backward pass the patch is flipped by 180°, and the effect of omitting the flip."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcnn
from experiments.lecture.drawing import figure, signed
from experiments.lecture.numerical import drawn, slopes_by_differences, slopes_by_rule
from experiments.lecture.statement import Shown, Statement, at_least, at_most, main, relative
from jaxcnn.ops.signal import convolve, correlate

STATEMENT = Statement(
    name="s15_turned",
    section="15",
    title="Why the patch is turned on the way back",
    korean_title="역전파에서 패치를 180도 회전하는 이유",
    korean="patch를 flip을 해서 correlation을 한다 … convolution에 대해서 미분을 하려고 하니까 방향에 대해서 보정을 "
    "해주는 이유",
    claim="Going forward, entry k of the patch looks k to the right of its place; so on the way back δ has to look k "
    "to the left: the full correlation of δ with the patch turned by 180°. With the patch left as it is, differences "
    "show it wrong.",
    formula="δ<sub>x</sub>[i] = Σ<sub>k</sub> δ[i − k]·w[k]: δ with w turned by 180°, channels exchanged",
    functions=("jaxcnn/ops/convolution.py: spread", "jaxcnn/ops/signal.py: convolve"),
    test="tests/test_rules.py",
)

F = np.array([[1.0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
"""A patch that is not its own half turn: the letter F."""


def turned(delta: Any, w: Any) -> Any:
    """Return the correct δ_x: δ with the flipped kernel."""
    return correlate(delta, w[::-1, ::-1], "full")


def unturned(delta: Any, w: Any) -> Any:
    """Return the wrong δ_x: δ with the unflipped kernel."""
    return correlate(delta, w, "full")


def show(right: Any = turned, wrong: Any = unturned) -> Shown:
    """Use three spikes of δ and the letter F as kernel, then random δ, kernel and channels."""
    w = jnp.asarray(F)
    delta = jnp.zeros((12, 13)).at[2, 2].set(1.0).at[5, 9].set(-1.0).at[10, 4].set(0.6)
    x = drawn(0, (16, 16))[0]

    def slide(x: Any) -> Any:
        return correlate(x, w, "valid")

    (differences,) = slopes_by_differences(slide, (x,), delta)
    pictures, patches, delta_y = drawn(1, (2, 9, 8, 3), (3, 4, 3, 2), (2, 7, 5, 2))
    delta_x = slopes_by_rule(jaxcnn.conv, (pictures, patches), delta_y)[0]
    symmetric = w + w[::-1, ::-1]
    by_channel = sum_over_channels(delta_y, patches)
    checks = (
        at_least("the patch against itself turned: relative distance", relative(F[::-1, ::-1], F), 0.1),
        at_most("δ_x with the patch turned: against differences", relative(right(delta, w), differences), 1e-7),
        at_least("δ_x with the patch not turned: against differences", relative(wrong(delta, w), differences), 0.1),
        at_most("convolve(δ, w) is the same: against differences", relative(convolve(delta, w), differences), 1e-7),
        at_most("conv's rule, 3 channels in and 2 out: against the formula channel by channel",
                relative(delta_x, by_channel), 1e-12),
        at_most("conv's rule: against differences",
                relative(delta_x, slopes_by_differences(jaxcnn.conv, (pictures, patches), delta_y)[0]), 1e-7),
        at_most("for a patch that is its own half turn both agree: relative distance",
                relative(wrong(delta, symmetric), right(delta, symmetric)), 1e-12),
    )  # fmt: skip
    caption = (
        "δ has three spikes. The true δ of x, found by moving each entry of x up and down, is the patch set down at "
        "each of them. The rule with the turned patch does that; without the turn every F stands on its head."
    )
    return Shown(checks, draw(w, delta, differences, right(delta, w), wrong(delta, w)), caption)


def sum_over_channels(delta: Any, w: Any) -> Any:
    """Return δ_x of a layer: every input channel collects from every output channel, one convolution each."""
    channel = jax.vmap(convolve, (0, None))  # over the batch
    inputs, outputs = w.shape[-2:]
    found = [sum(channel(delta[..., o], w[:, :, i, o]) for o in range(outputs)) for i in range(inputs)]
    return jnp.stack(found, -1)


def draw(w: Any, delta: Any, differences: Any, right: Any, wrong: Any) -> Any:
    """Draw kernel and δ, three versions of δ_x, and the two errors."""
    fig = figure(10, 6.4)
    top, bottom = fig.subplots(2, 3)
    signed(top[0], w, "the patch, w", limit=1)
    signed(top[1], delta, "δ of the output", limit=1)
    signed(top[2], differences, "δ of x, by differences", limit=1)
    signed(bottom[0], right, "δ of x, patch turned: right", limit=1)
    signed(bottom[1], wrong, "δ of x, patch not turned: wrong", limit=1)
    signed(bottom[2], np.asarray(wrong) - np.asarray(differences), "what it is off by", limit=1)
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
