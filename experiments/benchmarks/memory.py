"""Measure the temporary memory of a training step: python -m experiments.benchmarks.memory --help."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from experiments import cli

if TYPE_CHECKING:
    from experiments.benchmarks.nets import Timed

PROG = "python -m experiments.benchmarks.memory"
LIBRARIES = ("jaxcnn", "flax nnx", "equinox")


@dataclasses.dataclass(frozen=True)
class Config:
    """Count XLA's temporary bytes of the compiled training step, and the bytes of its residuals.

    The step is not run. Residuals are the arrays that JAX saves between the forward and the backward pass, excluding
    arguments. The compiler may save less and recompute the rest.
    """

    nets: tuple[str, ...] = ("lecture", "lenet5", "vgg", "mobile", "resnext")
    """Nets: lecture, lenet5, vgg, mobile, resnext."""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """Images per step; if omitted, 128 for 28×28 images, 64 for larger ones."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; a bar chart of the ratios is written next to it."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """The bytes of one net in one library."""

    temporary: int
    residuals: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Compile, count and print. Return 0, or 130 after Ctrl-C."""
    from experiments.benchmarks import results, timing
    from experiments.benchmarks.nets import NETS

    for name in config.nets:
        cli.check_choice("--nets", name, NETS)
    cli.check_count("--batch-size", config.batch_size)
    results.check_out(config.out)
    machine = timing.machine(("jax", "jaxlib"), others=("flax", "equinox"))
    results.heading(
        machine, "one training step: XLA's temporary memory, and residuals between forward and backward pass"
    )
    by_net: dict[str, dict[str, Bytes]] = {}
    with results.until_stopped(lambda: by_net) as stopped:
        for name in config.nets:
            timed = NETS[name]()
            timed = dataclasses.replace(timed, batch=config.batch_size or timed.batch)
            by_net[name] = {library: count(library, timed) for library in LIBRARIES}
    results.table(
        ["net", *(f"{library}: {what}" for library in LIBRARIES for what in ("temporary", "residuals"))], rows(by_net)
    )
    print("in parentheses: jaxcnn's bytes / this library's bytes")
    if config.out is not None:
        results.write(config.out, machine, config, bytes=by_net)
        ratios = {
            f"{name}, {what}, {library}": getattr(counts["jaxcnn"], what) / max(getattr(counts[library], what), 1)
            for name, counts in by_net.items()
            for what in ("temporary", "residuals")
            for library in LIBRARIES[1:]
        }
        label = "jaxcnn's bytes / the other library's bytes"
        results.bars(config.out.with_suffix(".png"), "memory of a training step", label, ratios)
    return stopped[0] if stopped else 0


def rows(by_net: Mapping[str, Mapping[str, Bytes]]) -> list[list[str]]:
    """Return one table row per net."""
    from experiments.benchmarks.results import megabytes

    lines = []
    for name, counts in by_net.items():
        line = [name]
        for library, b in counts.items():
            for what in ("temporary", "residuals"):
                ratio = getattr(counts["jaxcnn"], what) / max(getattr(b, what), 1)
                line.append(megabytes(getattr(b, what)) + ("" if library == "jaxcnn" else f" ({ratio:.2f})"))
        lines.append(line)
    return lines


def count(library: str, timed: "Timed") -> Bytes:
    """Return the bytes of the training step of a library."""
    from experiments.benchmarks.contenders import CONTENDERS

    temporary = CONTENDERS[library](timed).temporary_bytes
    loss, params = mean_loss(library, timed)
    return Bytes(temporary or 0, residual_bytes(loss, params))


def mean_loss(library: str, timed: "Timed") -> tuple[Callable[[Any], Any], Any]:
    """Return the mean loss of a batch as a function of the parameters, with dropout active, and the parameters."""
    import jax
    import numpy as np
    import optax

    from experiments.benchmarks import contenders

    x, labels = contenders.images(timed)
    if library == "jaxcnn":
        from jaxcnn import softmax_cross_entropy_with_integer_labels

        def ours(params: Any) -> Any:
            logits = timed.net.apply(params, x, key=jax.random.key(0))
            return softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return ours, timed.net.init(jax.random.key(0), timed.shape)
    if library == "flax nnx":
        from flax import nnx

        graph, *states = nnx.split(contenders.flax_net(timed), nnx.Param, ...)

        def flax(params: Any) -> Any:
            logits = nnx.merge(graph, params, *states[1:], copy=True)(x)  # a copy, because its random state changes
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return flax, states[0]
    import equinox as eqx

    params, static = eqx.partition(contenders.equinox_net(timed), eqx.is_inexact_array)
    channels_first = np.moveaxis(x, -1, 1).copy()

    def equinox(params: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), timed.batch)
        logits = jax.vmap(eqx.combine(params, static))(channels_first, key=keys)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return equinox, params


def residual_bytes(loss: Callable[[Any], Any], params: Any) -> int:
    """Return the bytes that `jax.vjp` saves for a function, each array once, without arguments and constants."""
    import jax
    from jax.extend.core import Literal

    closed = jax.make_jaxpr(lambda params: jax.vjp(loss, params)[1])(params)
    arguments = {*closed.jaxpr.invars, *closed.jaxpr.constvars}
    saved = {origin(closed.jaxpr, v) for v in closed.jaxpr.outvars if not isinstance(v, Literal)}
    return sum(
        math.prod(v.aval.shape) * v.aval.dtype.itemsize
        for v in saved
        if v is not None and v not in arguments and hasattr(v.aval.dtype, "itemsize")
    )


def origin(jaxpr: Any, var: Any) -> Any:
    """Return the variable that a value of a jaxpr is a copy of, through inner programs that return an argument."""
    from jax.extend.core import Literal

    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit") and var in eqn.outvars:
            inner = eqn.params["jaxpr"].jaxpr
            out = inner.outvars[eqn.outvars.index(var)]
            if isinstance(out, Literal):
                return None
            source = origin(inner, out)
            if source not in inner.invars:
                return var
            argument = eqn.invars[inner.invars.index(source)]
            return None if isinstance(argument, Literal) else origin(jaxpr, argument)
    return var


if __name__ == "__main__":
    sys.exit(main())
