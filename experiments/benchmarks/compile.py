"""Measure the compile time of a training step: python -m experiments.benchmarks.compile --help."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from experiments import cli

PROG = "python -m experiments.benchmarks.compile"
LIBRARIES = ("jaxcnn", "flax nnx", "equinox")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the tracing, lowering and compiling of a training step, each time in a new process, in turns.

    Imports and parameter initialization are not included. The compilation cache is off.
    """

    net: str = "lecture"
    """Net: lecture, lenet5, vgg, mobile or resnext."""
    libraries: tuple[str, ...] = LIBRARIES[1:]
    """Libraries to compare jaxcnn with: "flax nnx", equinox."""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """Images per step; if omitted, 128 for 28×28 images, 64 for larger ones."""
    rounds: int = 5
    """Number of processes per library."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; a bar chart of the ratios is written next to it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Compile, and print the times. Return 0, or 130 after Ctrl-C."""
    from experiments.benchmarks import results, timing
    from experiments.benchmarks.nets import NETS
    from experiments.benchmarks.worker import compile_once

    for flag, number in (("--batch-size", config.batch_size), ("--rounds", config.rounds)):
        cli.check_count(flag, number)
    for flag, got, known in (
        ("--net", config.net, list(NETS)),
        *(("--libraries", name, list(LIBRARIES[1:])) for name in config.libraries),
    ):
        cli.check_choice(flag, got, known)
    results.check_out(config.out)
    names = ["jaxcnn", *config.libraries]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    machine = timing.machine(("jax", "jaxlib"), others=("flax", "equinox"))
    with results.until_stopped(lambda: all(seconds.values())) as stopped:
        for name in timing.in_rounds(names, config.rounds):
            seconds[name].append(compile_once(name, config.net, environment, batch=config.batch_size))
    times = {name: timing.Times(tuple(s)) for name, s in seconds.items()}
    title = f"{config.net}: trace, lower and compile a training step, {config.rounds} new processes each"
    results.report(config.out, machine, config, title, times, "jaxcnn", "jaxcnn")
    return stopped[0] if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
