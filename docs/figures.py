"""Draw the figures of the pages, with numbers computed by jaxcnn: python docs/figures.py [folder]."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxcnn
from jaxcnn.geometry import Correlation, window
from jaxcnn.ops import convolution, pooling

CELL = 34
INK, FAINT, LINE = "#1b1b1b", "#6b6b6b", "#b8bcc4"
WHITE, GRAY, BLUE, RED, GREEN, YELLOW = "#ffffff", "#eceef1", "#bcd4ee", "#f4c3c8", "#c6e3c9", "#f3e3a3"
STROKES = {BLUE: "#2f6fb0", RED: "#c4404e", GREEN: "#2e7d43"}


class Drawing:
    """Rectangles, lines and text as SVG, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            ' font-family="Helvetica, Arial, sans-serif" role="img">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" rx="6" fill="{WHITE}"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        words: object,
        size: int = 13,
        fill: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Draw one line of text, centered vertically at y."""
        weight = ' font-weight="bold"' if bold else ""
        safe = str(words).replace("&", "&amp;").replace("<", "&lt;")
        self._parts.append(
            f'<text x="{x:g}" y="{y + size * 0.35:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>'
            f"{safe}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, fill: str = WHITE, stroke: str = LINE) -> None:
        """Draw a rectangle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}"/>'
        )

    def line(
        self, x: float, y: float, to_x: float, to_y: float, stroke: str = FAINT, width: float = 1, head: bool = False
    ) -> None:
        """Draw a line; `head` adds an arrowhead at its end."""
        self._parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{stroke}" stroke-width="{width:g}"/>'
        )
        if head:
            along = np.array([to_x - x, to_y - y]) / np.hypot(to_x - x, to_y - y)
            back, across = np.array([to_x, to_y]) - 8 * along, 4 * np.array([-along[1], along[0]])
            points = " ".join(f"{p[0]:.4g},{p[1]:.4g}" for p in ((to_x, to_y), back + across, back - across))
            self._parts.append(f'<polygon points="{points}" fill="{stroke}"/>')

    def grid(
        self, x: float, y: float, rows: Sequence[Sequence[object]], fill: Callable[[int, int], str] = lambda i, j: WHITE
    ) -> None:
        """Draw a grid of cells with one word each; its upper left corner is (x, y)."""
        for i, row in enumerate(rows):
            for j, word in enumerate(row):
                self.box(x + j * CELL, y + i * CELL, CELL, CELL, fill(i, j))
                self.text(x + (j + 0.5) * CELL, y + (i + 0.5) * CELL, word)

    def svg(self) -> str:
        """Return the SVG file."""
        return "\n".join([*self._parts, "</svg>", ""])


KERNEL, DELTA = np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 100.0])
TAPS = (BLUE, GREEN, RED)


def input_grad(size: int, stride: int) -> list[int]:
    """Return δ_x of one row for DELTA and KERNEL."""
    win = window("conv", (size,), (3,), stride=stride)
    c = Correlation(win, 1, np.dtype(np.float32))
    delta, kernel = (jnp.asarray(v, jnp.float32) for v in (DELTA, KERNEL))
    return [int(v) for v in convolution.input_grad(c, delta[None, :, None], kernel[:, None, None])[0, :, 0]]


