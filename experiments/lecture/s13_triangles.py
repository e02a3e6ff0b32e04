"""§13: two right triangles, with opposite orientations and with the same orientation."""

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.lecture.drawing import BLUE, DARK, GRAY, RED, figure, parts, plain
from experiments.lecture.statement import Result, Statement, at_least, at_most, equal, main
from jaxcnn.ops import signal

STATEMENT = Statement(
    name="s13_triangles",
    section="13",
    title="Two right triangles: the hill and the peak",
    korean_title="두 직각삼각형: 산모양과 최고점",
    korean="직각이 오른쪽에 있는 삼각형을 patch라고 … 산모양 삼각형 … 최고점보다도 훨씬 더 높은 값을 가질 확률이 높다",
    claim="A kernel with its right angle on the right slides over an image with its right angle on the left: the "
    "result is a low hill. The flipped kernel has the image's shape: the result is a higher peak, at the shift where "
    "both coincide.",
    formula="max<sub>o</sub> Σ<sub>k</sub> a[o + k]·v[k] ≤ ‖a‖·‖v‖,  with equality if v has the shape of a",
    functions=("jaxcnn/ops/signal.py: correlate", "jaxcnn/ops/signal.py: convolve"),
    test="tests/ops/test_signal.py",
)

WIDTH = 60
KERNEL = np.arange(1, WIDTH + 1) / WIDTH  # increases toward its right angle
IMAGE = KERNEL[::-1].copy()  # decreases from its right angle


def show(convolve: Any = signal.convolve, correlate: Any = signal.correlate) -> Result:
    """Slide the kernel over the image, not flipped and flipped, as given and with the means subtracted."""
    hill, peak = correlate(IMAGE, KERNEL), convolve(IMAGE, KERNEL)
    image, kernel = IMAGE - IMAGE.mean(), KERNEL - KERNEL.mean()
    low, high = correlate(image, kernel), convolve(image, kernel)
    checks = (
        equal("flipped kernel and image, maximum difference", np.abs(KERNEL[::-1] - IMAGE).max(), 0),
        at_least("peak / hill", float(peak.max() / hill.max()), 1.15),
        at_least("peak / hill with the means subtracted", float(high.max() / low.max()), 2),
        equal("shift of the peak, where kernel and image coincide", int(jnp.argmax(peak)) - (WIDTH - 1), 0),
        at_most("the peak and the image's energy, relative difference", abs(peak.max() / np.sum(IMAGE**2) - 1), 1e-12),
        equal("changes of direction of the hill, from rising to falling", changes_of_direction(hill), 1),
    )
    ratios = float(peak.max() / hill.max()), float(high.max() / low.max())
    caption = (
        f"Left: the triangles at the best shift. Middle: as given, the peak is {ratios[0]:.2f} times as high as the "
        f"hill, not “far higher”. Right: with the means subtracted, as in template matching, it is {ratios[1]:.2f} "
        "times as high."
    )
    return Result(checks, draw((hill, peak), (low, high)), caption)


def changes_of_direction(y: Any) -> int:
    """Return the number of changes of a sequence from rising to falling or back."""
    rises = np.sign(np.diff(np.asarray(y)))
    rises = rises[rises != 0]
    return int(np.sum(rises[1:] != rises[:-1]))


def draw(as_given: Any, centered: Any) -> Any:
    """Draw the triangles at the best shift, and the sums over all shifts."""
    fig = figure(10.6, 4.3)
    shapes, curves = parts(fig, 1, 2, width_ratios=(1, 2.2))
    best = int(np.argmax(np.asarray(as_given[0]))) - (WIDTH - 1)
    for axes, shift, kernel, title, color in zip(
        shapes.subplots(2, 1), (best, 0), (KERNEL, KERNEL[::-1]), ("not flipped", "flipped"), (GRAY, RED), strict=True
    ):
        triangle(axes, 0, IMAGE, BLUE, "image")
        triangle(axes, shift, kernel, color, "kernel")
        axes.set_title(title, fontsize=10.5)
        axes.set(xlim=(best - 3, WIDTH + 3), ylim=(0, 1.08), xticks=[], yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    shifts = np.arange(1 - WIDTH, WIDTH)
    panels = curves.subplots(1, 2)
    for axes, (low, high), title in zip(
        panels, (as_given, centered), ("the triangles as given", "with the means subtracted"), strict=True
    ):
        plain(axes, title, "shift of the kernel", "sum of the products" if axes is panels[0] else "")
        axes.axhline(0, color=DARK, linewidth=0.7)
        axes.plot(shifts, low, color=GRAY, linewidth=2, label="not flipped")
        axes.plot(shifts, high, color=RED, linewidth=2, label="flipped")
        for y, color in ((low, "0.35"), (high, RED)):
            at = int(np.argmax(np.asarray(y)))
            axes.annotate(f"{float(y[at]):.1f}", (shifts[at], float(y[at])), (0, 4), textcoords="offset points",
                          ha="center", fontsize=9, color=color)  # fmt: skip
        axes.margins(y=0.12)
    panels[0].set_ylim(0)
    panels[0].legend(frameon=False, fontsize=9, loc="upper right")
    return fig


def triangle(axes: Any, at: int, heights: Any, color: str, label: str) -> None:
    """Draw a right triangle at position `at`."""
    x = np.arange(at, at + WIDTH)
    axes.fill(np.r_[x[0], x, x[-1]], np.r_[0, heights, 0], facecolor=color, alpha=0.35, edgecolor=color, label=label)


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
