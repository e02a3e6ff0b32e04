"""Compare the time to reach an accuracy with flax and PyTorch: python -m experiments.benchmarks.accuracy --help."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import arg

from experiments import cli
from experiments.data import SOURCES, Batch, Dataset, batches, load, shuffled_batches
from experiments.errors import UsageError

if TYPE_CHECKING:
    from experiments.benchmarks.nets import Timed

PROG = "python -m experiments.benchmarks.accuracy"
LIBRARIES = ("jaxcnn", "flax nnx", "torch")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train the lecture's net with the same recipe in each library, alternately, until the test accuracy is reached.

    Initial weights, batches and optimizer are the same (Adam, with a learning rate that falls to 0 along a cosine).
    Dropout uses each library's own random numbers. Only training time counts: neither evaluation nor compilation.
    """

    data: str = "fashion-mnist"
    """The images: fashion-mnist (60,000) or fashion-mnist-sample (10,000, embedded)."""
    data_dir: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the idx files of --data fashion-mnist; without it, the system's, the cache, a download."""
    libraries: tuple[str, ...] = LIBRARIES
    """Who takes part: jaxcnn, "flax nnx", torch (channels last)."""
    target: float = 0.9
    """The test accuracy to reach."""
    epochs: int = 10
    """The learning rate is 0 after so many; who is not there by then gives up."""
    turns: int = 2
    """Turns, and evaluations, an epoch."""
    batch_size: int = 128
    """Images a step."""
    learning_rate: float = 2e-3
    """At the first step."""
    seeds: tuple[int, ...] = (0,)
    """Each decides the first weights, the order of the images and the dropout."""
    max_steps: Annotated[int | None, arg(metavar="INT")] = None
    """Stop after so many steps, to see that all of it runs."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """A file for all numbers, as JSON; a bar chart of the ratios goes beside it."""


@dataclasses.dataclass
class Trained:
    """One library's training: seconds and accuracy after every turn."""

    train: Callable[[Sequence[Batch]], None]
    accuracy: Callable[[], float]
    seconds: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[float] = dataclasses.field(default_factory=list)
    epochs: list[float] = dataclasses.field(default_factory=list)

    def reached(self, target: float) -> tuple[float, float] | None:
        """Return seconds of training and epochs until the target; None if it was not reached."""
        for i, accuracy in enumerate(self.accuracies):
            if accuracy >= target:
                return sum(self.seconds[: i + 1]), self.epochs[i]
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Train, and print when each library reached the target. Returns 0."""
    check(config)
    data = load(config.data, config.data_dir)

    from experiments.benchmarks import results, timing

    results.check_out(config.out)
    machine = timing.machine(("jax", "jaxlib", "optax"), others=("flax", "torch"))
    title = f"{config.data}, lecture, batch {config.batch_size}: seconds of training until {config.target:.0%}"
    results.heading(machine, title)
    found: dict[int, dict[str, Trained]] = {}
    with results.until_interrupted(lambda: found) as interrupted:
        for seed in config.seeds:
            found[seed] = dict(race(config, data, seed))
            print(f"seed {seed}")
            results.table(
                ["", "to the target", "epochs", "best accuracy", "trained"], lines(found[seed], config.target)
            )
    totals = mean_seconds(found, config.target)
    if len(totals) > 1 and "jaxcnn" in totals:
        ratios = {name: total / totals["jaxcnn"] for name, total in totals.items()}
        print("times jaxcnn, over all seeds: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
        if config.out is not None:
            label = "seconds of training, as a multiple of jaxcnn's"
            results.bars(config.out.with_suffix(".png"), title, label, ratios, ours="jaxcnn")
    if config.out is not None:
        plain = {seed: {name: told(trained) for name, trained in of.items()} for seed, of in found.items()}
        results.write(config.out, machine, config, seeds=plain)
    return interrupted[0] if interrupted else 0


def check(config: Config) -> None:
    """Raise UsageError for every error that can be detected in the options."""
    for name in ("epochs", "turns", "batch_size", "max_steps"):
        cli.check_count(f"--{name.replace('_', '-')}", getattr(config, name))
    if not 0 < config.target < 1:
        raise UsageError(f"--target: expected an accuracy between 0 and 1, got {config.target}")
    images = [name for name in SOURCES if name.startswith("fashion-mnist")]
    for flag, got, known in (
        ("--data", config.data, images),
        *(("--libraries", name, list(LIBRARIES)) for name in config.libraries),
    ):
        cli.check_choice(flag, got, known)


def told(trained: Trained) -> dict[str, Sequence[float]]:
    """Return the JSON form of one training."""
    return {"seconds": trained.seconds, "accuracies": trained.accuracies, "epochs": trained.epochs}


def lines(found: Mapping[str, Trained], target: float) -> list[list[str]]:
    """Return one table row per library."""
    table = []
    for name, trained in found.items():
        there = trained.reached(target)
        to, epochs = ("not reached", "") if there is None else (f"{there[0]:.1f} s", f"{there[1]:.2f}")
        table.append([name, to, epochs, f"{max(trained.accuracies):.4f}", f"{sum(trained.seconds):.1f} s"])
    return table


def mean_seconds(found: Mapping[int, Mapping[str, Trained]], target: float) -> dict[str, float]:
    """Return the mean seconds to the target for each library that reached it with every seed."""
    totals: dict[str, list[float]] = {}
    for of in found.values():
        for name, trained in of.items():
            if (there := trained.reached(target)) is not None:
                totals.setdefault(name, []).append(there[0])
    return {name: float(np.mean(all_)) for name, all_ in totals.items() if len(all_) == len(found)}


def race(config: Config, data: Dataset, seed: int) -> Iterator[tuple[str, Trained]]:
    """Train all libraries alternately; a library that has reached the target stops."""
    import jax

    from experiments.benchmarks.nets import NETS

    timed = dataclasses.replace(NETS["lecture"](), batch=config.batch_size)
    a_epoch = len(data.train_labels) // config.batch_size
    params = timed.net.init(jax.random.key(seed), timed.shape)
    build = {"jaxcnn": ours, "flax nnx": flax, "torch": torch}
    racers = {}
    for name in config.libraries:
        racers[name] = Trained(*build[name](timed, params, config.learning_rate, config.epochs * a_epoch, seed, data))
    step = 0
    for epoch in range(config.epochs):
        images, labels = data.train_images, data.train_labels
        whole = list(shuffled_batches(images, labels, config.batch_size, seed=seed, epoch=epoch))
        for turn in range(config.turns):
            part = whole[len(whole) * turn // config.turns : len(whole) * (turn + 1) // config.turns]
            part = part if config.max_steps is None else part[: max(config.max_steps - step, 0)]
            running = [name for name, racer in racers.items() if racer.reached(config.target) is None]
            if not part or not running:
                return iter(racers.items())
            step += len(part)
            first = (epoch * config.turns + turn) % len(running)
            for name in running[first:] + running[:first]:
                racer = racers[name]
                time.sleep(0.3)  # until the threads of the previous library have stopped spinning
                began = time.perf_counter()
                racer.train(part)
                racer.seconds.append(time.perf_counter() - began)
                racer.epochs.append(step / len(whole))
                racer.accuracies.append(racer.accuracy())
    return iter(racers.items())


Racer = tuple[Callable[[Sequence[Batch]], None], Callable[[], float]]


def ours(timed: "Timed", params: Any, rate: float, steps: int, seed: int, data: Dataset) -> Racer:
    """Train with the explicit rules."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxcnn import TrainState, evaluate, make_train_step
    from jaxcnn import softmax_cross_entropy_with_integer_labels as loss

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    state = TrainState.create(timed.net, optimizer, jax.random.key(seed), timed.shape)
    state = dataclasses.replace(state, params=jax.tree.map(jnp.array, params))  # copies: a step donates them
    jitted: Any = make_train_step(timed.net, loss, optimizer)
    first = next(shuffled_batches(data.train_images, data.train_labels, timed.batch, seed=seed, epoch=0))
    step = jitted.lower(state, first).compile()

    def train(batches: Sequence[Batch]) -> None:
        nonlocal state
        for batch in batches:
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    def accuracy() -> float:
        return evaluate(timed.net, loss, state.params, test_batches(data))["accuracy"]

    return train, accuracy


