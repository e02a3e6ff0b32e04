"""The figures of report.html: charts as SVG in the colors of the page, and arrays of pixels as PNG data URIs."""

import base64
import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.lecture.drawing import SIGNED
from experiments.run_folder import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders of the variables of the page's style sheet, so that a chart follows the color scheme.
TEXT, SOFT, FAINT, LINE, ACCENT = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES: Mapping[str, str] = {TEXT: "text", SOFT: "soft", FAINT: "faint", LINE: "line", ACCENT: "accent"}
WIDTH = 4.3
"""Width of a chart in inches; its letters are readable on a screen of 390 pixels."""
MAX_POINTS = 300
"""Number of points of a line; a longer one is averaged."""
MAX_NAMES = 12
"""Number of lines that are named in a chart."""
MAX_CLASSES = 20
"""Number of classes whose names and counts fit into the confusion matrix."""
GAP = 1
"""Pixels between the tiles of a mosaic."""


def svg(figure: "Figure", name: str, alt: str) -> str:
    """Return a figure as inline SVG, whose ids start with `name`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt, quote=True)}" ', 1)


def _figure(height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _chart(xlabel: str, ylabel: str, height: float = 3.3) -> "tuple[Figure, Axes]":
    from matplotlib.ticker import MaxNLocator

    figure = _figure(height)
    axes = figure.subplots()
    axes.set_xlabel(xlabel, color=SOFT, fontsize=10.5)
    axes.set_ylabel(ylabel, color=SOFT, fontsize=10.5)
    axes.tick_params(which="both", colors=SOFT, labelsize=10)
    axes.grid(color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    return figure, axes


def _key(figure: "Figure", axes: "Axes", columns: int) -> None:
    lines, names = axes.get_legend_handles_labels()
    options: dict[str, Any] = {
        "frameon": False,
        "fontsize": 10,
        "labelcolor": TEXT,
        "handlelength": 1.3,
        "columnspacing": 1.0,
    }
    figure.legend(lines, names, loc="outside upper left", ncols=columns, **options)


def averaged(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return at most MAX_POINTS points: the means of consecutive ones."""
    parts = min(MAX_POINTS, len(x))
    mean = [[part.mean() for part in np.array_split(np.asarray(a, float), parts)] if parts else [] for a in (x, y)]
    return np.array(mean[0]), np.array(mean[1])


def title(quantity: str) -> str:
    """Return the name of a metric in words."""
    return quantity.replace("_", " ").replace("iou", "IoU")


def curve(
    quantity: str, steps: Sequence[Mapping[str, Any]], epochs: Sequence[Epoch], best_step: int | None
) -> "Figure":
    """Draw the loss or accuracy over the steps: of each batch, the mean of each epoch, and that of the validation."""
    figure, axes = _chart("step", title(quantity))
    lines = [step for step in steps if quantity in step]
    points = averaged([step["step"] for step in lines], [step[quantity] for step in lines])
    if lines:
        axes.plot(*points, color=FAINT, linewidth=1, label="batch")
    x = [row.step for row in epochs]
    marker = "o" if len(x) < 40 else ""
    train = [getattr(row, f"train_{quantity}", math.nan) for row in epochs]
    validation = [getattr(row, f"validation_{quantity}") for row in epochs]
    if any(map(math.isfinite, train)):
        axes.plot(x, train, "--", color=SOFT, marker=marker, markersize=3.5, label="epoch")
    if any(map(math.isfinite, validation)):
        axes.plot(x, validation, color=ACCENT, marker=marker, markersize=4.5, label="validation (○ best)")
    if best_step is not None:
        chosen = next((value for row, value in zip(epochs, validation, strict=True) if row.step == best_step), math.nan)
        if math.isfinite(chosen):
            axes.plot([best_step], [chosen], "o", color=ACCENT, markersize=11, fillstyle="none")
    # A few early batches must not hide the rest.
    values = np.array([v for v in (*train, *validation) if math.isfinite(v)])
    if quantity == "loss" and lines and values.size:
        top = max(values.max(), np.quantile(points[1], 0.97))
        axes.set_ylim(0, 1.1 * top if math.isfinite(top) and top > 0 else None)
    _key(figure, axes, 3)
    return figure


def speed(epochs: Sequence[Epoch]) -> "Figure":
    """Draw the images per second of each epoch."""
    figure, axes = _chart("epoch", "images per second", 2.4)
    x = [row.epoch for row in epochs]
    axes.bar(x, [row.images_per_second for row in epochs], color=ACCENT, width=0.7)
    return figure


def norms(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str) -> "Figure":
    """Draw norms over the steps on a logarithmic scale, from the first line (violet) to the last (orange)."""
    import matplotlib

    shown = list(lines)
    if len(shown) > MAX_NAMES:
        shown = [shown[round(n * (len(lines) - 1) / (MAX_NAMES - 1))] for n in range(MAX_NAMES)]
    figure, axes = _chart("step", ylabel, 3.3 + 0.17 * math.ceil(len(shown) / 2))
    colors = matplotlib.colormaps["plasma"](np.linspace(0.32, 0.85, max(2, len(lines))))
    for color, (name, (x, y)) in zip(colors, lines.items(), strict=False):
        points = averaged(x, y)
        marker = "o" if len(points[0]) < 20 else ""
        label = _end(name) if name in shown else None
        axes.plot(*points, color=color, linewidth=1.6, marker=marker, markersize=3, label=label)
    if any(value > 0 and math.isfinite(value) for _, y in lines.values() for value in y):
        axes.set_yscale("log")
    axes.yaxis.grid(True, which="major")
    _key(figure, axes, 2)
    return figure


