"""Compare nets of other libraries with their explicit form: python -m experiments.zoo --help."""

import dataclasses
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli
from experiments.errors import RunError, check_packages, explain

if TYPE_CHECKING:
    from experiments.benchmarks.timing import Times

PROG = "python -m experiments.zoo"
STOCK, OURS = "stock JAX", "explicit"
MODES = ("training", "evaluation")
PAUSE = 0.3
"""Seconds before each turn, in which the threads of the other process stop spinning."""
EQUAL = {"float64": 1e-10, "float32": 1e-5}
"""Relative distance up to which results are equal: the largest of all parameters, and their median."""
ZERO = 1e-6
"""Distances are relative to the norm of a parameter's gradient, or to this part of the norm of all gradients if that is
larger: the gradient of a bias before batch norm is 0, and all that is computed of it are rounding errors. The same
holds for the new state, such as means of channels whose mean is 0."""
ROUNDING, BATCHES = 2.0, 20
"""Results in float32 that differ by more are equal up to rounding if those of the explicit form are at most this many
times as far from float64 as those of stock JAX. The smallest distances of some batches are compared, because rounding
moves an activation to the other side of its edge in some batches only."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Time jax.value_and_grad of nets in Keras, Haiku, Flax and Equinox, in stock JAX and through jaxcnn.explicit.

    Each form of each net has its own process, and they take turns. Weights are random. The compilation cache is off.
    """

    nets: tuple[str, ...] = ("all",)
    """Nets, such as MobileNetV2 linen; all for all of them."""
    rounds: int = 3
    """Number of rounds. In each round, both forms have one turn in each mode."""
    batch_size: int = 8
    """Images per step."""
    modes: tuple[str, ...] = MODES
    """Modes of the net: training, evaluation."""
    check: FlagCreatePairsOff[bool] = False
    """Compare outputs and gradients in float64 and float32, and time nothing. If float32 gradients differ, compare both
    forms with float64."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; a bar chart of the ratios is written next to it."""


@dataclasses.dataclass(frozen=True)
class Built:
    """Measurements of the first build of a step in one process."""

    #: Seconds until the first result, imports and weights excluded: of the clock, and of all cores.
    first: float
    first_cpu: float
    #: Parts of ``first``.
    trace: float
    compile: float
    temporary_bytes: int
    #: Operations that the library computes, operations that JAX computes, and all other equations.
    operations: tuple[int, int, int] | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Compare or time the nets. Return 0, 1 if a result differs, or 130 after Ctrl-C."""
    names = check_config(config)

    from experiments.benchmarks import results, timing

    machine = timing.machine(("jax", "jaxlib"), others=("keras", "flax", "dm-haiku", "equinox"))
    if config.check:
        results.heading(machine, f"outputs and gradients compared with stock JAX, batch {config.batch_size}")
        return check(config, names, machine)
    results.heading(machine, f"jax.value_and_grad, batch {config.batch_size}, {config.rounds} rounds")
    rows: list[dict[str, Any]] = []
    failed = []
    with results.until_stopped(lambda: rows) as stopped:
        for name, mode in itertools.product(names, config.modes):
            try:
                rows.append(measure(name, mode, config))
            except RunError as error:
                failed.append(f"{name}, {mode}")
                print(error, flush=True)
            else:
                print(line(rows[-1]), flush=True)
    report(config, machine, rows)
    if failed:
        print(f"without a result: {'; '.join(failed)}")
    return stopped[0] if stopped else int(bool(failed))


def check_config(config: Config) -> list[str]:
    """Return the names of the nets; raise UsageError for an invalid option."""
    from experiments.benchmarks import results
    from experiments.zoo_nets import NETS

    for flag, number in (("--rounds", config.rounds), ("--batch-size", config.batch_size)):
        cli.check_count(flag, number)
    for name in config.nets:
        cli.check_choice("--nets", name, ["all", *NETS])
    for mode in config.modes:
        cli.check_choice("--modes", mode, MODES)
    results.check_out(config.out)
    check_packages("zoo")
    return list(NETS) if "all" in config.nets else list(dict.fromkeys(config.nets))


def measure(name: str, mode: str, config: Config) -> dict[str, Any]:
    """Return the numbers of one net in one mode."""
    from experiments.benchmarks.timing import Times

    steps: dict[str, Process] = {}
    try:
        built = {}
        for form in (STOCK, OURS):  # one after another, because the time to the first result is measured as well
            steps[form] = Process("step", name, form, mode, str(config.batch_size))
            answer = steps[form].answer()
            built[form] = Built(**answer)
        seconds: dict[str, list[float]] = {form: [] for form in steps}
        for i in range(config.rounds):
            for form in list(steps)[:: 1 if i % 2 == 0 else -1]:
                seconds[form] += steps[form].turn()
    finally:
        for step in steps.values():
            step.stop()
    return {
        "net": name,
        "mode": mode,
        "seconds": {form: Times(tuple(s)) for form, s in seconds.items()},
        "built": built,
    }


def ratio(row: Mapping[str, Any]) -> float:
    """Return the time of stock JAX / the time of the explicit form (minima)."""
    times: Mapping[str, Times] = row["seconds"]
    return times[STOCK].minimum / times[OURS].minimum


def first_ratio(row: Mapping[str, Any]) -> float:
    """Return the processor time to the first result, of the explicit form / of stock JAX."""
    built: Mapping[str, Built] = row["built"]
    return built[OURS].first_cpu / built[STOCK].first_cpu


COLUMNS = (
    "net", "stock JAX", "explicit", "ratio", "medians", "temporary MB", "first result, s", "CPU s", "ratio",
    "replaced, in JAX, other",
)  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return one row of the table."""
    from experiments.benchmarks import results

    times, built = row["seconds"], row["built"]
    stock, ours = built[STOCK], built[OURS]
    return [
        f"{row['net']}, {row['mode']}",
        results.seconds(times[STOCK].minimum),
        results.seconds(times[OURS].minimum),
        f"{ratio(row):.2f}",
        f"{times[STOCK].median / times[OURS].median:.2f}",
        f"{stock.temporary_bytes / 1e6:.0f} → {ours.temporary_bytes / 1e6:.0f}",
        f"{stock.first:.1f} → {ours.first:.1f}",
        f"{stock.first_cpu:.1f} → {ours.first_cpu:.1f}",
        f"{first_ratio(row):.2f}",
        ", ".join(map(str, ours.operations or ())),
    ]


