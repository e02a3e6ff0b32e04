"""Compare whole training steps with other libraries: python -m experiments.benchmarks.step --help."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from experiments import cli, process

if TYPE_CHECKING:
    from experiments.benchmarks.timing import Times
    from experiments.benchmarks.worker import Ready

PROG = "python -m experiments.benchmarks.step"


@dataclasses.dataclass(frozen=True)
class Config:
    """Time a training step (forward, backward, Adam) of the same net in jaxcnn and other libraries, in turns."""

    net: str = "lecture"
    """Net: lecture, lenet5, vgg, mobile or resnext."""
    contenders: tuple[str, ...] = ("all",)
    """Libraries to compare jaxcnn with, such as "flax nnx" torch; all for all that the README lists."""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """Images per step; if omitted, 128 for 28×28 images, 64 for larger ones."""
    microbatch: Annotated[int | None, arg(metavar="INT")] = None
    """Images per microbatch in jaxcnn's step, by gradient accumulation; if omitted, no microbatches."""
    scan: Annotated[int | None, arg(metavar="INT")] = None
    """Steps per call, by jax.lax.scan, for jaxcnn, flax nnx and equinox; if omitted, one step without a loop."""
    rounds: int = 10
    """Number of rounds. In each round, every library has one turn."""
    steps: int = 5
    """Timed calls per turn. Results are seconds per step."""
    allocator: str = "stock"
    """Allocator settings of glibc for all libraries: stock or tuned."""
    device: str = "cpu"
    """Device: cpu or gpu."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; a bar chart of the ratios is written next to it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Build and time all libraries, and print the results. Return 0, or 130 after Ctrl-C."""
    names = check(config)

    from experiments.benchmarks import results, timing
    from experiments.benchmarks.worker import Contender

    platform = "cuda" if config.device == "gpu" else "cpu"
    environment = {"JAXCNN_BENCHMARK_DEVICE": config.device, "JAX_PLATFORMS": platform}
    environment |= process.environment(config.allocator)
    machine = timing.machine(("jax", "jaxlib", "optax"), others=("flax", "equinox", "keras", "torch"))
    contenders: dict[str, Contender] = {}
    ready: dict[str, Ready] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in names:  # one after another, because compile times are reported as well
            contenders[name] = Contender(
                name,
                config.net,
                environment,
                batch=config.batch_size,
                microbatch=config.microbatch,
                scan=config.scan,
            )
            ready[name] = contenders[name].ready()
        with results.until_stopped(lambda: all(seconds.values())) as stopped:
            for name in timing.in_rounds(names, config.rounds):
                seconds[name] += contenders[name].turn(config.steps)
    finally:
        for contender in contenders.values():
            contender.stop()
    times = {name: timing.Times(tuple(s)) for name, s in seconds.items()}
    report(config, machine, times, ready)
    return stopped[0] if stopped else 0


def check(config: Config) -> list[str]:
    """Return the names of the libraries, jaxcnn first; raise UsageError for an invalid option."""
    from experiments.benchmarks import results
    from experiments.benchmarks.contenders import CONTENDERS, IN_LOOPS
    from experiments.benchmarks.nets import NETS

    for name in ("batch_size", "microbatch", "scan", "rounds", "steps"):
        cli.check_count(f"--{name.replace('_', '-')}", getattr(config, name))
    known_names = list(CONTENDERS if config.scan is None else IN_LOOPS)
    for flag, got, known in (
        ("--net", config.net, list(NETS)),
        ("--allocator", config.allocator, process.ALLOCATORS),
        ("--device", config.device, ["cpu", "gpu"]),
        *(("--contenders", name, ["all", *known_names]) for name in config.contenders),
    ):
        cli.check_choice(flag, got, known)
    results.check_out(config.out)
    chosen = known_names if "all" in config.contenders else list(config.contenders)
    return ["jaxcnn", *(name for name in dict.fromkeys(chosen) if name != "jaxcnn")]


def report(
    config: Config, machine: Mapping[str, Any], times: "Mapping[str, Times]", ready: "Mapping[str, Ready]"
) -> None:
    """Print the table, and write the numbers and the chart if `config.out` is given."""
    from experiments.benchmarks import results
    from experiments.benchmarks.nets import NETS

    config = dataclasses.replace(config, batch_size=config.batch_size or NETS[config.net]().batch)
    title = f"{config.net}, batch {config.batch_size}, {config.allocator} allocator"
    if config.microbatch is not None:
        title += f", jaxcnn in microbatches of {config.microbatch}"
    if config.scan is not None:
        title += f", {config.scan} steps per call"
    results.heading(machine, f"{title}, one training step, {config.rounds} turns of {config.steps} steps")
    compiling = {name: f"{t.compile_seconds:.1f} s" for name, t in ready.items() if t.compile_seconds is not None}
    temporary = {name: results.megabytes(t.temporary_bytes) for name, t in ready.items() if t.temporary_bytes}
    results.contenders(times, "jaxcnn", {"compile": compiling, "temporary": temporary})
    if config.out is not None:
        numbers = {name: {"seconds": t, **dataclasses.asdict(ready[name])} for name, t in times.items()}
        results.write(config.out, machine, config, contenders=numbers)
        ratios = {name: t.median / times["jaxcnn"].median for name, t in times.items()}
        notes = [f"{ratios[name]:.2f}×  {t.median * 1e3:.0f} ms" for name, t in times.items()]
        label = "time / jaxcnn's time (medians)"
        results.bars(
            config.out.with_suffix(".png"), f"one training step: {title}", label, ratios, notes=notes, ours="jaxcnn"
        )


if __name__ == "__main__":
    sys.exit(main())
