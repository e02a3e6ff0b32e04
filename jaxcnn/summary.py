"""The summary of a net: one row per layer, and their table."""

import dataclasses

from jaxcnn.layers import Shape
from jaxcnn.text import aligned, by


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of a net. The shape is that of one example, and FLOPs are those of its forward pass."""

    name: str
    op: str
    output_shape: tuple[int, ...]
    parameters: int
    flops: int
    #: Shape before pooling, for a fused `HiddenLayer`; otherwise None.
    inner_shape: tuple[int, ...] | None = None

    @property
    def shapes(self) -> str:
        """Return the shapes as text, such as ``24×24×32 → 12×12×32``."""
        return " → ".join(_text(shape) for shape in (self.inner_shape, self.output_shape) if shape is not None)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A net, layer by layer. ``str()`` is a table."""

    input_shape: Shape
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Return the number of parameters of all layers."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        """Return the FLOPs of the forward pass of all layers, for one example."""
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        table = [("layer", "op", "output", "parameters", "FLOPs"), ("input", "", _text(self.input_shape), "", "")]
        table += [(r.name, r.op, r.shapes, f"{r.parameters:,}", f"{r.flops:,}") for r in self.rows]
        table += [("total", "", "", f"{self.parameters:,}", f"{self.flops:,}")]
        return aligned(table, right=(3, 4))


def _text(shape: Shape) -> str:
    if shape and isinstance(shape[0], tuple):
        return ", ".join(map(_text, shape))
    return by(shape)
