"""Whole training steps beside other libraries: python -m experiments.benchmarks.step --help."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from experiments import cli
from experiments.errors import UsageError
from experiments.files import replacing

if TYPE_CHECKING:
    from experiments.benchmarks.timing import Times
    from experiments.benchmarks.turn import Told

PROG = "python -m experiments.benchmarks.step"
TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""glibc keeps the memory that is freed; see the README of the benchmarks."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Time a training step (forward, backward, Adam) of the same net in jaxcnn and in other libraries, in turns."""

    net: str = "lecture"
    """lecture, lenet5, vgg, mobile or resnext."""
    contenders: tuple[str, ...] = ("all",)
    """Whom to compare jaxcnn with, such as --contenders "flax nnx" torch; all is all that the README names."""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """Images a step; without it, 128 for pictures of 28×28 and 64 for larger ones."""
    rounds: int = 10
    """How often each contender takes its turn."""
    steps: int = 5
    """Steps of a turn that are counted."""
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

    from experiments.benchmarks import timing
    from experiments.benchmarks.turn import Contender

    environment = {**(TUNED if config.allocator == "tuned" else {}), "JAXCNN_BENCHMARK_DEVICE": config.device}
    environment["JAX_PLATFORMS"] = "cuda" if config.device == "gpu" else "cpu"
    machine = timing.machine(("jax", "jaxlib", "optax"), others=("flax", "equinox", "keras", "torch"))
    contenders: dict[str, Contender] = {}
    told: dict[str, Told] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in names:  # one after the other: compile times are told too
            contenders[name] = Contender(name, config.net, config.batch_size, environment)
            told[name] = contenders[name].ready()
        for i in range(config.rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                seconds[name] += contenders[name].turn(config.steps)
    finally:
        for contender in contenders.values():
            contender.stop()
    times = {name: timing.Times(tuple(s)) for name, s in seconds.items()}
    report(config, machine, times, told)
    return 0


def check(config: Config) -> list[str]:
    """Return who takes part, jaxcnn first; raise UsageError for whatever can be known to be wrong."""
    from experiments.benchmarks.contenders import CONTENDERS
    from experiments.benchmarks.nets import NETS

    for flag, number in {"--batch-size": config.batch_size, "--rounds": config.rounds, "--steps": config.steps}.items():
        if number is not None and number < 1:
            raise UsageError(f"{flag}: expected a whole number >= 1, got {number}")
    for flag, got, known in (
        ("--net", config.net, list(NETS)),
        ("--allocator", config.allocator, ["stock", "tuned"]),
        ("--device", config.device, ["cpu", "gpu"]),
        *(("--contenders", name, ["all", *CONTENDERS]) for name in config.contenders),
    ):
        if got not in known:
            raise UsageError(f"{flag}: expected one of {', '.join(known)}, got {got!r}{cli.did_you_mean(got, known)}")
    if config.out is not None and config.out.is_dir():
        raise UsageError(f"--out: expected a file, got the folder {config.out}")
    chosen = list(CONTENDERS) if "all" in config.contenders else list(config.contenders)
    return ["jaxcnn", *(name for name in dict.fromkeys(chosen) if name != "jaxcnn")]


def report(
    config: Config, machine: Mapping[str, Any], times: "Mapping[str, Times]", told: "Mapping[str, Told]"
) -> None:
    """Print the table, and write the numbers and the chart if a file was named."""
    from experiments.benchmarks.nets import NETS

    batch = config.batch_size or NETS[config.net]().batch
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    turns = f"{config.rounds} turns of {config.steps} steps"
    print(f"{config.net}, batch {batch}, one training step, {config.allocator} allocator, {turns}")
    head = f"{'':28}  {'median':>9}  {'minimum':>9}  {'spread':>6}  {'jaxcnn is faster by':>19}"
    print(f"{head}  {'compile':>7}  {'temporary':>9}")
    ours = times["jaxcnn"]
    for name, t in times.items():
        ratio = f"{t.median / ours.median:.2f}× ({t.minimum / ours.minimum:.2f}×)"
        line = f"{name:28}  {t.median * 1e3:6.1f} ms  {t.minimum * 1e3:6.1f} ms  {t.spread:6.0%}  {ratio:>19}"
        compiling, temporary = told[name].compile_seconds, told[name].temporary_bytes
        line += f"  {'' if compiling is None else f'{compiling:.1f} s':>7}"
        print(line + f"  {'' if temporary is None else f'{temporary / 1e6:.1f} MB':>9}")
    print("ratios of medians (of minima); spread: between the quartiles, of the median")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        numbers = {
            "machine": machine,
            "config": {**dataclasses.asdict(config), "out": str(config.out), "batch_size": batch},
            "contenders": {name: {"seconds": t.seconds, **dataclasses.asdict(told[name])} for name, t in times.items()},
        }
        with replacing(config.out) as temporary_file:
            temporary_file.write_text(json.dumps(numbers, indent=1))
        chart(config.out.with_suffix(".png"), f"{config.net}, batch {batch}, {config.allocator} allocator", times)


def chart(path: Path, title: str, times: "Mapping[str, Times]") -> None:
    """Draw how much longer each contender takes than jaxcnn."""
    from matplotlib.figure import Figure

    names = sorted(times, key=lambda name: times[name].median)
    ratios = [times[name].median / times["jaxcnn"].median for name in names]
    figure = Figure(figsize=(7, 0.6 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, ratios, color=["#c0392b" if name == "jaxcnn" else "#95a5a6" for name in names])
    labels = [f"{ratio:.2f}×  {times[name].median * 1e3:.0f} ms" for name, ratio in zip(names, ratios, strict=True)]
    axes.bar_label(bars, labels, padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ratios) * 1.25)
    axes.set_title(f"one training step: {title}", fontsize=10, loc="left")
    axes.set_xlabel("time, as a multiple of jaxcnn's (median)")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


if __name__ == "__main__":
    sys.exit(main())
