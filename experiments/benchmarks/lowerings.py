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
from tyro.conf import FlagCreatePairsOff, Positional, arg

from experiments import cli
from experiments.errors import UsageError, bad_value

if TYPE_CHECKING:
    from experiments.benchmarks.drawn_rows import Drawn
    from experiments.benchmarks.nets import Timed
    from jaxcnn.kernels.cost import Product
    from jaxcnn.kernels.measured import Costs

PROG = "python -m experiments.benchmarks.lowerings"
SLOW = 8
"""Lowerings that take this many times as long as the fastest get no more than two turns."""
NUMBERS = 5
"""Largest number of costs of a lowering."""
KEEP = 4
"""How much adapted costs are kept: they minimize this · Σ log² of their factors / 2, plus a loss per product."""
FOLDS = 4
"""Parts of the products for cross-validation: the lowerings of each are chosen by costs fitted to the others."""
OUTLIER = 0.5
"""Distance of logarithms of times from which the loss grows linearly instead of quadratically."""
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
    nets: int = 0
    """Number of nets to draw; the products of their convolutions are timed."""
    seed: int = 0
    """Seed of the drawn convolutions and nets."""
    adapt: FlagCreatePairsOff[bool] = False
    """Fit factors of the costs with AVX-512, for which few times suffice, instead of costs."""
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
    #: Name of the processor's table of costs: "avx2" or "avx512".
    processor: str

    @property
    def least(self) -> float:
        """Seconds of the fastest lowering."""
        return min(self.seconds.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, measure_or_fit, argv, prog=PROG)


def measure_or_fit(config: Config) -> int:
    """Time the lowerings of drawn products, or fit costs to files. Return 0, or 130 after Ctrl-C."""
    for name in ("drawn", "nets"):
        if getattr(config, name) < 0:
            raise bad_value(UsageError, f"--{name}", "at least 0", getattr(config, name))
    cli.check_count("--drawn and --nets together", config.drawn + config.nets)
    cli.check_count("--rounds", config.rounds)
    os.environ["JAX_PLATFORMS"] = "cpu"

    from experiments.benchmarks import results

    results.check_out(config.out)
    if config.fit:
        print(fitted(read_all(config.fit), config.adapt))
        return 0
    from experiments.benchmarks import timing

    machine = timing.machine(("jax", "jaxlib"))
    drawn = f"{config.drawn} convolutions and {config.nets} nets drawn from seed {config.seed}"
    results.heading(machine, f"{drawn}; microseconds")
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
    """Yield the times of the lowerings of each product, whose results are compared first."""
    of_product = tables()
    for p in products(config):
        yield measure_product(p, of_product[p.name], config.rounds)


def products(config: Config) -> Iterator["Product"]:
    """Yield the products of the drawn convolutions, then those of the nets."""
    from experiments.benchmarks import drawn_nets, drawn_rows

    for one in drawn_rows.drawn(config.seed, config.drawn):
        if one.kind not in drawn_rows.POOLS:
            for name in tables():
                yield product_of(one, name)
    for number in range(config.nets):
        yield from products_of_net(drawn_nets.drawn(config.seed, number))


def products_of_net(timed: "Timed") -> Iterator["Product"]:
    """Yield the products of the convolutions of a net's training step."""
    from experiments.benchmarks import nets
    from jaxcnn import Conv, geometry
    from jaxcnn.geometry import Correlation
    from jaxcnn.kernels.cost import Product

    first = True
    for layer, (*shape, inputs) in nets.parts(timed.net, timed.shape):
        if not isinstance(layer, Conv):
            continue
        window = geometry.window("conv", tuple(shape), layer.kernel_size, stride=layer.stride, padding=layer.padding)
        c = Correlation(window, layer.groups, np.dtype(np.float32))
        for name in tables():
            if name != "input_grad" or not first:  # the gradient of the images is not computed
                yield Product(name, c, timed.batch, inputs, layer.features)
        first = False


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


