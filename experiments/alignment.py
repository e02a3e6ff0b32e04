"""Measure angles between gradients by other rules and the true gradient: python -m experiments.alignment --help."""

import csv
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import arg

from experiments import cli, terminal
from experiments.data import load, shuffled_batches
from experiments.dataset import Dataset, batches
from experiments.errors import RunError, UsageError, WriteError, bad_value
from experiments.files import replacing
from experiments.run_folder import check_folder, new_folder

if TYPE_CHECKING:
    from jaxcnn import Serial

PROG = "python -m experiments.alignment"
RULES = ("exact", "literal up", "feedback alignment", "sign-symmetric", "clipped δ", "8-bit δ")
CLIP = 0.25
"""Bound of ‖δ‖ of one example, in units of its weight 1/N in the mean; for the logits, ‖δ‖ starts near 0.95."""
LEARNING_RATE = 2e-3
MEASUREMENTS = 12
"""Number of steps at which a training measures the angles, from the first step to the last."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train one small net with six rules for δ, several times each, and measure angles and accuracy.

    The angle of a layer is the angle between its gradient by the rule and its true gradient, for the same batch and
    parameters. The net has two convolutions with 8 and 16 output channels, each with ReLU and max pooling, and one
    dense layer. It trains on the 10,000 embedded images in random order. The folder receives angles.csv, accuracy.csv
    and alignment.png.
    """

    rules: tuple[str, ...] = ("all",)
    """Any of exact, "literal up", "feedback alignment", sign-symmetric, "clipped δ" and "8-bit δ", or all."""
    seeds: int = 3
    """Trainings per rule. The seed sets the initial weights, the order of images, and the fixed random kernels."""
    steps: int = 300
    """Steps per training, by Adam with a learning rate that decays from 0.002 to 0."""
    batch_size: int = 64
    """Images per step."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the results, new or empty; if omitted, runs/<time>-alignment."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """One training: the angle in degrees by step (from 0) and layer, and the final test accuracy."""

    rule: str
    seed: int
    angles: Mapping[int, Mapping[str, float]]
    accuracy: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, align, argv, prog=PROG)


def align(config: Config) -> int:
    """Train with each rule and each seed, print and draw. Return 0; raise UsageError or RunError."""
    names = check(config)
    check_folder(config.out)
    dataset = load("fashion-mnist-sample")
    if config.batch_size > len(dataset.train_labels):
        raise bad_value(UsageError, "--batch-size", f"at most {len(dataset.train_labels)}", config.batch_size)
    pairs = list(itertools.product(names, range(config.seeds)))
    with new_folder(config.out, "alignment") as folder:
        return train_all(pairs, dataset, config, folder)


def train_all(pairs: Sequence[tuple[str, int]], dataset: Dataset, config: Config, folder: Path) -> int:
    """Train with each pair of a rule and a seed; the files in `folder` always contain the finished trainings.

    Args:
        pairs: Names of RULES and seeds.
        dataset: The training and test images.
        config: The options.
        folder: The folder of the results.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        RunError: A loss is not finite, or a file cannot be written.
    """
    trainings: list[Trained] = []
    stopped: BaseException | None = None
    try:
        with terminal.progress(len(pairs) * config.steps) as progress:
            for finished, (name, seed) in enumerate(pairs):

                def update(step: int, *numbers: float, before: int = finished * config.steps) -> None:
                    progress.update(before + step, *numbers)

                training = train(name, seed, dataset, config.steps, config.batch_size, update)
                write(folder, [*trainings, training])
                trainings.append(training)
                progress.line(f"{name:<18} seed {seed}   test accuracy {trainings[-1].accuracy:.4f}")
    except (KeyboardInterrupt, RunError) as error:
        stopped = error
    if trainings and not isinstance(stopped, WriteError):
        save_figure(folder / "alignment.png", trainings)
        print()
        show(trainings)
        print(f"\n{folder / 'alignment.png'}", flush=True)
    saved = f"{len(trainings)} of {len(pairs)} trainings are saved in {folder}" if trainings else "nothing was saved"
    if isinstance(stopped, RunError):
        raise RunError(f"{stopped}; {saved}") from stopped
    if stopped is not None:
        print(f"{PROG}: interrupted; {saved}", file=sys.stderr)
        return cli.INTERRUPTED
    return 0


def check(config: Config) -> list[str]:
    """Return the selected rules; raise UsageError for an invalid option."""
    for flag, value in (("--seeds", config.seeds), ("--steps", config.steps), ("--batch-size", config.batch_size)):
        cli.check_count(flag, value)
    if not config.rules:
        raise bad_value(UsageError, "--rules", "at least one name", "none")
    for name in config.rules:
        cli.check_choice("--rules", name, ("all", *RULES))
    return [name for name in RULES if "all" in config.rules or name in config.rules]


def net(classes: int) -> "Serial":
    """Return a small net: 28×28 → 24×24×8 → 12×12×8 → 8×8×16 → 4×4×16 → classes."""
    from jaxcnn import Conv, Dense, Flatten, MaxPool, Relu, serial

    return serial(Conv(8, 5), Relu(), MaxPool(2), Conv(16, 5), Relu(), MaxPool(2), Flatten(), Dense(classes))


def rules_of(name: str, seed: int, batch_size: int) -> Any:
    """Return the `rules=` argument of the net for a name in RULES."""
    from jaxcnn import Conv, Dense, MaxPool, rules

    match name:
        case "exact":
            return None
        case "literal up":
            return {MaxPool: rules.literal_up}
        case "feedback alignment":  # the layers have different shapes, so one seed gives different kernels
            fixed = rules.FeedbackAlignment(seed)
            return {Conv: fixed, Dense: fixed}
        case "sign-symmetric":
            return {Conv: rules.sign_symmetric, Dense: rules.sign_symmetric}
        case "clipped δ":
            return rules.ClipDelta(CLIP / batch_size)
        case "8-bit δ":
            return rules.QuantizedDelta("int8")
    raise KeyError(name)


def train(
    name: str,
    seed: int,
    dataset: Dataset,
    steps: int,
    batch_size: int,
    update: Callable[[int, float, float, float], None] = lambda *numbers: None,
) -> Trained:
    """Train once.

    Args:
        name: One of RULES.
        seed: The seed of the training.
        dataset: The training and test images.
        steps: The number of steps.
        batch_size: Images per step.
        update: Called at some steps with the number of finished steps, the loss, the accuracy, and images per second.

    Raises:
        RunError: The final loss is not finite.
    """
    import jax

    import jaxcnn
    from experiments.recipe import RecipeOptions, make_optimizer

    model = net(len(dataset.class_names))
    optimizer = make_optimizer(RecipeOptions(learning_rate=LEARNING_RATE), steps, steps)
    state = jaxcnn.TrainState.create(model, optimizer, jax.random.key(seed), dataset.image_shape)
    step, angles = compiled(name, seed if name == "feedback alignment" else 0, model, steps, batch_size)

    measured = set(np.linspace(0, steps - 1, min(MEASUREMENTS, steps)).round().astype(int).tolist())
    images, labels = dataset.train_images, dataset.train_labels
    endless = (b for n in itertools.count() for b in shuffled_batches(images, labels, batch_size, seed=seed, epoch=n))
    by_step = {}
    began = 0.0
    for number, batch in enumerate(itertools.islice(endless, steps)):
        if number in measured:
            by_step[number] = {layer: float(angle) for layer, angle in angles(state.params, *batch).items()}
        state, metrics = step(state, batch)
        if number == 0:  # the first step includes compilation
            jax.block_until_ready(metrics)
            began = time.perf_counter()
        elif number in measured:
            loss_now, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
            update(number + 1, loss_now, accuracy, number * batch_size / (time.perf_counter() - began))
    if not np.isfinite(metrics["loss"]):
        raise bad_value(RunError, f"loss of {name}, seed {seed}", "finite", float(metrics["loss"]))
    loss, tests = jaxcnn.softmax_cross_entropy_with_integer_labels, (dataset.test_images, dataset.test_labels)
    tested = jaxcnn.evaluate(model, loss, state.params, batches(*tests, 1000))
    return Trained(name, seed, by_step, tested["accuracy"])


@functools.cache
def compiled(name: str, seed: int, model: "Serial", steps: int, batch_size: int) -> tuple[Any, Any]:
    """Return a training step, and a function from parameters and a batch to angles; each compiles once for all seeds.

    Args:
        name: One of RULES.
        seed: The seed of the rule, not of the training.
        model: The net.
        steps: The number of steps.
        batch_size: Images per step.
    """
    import jax

    import jaxcnn
    from experiments.recipe import RecipeOptions, make_optimizer

    loss, rules = jaxcnn.softmax_cross_entropy_with_integer_labels, rules_of(name, seed, batch_size)

    @jax.jit
    def angles(params: Any, images: Any, labels: Any) -> dict[str, jax.Array]:
        def gradient(rules: Any) -> Any:
            return jax.grad(lambda p: loss(model.apply(p, images, rules=rules), labels).mean())(params)

        return layer_angles(gradient(rules), gradient(None))

    optimizer = make_optimizer(RecipeOptions(learning_rate=LEARNING_RATE), steps, steps)
    return jaxcnn.make_train_step(model, loss, optimizer, rules=rules), angles


def layer_angles(gradient: Mapping[str, Any], true: Mapping[str, Any]) -> dict[str, Any]:
    """Return the angle in degrees between two gradients, per layer over all its parameters.

    The angle is 2·atan2(‖u − v‖, ‖u + v‖) of the unit vectors u and v, which is accurate for small angles as well. It
    is NaN if a gradient is zero.
    """
    import jax
    import jax.numpy as jnp

    def angle(one: Any, two: Any) -> Any:
        u, v = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (one, two))
        u, v = u / jnp.linalg.norm(u), v / jnp.linalg.norm(v)
        return jnp.degrees(2 * jnp.arctan2(jnp.linalg.norm(u - v), jnp.linalg.norm(u + v)))

    return {layer: angle(gradient[layer], true[layer]) for layer in true}


def write(folder: Path, trainings: Sequence[Trained]) -> None:
    """Write angles.csv, one line per training, step and layer, and accuracy.csv, one line per training."""
    angles = [
        (t.rule, t.seed, step, layer, f"{angle:.6g}")
        for t in trainings
        for step, by_layer in t.angles.items()
        for layer, angle in by_layer.items()
    ]
    accuracies = [(t.rule, t.seed, f"{t.accuracy:.6g}") for t in trainings]
    for name, header, rows in (
        ("angles.csv", ("rule", "seed", "step", "layer", "degrees"), angles),
        ("accuracy.csv", ("rule", "seed", "test_accuracy"), accuracies),
    ):
        with replacing(folder / name) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)


def by_rule(trainings: Sequence[Trained]) -> dict[str, list[Trained]]:
    """Return the trainings of each rule, in their original order."""
    result: dict[str, list[Trained]] = {}
    for training in trainings:
        result.setdefault(training.rule, []).append(training)
    return result


def layers(trainings: Sequence[Trained]) -> list[str]:
    """Return the names of the layers with parameters, in the order of the net."""
    return sorted(next(iter(trainings[0].angles.values())), key=lambda name: (not name.startswith("conv"), name))


def show(trainings: Sequence[Trained]) -> None:
    """Print a table with the accuracy over all seeds per rule, and the first and last angle per layer."""
    from rich.console import Console
    from rich.table import Table

    names = layers(trainings)
    table = Table(title="test accuracy: mean (min–max) over the seeds; angle to the true gradient: first → last step")
    table.add_column("rule")
    table.add_column("test accuracy", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for rule, group in by_rule(trainings).items():
        accuracy = [t.accuracy for t in group]
        first, last = (
            [[by[name] for by in (list(t.angles.values())[i] for t in group)] for name in names] for i in (0, -1)
        )
        table.add_row(
            rule,
            f"{np.mean(accuracy):.3f} ({min(accuracy):.3f}–{max(accuracy):.3f})",
            *(f"{np.mean(a):.1f}° → {np.mean(b):.1f}°" for a, b in zip(first, last, strict=True)),
        )
    Console(width=118).print(table)


def save_figure(path: Path, trainings: Sequence[Trained]) -> None:
    """Write a PNG with one chart of angles per layer, and the accuracy of each training at the right."""
    from experiments.lecture.drawing import figure, plain

    names = layers(trainings)
    colors = dict(zip(RULES, ("0.2", "tab:orange", "tab:red", "tab:purple", "tab:green", "tab:blue"), strict=True))
    fig = figure(3.2 * (len(names) + 1), 3.9)
    fig.suptitle(
        "Angle between a rule's gradient and the true gradient while the rule trains the net; one line per seed"
    )
    *charts, last = fig.subplots(1, len(names) + 1)
    for axes, name in zip(charts, names, strict=True):
        for t in trainings:
            steps = list(t.angles)
            label = t.rule if t.seed == 0 else None
            axes.plot(steps, [t.angles[s][name] for s in steps], color=colors[t.rule], linewidth=1.3, label=label)
        axes.axhline(90, color="0.8", linewidth=0.8, linestyle=":")
        axes.set_ylim(-5, 185)
        axes.set_yticks(range(0, 181, 30))
        plain(axes, name, "step", "degrees" if axes is charts[0] else "")
    for i, (rule, group) in enumerate(by_rule(trainings).items()):
        last.plot([t.accuracy for t in group], [-i] * len(group), "o", color=colors[rule], alpha=0.7, markersize=6)
    rules = list(by_rule(trainings))
    plain(last, "test accuracy", "", "")
    last.set_yticks([-i for i in range(len(rules))], rules)
    last.margins(y=0.15)
    handles = charts[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=len(rules), frameon=False)
    with replacing(path) as temporary:
        fig.savefig(temporary, format="png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
