"""Communication of data-parallel training from 1 to 4,096 chips, on paper: python -m experiments.scaling --help."""

import collections
import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli
from experiments.benchmarks import compiler, hlo
from experiments.errors import UsageError, bad_value

if TYPE_CHECKING:
    from jaxcnn import Serial

PROG = "python -m experiments.scaling"

PEAK = 197e12
"""Operations per second of a TPU v5e chip in bfloat16. All rates are from Google's page "TPU v5e"."""
LINKS = 200e9
"""Bytes per second that a chip sends over its four links in a pod."""
POD = 256
"""Chips of a pod, a torus of 16×16. In a smaller slice a corner has two links, and LINKS is half."""
NETWORK = 6.4e12 / 8 / POD
"""Bytes per second that a chip sends to other pods: its share of the pod's 6.4 Tb/s."""
PER_NORM = 2
"""All-reduces of a batch norm of a large array on TPU: of Σ x and Σ x², and of ∂E/∂γ and ∂E/∂β."""

BATCH = {"lecture": 128, "resnet50": 64}
"""Images per chip and step."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Print the bytes and the time of the gradients' all-reduce, and the time of the products. Nothing is measured."""

    net: str = "resnet50"
    """Net: lecture (28×28×1) or resnet50 (224×224×3)."""
    chips: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    """Numbers of chips; beyond 256, a multiple of it."""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """Images per chip and step; if omitted, 128 for lecture, 64 for resnet50."""
    utilization: float = 0.4
    """Assumed share of the peak rate that the products reach."""
    latency: float = 1e-6
    """Assumed seconds per hop from a chip to its neighbor."""
    network_latency: float = 50e-6
    """Assumed seconds per all-reduce between pods, in addition."""
    local_statistics: FlagCreatePairsOff[bool] = False
    """Whether batch norms use the statistics of each chip's images, which need no communication."""
    compile: tuple[str, ...] = ()
    """Slices of TPU v5e, such as 2x2, 4x4 and 16x16, for which the training step is compiled by libtpu (Linux, Python
    3.12, pip install "jax[tpu]") to count its collectives. This needs no TPU and takes minutes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, scale, argv, prog=PROG)


def scale(config: Config) -> int:
    """Print the table, then the collectives of the compiled steps; raise UsageError for options that do not fit."""
    cli.check_choice("--net", config.net, BATCH)
    cli.check_count("--batch-size", config.batch_size)
    if not 0 < config.utilization <= 1:
        raise bad_value(UsageError, "--utilization", "above 0 and at most 1", config.utilization)
    for chips in config.chips:
        if chips < 1 or (chips > POD and chips % POD):
            raise bad_value(UsageError, "--chips", f"from 1 to {POD}, or multiples of {POD}", chips)
    if config.compile and importlib.util.find_spec("libtpu") is None:
        raise bad_value(UsageError, "--compile", 'omitted unless libtpu is installed (pip install "jax[tpu]")', "none")
    from jaxcnn.text import aligned

    net, shape = build(config.net)
    rows = net.summary(shape).rows
    parameters, batch = sum(row.parameters for row in rows), config.batch_size or BATCH[config.net]
    channels = [row.output_shape[-1] for row in rows if row.op == "BatchNorm" and not config.local_statistics]
    operations = sum(row.flops for row in rows)
    size, count = 4 * parameters + 2 * 4 * sum(channels), 1 + PER_NORM * len(channels)
    print(f"{config.net}: {parameters:,} parameters, {operations:,} operations per image forward, 3 times per step")
    print(f"{count} all-reduces per step, {size:,} bytes; {len(channels)} batch norms over all chips")
    print(f"TPU v5e at {config.utilization:.0%} of its peak, {batch} images per chip")
    lines: list[Sequence[str]] = [
        ("chips", "images", "sent per chip, MB", "products, ms", "bytes, ms", "latency, ms", "efficiency")
    ]
    products = 3 * operations * batch / (PEAK * config.utilization)
    for chips in config.chips:
        sent, moving = all_reduce(size, chips)
        waiting = count * (hops(chips) * config.latency + (chips > POD) * config.network_latency)
        times = (f"{1e3 * seconds:.3f}" for seconds in (products, moving, waiting))
        efficiency = products / (products + moving + waiting)
        lines.append((f"{chips:,}", f"{batch * chips:,}", f"{sent / 1e6:.2f}", *times, f"{efficiency:.1%}"))
    print(aligned(lines, range(len(lines[0]))))
    for slice_ in config.compile:
        counts = collectives(net, shape, batch, slice_)
        print(f"compiled for v5e:{slice_}: {', '.join(f'{n} {kind} ({size:,} bytes)' for kind, n, size in counts)}")
    return 0


def all_reduce(size: int, chips: int) -> tuple[float, float]:
    """Return the bytes that each chip sends for an all-reduce of `size` bytes, and the seconds that this takes.

    In a pod of n chips, a reduce-scatter and an all-gather send 2·(n − 1)/n·size bytes from each chip. Between m pods,
    each chip does the same with its n-th part of the sum, over the data center's network.
    """
    n, pods = min(chips, POD), max(chips // POD, 1)
    inside, between = 2 * (n - 1) / n * size, 2 * (pods - 1) / pods * size / n
    return inside + between, inside / (LINKS if n == POD else LINKS / 2) + between / NETWORK


def hops(chips: int) -> int:
    """Return the hops of an all-reduce: twice along both sides of the slice, or half of each side of a pod's torus."""
    side = math.sqrt(min(chips, POD))
    return round(4 * (side / 2 if chips >= POD else side - 1))