def _end(name: str, most: int = 20) -> str:
    """Return the last parts of a layer's name that fit into a key of two columns."""
    parts = name.split("/")
    kept = len(parts)
    while kept > 1 and len("/".join(parts[-kept:])) > most:
        kept -= 1
    return name if kept == len(parts) else "/".join(["…", *parts[-kept:]])


def confusion(counts: np.ndarray, names: Sequence[str]) -> "Figure":
    """Draw the share of each true class (rows) that is predicted as each class (columns), with the counts."""
    classes = len(names)
    figure = _figure(4.2)
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(classes, dtype=bool)[..., None]
    color = np.where(right, np.array([26, 127, 55]) / 255, np.array([208, 68, 35]) / 255)
    # A rare mistake is visible, but a frequent one more so.
    alpha = np.where(counts > 0, 0.08 + 0.62 * share**0.6, 0)
    axes.imshow(np.dstack([color, alpha]), interpolation="nearest")
    axes.set_xlabel("predicted class", color=SOFT, fontsize=10.5)
    axes.set_ylabel("true class", color=SOFT, fontsize=10.5)
    axes.tick_params(colors=TEXT, labelsize=10, length=0)
    axes.spines[:].set_color(LINE)
    if classes <= MAX_CLASSES:
        axes.set_xticks(range(classes), names, rotation=50, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), names)
        size = 9.5 if counts.max() < 1000 and classes <= 12 else 7
        for i, j in zip(*np.nonzero(counts), strict=True):
            text = str(counts[i, j]) if counts.max() < 100_000 else f"{share[i, j]:.1%}"
            axes.text(j, i, text, ha="center", va="center", fontsize=size, color=TEXT)
    return figure


def png(pixels: np.ndarray) -> str:
    """Return an image (H, W, 3) or (H, W, 4) of uint8 as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image(x: np.ndarray) -> np.ndarray:
    """Return the pixels of an image (H, W, C) with values in [0, 1]: gray, or in color if there are 3 channels."""
    x = np.clip(x, 0, 1)
    x = x if x.shape[-1] == 3 else np.repeat(x.mean(-1, keepdims=True), 3, -1)
    return np.round(255 * x).astype(np.uint8)


def signed(values: np.ndarray, limit: float | None = None) -> np.ndarray:
    """Return the pixels of an array of signed numbers: white is 0, red is positive, blue is negative."""
    limit = limit or float(np.abs(values).max()) or 1.0
    return _colors()[np.clip(np.round(127.5 + 127.5 * values / limit), 0, 255).astype(np.uint8)]


@functools.cache
def _colors() -> np.ndarray:
    import matplotlib

    return np.round(255 * matplotlib.colormaps[SIGNED](np.arange(256))[:, :3]).astype(np.uint8)


def mosaic(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange tiles of one size (H, W, 3) in rows, with transparent gaps."""
    height, width, _ = tiles[0].shape
    rows = math.ceil(len(tiles) / columns)
    result = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 4), np.uint8)
    for n, tile in enumerate(tiles):
        i, j = n // columns * (height + GAP), n % columns * (width + GAP)
        result[i : i + height, j : j + width, :3] = tile
        result[i : i + height, j : j + width, 3] = 255
    return result


def filters(weight: np.ndarray, shape: tuple[int, ...]) -> tuple[list[np.ndarray], str] | None:
    """Return the first layer's weights as tiles and their description, or None if they cannot be drawn.

    Args:
        weight: A kernel (kh, kw, inputs, outputs), or the matrix (inputs, outputs) of a dense layer. Its inputs must
            be the channels of an image, or those of a group of them.
        shape: The shape (H, W, C) of an image.
    """
    if weight.ndim == 2 and weight.shape[0] == math.prod(shape):
        weight = weight.reshape(*shape, -1)
        what = "units, in the shape of an image"
    elif weight.ndim == 4 and shape[-1] % weight.shape[2] == 0:
        what = "kernels"
    else:
        return None
    height, width, inputs, outputs = weight.shape
    order = np.argsort(-np.abs(weight).sum((0, 1, 2)), kind="stable")[:32] if outputs > 64 else np.arange(outputs)
    some = f"the {len(order)} largest of {outputs} " if len(order) < outputs else f"{outputs} "
    size = f", {height}×{width}"
    chosen = np.moveaxis(weight[..., order], -1, 0)
    if inputs == 3:
        limit = np.abs(chosen).max() or 1
        tiles = [np.round(127.5 + 127.5 * w / limit).astype(np.uint8) for w in chosen]
        return tiles, f"{some}{what}{size}, red, green and blue; gray is 0"
    limit = float(np.abs(chosen.mean(-1)).max())
    mean = "" if inputs == 1 else f", means over {inputs} channels"
    tiles = [signed(w.mean(-1), limit) for w in chosen]
    return tiles, f"{some}{what}{size}{mean}; red > 0, blue < 0, white 0, on a common scale ±{limit:.2g}"
