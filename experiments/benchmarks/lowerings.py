"""Time the lowerings of drawn products, and fit the costs of `jaxcnn.kernels.measured` to the times.

python -m experiments.benchmarks.lowerings --help
"""

import dataclasses
import functools
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from experiments import cli
from experiments.errors import UsageError, bad_value

if TYPE_CHECKING:
    from experiments.benchmarks.drawn_rows import Drawn
    from jaxcnn.kernels.cost import Product

PROG = "python -m experiments.benchmarks.lowerings"
SLOW = 8
"""Lowerings that take this many times as long as the fastest get no more than two turns."""
NUMBERS = 5
"""Largest number of costs of a lowering."""
FOLDS = 4
"""Parts of the products for cross-validation: the lowerings of each are chosen by costs fitted to the others."""
XLA_COST = 1.15
"""Factor of lowerings in XLA: oneDNN's compile ten times as fast."""
SPREAD_COST = 0.3
"""The cost of a lowering is multiplied by exp(this · σ²), where σ is the spread of the logarithms of its times."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the lowerings of drawn products, or fit costs to files of times.

    Fitting prints the table of `jaxcnn/kernels/measured.py`, and how much longer than the fastest the chosen lowerings
    take: with and without oneDNN, for products that were left out of the fit.
    """

    fit: Positional[tuple[Path, ...]] = ()
    """Files of times, written with `--out`. Without files, products are timed."""
    drawn: int = 150
    """Number of convolutions to draw; each has three products."""
    seed: int = 0
    """Seed of the drawn convolutions."""
    rounds: int = 3
    """Number of rounds. In each round, every lowering has one turn."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for the times."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A product and the seconds of its lowerings."""

    product: "Product"
    #: oneDNN's kernel, as it is called for the product, or for the product with x and δ swapped.
    kernel: str
    seconds: Mapping[str, float]
    #: Seconds of compilation.
    compiled: Mapping[str, float]

    @property
    def least(self) -> float:
        """Seconds of the fastest lowering."""
        return min(self.seconds.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, measure_or_fit, argv, prog=PROG)


def measure_or_fit(config: Config) -> int:
    """Time the lowerings of drawn products, or fit costs to files. Return 0, or 130 after Ctrl-C."""
    cli.check_count("--drawn", config.drawn)
    cli.check_count("--rounds", config.rounds)
    os.environ["JAX_PLATFORMS"] = "cpu"

    from experiments.benchmarks import results

    results.check_out(config.out)
    if config.fit:
        print(fitted([measured for path in config.fit for measured in read(path)]))
        return 0
    from experiments.benchmarks import timing

    machine = timing.machine(("jax", "jaxlib"))
    results.heading(machine, f"{config.drawn} convolutions drawn from seed {config.seed}; microseconds")
    table: list[Measured] = []
    with results.until_stopped(lambda: table) as stopped:
        for measured in measure(config):
            print(line(measured), flush=True)
            table.append(measured)
    if config.out is not None:
        results.write(config.out, machine, config, rows=[to_json(measured) for measured in table])
    return stopped[0] if stopped else 0


# ---------------------------------------------------------------------------------------------------------------------
# Times


def measure(config: Config) -> Iterator[Measured]:
    """Yield the times of the lowerings of each drawn convolution's products, which are compared first."""
    from experiments.benchmarks.drawn_rows import POOLS, drawn

    for one in drawn(config.seed, config.drawn):
        if one.kind not in POOLS:
            for name, table in tables().items():
                yield measure_product(product_of(one, name), table, config.rounds)


def tables() -> dict[str, Mapping[str, Any]]:
    """Return the lowerings of each product."""
    from jaxcnn.kernels import correlate, input_grad, kernel_grad

    return {
        "correlate": correlate.CORRELATE,
        "input_grad": input_grad.INPUT_GRAD,
        "kernel_grad": kernel_grad.KERNEL_GRAD,
    }