def line(row: Mapping[str, Any]) -> str:
    """Return one row as text, for a run that is in progress."""
    return "  ".join(cells(row))


def report(config: Config, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table and its summary; write the numbers and a chart if `--out` is given."""
    from experiments.benchmarks import results

    results.table(COLUMNS, map(cells, rows))
    print("times and their first ratio: minima; the ratio of first results is that of CPU seconds")
    for mode in config.modes:
        ratios = {row["net"]: ratio(row) for row in rows if row["mode"] == mode}
        if ratios:
            slowest = min(ratios, key=lambda name: ratios[name])
            mean = results.geometric_mean(ratios.values())
            print(f"{mode}: geometric mean {mean:.2f}, least {ratios[slowest]:.2f} ({slowest})")
    late = [f"{row['net']}, {row['mode']} ({first_ratio(row):.2f})" for row in rows if first_ratio(row) > 1.3]
    print(f"first result later than 1.3 times stock JAX: {'; '.join(late) or 'none'}")
    if config.out is not None:
        results.write(config.out, machine, config, rows=rows)
        bars = {f"{row['net']}, {row['mode']}": ratio(row) for row in rows}
        results.bars(config.out.with_suffix(".png"), "nets of other libraries", "stock JAX / explicit", bars, log=True)


def check(config: Config, names: Sequence[str], machine: Mapping[str, Any]) -> int:
    """Compare the results of each net with those of stock JAX, each dtype in its own process."""
    from experiments.benchmarks import results

    rows: list[dict[str, Any]] = []
    wrong = []
    with results.until_stopped(lambda: rows) as stopped:
        for name, mode, dtype in itertools.product(names, config.modes, EQUAL):
            what = f"{name}, {mode}, {dtype}"
            try:
                rows.append({"net": name, "mode": mode, "dtype": dtype, **compared(name, mode, dtype, config)})
            except RunError as error:
                wrong.append(what)
                print(error, flush=True)
            else:
                text, right = verdict(rows[-1])
                print(f"{what}: {text}{'' if right else '  DIFFERS'}", flush=True)
                if not right:
                    wrong.append(what)
    print(f"{len(rows)} comparisons, {len(wrong)} differ or failed: {'; '.join(wrong) or 'none'}")
    if config.out is not None:
        results.write(config.out, machine, config, rows=rows)
    return stopped[0] if stopped else int(bool(wrong))


def compared(name: str, mode: str, dtype: str, config: Config) -> dict[str, Any]:
    """Return the distances of one net, and if its float32 gradients differ, those from its float64 gradients."""

    def answer(kind: str) -> dict[str, Any]:
        process = Process("check", name, kind, mode, str(config.batch_size))
        try:
            return process.answer()
        finally:
            process.stop()

    row = answer(dtype)
    if dtype == "float32" and max(row["median"], row["loss"]) > EQUAL[dtype]:
        row |= answer("rounding")
    return row


def verdict(row: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the distances of a row as text, and whether they are small enough."""
    bar = EQUAL[row["dtype"]]
    number = row["largest"] if row["dtype"] == "float64" else row["median"]
    text = (
        f"loss {row['loss']:.1e}, gradients median {row['median']:.1e}, largest {row['largest']:.1e} "
        f"({row['parameter']})"
    )
    right = max(number, row["loss"]) <= bar
    if "rounding" in row:
        stock, ours = row["rounding"][STOCK], row["rounding"][OURS]
        text += "; from float64: " + ", ".join(
            f"{part} {stock[part]:.1e} in {STOCK}, {ours[part]:.1e} in {OURS}" for part in stock
        )
        right = all(ours[part] <= max(bar, ROUNDING * stock[part]) for part in stock)
    elif row["dtype"] == "float32" and row["largest"] >= 1e-3:
        text += "; a ReLU or maximum is on its edge"
    return text, right


# ---------------------------------------------------------------------------------------------------------------------
# The process of one form


class Process:
    """A process of this script, which answers in lines of JSON."""

    def __init__(self, *arguments: str) -> None:
        self.name = " ".join(arguments[1:-1])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.zoo", "--process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
            process_group=0,  # only the script receives Ctrl-C, and it ends its processes
        )

    def answer(self) -> dict[str, Any]:
        """Return the next answer; raise RunError if it is an error."""
        assert self._process.stdout is not None  # it is a pipe
        text = self._process.stdout.readline()
        if not text:
            raise RunError(f"{self.name}: its process ended with status {self._process.wait()}")
        answer = json.loads(text)
        if "error" in answer:
            raise RunError(f"{self.name}: {answer['error']}")
        return answer

    def turn(self) -> list[float]:
        """Return the seconds of the steps of one turn."""
        time.sleep(PAUSE)
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()["seconds"]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def run_process(what: str, name: str, kind: str, mode: str, batch_size: str) -> None:
    """Answer on stdout: once for a check, and after each line of stdin for a step."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of the libraries goes to stderr

    def send(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        if what == "check":
            import jax

            jax.config.update("jax_enable_x64", kind != "float32")
            if kind == "rounding":
                send(rounding=rounding(name, mode == "training", int(batch_size)))
            else:
                send(**differences(name, kind, mode == "training", int(batch_size)))
            return
        built, run = build(name, kind, mode == "training", int(batch_size))
    except Exception as error:
        if (text := explain(error)) is None:
            raise
        send(error=text)
        return
    send(**dataclasses.asdict(built))
    for _ in sys.stdin:
        run()
        seconds: list[float] = []
        while len(seconds) < 5 and (len(seconds) < 2 or sum(seconds) < 1):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        send(seconds=seconds)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def build(name: str, form: str, training: bool, batch_size: int) -> tuple[Built, Any]:
    """Return the measurements of the first call of `jax.value_and_grad`, and a function that calls it again."""
    import functools

    import jax

    import jaxcnn
    from experiments.zoo_nets import NETS

    net = NETS[name]("float32")
    x, labels = net.batch(batch_size, "float32")
    arguments = (net.params, net.state, x, labels)
    loss = functools.partial(net.loss, training)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(x))  # starts the compiler
    function = jaxcnn.explicit(loss) if form == OURS else loss
    began, began_cpu = time.perf_counter(), _cpu()
    lowered = jax.jit(jax.value_and_grad(function, has_aux=True)).lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    made = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    memory = compiled.memory_analysis()
    built = Built(
        first=time.perf_counter() - began,
        first_cpu=_cpu() - began_cpu,
        trace=traced - began,
        compile=made - traced,
        temporary_bytes=memory.temp_size_in_bytes if memory is not None else 0,
    )
    if form == OURS:
        rows = jaxcnn.operations(loss)(*arguments).rows
        replaced, recognized = sum(row.replaced for row in rows), sum(row.recognized for row in rows)
        built = dataclasses.replace(built, operations=(replaced, recognized - replaced, len(rows) - recognized))
    return built, lambda: jax.block_until_ready(compiled(*arguments))


def differences(name: str, dtype: str, training: bool, batch_size: int) -> dict[str, Any]:
    """Return relative distances of the explicit form's loss, new state and gradients from stock JAX's."""
    import functools

    import jax

    import jaxcnn
    from experiments.zoo_nets import NETS

    net = NETS[name](dtype)
    arguments = (net.params, net.state, *net.batch(batch_size, dtype))
    loss = functools.partial(net.loss, training)
    forms = (loss, jaxcnn.explicit(loss))
    expected, found = (jax.jit(jax.value_and_grad(form, has_aux=True))(*arguments) for form in forms)
    (values, gradients), (found_values, found_gradients) = expected, found
    leaves, _ = jax.tree.flatten_with_path(gradients)
    of_gradients = distances(found_gradients, gradients)
    worst = max(range(len(leaves)), key=lambda i: of_gradients[i])
    return {
        "loss": max(distances(found_values, values)),
        "median": statistics.median(of_gradients),
        "largest": of_gradients[worst],
        "parameter": jax.tree_util.keystr(leaves[worst][0]),
    }


def rounding(name: str, training: bool, batch_size: int) -> dict[str, dict[str, float]]:
    """Return how far each form's float32 results are from stock JAX's in float64: the least of some batches."""
    import functools

    import jax
    import numpy as np

    import jaxcnn
    from experiments.zoo_nets import NETS

    net = NETS[name]("float32")
    loss = functools.partial(net.loss, training)
    forms = {STOCK: loss, OURS: jaxcnn.explicit(loss)}
    compiled = {form: jax.jit(jax.value_and_grad(function, has_aux=True)) for form, function in forms.items()}
    batches = [net.batch(batch_size, "float32", seed) for seed in range(BATCHES)]
    found = {form: [run(net.params, net.state, *batch) for batch in batches] for form, run in compiled.items()}

    def widen(a: Any) -> Any:
        return np.asarray(a, np.float64) if np.asarray(a).dtype == np.float32 else a

    # After the nets in float32, because Keras has one setting for all nets.
    run = jax.jit(jax.value_and_grad(functools.partial(NETS[name]("float64").loss, training), has_aux=True))
    exact = [run(*jax.tree.map(widen, (net.params, net.state, *batch))) for batch in batches]
    return {
        form: {
            "values": min(max(distances(a, b)) for (a, _), (b, _) in zip(of_form, exact, strict=True)),
            "gradients": min(statistics.median(distances(a, b)) for (_, a), (_, b) in zip(of_form, exact, strict=True)),
        }
        for form, of_form in found.items()
    }


def distances(results: Any, expected: Any) -> list[float]:
    """Return the distance of each array of a tree."""
    import jax

    least = ZERO * norm_of_all(expected)
    leaves = zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True)
    return [distance(a, b, least) for a, b in leaves]


def norm_of_all(gradients: Any) -> float:
    """Return the L2 norm of all arrays of a tree."""
    import jax
    import numpy as np

    return math.hypot(*(float(np.linalg.norm(np.asarray(a, np.float64))) for a in jax.tree.leaves(gradients)))


def distance(result: Any, expected: Any, least: float = 0.0) -> float:
    """Return the L2 distance of two arrays relative to the expected one's norm, at least `least`; inf for NaN."""
    import numpy as np

    if not np.issubdtype(np.asarray(expected).dtype, np.floating):
        return 0.0 if np.array_equal(np.asarray(result), np.asarray(expected)) else math.inf
    a, b = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    d, size = float(np.linalg.norm(a - b)), max(float(np.linalg.norm(b)), least)
    return (d / size if size else d) if math.isfinite(d) else math.inf


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        run_process(*sys.argv[2:])
    else:
        sys.exit(main())