def flipped_kernel() -> str:
    """Draw the outputs that read x[2], each through an element of the kernel."""
    d = Drawing(720, 262, "The backward pass flips the kernel")
    d.text(20, 22, "Forward: y[o] = Σ x[o + k] · w[k]", 14, anchor="start", bold=True)
    left, top, bottom = 60, 50, 170
    d.text(40, top + CELL / 2, "x")
    d.text(40, bottom + CELL / 2, "y")
    for o in range(3):
        for k in range(3):
            reads_x2 = o + k == 2
            d.line(
                left + (o + k + 0.5) * CELL * 1.3, top + CELL, left + (o + 1.5) * CELL * 1.3, bottom,
                STROKES[TAPS[k]], 3 if reads_x2 else 1,
            )  # fmt: skip
    for i in range(5):
        d.box(left + i * CELL * 1.3, top, CELL * 1.3, CELL, YELLOW if i == 2 else WHITE)
        d.text(left + (i + 0.5) * CELL * 1.3, top + CELL / 2, f"x[{i}]")
    for o in range(3):
        d.box(left + (o + 1) * CELL * 1.3, bottom, CELL * 1.3, CELL)
        d.text(left + (o + 1.5) * CELL * 1.3, bottom + CELL / 2, f"y[{o}]")
    for k in range(3):
        d.line(left + 20 + 70 * k, 234, left + 42 + 70 * k, 234, STROKES[TAPS[k]], 3)
        d.text(left + 62 + 70 * k, 234, f"w[{k}]")

    d.text(370, 22, "Backward: δₓ[i] = Σ δ[i − k] · w[k]", 14, anchor="start", bold=True)
    left = 440
    d.text(430, 67, "flipped kernel", anchor="end")
    d.grid(left + 2 * CELL, 50, [[int(v) for v in KERNEL[::-1]]], lambda i, j: TAPS[2 - j])
    d.text(430, 117, "0, δ, 0", anchor="end")
    padded = [0, 0, *(int(v) for v in DELTA), 0, 0]
    d.grid(left, 100, [padded], lambda i, j: WHITE if 2 <= j <= 4 else GRAY)
    d.text(430, 187, "δₓ", anchor="end")
    d.grid(left + CELL, 170, [input_grad(5, 1)], lambda i, j: YELLOW if j == 2 else WHITE)
    d.line(left + 3.5 * CELL, 138, left + 3.5 * CELL, 167, head=True)
    d.text(left + 3.5 * CELL, 234, "δₓ[2] = 1·3 + 10·2 + 100·1")
    return d.svg()


def strided_delta() -> str:
    """Draw the zeros that a stride inserts between the elements of δ."""
    d = Drawing(560, 214, "A stride of 2 inserts a zero between the elements of δ")
    left = 130
    d.text(120, 37, "δ", anchor="end")
    d.grid(left + 4 * CELL, 20, [[int(v) for v in DELTA]], lambda i, j: YELLOW)
    d.text(120, 97, "with zeros, padded", anchor="end")
    spaced = [0] * 9
    spaced[2:7:2] = [int(v) for v in DELTA]
    d.grid(left + CELL, 80, [spaced], lambda i, j: YELLOW if j in (2, 4, 6) else GRAY)
    for o in range(3):
        d.line(left + (4.5 + o) * CELL, 20 + CELL, left + (3.5 + 2 * o) * CELL, 78, head=True)
    d.text(120, 167, "δₓ", anchor="end")
    d.grid(left + 2 * CELL, 150, [input_grad(7, 2)])
    d.line(left + 5.5 * CELL, 117, left + 5.5 * CELL, 147, head=True)
    d.text(left + 6.0 * CELL, 132, "the flipped kernel 3 2 1 slides over it", anchor="start")
    return d.svg()


