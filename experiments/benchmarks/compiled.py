"""Compare compiled programs for a TPU or GPU with stock JAX's: python -m experiments.benchmarks.compiled --help."""

import dataclasses
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli
from experiments.benchmarks.compiler import (
    BOTH,
    FLAX,
    FORWARD,
    OURS,
    PLATFORMS,
    STEP,
    STOCK,
    Compiled,
    Compiler,
    Job,
    require,
)  # fmt: skip
from experiments.errors import UsageError, bad_value

PROG = "python -m experiments.benchmarks.compiled"
DTYPES = ("float32", "bfloat16")
BAR = 1.05
"""Ratio to stock JAX above which a row is reported."""
QUICK = 2
"""Images per batch of a trial run."""
GROUPS = {
    "transposed convolutions": r"conv_transpose ",
    "grouped convolutions": r"conv .*(depthwise|groups)",
    "convolutions": r"conv ",
    "pools": r".*(pool|kron_up|block_sum) ",
    "norms": r"\w+_norm ",
    "dense": r"dense ",
    "hidden layer": r"hidden_layer ",
    "losses": r"softmax_|squared_error ",
    "activations": r"",
}
"""Groups of ops, each with the beginning of its rows' names; the first that matches counts."""
STEPS = "steps"


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile every op and training step for a TPU or GPU, in jaxcnn and in stock JAX, and compare the programs.

    No device is needed and nothing runs: the numbers are models. On TPU, cycles are the bundles that the compiler
    scheduled, or the time of the memory traffic if that is longer. On GPU, the bytes that the kernels read and write
    are counted.
    """

    platform: str = "tpu-v5e"
    """Device: tpu-v5e, tpu-v6e or cuda-h100."""
    only: Annotated[str, arg(metavar="PATTERN")] = ""
    """Compile only rows whose name matches this regular expression, such as "max_pool.*both" or "training step"."""
    dtypes: tuple[str, ...] = DTYPES
    """Dtypes of inputs and parameters: float32, bfloat16."""
    nets: tuple[str, ...] = ("lecture", "vgg", "mobile", "resnext", "resnet18", "unet")
    """Nets whose training step is compiled: lecture, lenet5, vgg, mobile, resnext, resnet18, unet, or none."""
    chips: int = 1
    """Devices that share each batch."""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """Images per step, and at most per op; if omitted, those of the benchmarks that run."""
    quick: FlagCreatePairsOff[bool] = False
    """Trial run with two images per device."""
    timeout: float = 900.0
    """Seconds after which a compilation counts as failed."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; a bar chart of the ratios is written next to it."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """One row: the program of each contender, or the reason why there is none."""

    row: str
    product: str
    dtype: str
    programs: Mapping[str, Compiled | str]
    measure: str

    @property
    def name(self) -> str:
        """Names of the op or net, the product, and the dtype."""
        return f"{self.row}, {self.product}, {self.dtype}"

    @property
    def group(self) -> str:
        """Group over which means are taken."""
        if self.product == STEP:
            return STEPS
        return next(group for group, pattern in GROUPS.items() if re.match(pattern, self.row))

    @property
    def failed(self) -> list[str]:
        """The contenders without a program, with the reason."""
        return [f"{name}: {reason}" for name, reason in self.programs.items() if isinstance(reason, str)]

    @property
    def same_program(self) -> bool:
        """Whether jaxcnn's program is that of stock JAX."""
        ours, stock = self.programs[OURS], self.programs[STOCK]
        return isinstance(ours, Compiled) and isinstance(stock, Compiled) and ours.program == stock.program

    @property
    def bound(self) -> float | None:
        """Bytes of all arguments and results divided by the bytes that stock JAX moves; None without them."""
        stock = self.programs[STOCK]
        return stock.least / stock.moved if isinstance(stock, Compiled) and stock.moved else None

    def ratio(self, measure: str | None = None, contender: str = STOCK) -> float | None:
        """Return jaxcnn's number divided by another contender's; None if one of them is 0 or missing."""
        ours, theirs = (self.programs.get(name) for name in (OURS, contender))
        if not isinstance(ours, Compiled) or not isinstance(theirs, Compiled):
            return None
        a, b = (getattr(counts, measure or self.measure) for counts in (ours, theirs))
        return a / b if a and b else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Compile and print all rows. Return 0, 1 if a program of jaxcnn failed, or 130 after Ctrl-C."""
    check(config)
    require(config.platform)

    from experiments.benchmarks import results

    jobs = list(chosen(config))
    if not jobs:
        raise bad_value(UsageError, "--only", "a pattern that matches the name of a row", repr(config.only))
    machine = versions(config.platform)
    results.heading(machine, f"programs for {config.platform}, {config.chips} device(s); models: no device ran them")
    print(header(PLATFORMS[config.platform].measure))
    rows: list[Compared] = []
    compiler = Compiler(config.platform, config.timeout)
    try:
        with results.until_stopped(lambda: rows) as stopped:
            for (row, product, dtype), contenders in jobs:
                programs = {name: compiler.compile(job) for name, job in contenders.items()}
                rows.append(Compared(row, product, dtype, programs, PLATFORMS[config.platform].measure))
                print(line(rows[-1]), flush=True)
    finally:
        compiler.close()
    print()
    for text in summary(rows):
        print(text)
    if config.out is not None:
        results.write(config.out, machine, config, rows=[to_json(row) for row in rows])
        draw(config.out.with_suffix(".png"), config.platform, rows)
    failed = any(isinstance(row.programs[OURS], str) for row in rows)
    return stopped[0] if stopped else int(failed)


def check(config: Config) -> None:
    """Raise UsageError for an invalid option."""
    from experiments.benchmarks import results
    from experiments.benchmarks.nets import LARGE, NETS

    cli.check_choice("--platform", config.platform, PLATFORMS)
    for dtype in config.dtypes:
        cli.check_choice("--dtypes", dtype, DTYPES)
    for net in config.nets:
        cli.check_choice("--nets", net, [*NETS, *LARGE, "none"])
    cli.check_count("--chips", config.chips)
    cli.check_count("--batch-size", config.batch_size)
    if not config.timeout > 0:
        raise bad_value(UsageError, "--timeout", "more than 0", config.timeout)
    try:
        re.compile(config.only)
    except re.error as error:
        raise bad_value(UsageError, "--only", "a regular expression", f"{config.only!r} ({error})") from None
    results.check_out(config.out)


def chosen(config: Config) -> Iterator[tuple[tuple[str, str, str], dict[str, Job]]]:
    """Yield the row, product and dtype of every row whose name matches, and the job of each contender."""
    from experiments.benchmarks import rows
    from experiments.benchmarks.nets import LARGE

    batch = QUICK * config.chips if config.quick else config.batch_size
    names: list[tuple[str, str, tuple[str, ...]]]
    names = [(row.name, product, (OURS, STOCK)) for row in rows.rows() for product in (FORWARD, BOTH)]
    for net in config.nets:
        if net != "none":
            names.append((net, STEP, (OURS, STOCK) if net in LARGE else (OURS, STOCK, FLAX)))
    for dtype in config.dtypes:
        for row, product, contenders in names:
            if re.search(config.only, f"{row}, {product}, {dtype}"):
                jobs = {name: Job(row, product, name, dtype, batch, config.chips) for name in contenders}
                yield (row, product, dtype), jobs


def versions(device: str) -> dict[str, str]:
    """Return the versions that determine the programs."""
    packages = ("jax", "jaxlib", PLATFORMS[device].distribution, "flax")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


# ---------------------------------------------------------------------------------------------------------------------
# Output


def header(measure: str) -> str:
    """Return the heading of the table."""
    columns = ("kilocycles", "MB moved") if measure == "cycles" else ("MB moved", "kernels")
    cells = f"{columns[0]:>12}{'ratio':>7}{columns[1]:>12}{'ratio':>7}{'MB temp':>10}{'ratio':>7}"
    return f"{'jaxcnn, and ratio to stock JAX':78}{cells}"


def line(row: Compared) -> str:
    """Return one row as text."""
    ours = row.programs[OURS]
    notes = [f"failed: {reason}" for reason in row.failed]
    cells = ""
    if isinstance(ours, Compiled):
        columns = ("cycles", "moved", "temporary") if row.measure == "cycles" else ("moved", "kernels", "temporary")
        units = {"cycles": 1e3, "moved": 1e6, "kernels": 1, "temporary": 1e6}
        for column, width in zip(columns, (12, 12, 10), strict=True):
            number = getattr(ours, column) / units[column]
            cells += f"{number:{width}.{0 if column == 'kernels' else 2}f}{decimals(row.ratio(column)):>7}"
        notes += ["same program"] if row.same_program else []
        if (flax := row.ratio(contender=FLAX)) is not None:
            notes.append(f"{flax:.2f} of {FLAX}")
        for what in ("calls", "collectives"):
            texts = {name: called(what, row.programs[name]) for name in row.programs}
            distinct = len(set(texts.values())) > 1 or (what == "collectives" and texts[OURS])
            notes += [f"{name} {text or 'none'}" for name, text in texts.items() if distinct]
        notes += ["slower"] if (row.ratio() or 0) > BAR else []
    return f"{row.name:78}{cells}  {'; '.join(notes)}".rstrip()


def decimals(ratio: float | None) -> str:
    """Return a ratio as text."""
    return "–" if ratio is None else f"{ratio:.2f}"


def called(what: str, counts: Compiled | str) -> str:
    """Return the library calls or collectives of one contender as text."""
    numbers = {} if isinstance(counts, str) else getattr(counts, what)
    return ", ".join(f"{n} {name.replace('cudnn$conv', '')}" for name, n in sorted(numbers.items()))


def summary(rows: Sequence[Compared]) -> list[str]:
    """Return the geometric means by group and dtype, and the rows above BAR."""
    from experiments.benchmarks.results import geometric_mean

    if not rows:
        return []
    measure = rows[0].measure
    texts = [f"{measure} of jaxcnn / {measure} of stock JAX, geometric means (maximum):"]
    for group in (*GROUPS, STEPS, "all"):
        cells = []
        for dtype in dict.fromkeys(row.dtype for row in rows):
            within = [row for row in rows if row.dtype == dtype and group in (row.group, "all")]
            for product in (FORWARD, BOTH, STEP):
                ratios = [r for row in within if row.product == product and (r := row.ratio()) is not None]
                if ratios:
                    cells.append(f"{product}, {dtype} {geometric_mean(ratios):.2f} ({max(ratios):.2f})")
        texts += [f"  {group}: {'; '.join(cells)}"] if cells else []
    compared = [(ratio, row) for row in rows if (ratio := row.ratio()) is not None]
    if bounds := [bound for row in rows if row.product != STEP and (bound := row.bound) is not None]:
        mean = geometric_mean(bounds)
        texts.append(f"  ops, bytes of all arguments and results / bytes moved by stock JAX: {mean:.2f}")
    slower = sorted((pair for pair in compared if pair[0] > BAR), key=lambda pair: -pair[0])
    texts.append(f"{len(slower)} of {len(compared)} rows above {BAR}:")
    texts += [f"  {ratio:.2f}  {row.name}" for ratio, row in slower]
    larger = [row for row in rows if (row.ratio("temporary") or 0) > BAR]
    texts.append(f"{len(larger)} rows with more than {BAR} of stock JAX's temporary bytes:")
    texts += [f"  {row.ratio('temporary'):.2f}  {row.name}" for row in larger]
    return texts + [f"failed: {row.name}: {reason}" for row in rows for reason in row.failed]


def to_json(row: Compared) -> dict[str, Any]:
    """Return a row in JSON form."""
    measures = (row.measure, "moved", "kernels", "temporary")
    return {
        "row": row.row,
        "product": row.product,
        "dtype": row.dtype,
        "group": row.group,
        "ratios": {measure: row.ratio(measure) for measure in measures},
        "programs": dict(row.programs),
    }


def draw(path: Path, device: str, rows: Iterable[Compared]) -> None:
    """Draw a chart of the ratios."""
    from experiments.benchmarks import results

    rows = list(rows)
    ratios = {row.name: 1 / ratio for row in rows if (ratio := row.ratio()) is not None}
    if ratios:
        measure = rows[0].measure
        label = f"{measure} of stock JAX / {measure} of jaxcnn, a model; jaxcnn needs more below 1"
        results.bars(path, f"compiled programs for {device}", label, ratios, log=True)


if __name__ == "__main__":
    sys.exit(main())
