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
    from experiments.benchmarks.worker import Told

PROG = "python -m experiments.benchmarks.step"


@dataclasses.dataclass(frozen=True)
class Config:
    """Time a training step (forward, backward, Adam) of the same net in jaxcnn and in other libraries, alternately."""

    net: str = "lecture"
    """lecture, lenet5, vgg, mobile or resnext."""
    contenders: tuple[str, ...] = ("all",)
    """Whom to compare jaxcnn with, such as --contenders "flax nnx" torch; all is all that the README names."""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """Images a step; without it, 128 for pictures of 28×28 and 64 for larger ones."""
    microbatch: Annotated[int | None, arg(metavar="INT")] = None
    """Images at a time in jaxcnn's step (gradient accumulation), the others take all; without it, all."""
    scan: Annotated[int | None, arg(metavar="INT")] = None
    """So many steps in one call, by jax.lax.scan: for jaxcnn, flax nnx and equinox; without it, one, and no loop."""
    rounds: int = 10
    """How often each contender takes its turn."""
    steps: int = 5
    """Calls of a turn that are counted; what is told is seconds a step."""
    allocator: str = "stock"
    """stock or tuned: how glibc keeps memory, the same for all."""
    device: str = "cpu"
    """cpu or gpu."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """A file for all numbers, as JSON; a bar chart of the ratios goes beside it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Build, time and print the contenders. Returns 0."""
    names = check(config)

    from experiments.benchmarks import results, timing
    from experiments.benchmarks.worker import Contender

    platform = "cuda" if config.device == "gpu" else "cpu"
    environment = {"JAXCNN_BENCHMARK_DEVICE": config.device, "JAX_PLATFORMS": platform}
    if config.allocator == "tuned":
        environment |= {name: str(number) for name, number in process.TUNED.items()}
    machine = timing.machine(("jax", "jaxlib", "optax"), others=("flax", "equinox", "keras", "torch"))
    contenders: dict[str, Contender] = {}
    told: dict[str, Told] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in names:  # sequentially, because compile times are reported as well
            contenders[name] = Contender(
                name,
                config.net,
                environment,
                batch=config.batch_size,
                microbatch=config.microbatch,
                scan=config.scan,
            )
            told[name] = contenders[name].ready()
        with results.until_interrupted(lambda: all(seconds.values())) as interrupted:
            for i in range(config.rounds):
                first = i % len(names)
                for name in names[first:] + names[:first]:
                    seconds[name] += contenders[name].turn(config.steps)
    finally:
        for contender in contenders.values():
            contender.stop()
    times = {name: timing.Times(tuple(s)) for name, s in seconds.items()}
    report(config, machine, times, told)
    return interrupted[0] if interrupted else 0


def check(config: Config) -> list[str]:
    """Return the contenders, jaxcnn first; raise UsageError for every error that can be detected in the options."""
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
    config: Config, machine: Mapping[str, Any], times: "Mapping[str, Times]", told: "Mapping[str, Told]"
) -> None:
    """Print the table, and write the numbers and the chart if a file was given."""
    from experiments.benchmarks import results
    from experiments.benchmarks.nets import NETS

    config = dataclasses.replace(config, batch_size=config.batch_size or NETS[config.net]().batch)
    title = f"{config.net}, batch {config.batch_size}, {config.allocator} allocator"
    if config.microbatch is not None:
        title += f", jaxcnn {config.microbatch} at a time"
    if config.scan is not None:
        title += f", {config.scan} steps a call"
    results.heading(machine, f"{title}, one training step, {config.rounds} turns of {config.steps} steps")
    compiling = {name: f"{t.compile_seconds:.1f} s" for name, t in told.items() if t.compile_seconds is not None}
    temporary = {name: results.megabytes(t.temporary_bytes) for name, t in told.items() if t.temporary_bytes}
    results.contenders(times, "jaxcnn", {"compile": compiling, "temporary": temporary})
    if config.out is not None:
        numbers = {name: {"seconds": t, **dataclasses.asdict(told[name])} for name, t in times.items()}
        results.write(config.out, machine, config, contenders=numbers)
        ratios = {name: t.median / times["jaxcnn"].median for name, t in times.items()}
        notes = [f"{ratios[name]:.2f}×  {t.median * 1e3:.0f} ms" for name, t in times.items()]
        label = "time, as a multiple of jaxcnn's (median)"
        picture = config.out.with_suffix(".png")
        results.bars(picture, f"one training step: {title}", label, ratios, notes=notes, ours="jaxcnn")


if __name__ == "__main__":
    sys.exit(main())
