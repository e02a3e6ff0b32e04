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
from experiments.errors import UsageError

if TYPE_CHECKING:
    from experiments.benchmarks.rows import Row
    from experiments.benchmarks.timing import Times

PROG = "python -m experiments.benchmarks.ops"
FORWARD, BOTH = "forward", "both halves"
OURS, STOCK, TORCH, GEMM = "jaxcnn", "stock JAX", "torch", "GEMM"

#: Relative L2 distance up to which results are equal.
EQUAL = {"cpu": 1e-4, "gpu": 1e-2}
"""float32 rounds to 1e-6; GPUs multiply in TF32 unless told otherwise, whoever asks."""
BAR = 0.95


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the forward pass and each δ of every op in jaxcnn, in stock JAX with autodiff, and in PyTorch, alternately.

    Results are compared before anything is timed. A row is "forward" (y only), the δ of one argument (from the
    residuals of the forward pass), or, if the rule needs more than the arguments, "both halves" (forward and backward
    pass) in one program.
    """

    only: str = ""
    """Rows whose name holds this, such as "depthwise" or "δ_w"."""
    rounds: int = 5
    """How often each contender takes its turn."""
    device: str = "cpu"
    """cpu or gpu."""
    torch: bool = True
    """Whether PyTorch takes part."""
    quick: FlagCreatePairsOff[bool] = False
    """Two pictures and one round, to see that all of it runs; the numbers mean nothing."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """A file for all numbers, as JSON; a bar chart of the ratios goes beside it."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row: the times of each contender, and the outcome of comparing their results."""

    row: str
    product: str
    times: Mapping[str, "Times"]
    note: str = ""
    #: Whether XLA compiled ours and stock JAX's to the same program; a ratio other than 1 is then noise.
    same: bool = False
    #: Share of the GEMM rate measured between the turns of this row.
    gemm_share: float | None = None

    @property
    def name(self) -> str:
        """Name of the op and the product."""
        return f"{self.row}, {self.product}"

    @property
    def compared(self) -> bool:
        """Whether the ratio to stock JAX is meaningful: stock JAX has the op and computes the same result."""
        return STOCK in self.times and STOCK not in self.note

    @property
    def below(self) -> bool:
        """Whether stock JAX is faster by more than the threshold, and not because of noise."""
        return self.compared and not self.same and self.ratio < BAR

    @property
    def ratio(self) -> float:
        """Time of stock JAX divided by ours (minima)."""
        return self.times[STOCK].minimum / self.times[OURS].minimum

    @property
    def torch_ratio(self) -> float | None:
        """Time of PyTorch's faster form divided by ours (minima)."""
        theirs = [t.minimum for name, t in self.times.items() if name.startswith(TORCH)]
        return min(theirs) / self.times[OURS].minimum if theirs else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Compare and time all rows, and print them as they finish. Returns 1 if a result of jaxcnn is wrong, else 0."""
    cli.check_count("--rounds", config.rounds)
    cli.check_choice("--device", config.device, EQUAL)
    os.environ["JAX_PLATFORMS"] = "cuda" if config.device == "gpu" else "cpu"

    from experiments.benchmarks import results, timing
    from experiments.benchmarks.rows import rows

    results.check_out(config.out)
    chosen = [(row, wanted) for row in rows() if (wanted := products(row, config.only))]
    if not chosen:
        raise UsageError(f"--only: expected a part of a row's name, got {config.only!r}")
    if config.torch:
        require_torch(config.device)
    machine = timing.machine(("jax", "jaxlib"), others=("torch",))
    title = f"each op, {config.rounds} rounds of turns, {config.device}; minima, and how many times as long others take"
    results.heading(machine, title)
    found: list[Measured] = []
    with results.until_interrupted(lambda: found) as interrupted:
        for row, wanted in chosen:
            for measured in measure(row, wanted, config):
                print(line(measured), flush=True)
                found.append(measured)
    for text in summary(found):
        print(text)
    if config.out is not None:
        results.write(config.out, machine, config, rows=[plain(measured) for measured in found])
        draw(config.out.with_suffix(".png"), found)
    wrong = any(OURS in measured.note for measured in found)
    return 1 if wrong else interrupted[0] if interrupted else 0


def products(row: "Row", only: str = "") -> list[str]:
    """Return the products to time for a row: forward, each δ, both halves, if the name contains `only`."""
    everything = [FORWARD, *(f"δ_{name}" for name in row.differentiable), *([BOTH] if row.together else [])]
    return [product for product in everything if only in f"{row.name}, {product}"]


def measure(row: "Row", wanted: Sequence[str], config: Config) -> Iterator[Measured]:
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
    for product in wanted:
        timed: dict[str, Callable[[], Any]] = {}
        found: dict[str, Any] = {}
        programs: dict[str, Callable[[], str]] = {}
        notes = []
        for name, build in contenders.items():
            if name.startswith(TORCH) and product in row.torch_crashes:
                notes.append(f"{name} crashes")
                continue
            try:
                call = build(product)
                found[name] = call.result()
                timed[name] = call.run
                if call.program is not None:
                    programs[name] = call.program
            except NotImplementedError:
                if name == OURS:
                    raise
                notes.append(f"{name} cannot")
        notes += judged(found, max(EQUAL[config.device], row.equal))
        if row.flops is not None and not config.quick:
            timed[GEMM] = gemm()
        rounds, most, calls_a_turn = (1, 0.0, 1) if config.quick else (config.rounds, 0.1, 10)
        times = timing.in_turns(timed, rounds, most=most, calls=calls_a_turn)
        share = None
        if row.flops is not None and GEMM in times:
            share = (row.flops / times[OURS].minimum) / (2 * GEMM_SIZE**3 / times[GEMM].minimum)
        same = STOCK in programs and programs[OURS]() == programs[STOCK]()
        yield Measured(row.name, product, times, "; ".join(notes), same, share)


def judged(results: Mapping[str, Any], equal: float) -> list[str]:
    """Return whose results differ: stock JAX's if PyTorch agrees with ours, ours if others agree or none is near."""
    ours = results[OURS]
    apart = {name: distance(theirs, ours) for name, theirs in results.items() if name != OURS}
    differ = [name for name, d in apart.items() if not d <= equal]
    if not differ:
        return []
    if differ == [STOCK] and len(apart) > 1:
        return [f"{STOCK} differs by {apart[STOCK]:.1g}"]
    if differ == list(apart) or STOCK not in differ:
        return [f"{OURS} differs from {name} by {apart[name]:.1g}" for name in differ]
    return [f"{name} differs by {apart[name]:.1g}" for name in differ]


