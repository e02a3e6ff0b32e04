"""Convolutions and pools that no table of `kernels/` is tuned on, drawn at random for `ops`."""

import dataclasses
import math
import random
from collections.abc import Iterator

from experiments.benchmarks import rows
from experiments.benchmarks.rows import Row

#: Most multiplications and additions of one product, so that it takes about a hundredth of a second.
MOST_FLOPS = 1e9
#: Least and most elements of the larger of input and result.
ELEMENTS = (2**14, 2**22)
CHANNELS, SIDES, BATCHES = (1, 512), (7, 224), (1, 2, 4, 8, 16, 32, 64, 128)
KERNEL_SIZES = (2, 3, 3, 3, 4, 5, 5, 7, 9, 11)
POOLS = ("max", "avg", "lp")
KINDS = ("dense", "dense", "strided", "1×1", "dilated", "depthwise", "groups", "transposed", *POOLS)
STRIDES = {"strided": (2, 2, 3), "transposed": (1, 2)}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A convolution, transposed convolution or pool, the same in all spatial dims."""

    kind: str
    #: Shape of the input, channels last.
    shape: tuple[int, ...]
    size: int
    features: int
    stride: int
    padding: int
    dilation: int
    groups: int

    @property
    def row(self) -> Row:
        """The row that `ops` times."""
        batch, *sides, channels = self.shape
        kernel_size = (self.size,) * len(sides)
        words = [
            "×".join(map(str, kernel_size)),
            str(channels) if self.kind in POOLS else f"{channels}→{self.features}",
        ]
        words += [f"stride {self.stride}"] if self.stride > 1 else []
        words += [f"padding {self.padding}"] if self.padding else []
        words += [f"dilation {self.dilation}"] if self.dilation > 1 else []
        words += [f"{self.groups} groups"] if self.groups > 1 else []
        name = f"{' '.join(words)}, {'×'.join(map(str, (batch, *sides)))}"
        if self.kind in POOLS:
            return rows.pool(self.kind, name, self.shape, self.size, self.stride, self.padding)
        if self.kind == "transposed":
            padding = min(self.padding, self.size - 1)
            return rows.conv_transpose(name, self.shape, kernel_size, self.features, self.stride, padding)
        return rows.conv(
            name, self.shape, kernel_size, self.features,
            stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups,
        )  # fmt: skip


def drawn_rows(seed: int, count: int) -> Iterator[Row]:
    """Yield convolutions and pools as rows for `ops`; see `drawn`."""
    for one in drawn(seed, count):
        yield one.row


def drawn(seed: int, count: int) -> Iterator[Drawn]:
    """Yield convolutions and pools in 1-D, 2-D (most) and 3-D.

    The logarithms of channels and sides are distributed uniformly. The batch is halved while an array or a product is
    too large.

    Args:
        seed: Seed of a series of rows.
        count: Number of rows.

    Yields:
        The convolutions and pools.
    """
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        one = None
        while one is None:
            one = _draw(rng, rng.choice(KINDS), rng.choice((1, 2, 2, 2, 2, 3)))
        yield one


def _draw(rng: random.Random, kind: str, dims: int) -> Drawn | None:
    """Draw one; None if one image is too large, all images too small, or the kernel larger than the image."""
    sides = tuple(_between(rng, *SIDES) for _ in range(dims))
    size = 1 if kind == "1×1" else rng.choice([size for size in KERNEL_SIZES if dims < 3 or size <= 5])
    stride = rng.choice(STRIDES[kind]) if kind in STRIDES else 1
    dilation = rng.choice((2, 3)) if kind == "dilated" else 1
    padding = rng.choice((0, size // 2)) * dilation
    channels, features, groups = _channels(rng, kind)
    pools = kind in POOLS
    if pools:
        stride, padding = rng.choice((size, size, 1, 2)), 0 if kind == "lp" else padding
    if min(sides) + 2 * padding < dilation * (size - 1) + 1:
        return None
    batch = rng.choice(BATCHES)
    if kind == "transposed":
        out = math.prod((side - 1) * stride + size for side in sides)
        work = 2 * math.prod(sides) * size**dims * channels * features
    else:
        out = math.prod((side + 2 * padding - dilation * (size - 1) - 1) // stride + 1 for side in sides)
        work = (1 if pools else 2) * out * size**dims * channels * (1 if pools else features // groups)
    largest = max(math.prod(sides) * channels, out * features)
    while batch * work > MOST_FLOPS or batch * largest > ELEMENTS[1]:
        batch //= 2
    if batch * largest < ELEMENTS[0]:
        return None
    return Drawn(kind, (batch, *sides, channels), size, features, stride, padding, dilation, groups)


def _channels(rng: random.Random, kind: str) -> tuple[int, int, int]:
    """Draw the channels of an input and a result, and the number of groups."""
    channels, features = _between(rng, *CHANNELS), _between(rng, *CHANNELS)
    if kind in POOLS:
        return channels, channels, 1
    if kind == "depthwise":
        return channels, channels * rng.choice((1, 1, 2)), channels
    if kind == "groups":
        groups = rng.choice((2, 4, 8, 16, 32))
        return -(-channels // groups) * groups, -(-features // groups) * groups, groups
    return channels, features, 1


def _between(rng: random.Random, low: int, high: int) -> int:
    """Draw an integer in [low, high], uniformly by its logarithm."""
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