def flax(timed: "Timed", params: Any, rate: float, steps: int, seed: int, data: Dataset) -> Racer:
    """Train in flax nnx, by autodiff."""
    import jax
    import optax
    from flax import nnx

    from experiments.benchmarks import contenders

    net = contenders.load_flax(contenders.flax_net(timed, seed), timed, params)
    optimizer = nnx.Optimizer(net, optax.adam(optax.cosine_decay_schedule(rate, steps)), wrt=nnx.Param)
    graph, state = nnx.split((net, optimizer))

    def training_step(state: Any, batch: Any) -> Any:
        net, optimizer = nnx.merge(graph, state)

        def error(net: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(net(batch[0]), batch[1]).mean()

        optimizer.update(net, nnx.grad(error)(net))
        return nnx.state((net, optimizer))

    first = next(shuffled_batches(data.train_images, data.train_labels, timed.batch, seed=seed, epoch=0))
    step = jax.jit(training_step, donate_argnums=0).lower(state, first).compile()

    def train(batches: Sequence[Batch]) -> None:
        nonlocal state
        for batch in batches:
            state = step(state, batch)
        jax.block_until_ready(state)

    @jax.jit
    def right(state: Any, x: Any, labels: Any) -> Any:
        net, _ = nnx.merge(graph, state)
        net.eval()
        return (net(x).argmax(-1) == labels).sum()

    def accuracy() -> float:
        return sum(int(right(state, x, labels)) for x, labels in test_batches(data)) / len(data.test_labels)

    return train, accuracy


def torch(timed: "Timed", params: Any, rate: float, steps: int, seed: int, data: Dataset) -> Racer:
    """Train in PyTorch, channels last, which is its faster form on CPU."""
    import os

    import torch
    from torch.nn import functional as F

    from experiments.benchmarks import contenders

    torch.manual_seed(seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    net = contenders.load_torch(contenders.torch_net(timed), timed, params).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def pictures(x: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(x)).movedim(-1, 1)  # channels last in memory

    def train(batches: Sequence[Batch]) -> None:
        net.train()
        for x, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(pictures(x)), torch.from_numpy(labels.astype(np.int64))).backward()
            optimizer.step()
            schedule.step()

    def accuracy() -> float:
        net.eval()
        with torch.no_grad():
            right = sum(
                int((net(pictures(x)).argmax(-1) == torch.from_numpy(labels.astype(np.int64))).sum())
                for x, labels in test_batches(data)
            )
        return right / len(data.test_labels)

    return train, accuracy


def test_batches(data: Dataset) -> Iterator[Batch]:
    """Yield all test images, 1000 at a time."""
    return batches(data.test_images, data.test_labels, 1000)


if __name__ == "__main__":
    sys.exit(main())
