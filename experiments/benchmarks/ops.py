"""Compare each op, forward and backward, with stock JAX and PyTorch: python -m experiments.benchmarks.ops --help."""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli
from experiments.errors import UsageError, bad_value

if TYPE_CHECKING:
    from experiments.benchmarks.rows import Row
    from experiments.benchmarks.timing import Times

PROG = "python -m experiments.benchmarks.ops"
FORWARD, BOTH = "forward", "both passes"
OURS, STOCK, TORCH, GEMM = "jaxcnn", "stock JAX", "torch", "GEMM"

EQUAL = {"cpu": 1e-4, "gpu": 1e-2}
"""Relative L2 distance up to which results are equal; by default, GPUs multiply in TF32."""
BAR = 0.95
"""Ratio below which a row is reported."""
NEAR, MORE = 1.05, 4
"""Ratio below which a row gets this many times as many rounds, because minima of a few short calls vary more."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the forward pass and each δ of every op in jaxcnn, in stock JAX with autodiff, and in PyTorch, in turns.

    Results are compared before anything is timed. A row is "forward" (y only), the δ of one argument (from the
    residuals of the forward pass), or, if the rule needs more than the arguments, "both passes" (forward and backward
    pass) in one program. If jaxcnn takes more than 0.95 of stock JAX's time, the row gets four times as many rounds.
    Rows below 0.95 are compiled and timed again at the end, and the second ratio counts: a minimum of many rows is
    mostly noise. Rows that are the same program in both libraries are timed again as well, and show how much.
    """

    only: str = ""
    """Time only rows whose name contains this, such as "depthwise" or "δ_w"."""
    drawn: int | None = None
    """Time this number of convolutions and pools, drawn from `--seed`, instead of the table in `rows.py`."""
    seed: int = 0
    """Seed of the drawn rows."""
    rounds: int = 5
    """Number of rounds. In each round, every library has one turn."""
    device: str = "cpu"
    """Device: cpu or gpu."""
    torch: bool = True
    """Include PyTorch."""
    quick: FlagCreatePairsOff[bool] = False
    """Trial run with two images and one round; the times are not meaningful."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; without `--drawn`, a bar chart of the ratios is written next to it."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row: the times of each library, and the result of the comparison."""

    row: str
    product: str
    times: Mapping[str, "Times"]
    note: str = ""
    #: Whether XLA compiled jaxcnn's and stock JAX's functions to the same program; the ratio is then noise.
    same: bool = False
    #: Fraction of the GEMM rate that was measured between the turns of this row.
    gemm_share: float | None = None
    #: The ratio before, for a row that was timed again.
    first_ratio: float | None = None

    @property
    def name(self) -> str:
        """Names of the op and the product."""
        return f"{self.row}, {self.product}"

    @property
    def compared(self) -> bool:
        """Whether the ratio to stock JAX is meaningful: stock JAX has the op and computes the same result."""
        return STOCK in self.times and STOCK not in self.note

    @property
    def below(self) -> bool:
        """Whether the ratio to stock JAX is below BAR."""
        return self.compared and self.ratio < BAR

    @property
    def ratio(self) -> float:
        """Time of stock JAX / time of jaxcnn (minima)."""
        return self.times[STOCK].minimum / self.times[OURS].minimum

    @property
    def torch_ratio(self) -> float | None:
        """Time of PyTorch's faster format / time of jaxcnn (minima)."""
        theirs = [t.minimum for name, t in self.times.items() if name.startswith(TORCH)]
        return min(theirs) / self.times[OURS].minimum if theirs else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Compare, time and print all rows. Return 0, 1 if a result of jaxcnn is wrong, or 130 after Ctrl-C."""
    cli.check_count("--rounds", config.rounds)
    cli.check_count("--drawn", config.drawn)
    cli.check_choice("--device", config.device, EQUAL)
    os.environ["JAX_PLATFORMS"] = "cuda" if config.device == "gpu" else "cpu"

    from experiments.benchmarks import results, timing
    from experiments.benchmarks.drawn_rows import drawn_rows
    from experiments.benchmarks.rows import rows

    results.check_out(config.out)
    table_rows = drawn_rows(config.seed, config.drawn) if config.drawn else rows()
    chosen = [(row, names) for row in table_rows if (names := products(row, config.only))]
    if not chosen:
        raise bad_value(UsageError, "--only", "part of the name of a row", repr(config.only))
    if config.torch:
        require_torch(config.device)
    machine = timing.machine(("jax", "jaxlib"), others=("torch",))
    which = f"{config.drawn} rows drawn from seed {config.seed}" if config.drawn else "each op"
    title = f"{which}, {config.rounds} rounds, {config.device}; minima, and ratios to jaxcnn's time"
    results.heading(machine, title)
    table: list[Measured] = []
    with results.until_stopped(lambda: table) as stopped:
        for row, names in chosen:
            for measured in measure(row, names, config):
                print(line(measured), flush=True)
                table.append(measured)
        for i, measured in again(table, [row for row, _ in chosen], config):
            print(line(measured), flush=True)
            table[i] = measured
    for text in summary(table):
        print(text)
    if config.out is not None:
        results.write(config.out, machine, config, rows=[to_json(measured) for measured in table])
        if not config.drawn:
            draw(config.out.with_suffix(".png"), table)
    wrong = any(OURS in measured.note for measured in table)
    return 1 if wrong else stopped[0] if stopped else 0


def products(row: "Row", only: str = "") -> list[str]:
    """Return the products of a row whose names contain `only`: forward, each δ, both passes."""
    names = [FORWARD, *(f"δ_{name}" for name in row.differentiable), *([BOTH] if row.together else [])]
    return [product for product in names if only in f"{row.name}, {product}"]


def measure(row: "Row", names: Sequence[str], config: Config) -> Iterator[Measured]:
    """Compare and then time each requested product of a row."""
    from experiments.benchmarks import timing

    arguments = row.arguments(2 if config.quick else None)
    contenders: dict[str, Callable[[str], Call]] = {
        OURS: functools.partial(jax_call, row.ours, arguments),
        STOCK: functools.partial(jax_call, row.stock, arguments),
    }
    if config.torch and row.torch is not None:
        for layout in layouts(next(iter(row.shapes.values()))):
            contenders[layout] = functools.partial(torch_call, row.torch, arguments, layout, config.device)
    for product in names:
        timed: dict[str, Callable[[], Any]] = {}
        outputs: dict[str, Any] = {}
        programs: dict[str, Callable[[], str]] = {}
        notes = []
        for name, build in contenders.items():
            if name.startswith(TORCH) and product in row.torch_crashes:
                notes.append(f"{name} crashes")
                continue
            try:
                call = build(product)
                outputs[name] = call.result()
                timed[name] = call.run
                if call.program is not None:
                    programs[name] = call.program
            except NotImplementedError:
                if name == OURS:
                    raise
                notes.append(f"{name} has no such gradient")
        notes += differences(outputs, max(EQUAL[config.device], row.equal))
        if row.flops is not None and not config.quick:
            timed[GEMM] = gemm()
        rounds, most, calls = (1, 0.0, 1) if config.quick else (config.rounds, 0.1, 10)
        turns = functools.partial(timing.in_turns, timed, most=most, calls=calls)
        times = turns(rounds)
        if STOCK in times and not config.quick and times[STOCK].minimum < NEAR * times[OURS].minimum:
            more = turns((MORE - 1) * rounds)
            times = {name: timing.Times(one.seconds + more[name].seconds) for name, one in times.items()}
        share = None
        if row.flops is not None and GEMM in times:
            share = (row.flops / times[OURS].minimum) / (2 * GEMM_SIZE**3 / times[GEMM].minimum)
        same = STOCK in programs and programs[OURS]() == programs[STOCK]()
        yield Measured(row.name, product, times, "; ".join(notes), same, share)


def again(table: Sequence[Measured], rows: Sequence["Row"], config: Config) -> Iterator[tuple[int, Measured]]:
    """Compile and time the rows below BAR again; yield their positions and the new measurements."""
    of = {row.name: row for row in rows}
    for i, first in enumerate(table):
        if first.below and not config.quick:
            (second,) = measure(of[first.row], [first.product], config)
            yield i, dataclasses.replace(second, first_ratio=first.ratio)


def differences(results: Mapping[str, Any], equal: float) -> list[str]:
    """Return notes on results that differ: stock JAX's if PyTorch agrees with jaxcnn's, otherwise jaxcnn's."""
    ours = results[OURS]
    distances = {name: distance(theirs, ours) for name, theirs in results.items() if name != OURS}
    differ = [name for name, d in distances.items() if not d <= equal]
    if not differ:
        return []
    if differ == [STOCK] and len(distances) > 1:
        return [f"{STOCK} differs by {distances[STOCK]:.1g}"]
    if differ == list(distances) or STOCK not in differ:
        return [f"{OURS} differs from {name} by {distances[name]:.1g}" for name in differ]
    return [f"{name} differs by {distances[name]:.1g}" for name in differ]


