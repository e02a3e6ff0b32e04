"""Shared style of the figures in this folder: gray for images, blue to red around zero for δ."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

BLUE, RED, GRAY, DARK = "#2166ac", "#b2182b", "0.55", "0.15"
SIGNED = "RdBu_r"


def figure(width: float, height: float) -> Figure:
    """Return an empty figure of the given size in inches."""
    fig = Figure(figsize=(width, height), dpi=150, layout="constrained")  # pyplot would have global state
    FigureCanvasAgg(fig)
    fig.get_layout_engine().set(w_pad=0.06, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    return fig


def parts(fig: Figure | SubFigure, rows: int, columns: int, **ratios: Any) -> list[SubFigure]:
    """Split a figure into `rows`×`columns` subfigures, in row-major order."""
    return list(np.ravel(np.asarray(fig.subfigures(rows, columns, **ratios), object)))


def gray(axes: Axes, values: Any, title: str, below: str | None = None, *, lowest: float | None = 0) -> None:
    """Draw an image of intensities; the text below it is `below`, or its size if `below` is None."""
    values = np.asarray(values, float)
    _image(axes, values, title, below, cmap="gray", vmin=lowest, vmax=values.max() or 1)


def signed(axes: Axes, values: Any, title: str, below: str | None = None, *, limit: float | None = None) -> None:
    """Draw an array of signed numbers on a symmetric scale: white is 0, red positive, blue negative."""
    values = np.asarray(values, float)
    limit = limit or np.abs(values).max() or 1
    _image(axes, values, title, below, cmap=SIGNED, vmin=-limit, vmax=limit)


def _image(axes: Axes, values: np.ndarray, title: str, below: str | None, **colors: Any) -> None:
    axes.imshow(values, interpolation="nearest", **colors)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("×".join(map(str, values.shape)) if below is None else below, fontsize=8.5, color="0.35")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("0.7")


def numbers(axes: Axes, values: Any, title: str, block: int = 0, below: str = "", *, span: int | None = None) -> None:
    """Draw a matrix as a grid of numbers or words, `span` columns wide; each `block`×`block` block has one color."""
    values = np.asarray(values)
    rows, columns = values.shape
    span = span or columns
    tints = ("#dbe9f6", "#fde3cf", "#e3f0d8", "#ece2f3")
    for i, j in np.ndindex(rows, columns):
        tint = tints[(2 * (i // block) + j // block) % len(tints)] if block else "white"
        axes.add_patch(_cell(j, i, tint))
        axes.text(j, i, str(values[i, j]), ha="center", va="center", fontsize=12, color=DARK)
    axes.set(xlim=((columns - span) / 2 - 0.55, (columns + span) / 2 - 0.45), xticks=[], yticks=[], aspect="equal")
    axes.set_ylim(rows - 0.45, -0.55)
    axes.set_anchor("C")
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(below, fontsize=9, color="0.35")


def _cell(x: float, y: float, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="0.6", linewidth=0.8)


def plain(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Style the axes of a chart: a light grid, no box."""
    axes.set_title(title, fontsize=10.5)
    axes.set_xlabel(xlabel, fontsize=9.5)
    axes.set_ylabel(ylabel, fontsize=9.5)
    axes.tick_params(labelsize=8.5)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")


def sign(axes: Axes, text: str) -> None:
    """Draw an operator between two images."""
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=20, color="0.3", transform=axes.transAxes)
