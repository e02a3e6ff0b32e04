"""Compare the training time until a test accuracy is reached: python -m experiments.benchmarks.accuracy --help."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import arg

from experiments import cli
from experiments.data import SOURCES, load, shuffled_batches
from experiments.dataset import Batch, Dataset, batches
from experiments.errors import UsageError, bad_value

if TYPE_CHECKING:
    from experiments.benchmarks.nets import Timed

PROG = "python -m experiments.benchmarks.accuracy"
LIBRARIES = ("jaxcnn", "flax nnx", "torch")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train the lecture's net in jaxcnn, Flax NNX and PyTorch, in turns, until a test accuracy is reached.

    Initial weights, batches and optimizer are the same: Adam, with a learning rate that decays to 0 along a cosine.
    Dropout uses each library's own random numbers. Evaluation and compilation are not timed.
    """

    data: str = "fashion-mnist"
    """Images: fashion-mnist (60,000) or fashion-mnist-sample (10,000, embedded)."""
    data_dir: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the idx files for --data fashion-mnist; if omitted, the system's copy, the cache, or a download."""
    libraries: tuple[str, ...] = LIBRARIES
    """Libraries: jaxcnn, "flax nnx", torch (channels last)."""
    target: float = 0.9
    """Test accuracy to reach."""
    epochs: int = 10
    """Maximum number of epochs; the learning rate is 0 after the last one."""
    turns: int = 2
    """Turns per epoch. The accuracy is evaluated after each turn."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 2e-3
    """Learning rate of the first step."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights, the order of the images and the dropout; one training per seed."""
    max_steps: Annotated[int | None, arg(metavar="INT")] = None
    """Maximum number of steps, for a short trial run."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; a bar chart of the ratios is written next to it."""


@dataclasses.dataclass
class Trained:
    """The training of one library, with seconds, accuracy and epochs after every turn."""

    train: Callable[[Sequence[Batch]], None]
    accuracy: Callable[[], float]
    seconds: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[float] = dataclasses.field(default_factory=list)
    epochs: list[float] = dataclasses.field(default_factory=list)

    def reached(self, target: float) -> tuple[float, float] | None:
        """Return the seconds of training and the epochs until the target, or None if it was not reached."""
        for i, accuracy in enumerate(self.accuracies):
            if accuracy >= target:
                return sum(self.seconds[: i + 1]), self.epochs[i]
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Train, and print when each library reached the target. Return 0, or 130 after Ctrl-C."""
    check(config)
    data = load(config.data, config.data_dir)

    from experiments.benchmarks import results, timing

    results.check_out(config.out)
    machine = timing.machine(("jax", "jaxlib", "optax"), others=("flax", "torch"))
    title = f"{config.data}, lecture, batch {config.batch_size}: seconds of training until {config.target:.0%}"
    results.heading(machine, title)
    by_seed: dict[int, dict[str, Trained]] = {}
    with results.until_stopped(lambda: by_seed) as stopped:
        for seed in config.seeds:
            by_seed[seed] = dict(train_all(config, data, seed))
            print(f"seed {seed}")
            results.table(
                ["", "to the target", "epochs", "best accuracy", "training time"], lines(by_seed[seed], config.target)
            )
    totals = mean_seconds(by_seed, config.target)
    if len(totals) > 1 and "jaxcnn" in totals:
        ratios = {name: total / totals["jaxcnn"] for name, total in totals.items()}
        print("time / jaxcnn's, over all seeds: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
        if config.out is not None:
            label = "training time / jaxcnn's"
            results.bars(config.out.with_suffix(".png"), title, label, ratios, ours="jaxcnn")
    if config.out is not None:
        seeds = {seed: {name: to_json(t) for name, t in trainings.items()} for seed, trainings in by_seed.items()}
        results.write(config.out, machine, config, seeds=seeds)
    return stopped[0] if stopped else 0


def check(config: Config) -> None:
    """Raise UsageError for every error that can be detected in the options."""
    for name in ("epochs", "turns", "batch_size", "max_steps"):
        cli.check_count(f"--{name.replace('_', '-')}", getattr(config, name))
    if not 0 < config.target < 1:
        raise bad_value(UsageError, "--target", "between 0 and 1", config.target)
    images = [name for name in SOURCES if name.startswith("fashion-mnist")]
    for flag, got, known in (
        ("--data", config.data, images),
        *(("--libraries", name, list(LIBRARIES)) for name in config.libraries),
    ):
        cli.check_choice(flag, got, known)


def to_json(trained: Trained) -> dict[str, Sequence[float]]:
    """Return the JSON form of one training."""
    return {"seconds": trained.seconds, "accuracies": trained.accuracies, "epochs": trained.epochs}


def lines(trainings: Mapping[str, Trained], target: float) -> list[list[str]]:
    """Return one table row per library."""
    table = []
    for name, trained in trainings.items():
        reached = trained.reached(target)
        time_, epochs = ("not reached", "") if reached is None else (f"{reached[0]:.1f} s", f"{reached[1]:.2f}")
        table.append([name, time_, epochs, f"{max(trained.accuracies):.4f}", f"{sum(trained.seconds):.1f} s"])
    return table


def mean_seconds(by_seed: Mapping[int, Mapping[str, Trained]], target: float) -> dict[str, float]:
    """Return the mean seconds to the target for each library that reached it with every seed."""
    totals: dict[str, list[float]] = {}
    for trainings in by_seed.values():
        for name, trained in trainings.items():
            if (reached := trained.reached(target)) is not None:
                totals.setdefault(name, []).append(reached[0])
    return {name: float(np.mean(seconds)) for name, seconds in totals.items() if len(seconds) == len(by_seed)}


def train_all(config: Config, data: Dataset, seed: int) -> Iterator[tuple[str, Trained]]:
    """Train all libraries in turns; a library that has reached the target stops."""
    import jax

    from experiments.benchmarks.nets import NETS

    timed = dataclasses.replace(NETS["lecture"](), batch=config.batch_size)
    steps_per_epoch = len(data.train_labels) // config.batch_size
    params = timed.net.init(jax.random.key(seed), timed.shape)
    build = {"jaxcnn": ours, "flax nnx": flax, "torch": torch}
    trainings = {}
    for name in config.libraries:
        steps = config.epochs * steps_per_epoch
        trainings[name] = Trained(*build[name](timed, params, config.learning_rate, steps, seed, data))
    step = 0
    for epoch in range(config.epochs):
        images, labels = data.train_images, data.train_labels
        epoch_batches = list(shuffled_batches(images, labels, config.batch_size, seed=seed, epoch=epoch))
        for turn in range(config.turns):
            count = len(epoch_batches)
            part = epoch_batches[count * turn // config.turns : count * (turn + 1) // config.turns]
            part = part if config.max_steps is None else part[: max(config.max_steps - step, 0)]
            running = [name for name, trained in trainings.items() if trained.reached(config.target) is None]
            if not part or not running:
                return iter(trainings.items())
            step += len(part)
            first = (epoch * config.turns + turn) % len(running)
            for name in running[first:] + running[:first]:
                trained = trainings[name]
                time.sleep(0.3)  # until the threads of the previous library have stopped spinning
                began = time.perf_counter()
                trained.train(part)
                trained.seconds.append(time.perf_counter() - began)
                trained.epochs.append(step / count)
                trained.accuracies.append(trained.accuracy())
    return iter(trainings.items())


Training = tuple[Callable[[Sequence[Batch]], None], Callable[[], float]]


def ours(timed: "Timed", params: Any, rate: float, steps: int, seed: int, data: Dataset) -> Training:
    """Build the training in jaxcnn."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxcnn import TrainState, evaluate, make_train_step
    from jaxcnn import softmax_cross_entropy_with_integer_labels as loss

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    state = TrainState.create(timed.net, optimizer, jax.random.key(seed), timed.shape)
    state = dataclasses.replace(state, params=jax.tree.map(jnp.array, params))  # copies, because a step donates them
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