def distance(result: Any, expected: Any) -> float:
    """Return the relative L2 distance of two results, which are sequences of arrays; inf if shapes differ."""
    largest = 0.0
    for one, other in zip(result, expected, strict=True):
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if a.shape != b.shape:
            return float("inf")
        size = float(np.linalg.norm(b))
        d = float(np.linalg.norm(a - b))
        largest = max(largest, d / size if size else d) if np.isfinite(d) else float("inf")
    return largest


# ---------------------------------------------------------------------------------------------------------------------
# Contenders


@dataclasses.dataclass(frozen=True)
class Call:
    """A call to time, and its results in jaxcnn's layout."""

    run: Callable[[], Any]
    result: Callable[[], Sequence[Any]]
    #: The text of the compiled program, without names.
    program: Callable[[], str] | None = None


def program(jitted: Any, *arguments: Any) -> str:
    """Return the compiled HLO of a function, without source locations, with numbers instead of names."""
    text = jitted.lower(*arguments).compile().as_text()
    text = text[text.index("\n\n") :]  # the first lines contain the module's name and source files
    text = text[text.index("\n%") if "\n%" in text else text.index("\nENTRY") :]
    text = re.sub(r", metadata={[^}]*}", "", text)
    text = re.sub(r"(?<=[( ])[\w.\-]+(?=: )", "", text)  # parameter names
    numbers: dict[str, str] = {}
    return re.sub(r"%[\w.\-]+", lambda match: numbers.setdefault(match[0], f"%{len(numbers)}"), text)