def build(name: str) -> "tuple[Serial, tuple[int, ...]]":
    """Return a net, and the shape of its images."""
    from experiments.models import CLASSIFIERS

    return (resnet50(1000), (224, 224, 3)) if name == "resnet50" else (CLASSIFIERS[name](10), (28, 28, 1))


def resnet50(classes: int) -> "Serial":
    """Return ResNet-50 (He et al. 2015), with the strides in the 3×3 convolutions."""
    from jaxcnn import BatchNorm, Conv, Dense, GlobalAvgPool, MaxPool, Relu, branches, serial

    def conv(features: int, size: int, stride: int = 1) -> "tuple[Conv, BatchNorm]":
        return Conv(features, size, stride, (size - 1) // 2, bias=False), BatchNorm()

    def block(features: int, stride: int, project: bool) -> "Serial":
        path = serial(*conv(features, 1), Relu(), *conv(features, 3, stride), Relu(), *conv(4 * features, 1))
        shortcut = serial(*conv(4 * features, 1, stride)) if project else serial()
        return serial(branches(path, shortcut, join="add"), Relu())

    stages = [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]
    blocks = [block(f, stride if i == 0 else 1, i == 0) for f, count, stride in stages for i in range(count)]
    return serial(*conv(64, 7, 2), Relu(), MaxPool(3, 2, 1), *blocks, GlobalAvgPool(), Dense(classes))


def collectives(net: "Serial", shape: tuple[int, ...], batch: int, slice_: str) -> list[tuple[str, int, int]]:
    """Compile a training step for a slice of TPU v5e; return the kinds of its collectives, their counts and bytes."""
    os.environ |= compiler.PLATFORMS["tpu-v5e"].environment  # the type is that of this process, whatever the slice
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.experimental import topologies

    import jaxcnn

    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{slice_}").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    optimizer = optax.sgd(0.1)
    step = jaxcnn.make_train_step(net, jaxcnn.softmax_cross_entropy_with_integer_labels, optimizer)

    def create() -> Any:
        return jaxcnn.TrainState.create(net, optimizer, jax.random.key(0), shape)

    def split(tree: Any, *axes: str) -> Any:
        sharding = jax.NamedSharding(mesh, jax.P(*axes))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    count = batch * len(devices)
    images = jax.ShapeDtypeStruct((count, *shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((count,), jnp.int32)
    compiled = step.lower(split(jax.eval_shape(create)), split((images, labels), "batch")).compile()  # type: ignore[attr-defined]
    return count_collectives(compiled.as_text())


def count_collectives(text: str) -> list[tuple[str, int, int]]:
    """Return the kinds of collectives in a compiled program, the number of each, and the bytes of their results."""
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    kinds = "|".join(hlo.COLLECTIVES)
    for result, kind in re.findall(rf"^ *(?:ROOT )?%?\S+ = (.*?) ({kinds})(?:-start)?\(", text, re.MULTILINE):
        counts[kind] += 1
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result):
            sizes[kind] += hlo.BYTES.get(dtype, 0) * math.prod(map(int, filter(None, dims.split(","))))
    return [(kind, n, sizes[kind]) for kind, n in counts.most_common()]


if __name__ == "__main__":
    sys.exit(main())
