"""§11–12: convolution and correlation differ by a flip of the kernel; the lecture exchanges their names."""

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxcnn
from experiments.lecture.drawing import BLUE, DARK, figure
from experiments.lecture.numerical import normal
from experiments.lecture.statement import Result, Statement, at_most, equal, main, relative
from jaxcnn.ops import signal

KERNEL, IMAGE = np.array([1.0, 2, 3, 4]), np.array([5.0, 6, 7, 8])

STATEMENT = Statement(
    name="s11_flip",
    section="11–12",
    title="Convolution, correlation, and the flip; auto-correlation",
    korean_title="합성곱, 상관, 플립(180도 회전), 자기상관",
    korean="정확히는 convolution이 아니라 correlation하게 되는거다 … 단지 patch를 flip을 시킨다 … "
    "patch를 180도 회전(flip)을 시켜서",
    claim="A kernel slides over the image. At each position the products are summed, and the result is smaller than "
    "the image. With a flipped kernel the same sliding gives the other one of the two operations, and a signal that "
    "slides over itself gives its auto-correlation.",
    formula="correlate(a, v)[o] = Σ<sub>k</sub> a[o + k]·v[k],  convolve(a, v) = correlate(a, flipped v),  "
    "autocorrelate(a) = correlate(a, a)",
    functions=(
        "jaxcnn/ops/signal.py: correlate",
        "jaxcnn/ops/signal.py: convolve",
        "jaxcnn/ops/signal.py: autocorrelate",
        "jaxcnn/ops/convolution.py: conv",
    ),
    test="tests/ops/test_signal.py",
    errata=(
        (
            4,
            "The lecture calls sliding without a flip “convolution” and sliding with a flip “correlation”. In signal "
            "processing, NumPy, SciPy and jaxcnn the names are reversed. Convolution layers do not flip their kernel, "
            "in spite of their name.",
        ),
    ),
)


def show(correlate: Any = signal.correlate, convolve: Any = signal.convolve) -> Result:
    """Check the lecture's 1 2 3 4 over 5 6 7 8, the identity in 1-, 2- and 3-D, and a layer's forward pass."""
    a, w = normal(0, (28, 28), (5, 5))
    layer = jaxcnn.conv(a[None, :, :, None], w[:, :, None, None])[0, :, :, 0]
    shapes = (((9,), (4,)), ((7, 6), (3, 2)), ((5, 4, 6), (2, 3, 2)))
    pairs = [normal(1, *pair) for pair in shapes]
    flipped = [convolve(a, v) for a, v in pairs], [correlate(a, jnp.flip(v)) for a, v in pairs]
    checks = (
        equal(
            "not flipped: correlate(5 6 7 8, 1 2 3 4)", correlate(IMAGE, KERNEL), np.correlate(IMAGE, KERNEL, "full")
        ),
        equal("flipped: convolve(5 6 7 8, 1 2 3 4)", convolve(IMAGE, KERNEL), np.convolve(IMAGE, KERNEL)),
        equal("over itself: autocorrelate(5 6 7 8)", signal.autocorrelate(IMAGE), np.correlate(IMAGE, IMAGE, "full")),
        at_most(
            "convolve and correlate with a flipped kernel in 1-, 2- and 3-D, relative difference",
            relative(*flipped),
            1e-14,
        ),
        equal("size of the result for a 28×28 image and a 5×5 kernel", correlate(a, w, "valid").shape, (24, 24)),
        at_most("a layer's conv and correlate, relative difference", relative(layer, correlate(a, w, "valid")), 1e-14),
    )
    caption = (
        "Each row is one position of the kernel. Its elements are multiplied by those of the image above them, and the "
        "sum is at the right. In the framed row, the kernel is entirely inside the image. A layer keeps only such "
        "positions, so the result is smaller, even if a sum at another position is larger."
    )
    return Result(checks, draw(correlate(IMAGE, KERNEL), convolve(IMAGE, KERNEL), signal.autocorrelate(IMAGE)), caption)


def draw(unflipped: Any, flipped: Any, over_itself: Any) -> Any:
    """Draw three tables of seven rows."""
    from matplotlib.patches import Rectangle

    fig = figure(10.6, 3.4)
    panels = fig.subplots(1, 3)
    for axes, kernel, sums, title in (
        (panels[0], KERNEL, unflipped, "not flipped: correlation\n(the lecture's “convolution”)"),
        (panels[1], KERNEL[::-1], flipped, "flipped: convolution\n(the lecture's “correlation”)"),
        (panels[2], IMAGE, over_itself, "the image over itself:\nauto-correlation"),
    ):
        axes.set_title(title, fontsize=10.5)
        for x, value in enumerate(IMAGE):
            cell(axes, x, -0.35, value, "#dbe9f6")
        for row, total in enumerate(np.asarray(sums)):
            shift = row - len(KERNEL) + 1
            for k, value in enumerate(kernel):
                inside = 0 <= shift + k < len(IMAGE)
                cell(axes, shift + k, row + 1, value, "#fde3cf" if inside else "white", faint=not inside)
            axes.text(8.4, row + 1, f"{total:g}", ha="right", va="center", fontsize=11, color=BLUE)
            if shift == 0:
                frame = Rectangle((-0.62, row + 0.48), 9.22, 1.04, facecolor="none", edgecolor=DARK, linewidth=1.3)
                axes.add_patch(frame)
                axes.text(-0.8, row + 1, "entirely\ninside", ha="right", va="center", fontsize=8.5, color="0.3")
        axes.text(-0.8, -0.35, "image", ha="right", va="center", fontsize=9.5, color="0.3")
        axes.text(8.4, -0.35, "sum", ha="right", va="center", fontsize=9.5, color="0.3")
        axes.set(xlim=(-3.7, 8.75), ylim=(7.6, -1), aspect="equal")
        axes.axis("off")
    return fig


def cell(axes: Any, x: float, y: float, value: float, color: str, *, faint: bool = False) -> None:
    """Draw a number in a box."""
    from matplotlib.patches import Rectangle

    edge = "0.85" if faint else "0.55"
    axes.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, facecolor=color, edgecolor=edge, linewidth=0.8))
    axes.text(x, y, f"{value:g}", ha="center", va="center", fontsize=10, color="0.75" if faint else DARK)


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
