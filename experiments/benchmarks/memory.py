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

    Nothing is run or timed. Residuals are what JAX saves between the forward and the backward pass, excluding
    arguments. The compiler may keep less and recompute it.
    """

    nets: tuple[str, ...] = ("lecture", "lenet5", "vgg", "mobile", "resnext")
    """Which nets."""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """Images a step; without it, 128 for pictures of 28×28 and 64 for larger ones."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """A file for all numbers, as JSON; a bar chart of the ratios goes beside it."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """The bytes of one net in one library."""

    temporary: int
    kept: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Compile and count. Returns 0."""
    from experiments.benchmarks import results, timing
    from experiments.benchmarks.nets import NETS

    for name in config.nets:
        cli.check_choice("--nets", name, NETS)
    cli.check_count("--batch-size", config.batch_size)
    results.check_out(config.out)
    machine = timing.machine(("jax", "jaxlib"), others=("flax", "equinox"))
    results.heading(machine, "one training step: XLA's temporary bytes, and bytes kept between forward and backward")
    found: dict[str, dict[str, Bytes]] = {}
    with results.until_interrupted(lambda: found) as interrupted:
        for name in config.nets:
            timed = NETS[name]()
            timed = dataclasses.replace(timed, batch=config.batch_size or timed.batch)
            found[name] = {library: count(library, timed) for library in LIBRARIES}
    results.table(
        ["net", *(f"{library}: {what}" for library in LIBRARIES for what in ("temporary", "kept"))], rows(found)
    )
    print("in brackets: jaxcnn's as a multiple of theirs")
    if config.out is not None:
        results.write(config.out, machine, config, bytes=found)
        ratios = {
            f"{name}, {what}, {library}": getattr(of["jaxcnn"], what) / max(getattr(of[library], what), 1)
            for name, of in found.items()
            for what in ("temporary", "kept")
            for library in LIBRARIES[1:]
        }
        label = "jaxcnn's bytes, as a multiple of the other's"
        results.bars(config.out.with_suffix(".png"), "memory of a training step", label, ratios)
    return interrupted[0] if interrupted else 0


def rows(found: Mapping[str, Mapping[str, Bytes]]) -> list[list[str]]:
    """Return one table row per net."""
    from experiments.benchmarks.results import megabytes

    lines = []
    for name, of in found.items():
        line = [name]
        for library, b in of.items():
            for what in ("temporary", "kept"):
                ratio = getattr(of["jaxcnn"], what) / max(getattr(b, what), 1)
                line.append(megabytes(getattr(b, what)) + ("" if library == "jaxcnn" else f" ({ratio:.2f})"))
        lines.append(line)
    return lines


def count(library: str, timed: "Timed") -> Bytes:
    """Compile the training step of a library, and trace its loss."""
    from experiments.benchmarks.contenders import CONTENDERS

    temporary = CONTENDERS[library](timed).temporary_bytes
    error, params = errors(library, timed)
    return Bytes(temporary or 0, kept_bytes(error, params))


def errors(library: str, timed: "Timed") -> tuple[Callable[[Any], Any], Any]:
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
            logits = nnx.merge(graph, params, *states[1:], copy=True)(x)  # its random numbers advance
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return flax, states[0]
    import equinox as eqx

    params, static = eqx.partition(contenders.equinox_net(timed), eqx.is_inexact_array)
    pictures = np.moveaxis(x, -1, 1).copy()

    def equinox(params: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), timed.batch)
        logits = jax.vmap(eqx.combine(params, static))(pictures, key=keys)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return equinox, params


def kept_bytes(error: Callable[[Any], Any], params: Any) -> int:
    """Return the bytes that `jax.vjp` saves for a function, each array once, without arguments and constants."""
    import jax
    from jax.extend.core import Literal

    closed = jax.make_jaxpr(lambda params: jax.vjp(error, params)[1])(params)
    given = {*closed.jaxpr.invars, *closed.jaxpr.constvars}
    made = {origin(closed.jaxpr, v) for v in closed.jaxpr.outvars if not isinstance(v, Literal)}
    return sum(
        math.prod(v.aval.shape) * v.aval.dtype.itemsize
        for v in made
        if v is not None and v not in given and hasattr(v.aval.dtype, "itemsize")
    )


def origin(jaxpr: Any, var: Any) -> Any:
    """Return the origin of a value in a jaxpr: inner programs that return an argument unchanged are not its origin."""
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
            given = eqn.invars[inner.invars.index(source)]
            return None if isinstance(given, Literal) else origin(jaxpr, given)
    return var


if __name__ == "__main__":
    sys.exit(main())
