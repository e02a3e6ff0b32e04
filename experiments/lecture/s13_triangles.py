"""§13: two right triangles with opposite orientation and with the same orientation."""

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.lecture.drawing import BLUE, DARK, GREY, RED, figure, parts, plain
from experiments.lecture.statement import Shown, Statement, at_least, at_most, equal, main
from jaxcnn.ops import signal

STATEMENT = Statement(
    name="s13_triangles",
    section="13",
    title="Two right triangles: the hill and the peak",
    korean_title="두 직각삼각형: 산모양과 최고점",
    korean="직각이 오른쪽에 있는 삼각형을 patch라고 … 산모양 삼각형 … 최고점보다도 훨씬 더 높은 값을 가질 확률이 높다",
    claim="A patch whose right angle is on the right slides over an image whose right angle is on the left: a low "
    "hill. Flipped, it has the image's shape, and where the two coincide stands a peak that is higher.",
    formula="max<sub>o</sub> Σ<sub>k</sub> a[o + k]·v[k] ≤ ‖a‖·‖v‖,  reached where v has the shape of a",
    functions=("jaxcnn/ops/signal.py: correlate", "jaxcnn/ops/signal.py: convolve"),
    test="tests/ops/test_signal.py",
)

WIDTH = 60
PATCH = np.arange(1, WIDTH + 1) / WIDTH  # rises to its right angle
IMAGE = PATCH[::-1].copy()  # falls from its right angle


def show(convolve: Any = signal.convolve, correlate: Any = signal.correlate) -> Shown:
    """Slide the patch over the image, unflipped and flipped, with the original triangles and without their means."""
    hill, peak = correlate(IMAGE, PATCH), convolve(IMAGE, PATCH)
    image, patch = IMAGE - IMAGE.mean(), PATCH - PATCH.mean()
    low, high = correlate(image, patch), convolve(image, patch)
    checks = (
        equal("flipped, the patch has the image's shape: largest difference", np.abs(PATCH[::-1] - IMAGE).max(), 0),
        at_least("peak over hill", float(peak.max() / hill.max()), 1.15),
        at_least("peak over hill, triangles less their means", float(high.max() / low.max()), 2),
        equal("where the peak is: patch and image coincide", int(jnp.argmax(peak)) - (WIDTH - 1), 0),
        at_most(
            "the peak against the image's energy: relative distance", abs(peak.max() / np.sum(IMAGE**2) - 1), 1e-12
        ),
        equal("the hill rises, then falls", changes_of_direction(hill), 1),
    )
    ratios = float(peak.max() / hill.max()), float(high.max() / low.max())
    caption = (
        f"Left, the triangles where they fit best. Middle, as they are: the peak is {ratios[0]:.2f} times as high as "
        f"the hill, not “far higher”. Right, with their means taken away: {ratios[1]:.2f} times; that is what template "
        "matching compares."
    )
    return Shown(checks, draw((hill, peak), (low, high)), caption)


def changes_of_direction(y: Any) -> int:
    """Return how often a sequence changes from rising to falling or back."""
    rises = np.sign(np.diff(np.asarray(y)))
    rises = rises[rises != 0]
    return int(np.sum(rises[1:] != rises[:-1]))


def draw(as_they_are: Any, less_means: Any) -> Any:
    """Draw the shapes at the best shift next to the curves over all shifts."""
    fig = figure(10.6, 4.3)
    shapes, curves = parts(fig, 1, 2, width_ratios=(1, 2.2))
    best = int(np.argmax(np.asarray(as_they_are[0]))) - (WIDTH - 1)
    for axes, shift, patch, title, colour in zip(
        shapes.subplots(2, 1), (best, 0), (PATCH, PATCH[::-1]), ("not flipped", "flipped"), (GREY, RED), strict=True
    ):
        triangle(axes, 0, IMAGE, BLUE, "image")
        triangle(axes, shift, patch, colour, "patch")
        axes.set_title(title, fontsize=10.5)
        axes.set(xlim=(best - 3, WIDTH + 3), ylim=(0, 1.08), xticks=[], yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    shifts = np.arange(1 - WIDTH, WIDTH)
    panels = curves.subplots(1, 2)
    for axes, (low, high), title in zip(
        panels, (as_they_are, less_means), ("the triangles as they are", "less their means"), strict=True
    ):
        plain(axes, title, "shift of the patch", "sum of the products" if axes is panels[0] else "")
        axes.axhline(0, color=DARK, linewidth=0.7)
        axes.plot(shifts, low, color=GREY, linewidth=2, label="not flipped")
        axes.plot(shifts, high, color=RED, linewidth=2, label="flipped")
        for y, colour in ((low, "0.35"), (high, RED)):
            at = int(np.argmax(np.asarray(y)))
            axes.annotate(f"{float(y[at]):.1f}", (shifts[at], float(y[at])), (0, 4), textcoords="offset points",
                          ha="center", fontsize=9, color=colour)  # fmt: skip
        axes.margins(y=0.12)
    panels[0].set_ylim(0)
    panels[0].legend(frameon=False, fontsize=9, loc="upper right")
    return fig


def triangle(axes: Any, at: int, heights: Any, colour: str, label: str) -> None:
    """Draw a right triangle at position `at`."""
    x = np.arange(at, at + WIDTH)
    axes.fill(np.r_[x[0], x, x[-1]], np.r_[0, heights, 0], facecolor=colour, alpha=0.35, edgecolor=colour, label=label)


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