def distance(found: Any, expected: Any) -> float:
    """Return the relative L2 distance of two results (arrays or sequences of them); inf if shapes differ."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if a.shape != b.shape:
            return float("inf")
        size = float(np.linalg.norm(b))
        apart = float(np.linalg.norm(a - b))
        worst = max(worst, apart / size if size else apart) if np.isfinite(apart) else float("inf")
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Contenders


@dataclasses.dataclass(frozen=True)
class Call:
    """A call to time, and its results as arrays in jaxcnn's layout."""

    run: Callable[[], Any]
    result: Callable[[], Sequence[Any]]
    #: The compiled program, without names.
    program: Callable[[], str] | None = None


def program(jitted: Any, *arguments: Any) -> str:
    """Return the compiled HLO of a function, without source locations and with its parts numbered instead of named."""
    text = jitted.lower(*arguments).compile().as_text()
    text = text[text.index("\n\n") :]  # the first lines contain the module's name and source files
    text = text[text.index("\n%") if "\n%" in text else text.index("\nENTRY") :]
    text = re.sub(r", metadata={[^}]*}", "", text)
    text = re.sub(r"(?<=[( ])[\w.\-]+(?=: )", "", text)  # parameter names
    numbers: dict[str, str] = {}
    return re.sub(r"%[\w.\-]+", lambda found: numbers.setdefault(found[0], f"%{len(numbers)}"), text)