def cotangent(shape: Sequence[int]) -> np.ndarray:
    """Return δ: normally distributed numbers."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def jax_call(f: Callable[..., Any], arguments: Mapping[str, np.ndarray], product: str) -> Call:
    """Return a jitted JAX call; δ is computed by `jax.vjp`, from the residuals of the forward pass."""
    import jax

    order = list(arguments)  # jit sorts the names of its arguments
    arguments = jax.device_put(dict(arguments))

    def positional(named: Any) -> Any:
        return f(*(named[name] for name in order))

    if product == FORWARD:
        forward = jax.jit(positional)
        return Call(lambda: forward(arguments), lambda: [forward(arguments)], lambda: program(forward, arguments))
    delta = jax.device_put(cotangent(jax.eval_shape(positional, arguments).shape))

    def vjp(arguments: Any, names: Sequence[str]) -> Any:
        return jax.vjp(lambda inner: positional({**arguments, **inner}), {name: arguments[name] for name in names})

    if product == BOTH:
        names = [name for name in order if name != "labels"]

        def both(arguments: Any, delta: Any) -> Any:
            y, pull = vjp(arguments, names)
            return y, pull(delta)[0]

        jitted = jax.jit(both)

        def result() -> Sequence[Any]:
            y, deltas = jitted(arguments, delta)
            return [y, *(deltas[name] for name in names)]

        return Call(lambda: jitted(arguments, delta), result, lambda: program(jitted, arguments, delta))
    _, pull = jax.jit(lambda arguments: vjp(arguments, [product.removeprefix("δ_")]))(arguments)
    back = jax.jit(lambda pull, delta: pull(delta)[0])
    return Call(lambda: back(pull, delta), lambda: list(back(pull, delta).values()), lambda: program(back, pull, delta))


def layouts(shape: Sequence[int]) -> list[str]:
    """Return PyTorch's memory formats for an input of this shape."""
    return [TORCH, f"{TORCH} channels-last"] if len(shape) in (4, 5) else [TORCH]


