"""Compare training steps of drawn nets with other libraries: python -m experiments.benchmarks.drawn --help."""

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from experiments import cli, process
from experiments.errors import UsageError, bad_value

if TYPE_CHECKING:
    from experiments.benchmarks.timing import Times

PROG = "python -m experiments.benchmarks.drawn"
STOCK = "flax nnx"
"""The contender that is stock JAX."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Time training steps (forward, backward, Adam) of nets drawn from a seed, written as users write them.

    Each net is compared with Flax NNX, which is stock JAX, and with the fastest of the chosen configurations of
    PyTorch. The contenders of a net take turns, each in its own process.
    """

    seed: int = 0
    """Seed of the nets."""
    nets: int = 40
    """Number of nets."""
    only: tuple[int, ...] = ()
    """Numbers of the nets to time, from 0; by default the first `--nets`."""
    fixed: bool = False
    """Time the five fixed nets of `drawn_nets.FIXED` instead of drawn ones."""
    contenders: tuple[str, ...] = (STOCK, "torch", "torch channels-last")
    """Libraries to compare jaxcnn with; "torch.compile" and "torch.compile channels-last" take a minute per net."""
    allocator: str = "stock"
    """stock: glibc's defaults. tuned: glibc keeps freed memory, in all libraries (docs/training.md)."""
    rounds: int = 4
    """Number of rounds. In each round, every library has one turn."""
    steps: int = 16
    """Timed steps per turn. The first ones of a turn are slower, those of small nets by a third."""
    compilations: int = 3
    """Number of processes per JAX library that compile the step, in turns; the least time counts."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; a bar chart of the ratios is written next to it."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The times of one net, by contender."""

    net: str
    times: "Mapping[str, Times]"
    #: Seconds of tracing and compiling in each process.
    compile_seconds: Mapping[str, Sequence[float]]
    #: Temporary bytes of the step as reported by XLA.
    temporary_bytes: Mapping[str, int | None]

    def against(self, prefix: str) -> float | None:
        """Return the least minimum among the contenders with a prefix, divided by jaxcnn's; None without one."""
        theirs = [t.minimum for name, t in self.times.items() if name.startswith(prefix)]
        return min(theirs) / self.times["jaxcnn"].minimum if theirs else None

    @property
    def compile_ratio(self) -> float | None:
        """Jaxcnn's least compile time divided by stock JAX's; None without stock JAX."""
        if STOCK not in self.compile_seconds:
            return None
        return min(self.compile_seconds["jaxcnn"]) / min(self.compile_seconds[STOCK])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Time all nets, and print a row for each. Return 0, or 130 after Ctrl-C."""
    from experiments.benchmarks import results, timing
    from experiments.benchmarks.contenders import CONTENDERS
    from experiments.benchmarks.drawn_nets import FIXED

    for name in ("nets", "rounds", "steps", "compilations"):
        cli.check_count(f"--{name}", getattr(config, name))
    for name in config.contenders:
        cli.check_choice("--contenders", name, [other for other in CONTENDERS if other != "jaxcnn"])
    cli.check_choice("--allocator", config.allocator, process.ALLOCATORS)
    results.check_out(config.out)
    if config.only and min(config.only) < 0:
        raise bad_value(UsageError, "--only", "at least 0", min(config.only))
    numbers = config.only or range(config.nets)
    names = [*FIXED] if config.fixed else [f"drawn {config.seed} {number}" for number in numbers]
    machine = timing.machine(("jax", "jaxlib", "optax"), others=("flax", "torch"))
    rows: list[Result] = []
    with results.until_stopped(lambda: rows) as stopped:
        for name in names:
            rows.append(timed(name, config))
            print(f"{rows[-1].net}: " + ", ".join(f"{n} {t.minimum * 1e3:.1f} ms" for n, t in rows[-1].times.items()),
                  flush=True)  # fmt: skip
    report(config, machine, rows)
    return stopped[0] if stopped else 0


def timed(name: str, config: Config) -> Result:
    """Build the net in each library, and time the steps in turns."""
    from experiments.benchmarks import timing
    from experiments.benchmarks.drawn_nets import described, find
    from experiments.benchmarks.worker import Contender, compile_once

    libraries = ["jaxcnn", *dict.fromkeys(config.contenders)]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment |= process.environment(config.allocator)
    contenders: dict[str, Contender] = {}
    seconds: dict[str, list[float]] = {library: [] for library in libraries}
    compile_seconds: dict[str, list[float]] = {}
    temporary_bytes = {}
    try:
        for library in libraries:  # one after another, because compile times are reported as well
            contenders[library] = Contender(library, name, environment)
            ready = contenders[library].ready()
            temporary_bytes[library] = ready.temporary_bytes
            if ready.compile_seconds is not None:
                compile_seconds[library] = [ready.compile_seconds]
        for library in [*compile_seconds] * (config.compilations - 1):
            compile_seconds[library].append(compile_once(library, name, environment))
        for library in timing.in_rounds(libraries, config.rounds):
            seconds[library] += contenders[library].turn(config.steps)
    finally:
        for contender in contenders.values():
            contender.stop()
    times = {library: timing.Times(tuple(s)) for library, s in seconds.items()}
    return Result(described(find(name)), times, compile_seconds, temporary_bytes)


def report(config: Config, machine: Mapping[str, Any], rows: Sequence[Result]) -> None:
    """Print the table and the summary, and write the numbers and the chart if `config.out` is given."""
    from experiments.benchmarks import results

    which = "fixed nets" if config.fixed else f"nets drawn from seed {config.seed}"
    turns = f"{config.rounds} turns of {config.steps} steps, {config.allocator} allocator"
    title = f"{len(rows)} {which}, one training step, {turns}"
    results.heading(machine, title)
    columns = {
        "of the best PyTorch": [row.against("torch") for row in rows],
        f"of {STOCK}": [row.against(STOCK) for row in rows],
        f"compile time / {STOCK}": [row.compile_ratio for row in rows],
    }
    results.table(
        ["net", "jaxcnn", *columns],
        [
            [row.net, results.seconds(row.times["jaxcnn"].minimum), *("" if r is None else f"{r:.2f}" for r in ratios)]
            for row, *ratios in zip(rows, *columns.values(), strict=True)
        ],
    )
    print("minima; time of the other library / jaxcnn's time")
    for what, ratios in columns.items():
        if known := sorted(r for r in ratios if r is not None):
            print(f"{what}: median {statistics.median(known):.2f}, least {known[0]:.2f}, largest {known[-1]:.2f}")
    if config.out is not None:
        results.write(config.out, machine, config, nets=[dataclasses.asdict(row) for row in rows])
        what = "of the best PyTorch" if any(r is not None for r in columns["of the best PyTorch"]) else f"of {STOCK}"
        bars = {row.net: r for row, r in zip(rows, columns[what], strict=True) if r is not None}
        results.bars(config.out.with_suffix(".png"), title, f"time {what} / jaxcnn's time (minima)", bars, log=True)


if __name__ == "__main__":
    sys.exit(main())