def cotangent(shape: Sequence[int]) -> np.ndarray:
    """Return noise."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def jax_call(f: Callable[..., Any], arguments: Mapping[str, np.ndarray], product: str) -> Call:
    """Return a jit-compiled JAX call; δ is that of `jax.vjp`, from the residuals of its forward pass."""
    import jax

    order = list(arguments)  # jit sorts the names of its arguments
    arguments = jax.device_put(dict(arguments))

    def positional(named: Any) -> Any:
        return f(*(named[name] for name in order))

    if product == FORWARD:
        forward = jax.jit(positional)
        return Call(lambda: forward(arguments), lambda: [forward(arguments)], lambda: program(forward, arguments))
    delta = jax.device_put(cotangent(jax.eval_shape(positional, arguments).shape))

    def halves(arguments: Any, of: Sequence[str]) -> Any:
        return jax.vjp(lambda inner: positional({**arguments, **inner}), {name: arguments[name] for name in of})

    if product == BOTH:
        of = [name for name in order if name != "labels"]

        def both(arguments: Any, delta: Any) -> Any:
            y, pull = halves(arguments, of)
            return y, pull(delta)[0]

        jitted = jax.jit(both)

        def result() -> Sequence[Any]:
            y, found = jitted(arguments, delta)
            return [y, *(found[name] for name in of)]

        return Call(lambda: jitted(arguments, delta), result, lambda: program(jitted, arguments, delta))
    _, pull = jax.jit(lambda arguments: halves(arguments, [product.removeprefix("δ_")]))(arguments)
    back = jax.jit(lambda pull, delta: pull(delta)[0])
    return Call(lambda: back(pull, delta), lambda: list(back(pull, delta).values()), lambda: program(back, pull, delta))


def layouts(shape: Sequence[int]) -> list[str]:
    """Return the memory formats that PyTorch has for an input of this shape."""
    return [TORCH, f"{TORCH} channels-last"] if len(shape) in (4, 5) else [TORCH]


def torch_call(
    f: Callable[..., Any], arguments: Mapping[str, np.ndarray], layout: str, device: str, product: str
) -> Call:
    """Return a PyTorch call; δ is computed by autograd, from the residuals of the forward pass."""
    import torch

    where = torch.device("cuda" if device == "gpu" else "cpu")
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}

    def placed(name: str, a: np.ndarray) -> Any:
        tensor = torch.from_numpy(np.ascontiguousarray(to_torch(name, a))).to(where)
        if layout != TORCH and tensor.ndim in formats:
            tensor = tensor.to(memory_format=formats[tensor.ndim])
        return tensor

    def wait() -> None:
        if device == "gpu":
            torch.cuda.synchronize()

    there = {name: placed(name, a) for name, a in arguments.items()}

    def plain(name: str, tensor: Any) -> np.ndarray:
        return from_torch(name, tensor.detach().cpu().numpy())

    def forward() -> Any:
        with torch.no_grad():
            y = f(*there.values())
        wait()
        return y

    if product == FORWARD:
        return Call(forward, lambda: [plain("y", forward())])
    of = [n for n in there if n != "labels"] if product == BOTH else [product.removeprefix("δ_")]
    for name in of:
        there[name].requires_grad_()
    delta = placed("y", cotangent(plain("y", forward()).shape))
    kept = None if product == BOTH else f(*there.values())

    def run() -> Any:
        y = f(*there.values()) if kept is None else kept
        found = torch.autograd.grad(y, [there[name] for name in of], delta, retain_graph=kept is not None)
        wait()
        return y, found

    def result() -> Sequence[Any]:
        y, found = run()
        deltas = [plain(name, a) for name, a in zip(of, found, strict=True)]
        return [plain("y", y), *deltas] if product == BOTH else deltas

    return Call(run, result)


def to_torch(name: str, a: np.ndarray) -> np.ndarray:
    """Convert to PyTorch's layout: channels first; for a kernel, O and I first."""
    if name == "weight":
        return np.moveaxis(a, (-1, -2), (0, 1))
    return np.moveaxis(a, -1, 1) if name in ("x", "y") and a.ndim > 2 else a


def from_torch(name: str, a: np.ndarray) -> np.ndarray:
    """Convert from PyTorch's layout."""
    if name == "weight":
        return np.moveaxis(a, (0, 1), (-1, -2))
    return np.moveaxis(a, 1, -1) if name in ("x", "y") and a.ndim > 2 else a