def up_or_winner() -> str:
    """Draw the backward pass of three kinds of pooling."""
    x = np.array([[1, 5, 2, 0], [3, 4, 8, 1], [7, 2, 1, 1], [0, 6, 3, 9]], np.float32)
    delta = np.array([[1, 2], [3, 4]], np.float32)
    x_batch, delta_batch = (jnp.asarray(a)[None, :, :, None] for a in (x, delta))
    win = pooling.pool_window("max_pool", (4, 4), 2, None, "VALID", 1, False)
    y, winner = pooling.max_and_winner(win, x_batch)
    max_back = pooling.scatter_to_winners(win, delta_batch, winner)[0, :, :, 0]
    up = jaxcnn.kron_up(delta_batch, 2)[0, :, :, 0]

    d = Drawing(720, 420, "up(δ) and the winner")
    colors = (BLUE, GREEN, RED, YELLOW)

    def block(i: int, j: int) -> str:
        return colors[i // 2 * 2 + j // 2]

    def shown(a: object) -> list[list[str]]:
        return [[f"{v:g}" for v in row] for row in np.asarray(a)]

    won = np.asarray(max_back) != 0
    d.text(20, 22, "Forward", 14, anchor="start", bold=True)
    d.text(40 + 2 * CELL, 50, "x")
    d.grid(40, 64, shown(x), lambda i, j: block(i, j) if won[i, j] else WHITE)
    d.line(186, 64 + 2 * CELL, 226, 64 + 2 * CELL, head=True)
    d.text(206, 50 + 2 * CELL, "max")
    d.text(240 + CELL, 50 + CELL, "y")
    d.grid(240, 64 + CELL, shown(y[0, :, :, 0]), lambda i, j: colors[2 * i + j])
    d.text(450 + CELL, 50 + CELL, "δ, with the size of y")
    d.grid(450, 64 + CELL, shown(delta), lambda i, j: colors[2 * i + j])

    d.text(20, 226, "Backward", 14, anchor="start", bold=True)
    panels = (
        ("sum pooling: up(δ)", up, block),
        ("average pooling: up(δ) / 4", up / 4, block),
        ("max pooling: the winner", max_back, lambda i, j: block(i, j) if won[i, j] else WHITE),
    )
    for n, (title, numbers, fill) in enumerate(panels):
        left = 40 + n * 230
        d.text(left + 2 * CELL, 254, title)
        d.grid(left, 268, shown(numbers), fill)
    return d.svg()


def hidden_layer() -> str:
    """Draw the sizes in the forward and the backward pass (lecture §7 and §9)."""
    d = Drawing(760, 330, "One hidden layer, forward and backward")
    sizes = {"x": "28×28", "z": "24×24", "a": "24×24", "p": "12×12", "y": "8×8"}
    at = {name: 30 + 150 * n for n, name in enumerate(sizes)}

    def tile(name: str, y: int, words: str, size: str, fill: str) -> None:
        d.box(at[name] - 4, y, 98, 46, fill)
        d.text(at[name] + 45, y + 15, words, bold=True)
        d.text(at[name] + 45, y + 34, size, 12, FAINT)

    d.text(30, 20, "Forward", 14, anchor="start", bold=True)
    d.text(30, 142, "Backward", 14, anchor="start", bold=True)
    forward = (("x", "x"), ("z", "z"), ("a", "g(z)"), ("p", "a"), ("y", "next z"))
    for name, words in forward:
        tile(name, 40, words, sizes[name], GRAY if name == "x" else BLUE)
    for name, words in zip("xzap", ("conv w₁", "ReLU g", "max", "conv w₂"), strict=True):
        d.line(at[name] + 96, 63, at[name] + 144, 63, head=True)
        d.text(at[name] + 120, 48, words, 12)
    backward = (("p", "w₂ ∗ δₗ₊₁"), ("a", "up(w₂ ∗ δₗ₊₁)"), ("z", "δₗ"), ("y", "δₗ₊₁"), ("x", "w₁ ∗ δₗ"))
    for name, words in backward:
        tile(name, 164, words, sizes[name], GRAY if name == "x" else YELLOW)
    for name, words in zip("zapy", ("w₁ ∗", "∘ g′(z)", "up", "w₂ ∗"), strict=True):
        d.line(at[name] - 6, 187, at[name] - 54, 187, head=True)
        d.text(at[name] - 30, 172, words, 12)
    d.line(at["z"] + 45, 88, at["z"] + 45, 161, LINE, head=True)
    d.text(at["z"] + 50, 124, "g′(z), 24×24", 12, FAINT, "start")
    d.line(at["a"] + 45, 88, at["a"] + 45, 161, LINE, head=True)
    d.text(at["a"] + 50, 124, "winners, 12×12", 12, FAINT, "start")
    d.line(at["z"] + 45, 212, at["z"] + 45, 246, head=True)
    d.box(at["z"] - 20, 248, 130, 46, GREEN)
    d.text(at["z"] + 45, 263, "∂E/∂w₁ = x ⋆ δₗ", bold=True)
    d.text(at["z"] + 45, 282, "5×5", 12, FAINT)
    d.text(320, 262, "up must enlarge w₂ ∗ δₗ₊₁ from 12×12 to 24×24.", anchor="start")
    d.text(320, 284, "g′(z) is already 24×24; up(g′(z)) would be 48×48.", anchor="start")
    return d.svg()


FIGURES = {
    "flipped-kernel": flipped_kernel,
    "strided-delta": strided_delta,
    "up-or-winner": up_or_winner,
    "hidden-layer": hidden_layer,
}


def main(folder: Path) -> None:
    """Write all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the figures of the pages, with numbers computed by jaxcnn.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "figures")
    main(parser.parse_args().folder)
