"""A whole training step of the lecture's net, beside flax nnx: python -m experiments.benchmarks.step --help."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from experiments import cli
from experiments.errors import RunError, UsageError
from experiments.files import replacing

PROG = "python -m experiments.benchmarks.step"


@dataclasses.dataclass(frozen=True)
class Config:
    """Time a training step (forward, backward, Adam) of the lecture's net: the same in jaxcnn and in flax nnx."""

    batch_size: int = 128
    """Images a step."""
    rounds: int = 30
    """How often each contender takes its turn."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """A file for all numbers, as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Build, time and print the contenders. Returns 0."""
    for name in ("batch_size", "rounds"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected a whole number >= 1, got {getattr(config, name)}")
    if config.out is not None and config.out.is_dir():
        raise UsageError(f"--out: expected a file, got the folder {config.out}")

    import jax

    from experiments.benchmarks import timing

    key = jax.random.key(0)
    x = jax.random.normal(key, (config.batch_size, 28, 28, 1))
    labels = jax.random.randint(key, (config.batch_size,), 0, 10)
    try:
        contenders = {"jaxcnn": _jaxcnn(x, labels), "flax nnx": _flax(x, labels)}
    except ImportError as error:
        raise RunError(f"{error.name} is not installed: pip install 'jaxcnn[bench]'") from None
    machine = timing.machine(("jax", "jaxlib", "flax", "optax"))
    times = timing.interleaved(contenders, config.rounds)

    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"lecture, batch {config.batch_size}, {config.rounds} rounds: one training step")
    print(f"{'':10}  {'median':>9}  {'minimum':>9}  {'spread':>6}  {'jaxcnn is faster by':>19}")
    ours = times["jaxcnn"]
    for name, t in times.items():
        ratio = f"{t.median / ours.median:.2f}× ({t.minimum / ours.minimum:.2f}×)"
        print(f"{name:10}  {t.median * 1e3:6.1f} ms  {t.minimum * 1e3:6.1f} ms  {t.spread:6.0%}  {ratio:>19}")
    print("ratios of medians (of minima)")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        seconds = {name: t.seconds for name, t in times.items()}
        with replacing(config.out) as temporary:
            temporary.write_text(
                json.dumps({"machine": machine, "config": _plain(config), "seconds": seconds}, indent=1)
            )
    return 0


def _plain(config: Config) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}


def _jaxcnn(x: Any, labels: Any) -> Callable[[], Any]:
    import jax
    import optax

    from experiments.models import lecture
    from jaxcnn import TrainState, make_train_step, softmax_cross_entropy_with_integer_labels

    net, optimizer = lecture(10), optax.adam(1e-3)
    state = TrainState.create(net, optimizer, jax.random.key(0), x.shape[1:])
    step = make_train_step(net, softmax_cross_entropy_with_integer_labels, optimizer)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, (x, labels))
        return metrics

    return run


def _flax(x: Any, labels: Any) -> Callable[[], Any]:
    import optax
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv1 = nnx.Conv(1, 32, (5, 5), padding="VALID", rngs=rngs)
            self.conv2 = nnx.Conv(32, 64, (5, 5), padding="VALID", rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.dense = nnx.Linear(1024, 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            for conv in (self.conv1, self.conv2):
                x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
            return self.dense(self.dropout(x.reshape(x.shape[0], -1)))

    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(net: Net, optimizer: nnx.Optimizer, x: Any, labels: Any) -> dict[str, Any]:
        def error(net: Net) -> tuple[Any, Any]:
            logits = net(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

        (loss, logits), gradients = nnx.value_and_grad(error, has_aux=True)(net)
        optimizer.update(net, gradients)
        return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}

    return lambda: step(net, optimizer, x, labels)


if __name__ == "__main__":
    sys.exit(main())
