"""Compare `backprop` with `jax.value_and_grad`: python -m experiments.benchmarks.backprop --help."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from experiments import cli

PROG = "python -m experiments.benchmarks.backprop"


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare `backprop`, which returns every activation and δ, with `jax.value_and_grad`; both are jitted."""

    model: str = "lecture"
    """Net: a name in experiments.models."""
    batch_size: int = 128
    """Images per pass."""
    rounds: int = 30
    """Number of rounds. In each round, each of the two has one turn."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; a bar chart of the ratios is written next to it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Time both and print the results. Return 0."""
    for name in ("batch_size", "rounds"):
        cli.check_count(f"--{name.replace('_', '-')}", getattr(config, name))

    import jax

    from experiments.benchmarks import results, timing
    from experiments.models import CLASSIFIERS
    from jaxcnn import backprop, softmax_cross_entropy_with_integer_labels

    results.check_out(config.out)
    cli.check_choice("--model", config.model, CLASSIFIERS)
    key = jax.random.key(0)
    net = CLASSIFIERS[config.model](10)
    x = jax.random.normal(key, (config.batch_size, 28, 28, 1))
    labels = jax.random.randint(key, (config.batch_size,), 0, 10)
    params = net.init(key, x.shape[1:])

    loss = softmax_cross_entropy_with_integer_labels

    def mean(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        return loss(net.apply(params, x, key=key), labels).mean()

    value_and_grad = jax.jit(jax.value_and_grad(mean))
    with_deltas = jax.jit(lambda params, x, labels: backprop(net, loss, params, x, labels, key=key))
    contenders = {
        "value_and_grad": lambda: value_and_grad(params, x, labels),
        "backprop": lambda: with_deltas(params, x, labels),
    }
    machine = timing.machine(("jax", "jaxlib"))
    times = timing.interleaved(contenders, config.rounds)
    title = f"{config.model}, batch {config.batch_size}, {config.rounds} rounds: one forward and one backward pass"
    results.report(config.out, machine, config, title, times, "value_and_grad", "backprop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
