"""Costs of the lowerings of the three products on CPU; the lowering with the smallest cost is chosen.

A cost is a predicted time in microseconds, a sum over kinds of work: how much of it a lowering does (`work`), times
the cost of a unit of it on this processor (`measured.COSTS`). Lowerings that split a product cost as much as its parts
(`parts`), and as the splitting. ``python -m experiments.benchmarks.lowerings`` times the lowerings of drawn products,
and fits these costs.
"""

import dataclasses
import functools
import itertools
import math

from jaxcnn.geometry import Correlation
from jaxcnn.kernels import measured, unrolled
from jaxcnn.kernels.lowering import MAX_SLICES, applies, joined_groups, without_depth
from jaxcnn.kernels.parallel import ONE_THREAD
from jaxcnn.kernels.shapes import is_symbolic
from jaxcnn.kernels.windows import phase_taps, phase_window

#: Number of float32 elements of a vector of AVX-512. With AVX2, libraries process as many in two vectors, mostly.
VECTOR = 16

#: Number of images that a batch of symbolic size is taken to have.
SYMBOLIC_BATCH = 64

#: Image patches of a whole batch may have this many times the elements of image and result, or this many elements.
PATCHES, FEW_PATCHES = 2, 1 << 20

#: Products of a single image's δ with the whole kernel may have up to this many elements ("products").
MAX_PRODUCTS = 1 << 23

#: Up to this many channels per group, a grouped product is unrolled.
UNROLLED_CHANNELS = 15

#: Up to this many multiplications per position, a product with one group is unrolled.
UNROLLED_MULTIPLICATIONS = 640

#: Up to this many groups of few channels have a product each; more would become a long program.
MAX_GROUPS = 8

#: At least this many groups are joined: devices sum all products of a batch that is split over them, including those
#: that are dropped afterwards.
LEAST_JOINED = 4