def flax(timed: "Timed", params: Any, rate: float, steps: int, seed: int, data: Dataset) -> Training:
    """Build the training in Flax NNX."""
    import jax
    import optax
    from flax import nnx

    from experiments.benchmarks import contenders

    net = contenders.load_flax(contenders.flax_net(timed, seed), timed, params)
    optimizer = nnx.Optimizer(net, optax.adam(optax.cosine_decay_schedule(rate, steps)), wrt=nnx.Param)
    graph, state = nnx.split((net, optimizer))

    def training_step(state: Any, batch: Any) -> Any:
        net, optimizer = nnx.merge(graph, state)

        def loss(net: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(net(batch[0]), batch[1]).mean()

        optimizer.update(net, nnx.grad(loss)(net))
        return nnx.state((net, optimizer))

    first = next(shuffled_batches(data.train_images, data.train_labels, timed.batch, seed=seed, epoch=0))
    step = jax.jit(training_step, donate_argnums=0).lower(state, first).compile()

    def train(batches: Sequence[Batch]) -> None:
        nonlocal state
        for batch in batches:
            state = step(state, batch)
        jax.block_until_ready(state)

    @jax.jit
    def count_correct(state: Any, x: Any, labels: Any) -> Any:
        net, _ = nnx.merge(graph, state)
        net.eval()
        return (net(x).argmax(-1) == labels).sum()

    def accuracy() -> float:
        return sum(int(count_correct(state, x, labels)) for x, labels in test_batches(data)) / len(data.test_labels)

    return train, accuracy


def torch(timed: "Timed", params: Any, rate: float, steps: int, seed: int, data: Dataset) -> Training:
    """Build the training in PyTorch, with the channels-last format, which is faster on CPU."""
    import os

    import torch
    from torch.nn import functional as F

    from experiments.benchmarks import contenders

    torch.manual_seed(seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    net = contenders.load_torch(contenders.torch_net(timed), timed, params).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def to_tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(x)).movedim(-1, 1)  # channels last in memory

    def train(batches: Sequence[Batch]) -> None:
        net.train()
        for x, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(to_tensor(x)), torch.from_numpy(labels.astype(np.int64))).backward()
            optimizer.step()
            schedule.step()

    def accuracy() -> float:
        net.eval()
        with torch.no_grad():
            correct = sum(
                int((net(to_tensor(x)).argmax(-1) == torch.from_numpy(labels.astype(np.int64))).sum())
                for x, labels in test_batches(data)
            )
        return correct / len(data.test_labels)

    return train, accuracy


def test_batches(data: Dataset) -> Iterator[Batch]:
    """Yield all test images, 1000 at a time."""
    return batches(data.test_images, data.test_labels, 1000)


if __name__ == "__main__":
    sys.exit(main())