def require_torch(device: str) -> None:
    """Raise UsageError if PyTorch is not installed, or not available on this device."""
    try:
        import torch
    except ImportError:
        raise UsageError("--torch: expected PyTorch: pip install 'jaxcnn[bench]', or --no-torch") from None
    if device == "gpu" and not torch.cuda.is_available():
        raise UsageError("--device gpu: expected a PyTorch with CUDA, or --no-torch")


GEMM_SIZE = 2048


@functools.cache
def gemm() -> Callable[[], Any]:
    """Return the product of two large matrices, which measures the machine's GEMM rate."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (GEMM_SIZE, GEMM_SIZE))
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(a, a)


# ---------------------------------------------------------------------------------------------------------------------
# Output


def line(measured: Measured) -> str:
    """Return one row as text: our time, the ratios of stock JAX and PyTorch, and remarks."""
    from experiments.benchmarks.results import seconds

    stock = f"{measured.ratio:7.2f}×" if STOCK in measured.times else f"{'–':>8}"
    torch = f"{'–':>8}" if measured.torch_ratio is None else f"{measured.torch_ratio:7.2f}×"
    said = [measured.note] if measured.note else []
    if measured.gemm_share is not None:
        said.append(f"{measured.gemm_share:.0%} of the GEMM rate")
    if measured.same:
        said.append("the same program as stock JAX's")
    if measured.below:
        said.append(f"below {BAR}")
    ours = seconds(measured.times[OURS].minimum)
    return f"{measured.name:66} {ours:>9}  stock{stock}  torch{torch}  {'; '.join(said)}".rstrip()


def summary(found: Iterable[Measured]) -> list[str]:
    """Return the means over rows, and the smallest ratio."""
    from experiments.benchmarks.results import geometric_mean

    found = list(found)
    compared = [measured for measured in found if measured.compared]
    texts = []
    if compared:
        own = [measured for measured in compared if not measured.same]
        low = min(own or compared, key=lambda measured: measured.ratio)
        below = sum(measured.below for measured in compared)
        texts.append(
            f"stock JAX: geometric mean over {len(compared)} rows {geometric_mean(m.ratio for m in compared):.2f}×; "
            f"{len(compared) - len(own)} rows are the same program; of the others the minimum is {low.ratio:.2f}× "
            f"({low.name}), and {below} are below {BAR}"
        )
    theirs = [(m.torch_ratio, m.name) for m in found if m.torch_ratio is not None]
    if theirs:
        mean = geometric_mean(ratio for ratio, _ in theirs)
        texts.append(f"PyTorch: geometric mean over {len(theirs)} rows {mean:.2f}×, minimum {min(theirs)[0]:.2f}×")
        texts[-1] += f" ({min(theirs)[1]})"
    return texts + [f"{measured.name}: {measured.note}" for measured in found if measured.note]


def plain(measured: Measured) -> dict[str, Any]:
    """Return a row in JSON form."""
    return {
        "row": measured.row,
        "product": measured.product,
        "seconds": dict(measured.times),
        "stock_ratio": measured.ratio if measured.compared else None,
        "torch_ratio": measured.torch_ratio,
        "same_program": measured.same,
        "gemm_share": measured.gemm_share,
        "note": measured.note,
    }


def draw(path: Path, found: Iterable[Measured]) -> None:
    """Draw the ratios as a chart."""
    from experiments.benchmarks import results

    compared = {measured.name: measured for measured in found if measured.compared}
    if not compared:
        return
    torch = {name: m.torch_ratio for name, m in compared.items() if m.torch_ratio is not None}
    results.bars(
        path,
        "each op, forward and backward: bars against stock JAX, dots against the better form of PyTorch",
        "time of the other, as a multiple of jaxcnn's (minima); to the left of 1 jaxcnn is slower",
        {name: measured.ratio for name, measured in compared.items()},
        dots={"PyTorch": torch} if torch else {},
        log=True,
    )


if __name__ == "__main__":
    sys.exit(main())
