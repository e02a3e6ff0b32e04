"""Time training steps of increasing size: python -m experiments.benchmarks.growth --help."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from experiments import cli, process
from experiments.errors import UsageError, bad_value

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
    """Time training steps of increasing size in jaxcnn and Flax NNX, in turns.

    batch: the lecture's net with larger batches. side: convolutions with 16 and 32 channels on larger images, batch 8.
    channels: two convolutions with more channels on 16×16 images, batch 8.
    """

    what: tuple[str, ...] = tuple(SIZES)
    """Quantities to increase: batch, side, channels."""
    microbatch: Annotated[int | None, arg(metavar="INT")] = None
    """Images per microbatch in jaxcnn's step, by gradient accumulation; if omitted, no microbatches."""
    most: int = 1024
    """Largest size."""
    rounds: int = 3
    """Number of rounds. In each round, every library has one turn."""
    allocator: str = "stock"
    """Allocator settings of glibc for both libraries: stock or tuned."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; a plot is written next to it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, measure, argv, prog=PROG)


def measure(config: Config) -> int:
    """Time all sizes and print them. Return 0, or 130 after Ctrl-C."""
    cli.check_count("--rounds", config.rounds)
    cli.check_count("--microbatch", config.microbatch)
    cli.check_choice("--allocator", config.allocator, process.ALLOCATORS)
    for what in config.what:
        cli.check_choice("--what", what, SIZES)
    sizes = {what: [size for size in SIZES[what] if size <= config.most] for what in config.what}
    if not all(sizes.values()):
        raise bad_value(UsageError, "--most", f"at least {max(s[0] for s in SIZES.values())}", config.most)
    tuned = config.allocator == "tuned" and process.keep_freed_memory()

    from experiments.benchmarks import results, timing

    results.check_out(config.out)
    machine = timing.machine(("jax", "jaxlib"), others=("flax",))
    results.heading(
        machine,
        f"one training step, {config.rounds} rounds; minima{'; freed memory is kept' if tuned else ''}"
        + (f"; jaxcnn in microbatches of {config.microbatch}" if config.microbatch is not None else ""),
    )
    times: dict[str, Any] = {}
    panels: dict[str, dict[str, dict[int, float]]] = {}
    with results.until_stopped(lambda: panels) as stopped:
        for what in config.what:
            times[what] = {
                size: timing.in_turns(steps(what, size, config.microbatch), config.rounds, most=0.5)
                for size in sizes[what]
            }
            minima = {size: {n: t.minimum for n, t in by_name.items()} for size, by_name in times[what].items()}
            curves = per_image(what, minima)
            panels[what] = curves
            print()
            results.table([what, *(f"{name}, per image" for name in curves), "flax nnx / jaxcnn"], list(table(curves)))
            if what == "batch" and (ratio := flatness(curves["jaxcnn"])) is not None:
                print(f"jaxcnn, batches of 64 and more: time per image, maximum / minimum: {ratio:.2f}")
    if config.out is not None:
        results.write(config.out, machine, config, seconds=times)
        results.lines(config.out.with_suffix(".png"), "one training step", panels, "seconds per image")
    return stopped[0] if stopped else 0


def table(curves: Mapping[str, Mapping[int, float]]) -> Iterator[list[str]]:
    """Yield one table row per size."""
    from experiments.benchmarks.results import seconds

    for size in curves["jaxcnn"]:
        costs = [curve[size] for curve in curves.values()]
        yield [str(size), *map(seconds, costs), f"{curves['flax nnx'][size] / curves['jaxcnn'][size]:.2f}"]


def per_image(what: str, minima: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """Convert {size: {contender: seconds per step}} to {contender: {size: seconds per image}}."""
    images = {size: size if what == "batch" else IMAGES for size in minima}
    names = next(iter(minima.values()))
    return {name: {size: by_name[name] / images[size] for size, by_name in minima.items()} for name in names}


def flatness(curve: Mapping[int, float], least: int = 64) -> float | None:
    """Return maximum / minimum cost per image over batches of at least `least`; None if there are fewer than two."""
    costs = [cost for size, cost in curve.items() if size >= least]
    return max(costs) / min(costs) if len(costs) > 1 else None


IMAGES = 8
"""Batch size if another quantity grows."""


def steps(what: str, size: int, microbatch: int | None) -> dict[str, Callable[[], Any]]:
    """Return a training step of each library."""
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
    return Timed(net, (side, side, inputs), IMAGES)


if __name__ == "__main__":
    sys.exit(main())
