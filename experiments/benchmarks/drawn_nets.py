"""Nets that no table of `kernels/` is tuned on: drawn at random, and five fixed ones."""

import math
import random
from collections.abc import Callable, Mapping

from experiments.benchmarks.nets import CLASSES, NETS, Timed, shape_after
from jaxcnn import Conv, Dense, Flatten, Layer, MaxPool, Relu, Serial, serial

#: Most multiplications and additions of a forward pass, so that a step takes about a tenth of a second.
MOST_FLOPS = 3e9
SIDES = range(17, 49)
IMAGES = (32, 48, 64, 96, 128)
FEATURES = (12, 16, 24, 32, 48, 64, 96)


def drawn(seed: int, number: int) -> Timed:
    """Draw a net of two to six layers, its image size and its batch size.

    The layers are dense convolutions, strided convolutions, 1×1 convolutions, depthwise convolutions, convolutions in
    groups and max pools, each convolution with a ReLU; a dense layer follows.

    Args:
        seed: Seed of a series of nets.
        number: Number of the net in the series.

    Returns:
        The net, its input shape and its batch size. The batch is halved while the forward pass has more than
        `MOST_FLOPS`.
    """
    rng = random.Random(f"{seed} {number}")
    image = (rng.choice(SIDES), rng.choice(SIDES), rng.choice((1, 3, 3, 16)))
    shape: tuple[int, ...] = image
    layers: list[Layer] = []
    for _ in range(rng.randint(2, 6)):
        for layer in _block(rng, shape):
            layers.append(layer)
            shape = shape_after(layer, shape)
    net = serial(*layers, Flatten(), Dense(CLASSES))
    flops, batch = net.flops(image, (CLASSES,)), rng.choice(IMAGES)
    while batch > 8 and batch * flops > MOST_FLOPS:
        batch //= 2
    return Timed(net, image, batch)


def _block(rng: random.Random, shape: tuple[int, ...]) -> tuple[Layer, ...]:
    """Draw a max pool, or a convolution and its ReLU, for an input of this shape."""
    height, width, channels = shape
    kinds = ["dense", "dense", "1×1", "strided"]
    kinds += ["depthwise", "groups"] if channels > 3 else []
    kinds += ["pool"] if min(height, width) >= 8 else []
    kind = rng.choice(kinds)
    if kind == "pool":
        return (MaxPool(2),)
    size = min(rng.choice((3, 3, 5, 7)), height, width)
    if kind == "depthwise":
        return Conv(channels, size, padding="SAME", groups=channels), Relu()
    features = rng.choice(FEATURES)
    if kind == "1×1":
        return Conv(features, 1), Relu()
    if kind == "groups":
        groups = rng.choice([g for g in (2, 4, 8, 16) if math.gcd(g, channels) == g])
        return Conv(-(-features // groups) * groups, 3, padding="SAME", groups=groups), Relu()
    padding = rng.choice(("SAME", "VALID")) if size < min(height, width) else "SAME"
    return Conv(features, size, 2 if kind == "strided" else 1, padding=padding), Relu()


def described(timed: Timed) -> str:
    """Return a net in one line, such as "96×41×37×3: conv 24 3×3, max_pool 2"."""
    words = []
    for _, layer in timed.net.layers:
        if isinstance(layer, Conv):
            words.append(f"conv {layer.features} {layer.kernel_size}×{layer.kernel_size}")
            words[-1] += f"/{layer.stride}" if layer.stride != 1 else ""
            words[-1] += f", {layer.groups} groups" if layer.groups > 1 else ""
        elif isinstance(layer, MaxPool):
            words.append(f"pool {layer.window}")
    return f"{timed.batch}×{'×'.join(map(str, timed.shape))}: " + "; ".join(words)


def _convolutions(*layers: Layer) -> Serial:
    """Return a net with a ReLU after each convolution, and a dense layer at the end."""
    with_relu = (part for layer in layers for part in ((layer, Relu()) if isinstance(layer, Conv) else (layer,)))
    return serial(*with_relu, Flatten(), Dense(CLASSES))


#: Fixed nets, written layer by layer.
FIXED: Mapping[str, Callable[[], Timed]] = {
    "lecture by layers": lambda: Timed(
        _convolutions(Conv(32, 5), MaxPool(2), Conv(64, 5), MaxPool(2)), (28, 28, 1), 128
    ),
    "odd sizes": lambda: Timed(
        _convolutions(Conv(24, 3), Conv(48, 3), MaxPool(2), Conv(96, 3), MaxPool(2)), (41, 37, 3), 96
    ),
    "strided": lambda: Timed(
        _convolutions(Conv(32, 7, 2), Conv(64, 3, 2), Conv(64, 1), MaxPool(2)), (48, 48, 3), 64
    ),
    "separable": lambda: Timed(
        _convolutions(
            Conv(32, 3, padding="SAME"), Conv(32, 5, padding="SAME", groups=32), Conv(64, 1),
            Conv(64, 3, padding="SAME", groups=64), MaxPool(2),
        ),
        (32, 32, 3),
        64,
    ),
    "groups": lambda: Timed(
        _convolutions(
            Conv(64, 3, padding="SAME"), Conv(64, 3, padding="SAME", groups=4), MaxPool(2),
            Conv(64, 3, padding="SAME", groups=16), MaxPool(2),
        ),
        (32, 32, 3),
        64,
    ),
}  # fmt: skip


def find(name: str) -> Timed:
    """Return the net with a name: a key of `NETS` or `FIXED`, or "drawn SEED NUMBER"."""
    if name.startswith("drawn "):
        _, seed, number = name.split()
        return drawn(int(seed), int(number))
    return {**NETS, **FIXED}[name]()