def torch_call(
    f: Callable[..., Any], arguments: Mapping[str, np.ndarray], layout: str, device: str, product: str
) -> Call:
    """Return a PyTorch call; δ is computed by autograd, from the residuals of the forward pass."""
    import torch

    target = torch.device("cuda" if device == "gpu" else "cpu")
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}

    def placed(name: str, a: np.ndarray) -> Any:
        tensor = torch.from_numpy(np.ascontiguousarray(to_torch(name, a))).to(target)
        if layout != TORCH and tensor.ndim in formats:
            tensor = tensor.to(memory_format=formats[tensor.ndim])
        return tensor

    def wait() -> None:
        if device == "gpu":
            torch.cuda.synchronize()

    tensors = {name: placed(name, a) for name, a in arguments.items()}

    def to_numpy(name: str, tensor: Any) -> np.ndarray:
        return from_torch(name, tensor.detach().cpu().numpy())

    def forward() -> Any:
        with torch.no_grad():
            y = f(*tensors.values())
        wait()
        return y

    if product == FORWARD:
        return Call(forward, lambda: [to_numpy("y", forward())])
    names = [n for n in tensors if n != "labels"] if product == BOTH else [product.removeprefix("δ_")]
    for name in names:
        tensors[name].requires_grad_()
    delta = placed("y", cotangent(to_numpy("y", forward()).shape))
    saved = None if product == BOTH else f(*tensors.values())

    def run() -> Any:
        y = f(*tensors.values()) if saved is None else saved
        deltas = torch.autograd.grad(y, [tensors[name] for name in names], delta, retain_graph=saved is not None)
        wait()
        return y, deltas

    def result() -> Sequence[Any]:
        y, tensors_of_delta = run()
        deltas = [to_numpy(name, a) for name, a in zip(names, tensors_of_delta, strict=True)]
        return [to_numpy("y", y), *deltas] if product == BOTH else deltas

    return Call(run, result)


def to_torch(name: str, a: np.ndarray) -> np.ndarray:
    """Convert to PyTorch's layout: channels first, and O and I first for a kernel."""
    if name == "w":
        return np.moveaxis(a, (-1, -2), (0, 1))
    return np.moveaxis(a, -1, 1) if name in ("x", "y") and a.ndim > 2 else a


def from_torch(name: str, a: np.ndarray) -> np.ndarray:
    """Convert from PyTorch's layout."""
    if name == "w":
        return np.moveaxis(a, (0, 1), (-1, -2))
    return np.moveaxis(a, 1, -1) if name in ("x", "y") and a.ndim > 2 else a


def require_torch(device: str) -> None:
    """Raise UsageError if PyTorch is not installed or does not support the device."""
    try:
        import torch
    except ImportError:
        hint = "pip install 'jaxcnn[bench]', or use --no-torch"
        raise UsageError(f"--torch: needs the package torch, which is not installed: {hint}") from None
    if device == "gpu" and not torch.cuda.is_available():
        hint = "install PyTorch with CUDA, or use --no-torch"
        raise bad_value(UsageError, "--device", "cpu for this build of PyTorch", "gpu", hint)


GEMM_SIZE = 2048