def operands(p: "Product") -> list[tuple[int, ...]]:
    """Return the shapes of the two arrays that a product takes."""
    win = p.c.window
    shapes = {
        "x": (p.batch, *win.shape, p.inputs),
        "w": (*win.size, p.inputs // p.c.groups, p.outputs),
        "y": (p.batch, *win.out, p.outputs),
    }
    return [shapes[array] for array in {"correlate": "xw", "input_grad": "yw", "kernel_grad": "xy"}[p.name]]


def measure_product(p: "Product", table: Mapping[str, Any], rounds: int) -> Measured:
    """Time the lowerings of a product. Raise an error if their results differ."""
    import time

    import jax

    from experiments.benchmarks import timing
    from experiments.benchmarks.ops import EQUAL, distance
    from jaxcnn.kernels import measured, onednn
    from jaxcnn.kernels.cost import candidates
    from jaxcnn.native import library

    rng = np.random.default_rng(0)
    arrays = [jax.device_put(rng.standard_normal(shape, np.float32)) for shape in operands(p)]
    kernel = onednn.kernel_of(onednn.computed(p)) if library.is_enabled() else ""
    compiled, calls, first = {}, {}, None
    for name in [*(["onednn"] if kernel else []), *candidates(p)]:
        start = time.process_time()
        program = jax.jit(functools.partial(table[name], p.c)).lower(*arrays).compile()
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
    return Measured(p, kernel, times, compiled, measured.processor())


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
        "processor": measured.processor,
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
        yield Measured(p, row["kernel"], row["seconds"], row["compiled"], row["processor"])


def read_all(paths: Sequence[Path]) -> list[Measured]:
    """Return the products of all files, which must be from processors that share a table of costs."""
    table = [measured for path in paths for measured in read(path)]
    if len(processors := {measured.processor for measured in table}) > 1:
        raise bad_value(UsageError, "FIT", "times from one kind of processor", " and ".join(sorted(processors)))
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Fit

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
    if form.startswith("onednn gemm"):  # copies patches
        return (*arrays, "kernel", "patches", "multiply", "fours", "channels")
    if form.startswith("onednn"):
        return (*arrays, "kernel", "channels", "row", "sums", "depth")
    if form.startswith(("unrolled", "by_position")):
        vectors = "columns" if "columns" in form else "groups" if "groups" in form else "channels"
        return (*arrays, "multiply", vectors, *(("term", "looped") if "unrolled" in form else ("partial",)))
    if form.startswith(("patches", "products", "pointwise", "rows")):
        return (*arrays, "kernel", "patches", "multiply", "fours", "channels")
    return (*arrays, "kernel", "patches", "odd", "multiply", "fours", "channels")


def fit(table: Sequence[Measured], adapt: bool = False) -> "Costs":
    """Return costs that predict times: a few for each form, none negative. Forms that were not timed keep theirs.

    Args:
        table: Products and the times of their lowerings.
        adapt: Whether to keep the costs of `measured.AVX512` times factors, which differ as far as the times require
            it. Costs of forms that were not timed are multiplied by the median of the other forms' factors. New forms,
            and those with other kinds of work, are fitted.

    Returns:
        The costs.
    """
    from jaxcnn.kernels import cost, measured, onednn

    forms: dict[tuple[str, str], list[tuple[Product, str, float, float]]] = {}
    for one in table:
        candidates = {"onednn", *cost.candidates(one.product)}
        for name, seconds in one.seconds.items():
            if name not in candidates:  # it was one when the file was written
                continue
            p = onednn.computed(one.product) if name == "onednn" else one.product
            form = cost.form(p, name, one.kernel)
            if form != "onednn none":
                forms.setdefault((p.name, form), []).append((p, name, seconds, one.least))
    costs = {**(measured.AVX512 if adapt else measured.COSTS)}
    factors = []
    for key in sorted(forms, key=lambda key: (SPLIT.get(key[1], -1), *key)):
        use_costs(costs)  # of parts
        known = adapt and {*costs.get(key, {"new"})} <= {*kinds_of_work(key[1])}
        names = [*costs[key]] if known else kinds_of_work(key[1])
        amounts = [cost.work(p, name) for p, name, *_ in forms[key]]
        work = np.array([[of[kind] for kind in names] for of in amounts])
        times, least = (np.array([row[i] for row in forms[key]]) * 1e6 for i in (2, 3))
        weights = (least / times) ** 0.4
        if known:
            before = np.array([*costs[key].values()])
            found, spread = adapted(work, times, weights, before)
        else:
            found, spread = least_squares(work, times, weights, names)
        found *= math.exp(SPREAD_COST * spread**2) * (1 if key[1].startswith("onednn") else XLA_COST)
        if known:
            factors.append(np.median(found / before))
        costs[key] = rounded(dict(zip(names, found, strict=True)))
    for key in costs.keys() - forms.keys() if adapt else ():
        if key[1] not in SPLIT:  # whose costs are relative
            costs[key] = rounded({kind: n * np.median(factors) for kind, n in costs[key].items()})
    return costs


def rounded(costs: Mapping[str, float]) -> dict[str, float]:
    """Return the costs that are not nearly 0, with three digits."""
    return {kind: float(f"{n:.3g}") for kind, n in costs.items() if n > 1e-3}


def adapted(work: np.ndarray, times: np.ndarray, weights: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, float]:
    """Return costs near others, apart from a common factor, and the spread of the logarithms of times.

    The logarithms of times are fitted with the loss of `least_squares`, and those of the factors with squares.
    """
    from scipy import optimize

    common = np.exp(np.median(np.log(times / np.maximum(work @ before, 1e-9))))

    def distances(log_factors: np.ndarray) -> np.ndarray:
        x = common * before * np.exp(log_factors)
        return np.log(np.maximum(work @ x, 1e-9) / times)

    def loss(log_factors: np.ndarray) -> np.ndarray:
        distance = distances(log_factors) / OUTLIER
        soft_l1 = np.sign(distance) * OUTLIER * np.sqrt(2 * (np.sqrt(1 + weights * distance**2) - 1))
        return np.concatenate([soft_l1, math.sqrt(KEEP) * log_factors])

    found = optimize.least_squares(loss, np.zeros(len(before))).x
    spread = math.sqrt(np.average(distances(found) ** 2, weights=weights))
    return common * before * np.exp(found), spread


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
            distances,
            np.maximum(start, 1e-3),
            slopes,
            bounds=(0, np.inf),
            loss="soft_l1",
            f_scale=OUTLIER,
            max_nfev=100,
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


def fitted(table: Sequence[Measured], adapt: bool) -> str:
    """Return the source of the costs fitted to all products, and the results of cross-validation as comments."""
    from experiments.benchmarks.results import geometric_mean
    from jaxcnn.kernels import measured

    numbers = list(range(len(table)))
    random.Random(0).shuffle(numbers)
    ratios: dict[str, list[float]] = {}
    start = measured.COSTS
    for fold in range(FOLDS):
        use_costs(start)
        use_costs(fit([table[n] for i, n in enumerate(numbers) if i % FOLDS != fold], adapt))
        for one in (table[n] for i, n in enumerate(numbers) if i % FOLDS == fold):
            for what, ratio in chosen(one).items():
                ratios.setdefault(what, []).append(ratio)
    use_costs(start)
    costs = fit(table, adapt)
    spread = [
        f"# {what}: {geometric_mean(of):.3f}, 95 % of them at most {np.quantile(of, 0.95):.2f}"
        for what, of in sorted(ratios.items())
    ]
    lines = [f"    {key}: {of},".replace("'", '"') for key, of in sorted(costs.items())]
    about = f"# {len(table)} products; time of the chosen lowering / time of the fastest, geometric mean"
    use_costs(start)
    return "\n".join([about, *spread, f"{table[0].processor.upper()}: Costs = {{", *lines, "}"])


def use_costs(costs: "Costs") -> None:
    """Choose lowerings by other costs."""
    from jaxcnn.kernels import cost, measured

    measured.COSTS = costs
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
