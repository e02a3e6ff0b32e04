"""Text of tables and shapes."""

from collections.abc import Container, Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]], right: Container[int]) -> str:
    """Return a table with columns as wide as their longest cell; those numbered in ``right`` are aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def by(shape: Sequence[Any]) -> str:
    """Return a shape as text, such as ``24×24×32``."""
    return "×".join(map(str, shape))