@functools.cache
def gemm() -> Callable[[], Any]:
    """Return a product of two large matrices, for the machine's GEMM rate."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (GEMM_SIZE, GEMM_SIZE))
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(a, a)


# ---------------------------------------------------------------------------------------------------------------------
# Output


def line(measured: Measured) -> str:
    """Return one row as text: the time of jaxcnn, the ratios of stock JAX and PyTorch, and notes."""
    from experiments.benchmarks.results import seconds

    stock = f"{measured.ratio:7.2f}×" if STOCK in measured.times else f"{'–':>8}"
    torch = f"{'–':>8}" if measured.torch_ratio is None else f"{measured.torch_ratio:7.2f}×"
    notes = [measured.note] if measured.note else []
    if measured.gemm_share is not None:
        notes.append(f"{measured.gemm_share:.0%} of the GEMM rate")
    if measured.same:
        notes.append("the same program as stock JAX's")
    if measured.first_ratio is not None:
        notes.append(f"{measured.first_ratio:.2f}× before")
    if measured.below:
        notes.append(f"below {BAR}")
    ours = seconds(measured.times[OURS].minimum)
    return f"{measured.name:66} {ours:>9}  stock{stock}  torch{torch}  {'; '.join(notes)}".rstrip()


def summary(rows: Iterable[Measured]) -> list[str]:
    """Return the geometric means and the smallest ratios."""
    from experiments.benchmarks.results import geometric_mean

    rows = list(rows)
    compared = [measured for measured in rows if measured.compared]
    texts = []
    if compared:
        distinct = [measured for measured in compared if not measured.same]
        same = [measured for measured in compared if measured.same]
        low = min(distinct or compared, key=lambda measured: measured.ratio)
        texts.append(
            f"stock JAX: geometric mean over {len(compared)} rows {geometric_mean(m.ratio for m in compared):.2f}×; "
            f"{len(same)} rows are the same program, {below(same)}; the minimum of the others is {low.ratio:.2f}× "
            f"({low.name}), and {below(distinct)}"
        )
    theirs = [(m.torch_ratio, m.name) for m in rows if m.torch_ratio is not None]
    if theirs:
        mean = geometric_mean(ratio for ratio, _ in theirs)
        texts.append(f"PyTorch: geometric mean over {len(theirs)} rows {mean:.2f}×, minimum {min(theirs)[0]:.2f}×")
        texts[-1] += f" ({min(theirs)[1]})"
    return texts + [f"{measured.name}: {measured.note}" for measured in rows if measured.note]


def below(rows: Sequence[Measured]) -> str:
    """Return how many rows are below BAR, and how many were before they were timed again."""
    text = f"{sum(measured.below for measured in rows)} of them are below {BAR}"
    before = sum(measured.first_ratio is not None for measured in rows)
    return f"{text} ({before} before they were timed again)" if before else text


def to_json(measured: Measured) -> dict[str, Any]:
    """Return a row in JSON form."""
    return {
        "row": measured.row,
        "product": measured.product,
        "seconds": dict(measured.times),
        "stock_ratio": measured.ratio if measured.compared else None,
        "first_stock_ratio": measured.first_ratio,
        "torch_ratio": measured.torch_ratio,
        "same_program": measured.same,
        "gemm_share": measured.gemm_share,
        "note": measured.note,
    }


def draw(path: Path, rows: Iterable[Measured]) -> None:
    """Draw a chart of the ratios."""
    from experiments.benchmarks import results

    compared = {measured.name: measured for measured in rows if measured.compared}
    if not compared:
        return
    torch = {name: m.torch_ratio for name, m in compared.items() if m.torch_ratio is not None}
    results.bars(
        path,
        "each op, forward and backward: bars stock JAX, dots the faster format of PyTorch",
        "time / jaxcnn's time (minima); jaxcnn is slower below 1",
        {name: measured.ratio for name, measured in compared.items()},
        dots={"PyTorch": torch} if torch else {},
        log=True,
    )


if __name__ == "__main__":
    sys.exit(main())
