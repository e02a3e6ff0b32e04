"""Measure how the time of a training step grows: python -m experiments.benchmarks.growth --help."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from experiments import cli, process
from experiments.errors import UsageError

if TYPE_CHECKING:
    from experiments.benchmarks.nets import Timed

PROG = "python -m experiments.benchmarks.growth"
SIZES: Mapping[str, Sequence[int]] = {
    "batch": (16, 32, 64, 128, 256, 512, 1024),
    "side": (16, 32, 64, 112, 224),
    "channels": (8, 16, 32, 64, 128, 256),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Time training steps of increasing size in jaxcnn and in flax nnx, alternately.

    batch: the lecture's net. side: 16 and 32 channels over increasingly large images, batch 8. channels: two
    convolutions with that number of channels over 16×16 images, batch 8.
    """

    what: tuple[str, ...] = tuple(SIZES)
    """What grows: batch, side, channels."""
    microbatch: Annotated[int | None, arg(metavar="INT")] = None
    """Images at a time in jaxcnn's step (gradient accumulation), flax takes all; without it, all."""
    most: int = 1024
    """No larger than this."""
    rounds: int = 3
    """How often each contender takes its turn."""
    allocator: str = "stock"
    """stock or tuned: how glibc keeps memory, the same for both."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """A file for all numbers, as JSON; a plot goes beside it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, measure, argv, prog=PROG)


def measure(config: Config) -> int:
    """Time all sizes and print them. Returns 0."""
    cli.check_count("--rounds", config.rounds)
    cli.check_count("--microbatch", config.microbatch)
    cli.check_choice("--allocator", config.allocator, process.ALLOCATORS)
    for what in config.what:
        cli.check_choice("--what", what, SIZES)
    sizes = {what: [size for size in SIZES[what] if size <= config.most] for what in config.what}
    if not all(sizes.values()):
        raise UsageError(f"--most: expected at least {max(s[0] for s in SIZES.values())}, got {config.most}")
    tuned = config.allocator == "tuned" and process.keep_freed_memory()

    from experiments.benchmarks import results, timing

    results.check_out(config.out)
    machine = timing.machine(("jax", "jaxlib"), others=("flax",))
    results.heading(
        machine,
        f"one training step, {config.rounds} rounds of turns; minima{'; freed memory is kept' if tuned else ''}"
        + (f"; jaxcnn {config.microbatch} at a time" if config.microbatch is not None else ""),
    )
    found: dict[str, Any] = {}
    panels: dict[str, dict[str, dict[int, float]]] = {}
    with results.until_interrupted(lambda: panels) as interrupted:
        for what in config.what:
            found[what] = {
                size: timing.in_turns(steps(what, size, config.microbatch), config.rounds, most=0.5)
                for size in sizes[what]
            }
            curves = per_image(what, {size: {n: t.minimum for n, t in of.items()} for size, of in found[what].items()})
            panels[what] = curves
            print()
            results.table([what, *(f"{name}: an image" for name in curves), "flax nnx / jaxcnn"], list(table(curves)))
            if what == "batch" and (flat := flatness(curves["jaxcnn"])) is not None:
                print(f"jaxcnn, from batch 64 on: the dearest image costs {flat:.2f} times the cheapest")
    if config.out is not None:
        results.write(config.out, machine, config, seconds=found)
        results.lines(config.out.with_suffix(".png"), "one training step", panels, "seconds an image")
    return interrupted[0] if interrupted else 0


def table(curves: Mapping[str, Mapping[int, float]]) -> Iterator[list[str]]:
    """Yield one table row per size."""
    from experiments.benchmarks.results import seconds

    for size in curves["jaxcnn"]:
        costs = [curve[size] for curve in curves.values()]
        yield [str(size), *map(seconds, costs), f"{curves['flax nnx'][size] / curves['jaxcnn'][size]:.2f}"]


def per_image(what: str, minima: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """Convert {size: {contender: seconds per step}} to {contender: {size: seconds per image}}."""
    images = {size: size if what == "batch" else PICTURES for size in minima}
    names = next(iter(minima.values()))
    return {name: {size: of[name] / images[size] for size, of in minima.items()} for name in names}


def flatness(curve: Mapping[int, float], least: int = 64) -> float | None:
    """Return largest over smallest cost per image, for batches of at least `least`; None for fewer than two."""
    costs = [cost for size, cost in curve.items() if size >= least]
    return max(costs) / min(costs) if len(costs) > 1 else None


PICTURES = 8


def steps(what: str, size: int, microbatch: int | None) -> dict[str, Callable[[], Any]]:
    """Return a training step of each contender."""
    from experiments.benchmarks.contenders import flax_step, jaxcnn_step

    timed = dataclasses.replace(grown(what, size), microbatch=microbatch)
    return {"jaxcnn": jaxcnn_step(timed).run, "flax nnx": flax_step(timed).run}


def grown(what: str, size: int) -> "Timed":
    """Return the net, image shape and batch size for one size of `what`."""
    from experiments.benchmarks.nets import CLASSES, NETS, Timed
    from jaxcnn import Conv, Dense, Flatten, MaxPool, Relu, serial

    if what == "batch":
        return dataclasses.replace(NETS["lecture"](), batch=size)
    first, second = (16, 32) if what == "side" else (size, size)
    net = serial(
        Conv(first, 3, padding="SAME"),
        Relu(),
        MaxPool(2),
        Conv(second, 3, padding="SAME"),
        Relu(),
        MaxPool(2),
        Flatten(),
        Dense(CLASSES),
    )
    side, inputs = (size, 3) if what == "side" else (16, size)
    return Timed(net, (side, side, inputs), PICTURES)


if __name__ == "__main__":
    sys.exit(main())