#: Up to this many outputs per input, a depthwise kernel has lowerings of its own; they repeat the image for each.
MAX_MULTIPLIER = 4


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of images ``(batch, *c.window.shape, inputs)`` and results ``(batch, *c.window.out, outputs)``."""

    #: "correlate", "input_grad" or "kernel_grad".
    name: str
    c: Correlation
    batch: int
    inputs: int
    outputs: int

    @property
    def vector(self) -> int:
        """Number of channels of a group that a vector can hold: those of the image for `input_grad`."""
        return (self.inputs if self.name == "input_grad" else self.outputs) // self.c.groups

    @property
    def terms(self) -> int:
        """Number of terms of a sum over taps and channels."""
        summed = self.outputs if self.name == "input_grad" else self.inputs
        return self.c.window.entries * summed // self.c.groups


def product(name: str, c: Correlation, batch: int, inputs: int, outputs: int) -> Product:
    """Return the product for a batch, whose size may be symbolic."""
    return Product(name, c, SYMBOLIC_BATCH if is_symbolic(batch) else batch, inputs, outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Choice


@functools.lru_cache(maxsize=4096)
def cheapest(p: Product) -> str:
    """Return the lowering of a product with the smallest cost, among those in XLA."""
    return min(candidates(p), key=functools.partial(cost, p), default="xla")


@functools.lru_cache(maxsize=4096)
def cost(p: Product, lowering: str, kernel: str = "") -> float:
    """Return the cost of a lowering in microseconds; for "onednn", of the kernel with this name."""
    units = measured.COSTS.get((p.name, form(p, lowering, kernel)))
    if units is None:
        return math.inf
    amounts = work(p, lowering)
    return sum(amounts[kind] * per_unit for kind, per_unit in units.items())


def candidates(p: Product) -> list[str]:
    """Return lowerings that support a product, and keep the program short and its memory small."""
    return _of_groups(p) if p.c.groups > 1 else [*_matrix_products(p), *_convolutions(p), *_sums(p)]


def _of_groups(p: Product) -> list[str]:
    """Return the candidates for more than one group."""
    groups = p.c.groups
    if p.name == "kernel_grad":
        depthwise = groups == p.inputs and p.outputs <= MAX_MULTIPLIER * p.inputs
        names = ["by_position", "unrolled"] if depthwise else []
        names += ["joined"] if joined_groups(p.c, p.inputs, p.outputs) >= LEAST_JOINED else []
    else:
        names = ["unrolled"] if max(p.inputs, p.outputs) // groups <= UNROLLED_CHANNELS else []
    few = groups <= MAX_GROUPS and p.c.window.entries <= MAX_SLICES
    return [*names, "by_group"] if few or not names else names


def _matrix_products(p: Product) -> list[str]:
    """Return the candidates for one group that are matrix products."""
    win = p.c.window
    if applies("pointwise", p.c):
        # XLA's matrix products with up to three terms take up to twenty times as long as its convolution.
        slow = p.name == "input_grad" and p.outputs < 4 and "xla" in _convolutions(p)
        return [] if slow else ["pointwise"]
    if p.name == "kernel_grad":
        return ["patches", "rows"]
    if p.name == "input_grad":
        fit = max(win.size) <= MAX_SLICES and math.prod(win.out) * win.entries * p.inputs <= MAX_PRODUCTS
        return ["products"] if fit else []
    patches = p.batch * math.prod(win.out) * win.entries * p.inputs
    arrays = p.batch * (math.prod(win.shape) * p.inputs + math.prod(win.out) * p.outputs)
    fit = win.entries <= MAX_SLICES and patches <= max(PATCHES * arrays, FEW_PATCHES)
    return ["patches"] if fit else []


def _convolutions(p: Product) -> list[str]:
    """Return the candidates for one group that run XLA's convolution.

    In 3-D, except for 1 × 1 × 1 kernels, it takes up to a thousand times as long as other lowerings.
    """
    strided = p.c.window.strided
    if p.c.window.ndim == 3:
        if not applies("pointwise", p.c):
            return ["by_depth"]
        return [] if strided or p.name == "kernel_grad" else ["xla"]
    if p.name == "kernel_grad":
        return ["transposed"]
    if p.name == "input_grad" and strided:
        return ["phases", "xla"]
    if not ONE_THREAD:
        return ["xla"]
    spare = p.name == "correlate" and p.inputs % 2 == 1 and p.inputs > 1
    return ["xla", "all_threads", "spare_channel"] if spare else ["xla", "all_threads"]


def _sums(p: Product) -> list[str]:
    """Return the candidates for one group that are sums with a term per tap and channel, or per position."""
    names = ["unrolled"] if p.terms <= unrolled.TERMS and p.terms * p.vector <= UNROLLED_MULTIPLICATIONS else []
    one_channel = p.name == "kernel_grad" and p.inputs == 1 < p.c.window.entries
    return [*names, "by_position"] if one_channel else names


# ---------------------------------------------------------------------------------------------------------------------
# Work


def form(p: Product, lowering: str, kernel: str = "") -> str:
    """Return which costs of `measured.COSTS` a lowering has.

    They differ by oneDNN's kernel, by what vectors run over, and where XLA or oneDNN run other code: for 1 × 1 kernels,
    padding, a stride, few outputs, or few channels.
    """
    win, inputs, outputs = p.c.window, p.inputs, p.outputs
    pointwise = "" if win.entries > 1 else ", 1x1x1" if win.ndim == 3 else ", 1x1"
    of_groups = " of groups" if p.c.groups > 1 else ""
    if lowering == "onednn":
        strided = ", strided" if p.name == "input_grad" and win.strided else ""
        few = ", few channels" if p.name == "kernel_grad" and inputs * outputs <= 2 else ""
        matrix = f"brgemm{strided or of_groups or pointwise}" if p.name != "kernel_grad" else f"jit{of_groups}"
        kinds = {
            "ref": "none",
            "dense:": f"own{few}",
            "depthwise:": "depthwise",
            "dw": "depthwise",
            "gemm:": f"gemm{of_groups}",
            "1x1": "1x1" if p.name == "kernel_grad" and not of_groups else matrix,
            "brg": matrix,
            "jit": f"jit{strided or of_groups}",
        }
        return f"onednn {next((kind for part, kind in kinds.items() if part in kernel), 'none')}"
    if lowering in {"unrolled", "by_position"}:
        one = inputs == outputs == 1 if p.name == "kernel_grad" else p.vector == 1
        if one:
            return f"{lowering}, {'groups' if of_groups else 'columns'}"
        return f"{lowering}, channels{of_groups or pointwise}"
    if lowering in {"patches", "products", "pointwise"}:
        return f"pointwise{pointwise}" if pointwise else lowering
    if lowering in {"xla", "all_threads", "spare_channel", "transposed"}:
        if pointwise:
            return f"{lowering}{pointwise}"
        if p.name == "input_grad" and win.strided:
            return f"{lowering}, strided"
        if p.name != "kernel_grad" and outputs < 4:
            return f"{lowering}, {'padded, ' if p.name == 'correlate' and win.padded else ''}few outputs"
        if p.name == "correlate" and win.padded:
            return f"{lowering}, padded"
    return lowering


def work(p: Product, lowering: str = "") -> dict[str, float]:
    """Return how much work of each kind a lowering of a product does; except for calls and parts, in millions.

    - call: 1;
    - image, result, kernel: their elements;
    - patches: elements of all image patches, or products of δ with all taps;
    - odd: patches if what XLA sums over first (channels, or images for `kernel_grad`) is not a multiple of 4;
    - multiply: multiplications;
    - channels, groups, columns: multiplications, if vectors hold channels of a group, of all groups, or columns;
    - fours: the same for four channels of a group, which XLA's matrix products process together;
    - row: "channels" per column, as for the elements of a kernel that are read once per row;
    - sums: vectors of sums, one per tap;
    - depth: "channels" in 3-D;
    - term: terms of a sum, which have their own code, and looped: multiplications if they are in a loop;
    - partial: sums of each image;
    - part: parts of a product, and parts: their costs without those of calls.
    """
    win, groups = p.c.window, p.c.groups
    inputs, vector = p.inputs // groups, p.vector
    image, result = (p.batch * math.prod(n) for n in (win.shape, win.out))
    positions, columns = (image, win.shape[-1]) if p.name == "input_grad" else (result, win.out[-1])
    multiply = result * win.entries * inputs * p.outputs / 1e6
    channels = multiply * filled(vector)
    patches = result * win.entries * p.inputs / 1e6
    summed_channels = {"correlate": p.inputs, "input_grad": p.outputs, "kernel_grad": p.batch}[p.name]
    looped = win.entries > unrolled.LOOPED["taps"] or p.terms > unrolled.LOOPED["terms"]
    amounts: dict[str, float] = {
        "call": 1,
        "image": image * p.inputs / 1e6,
        "result": result * p.outputs / 1e6,
        "kernel": win.entries * inputs * p.outputs / 1e6,
        "patches": patches,
        "odd": patches if summed_channels % 4 else 0,
        "multiply": multiply,
        "fours": multiply * filled(vector, 4),
        "channels": channels,
        "groups": multiply * filled(vector * groups),
        "columns": multiply * filled(columns),
        "row": channels / columns,
        "sums": positions * win.entries * vector * filled(vector) * groups / 1e6,
        "depth": channels if win.ndim == 3 else 0,
        "term": p.terms,
        "looped": multiply if looped else 0,
        "partial": p.batch * win.entries * p.outputs / 1e6,
    }
    of = parts(p, lowering)
    total = 0.0
    for part, n in of.items():
        name = cheapest(part)
        total += n * (cost(part, name) - measured.COSTS[part.name, form(part, name)].get("call", 0))
    return amounts | {"part": sum(of.values()), "parts": total}


def filled(n: int, length: int = VECTOR) -> float:
    """Return how many times ``n`` elements the vectors of some length have that hold them."""
    return -(-n // length) * length / n


def parts(p: Product, lowering: str) -> dict[Product, int]:
    """Return the products that a lowering splits a product into, and how many there are of each; none otherwise."""
    c, win = p.c, p.c.window
    if lowering == "by_depth":
        return {dataclasses.replace(p, c=without_depth(c), batch=p.batch * win.out[0]): win.size[0]}
    if lowering == "by_group":
        one = dataclasses.replace(c, groups=1)
        return {dataclasses.replace(p, c=one, inputs=p.inputs // c.groups, outputs=p.outputs // c.groups): c.groups}
    if lowering == "joined":
        fewer = dataclasses.replace(c, groups=c.groups // joined_groups(c, p.inputs, p.outputs))
        return {dataclasses.replace(p, c=fewer): 1}
    found: dict[Product, int] = {}
    if lowering == "phases":
        for taps in itertools.product(*(phase_taps(win, dim) for dim in range(win.ndim))):
            if (phase := phase_window(win, taps)) is not None:
                part = Product("correlate", dataclasses.replace(c, window=phase[1]), p.batch, p.outputs, p.inputs)
                found[part] = found.get(part, 0) + 1
    return found
