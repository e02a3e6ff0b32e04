"""§11–12: convolution and correlation differ by a flip of the patch, and the lecture has their names exchanged."""

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxcnn
from experiments.lecture.drawing import BLUE, DARK, figure
from experiments.lecture.numerical import drawn
from experiments.lecture.statement import Shown, Statement, at_most, equal, main, relative
from jaxcnn.ops import signal

PATCH, IMAGE = np.array([1.0, 2, 3, 4]), np.array([5.0, 6, 7, 8])

STATEMENT = Statement(
    name="s11_flip",
    section="11–12",
    title="Convolution, correlation, and the flip; auto-correlation",
    korean_title="합성곱, 상관, 플립(180도 회전), 자기상관",
    korean="정확히는 convolution이 아니라 correlation하게 되는거다 … 단지 patch를 flip을 시킨다 … "
    "patch를 180도 회전(flip)을 시켜서",
    claim="A patch slides over the picture; at each place the products are added up, and what comes out is smaller. "
    "With the patch turned by 180° the same sliding gives the other of the two operations; a signal over itself, "
    "its auto-correlation.",
    formula="correlate(a, v)[o] = Σ<sub>k</sub> a[o + k]·v[k],  convolve(a, v) = correlate(a, v turned by 180°),  "
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
            "The lecture calls the sliding without a flip “convolution” and the one with it “correlation”. In signal "
            "processing, NumPy and SciPy it is the other way round, and so it is here. The layers of deep learning are "
            "named convolutions, and do not flip.",
        ),
    ),
)


def show(correlate: Any = signal.correlate, convolve: Any = signal.convolve) -> Shown:
    """Check the lecture's 1 2 3 4 over 5 6 7 8, the identity in one, two and three dims, and a layer's forward pass."""
    a, w = drawn(0, (28, 28), (5, 5))
    layer = jaxcnn.conv(a[None, :, :, None], w[:, :, None, None])[0, :, :, 0]
    shapes = (((9,), (4,)), ((7, 6), (3, 2)), ((5, 4, 6), (2, 3, 2)))
    pairs = [drawn(1, *pair) for pair in shapes]
    turned = [convolve(a, v) for a, v in pairs], [correlate(a, jnp.flip(v)) for a, v in pairs]
    checks = (
        equal("not flipped: correlate(5 6 7 8, 1 2 3 4)", correlate(IMAGE, PATCH), np.correlate(IMAGE, PATCH, "full")),
        equal("flipped: convolve(5 6 7 8, 1 2 3 4)", convolve(IMAGE, PATCH), np.convolve(IMAGE, PATCH)),
        equal("over itself: autocorrelate(5 6 7 8)", signal.autocorrelate(IMAGE), np.correlate(IMAGE, IMAGE, "full")),
        at_most("convolve against correlate with the patch turned, 1-, 2- and 3-D", relative(*turned), 1e-14),
        equal("size of a 28×28 picture after a 5×5 patch", correlate(a, w, "valid").shape, (24, 24)),
        at_most("a layer's conv against correlate, not flipped", relative(layer, correlate(a, w, "valid")), 1e-14),
    )
    caption = (
        "Each row is one place of the patch; its entries are multiplied with those of the image above them, and the "
        "sum is at the right. Framed: the patch lies wholly inside. Layers keep only such places, so images shrink; "
        "whether a sum elsewhere is larger does not matter."
    )
    return Shown(checks, draw(correlate(IMAGE, PATCH), convolve(IMAGE, PATCH), signal.autocorrelate(IMAGE)), caption)


def draw(unflipped: Any, flipped: Any, over_itself: Any) -> Any:
    """Draw three tables of seven rows."""
    from matplotlib.patches import Rectangle

    fig = figure(10.6, 3.4)
    panels = fig.subplots(1, 3)
    for axes, patch, sums, title in (
        (panels[0], PATCH, unflipped, "not flipped: correlation\n(the lecture's “convolution”)"),
        (panels[1], PATCH[::-1], flipped, "flipped: convolution\n(the lecture's “correlation”)"),
        (panels[2], IMAGE, over_itself, "the image over itself:\nauto-correlation"),
    ):
        axes.set_title(title, fontsize=10.5)
        for x, value in enumerate(IMAGE):
            cell(axes, x, -0.35, value, "#dbe9f6")
        for row, total in enumerate(np.asarray(sums)):
            shift = row - len(PATCH) + 1
            for k, value in enumerate(patch):
                meets = 0 <= shift + k < len(IMAGE)
                cell(axes, shift + k, row + 1, value, "#fde3cf" if meets else "white", faint=not meets)
            axes.text(8.4, row + 1, f"{total:g}", ha="right", va="center", fontsize=11, color=BLUE)
            if shift == 0:
                frame = Rectangle((-0.62, row + 0.48), 9.22, 1.04, facecolor="none", edgecolor=DARK, linewidth=1.3)
                axes.add_patch(frame)
                axes.text(-0.8, row + 1, "wholly\ninside", ha="right", va="center", fontsize=8.5, color="0.3")
        axes.text(-0.8, -0.35, "image", ha="right", va="center", fontsize=9.5, color="0.3")
        axes.text(8.4, -0.35, "sum", ha="right", va="center", fontsize=9.5, color="0.3")
        axes.set(xlim=(-3.7, 8.75), ylim=(7.6, -1), aspect="equal")
        axes.axis("off")
    return fig


def cell(axes: Any, x: float, y: float, value: float, colour: str, *, faint: bool = False) -> None:
    """Draw a number in a box."""
    from matplotlib.patches import Rectangle

    edge = "0.85" if faint else "0.55"
    axes.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, facecolor=colour, edgecolor=edge, linewidth=0.8))
    axes.text(x, y, f"{value:g}", ha="center", va="center", fontsize=10, color="0.75" if faint else DARK)


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