def product_of(one: "Drawn", name: str) -> "Product":
    """Return a product of a drawn convolution; the image of a transposed one is its result."""
    from jaxcnn.geometry import Correlation, Window
    from jaxcnn.kernels.cost import Product

    batch, *shape, inputs = one.shape
    outputs, padding = one.features, one.padding
    if one.kind == "transposed":
        inputs, outputs, padding = outputs, inputs, min(padding, one.size - 1)
        shape = [(n - 1) * one.stride + one.size - 2 * padding for n in shape]
    ndim = len(shape)
    window = Window(
        tuple(shape), (one.size,) * ndim, (one.stride,) * ndim, ((padding, padding),) * ndim, (one.dilation,) * ndim
    )
    return Product(name, Correlation(window, one.groups, np.dtype(np.float32)), batch, inputs, outputs)


def measure_product(p: "Product", table: Mapping[str, Any], rounds: int) -> Measured:
    """Time the lowerings of a product. Raise an error if their results differ."""
    import time

    import jax

    from experiments.benchmarks import timing
    from experiments.benchmarks.ops import EQUAL, distance
    from jaxcnn.kernels import onednn
    from jaxcnn.kernels.cost import candidates
    from jaxcnn.native import library

    c, win = p.c, p.c.window
    shapes = {
        "x": (p.batch, *win.shape, p.inputs),
        "w": (*win.size, p.inputs // c.groups, p.outputs),
        "y": (p.batch, *win.out, p.outputs),
    }
    rng = np.random.default_rng(0)
    arrays = [
        jax.device_put(rng.standard_normal(shapes[array], np.float32))
        for array in {"correlate": "xw", "input_grad": "yw", "kernel_grad": "xy"}[p.name]
    ]
    kernel = onednn.kernel_of(onednn.computed(p)) if library.is_enabled() else ""
    compiled, calls, first = {}, {}, None
    for name in [*(["onednn"] if kernel else []), *candidates(p)]:
        start = time.process_time()
        program = jax.jit(functools.partial(table[name], c)).lower(*arrays).compile()
        compiled[name] = time.process_time() - start
        calls[name] = functools.partial(program, *arrays)
        found = calls[name]()
        first = found if first is None else first
        if not distance([found], [first]) <= EQUAL["cpu"]:
            raise RuntimeError(f"{p}: {name} differs from {next(iter(calls))}")
    # In the first calls, memory for the results is new, which may take ten times as long as the product.
    times = {name: times.minimum for name, times in timing.in_turns(calls, 2, most=0.03, calls=6).items()}
    near = {name: call for name, call in calls.items() if times[name] <= SLOW * min(times.values())}
    for name, more in timing.in_turns(near, rounds, calls=10).items():
        times[name] = min(times[name], more.minimum)
    return Measured(p, kernel, times, compiled)


def line(measured: Measured) -> str:
    """Return a product and the microseconds of its lowerings, the fastest first."""
    p, win = measured.product, measured.product.c.window
    geometry = {
        "stride": win.stride[0],
        "padding": win.padding[0][0],
        "dilation": win.dilation[0],
        "groups": p.c.groups,
    }
    words = [f"{name} {n}" for name, n in geometry.items() if n != (name != "padding")]
    sides = ("×".join(map(str, n)) for n in ((p.batch, *win.shape), win.size))
    times = sorted(measured.seconds.items(), key=lambda item: item[1])
    return f"{p.name} {' '.join([*sides, f'{p.inputs}→{p.outputs}', *words])}: " + ", ".join(
        f"{name} {seconds * 1e6:.0f}" for name, seconds in times
    )


def to_json(measured: Measured) -> dict[str, Any]:
    """Return a product and its times as JSON."""
    p, win = measured.product, measured.product.c.window
    return {
        "product": p.name,
        "window": dataclasses.asdict(win),
        "groups": p.c.groups,
        "batch": p.batch,
        "inputs": p.inputs,
        "outputs": p.outputs,
        "kernel": measured.kernel,
        "seconds": dict(measured.seconds),
        "compiled": dict(measured.compiled),
    }


def read(path: Path) -> Iterator[Measured]:
    """Yield the products of a file."""
    from jaxcnn.geometry import Correlation, Window
    from jaxcnn.kernels.cost import Product

    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise bad_value(UsageError, "FIT", f"files written with {PROG} --out", f"{path} ({error})") from None
    for row in rows:
        of = row["window"]
        pads = tuple((lo, hi) for lo, hi in of["padding"])
        window = Window(tuple(of["shape"]), tuple(of["size"]), tuple(of["stride"]), pads, tuple(of["dilation"]))
        c = Correlation(window, row["groups"], np.dtype(np.float32))
        p = Product(row["product"], c, row["batch"], row["inputs"], row["outputs"])
        yield Measured(p, row["kernel"], row["seconds"], row["compiled"])


# ---------------------------------------------------------------------------------------------------------------------
# Fit

Key = tuple[str, str]
Table = dict[Key, dict[str, float]]

MULTIPLICATIONS = ("multiply", "fours", "channels", "groups", "columns")
SPLIT = {"by_depth": 0, "by_group": 1, "joined": 2, "phases": 3}
"""Lowerings that split a product, in the order in which they are fitted: the parts of one may be split by another."""


def kinds_of_work(form: str) -> tuple[str, ...]:
    """Return the kinds of work that may have a cost in a form."""
    if form in SPLIT:
        return ("image", "result", "kernel", "patches", "parts", "part")
    arrays = ("call", "image", "result")
    if form == "onednn depthwise":
        return (*arrays, "groups", "row", "depth")
    if form.startswith("onednn"):
        return (*arrays, "kernel", "channels", "row", "sums", "depth")
    if form.startswith(("unrolled", "by_position")):
        vectors = "columns" if "columns" in form else "groups" if "groups" in form else "channels"
        return (*arrays, "multiply", vectors, *(("term", "looped") if "unrolled" in form else ("partial",)))
    if form.startswith(("patches", "products", "pointwise", "rows")):
        return (*arrays, "kernel", "patches", "multiply", "fours", "channels")
    return (*arrays, "kernel", "patches", "odd", "multiply", "fours", "channels")


def fit(table: Sequence[Measured]) -> Table:
    """Return costs that predict times: a few for each form, none negative. Forms that were not timed keep theirs."""
    from jaxcnn.kernels import cost, onednn
    from jaxcnn.kernels.measured import COSTS

    forms: dict[Key, list[tuple[Product, str, float, float]]] = {}
    for one in table:
        candidates = {"onednn", *cost.candidates(one.product)}
        for name, seconds in one.seconds.items():
            if name not in candidates:  # it was one when the file was written
                continue
            p = onednn.computed(one.product) if name == "onednn" else one.product
            forms.setdefault((p.name, cost.form(p, name, one.kernel)), []).append((p, name, seconds, one.least))
    costs: Table = {**COSTS}
    order = sorted(forms, key=lambda key: (SPLIT.get(key[1], -1), *key))
    for key in order:
        names = kinds_of_work(key[1])
        use_costs(costs)  # of parts
        amounts = [cost.work(p, name) for p, name, *_ in forms[key]]
        work = np.array([[of[kind] for kind in names] for of in amounts])
        times, least = (np.array([row[i] for row in forms[key]]) * 1e6 for i in (2, 3))
        found, spread = least_squares(work, times, (least / times) ** 0.4, names)
        factor = 1 if key[1].startswith("onednn") else XLA_COST
        factor *= math.exp(SPREAD_COST * spread**2)
        costs[key] = {kind: float(f"{n * factor:.3g}") for kind, n in zip(names, found, strict=True) if n > 1e-3}
    return costs


def least_squares(
    work: np.ndarray, times: np.ndarray, weights: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, float]:
    """Return costs per unit of work, and the spread of the logarithms of times.

    The costs minimize the distance of the logarithms of times, with a loss that outliers do not dominate. Costs are
    left out one by one, the least important first, until at most `NUMBERS` are left and each matters. One cost of
    multiplications or of parts is kept, so that predictions hold for larger products.
    """
    from scipy import optimize

    scale = 1 / np.maximum((work / times[:, None]).mean(0), 1e-30)
    roots = np.sqrt(weights)

    def solve(kept: Sequence[int]) -> tuple[float, np.ndarray]:
        a = work[:, kept] * scale[kept]
        start, _ = optimize.nnls(a / times[:, None] * roots[:, None], roots)

        def distances(x: np.ndarray) -> np.ndarray:
            return np.log(np.maximum(a @ x, 1e-9) / times) * roots

        def slopes(x: np.ndarray) -> np.ndarray:
            return a / np.maximum(a @ x, 1e-9)[:, None] * roots[:, None]

        found = optimize.least_squares(
            distances, np.maximum(start, 1e-3), slopes, bounds=(0, np.inf), loss="soft_l1", f_scale=0.5, max_nfev=100
        )
        return found.cost, found.x

    def is_kept(i: int) -> bool:
        of = [j for j in kept if names[j] in (*MULTIPLICATIONS, "parts")]
        return of == [i]

    kept = [i for i in range(len(names)) if (work[:, i] > 0).any()]
    loss, x = solve(kept)
    while True:
        large = [i for i, n in zip(kept, x, strict=True) if n > 2e-3 or is_kept(i)]
        if len(large) < len(kept):
            kept = large
            loss, x = solve(kept)
            continue
        without = [(*solve([j for j in kept if j != i]), i) for i in kept if not is_kept(i) and len(kept) > 1]
        if not without:
            break
        next_loss, next_x, i = min(without, key=lambda found: found[0])
        if len(kept) <= NUMBERS and next_loss > 1.01 * loss + 1e-4 * len(times):
            break
        kept, loss, x = [j for j in kept if j != i], next_loss, next_x
    costs = np.zeros(len(names))
    costs[kept] = x * scale[kept]
    errors = np.log(np.maximum(work @ costs, 1e-9) / times)
    return costs, float(np.sqrt(np.average(errors**2, weights=weights)))


def fitted(table: Sequence[Measured]) -> str:
    """Return the source of the costs fitted to all products, and the results of cross-validation as comments."""
    from experiments.benchmarks.results import geometric_mean

    numbers = list(range(len(table)))
    random.Random(0).shuffle(numbers)
    ratios: dict[str, list[float]] = {}
    for fold in range(FOLDS):
        use_costs(fit([table[n] for i, n in enumerate(numbers) if i % FOLDS != fold]))
        for one in (table[n] for i, n in enumerate(numbers) if i % FOLDS == fold):
            for what, ratio in chosen(one).items():
                ratios.setdefault(what, []).append(ratio)
    costs = fit(table)
    spread = [
        f"# {what}: {geometric_mean(of):.3f}, 95 % of them at most {np.quantile(of, 0.95):.2f}"
        for what, of in sorted(ratios.items())
    ]
    lines = [f"    {key}: {of},".replace("'", '"') for key, of in sorted(costs.items())]
    about = f"# {len(table)} products; time of the chosen lowering / time of the fastest, geometric mean"
    return "\n".join([about, *spread, "COSTS = {", *lines, "}"])


def use_costs(costs: Table) -> None:
    """Choose lowerings by other costs."""
    from jaxcnn.kernels import cost, measured

    measured.COSTS.clear()
    measured.COSTS.update(costs)
    cost.cheapest.cache_clear()
    cost.cost.cache_clear()


def chosen(one: Measured) -> dict[str, float]:
    """Return the time of the lowering with the smallest cost, in times of the fastest, with oneDNN and without."""
    from jaxcnn.kernels import cost, onednn

    p = one.product
    in_xla = {name: seconds for name, seconds in one.seconds.items() if name != "onednn"}
    name = min(in_xla, key=lambda name: cost.cost(p, name))
    found = {f"{p.name} without oneDNN": in_xla[name] / min(in_xla.values())}
    if "onednn" in one.seconds:
        native = cost.cost(onednn.computed(p), "onednn", one.kernel) < cost.cost(p, name)
        found[f"{p.name} with oneDNN"] = (one.seconds["onednn"] if native else in_xla[name]) / one.least
    return found


if __name__ == "__main__":
    raise SystemExit(main())
