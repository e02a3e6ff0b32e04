"""Angles between other rules' gradients and the true one in training: python -m experiments.alignment --help."""

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

from experiments import cli, report
from experiments.data import Dataset, batches, load, shuffled_batches
from experiments.errors import RunError, UsageError, WriteError
from experiments.files import replacing
from experiments.run_folder import check_folder, new_folder

if TYPE_CHECKING:
    from jaxcnn import Serial

PROG = "python -m experiments.alignment"
RULES = ("exact", "literal up", "feedback alignment", "sign-symmetric", "clipped δ", "8-bit δ")
CLIP = 0.25
"""What δ of one example is clipped to, in units of its weight 1/N in the mean; δ of the logits starts near 0.95."""
LEARNING_RATE = 2e-3
LOOKS = 12
"""How often in a training the angles are taken, from the first step to the last."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train one small net with six rules for δ, several times each, and measure angles and accuracy.

    The angle of a layer is the angle between the gradient by the rule and the true gradient, for the same batch and
    parameters. The net has two convolutions with 8 and 16 output channels, with ReLU and max pooling, and one dense
    layer. It trains on the 10,000 embedded images in random order. The folder gets angles.csv, accuracy.csv and
    alignment.png.
    """

    rules: tuple[str, ...] = ("all",)
    """Of exact, "literal up", "feedback alignment", sign-symmetric, "clipped δ" and "8-bit δ"; all is all of them."""
    seeds: int = 3
    """Trainings with each rule; seed n decides the first weights, the order of images, and the fixed random patches."""
    steps: int = 300
    """Steps of a training, by Adam, whose rate falls from 0.002 to 0."""
    batch_size: int = 64
    """Images a step."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """The folder, new or empty; without it, runs/<time>-alignment."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """One training: the angle in degrees by step (counted from 0) and layer, and the accuracy at the end."""

    rule: str
    seed: int
    angles: Mapping[int, Mapping[str, float]]
    accuracy: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, align, argv, prog=PROG)


def align(config: Config) -> int:
    """Train with each rule and each seed, print and draw. Returns 0; raises UsageError or RunError."""
    names = check(config)
    check_folder(config.out)
    dataset = load("fashion-mnist-sample")
    if config.batch_size > len(dataset.train_labels):
        raise UsageError(f"--batch-size: expected at most {len(dataset.train_labels)}, got {config.batch_size}")
    wanted = list(itertools.product(names, range(config.seeds)))
    with new_folder(config.out, "alignment") as folder:
        return train_all(wanted, dataset, config, folder)


def train_all(wanted: Sequence[tuple[str, int]], dataset: Dataset, config: Config, folder: Path) -> int:
    """Train with each rule and seed of `wanted`; at any time, the files in `folder` hold the finished trainings.

    Returns 0, or 130 after Ctrl-C; raises RunError.
    """
    trainings: list[Trained] = []
    stopped: BaseException | None = None
    try:
        with report.progress(len(wanted) * config.steps) as progress:
            for done, (name, seed) in enumerate(wanted):

                def update(step: int, *numbers: float, before: int = done * config.steps) -> None:
                    progress.update(before + step, *numbers)

                found = train(name, seed, dataset, config.steps, config.batch_size, update)
                write(folder, [*trainings, found])
                trainings.append(found)
                progress.line(f"{name:<18} seed {seed}   test accuracy {trainings[-1].accuracy:.4f}")
    except (KeyboardInterrupt, RunError) as error:
        stopped = error
    if trainings and not isinstance(stopped, WriteError):
        picture(folder / "alignment.png", trainings)
        print()
        show(trainings)
        print(f"\n{folder / 'alignment.png'}", flush=True)
    kept = f"{len(trainings)} of {len(wanted)} trainings are kept in {folder}" if trainings else "nothing is kept yet"
    if isinstance(stopped, RunError):
        raise RunError(f"{stopped}; {kept}") from stopped
    if stopped is not None:
        print(f"{PROG}: interrupted; {kept}", file=sys.stderr)
        return cli.INTERRUPTED
    return 0


def check(config: Config) -> list[str]:
    """Return the selected rules; raises UsageError."""
    for flag, value in (("--seeds", config.seeds), ("--steps", config.steps), ("--batch-size", config.batch_size)):
        cli.check_count(flag, value)
    if not config.rules:
        raise UsageError("--rules: expected at least one, got none")
    for name in config.rules:
        cli.check_choice("--rules", name, ("all", *RULES))
    return [name for name in RULES if "all" in config.rules or name in config.rules]


def net(classes: int) -> "Serial":
    """Return 28×28 → 24×24×8 → 12×12×8 → 8×8×16 → 4×4×16 → classes."""
    from jaxcnn import Conv, Dense, Flatten, MaxPool, Relu, serial

    return serial(Conv(8, 5), Relu(), MaxPool(2), Conv(16, 5), Relu(), MaxPool(2), Flatten(), Dense(classes))


def rules_of(name: str, seed: int, batch_size: int) -> Any:
    """Return the `rules=` argument of the net for one name of RULES."""
    from jaxcnn import Conv, Dense, MaxPool, rules

    match name:
        case "exact":
            return None
        case "literal up":
            return {MaxPool: rules.literal_up}
        case "feedback alignment":  # layers of different shapes: one seed, different kernels
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
        update: Called from time to time with the number of finished steps, the loss, the accuracy, and images per
            second.

    Raises:
        RunError: The loss is not finite at the end.
    """
    import jax

    import jaxcnn
    from experiments.train import make_optimizer

    model = net(len(dataset.class_names))
    optimizer = make_optimizer("adam", LEARNING_RATE, steps)
    state = jaxcnn.TrainState.create(model, optimizer, jax.random.key(seed), dataset.image_shape)
    step, angles = compiled(name, seed if name == "feedback alignment" else 0, model, steps, batch_size)

    looks = set(np.linspace(0, steps - 1, min(LOOKS, steps)).round().astype(int).tolist())
    images, labels = dataset.train_images, dataset.train_labels
    endless = (b for n in itertools.count() for b in shuffled_batches(images, labels, batch_size, seed=seed, epoch=n))
    found = {}
    began = 0.0
    for number, batch in enumerate(itertools.islice(endless, steps)):
        if number in looks:
            found[number] = {layer: float(angle) for layer, angle in angles(state.params, *batch).items()}
        state, metrics = step(state, batch)
        if number == 0:  # the first step includes compilation
            jax.block_until_ready(metrics)
            began = time.perf_counter()
        elif number in looks:
            loss_now, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
            update(number + 1, loss_now, accuracy, number * batch_size / (time.perf_counter() - began))
    if not np.isfinite(metrics["loss"]):
        raise RunError(f"{name}, seed {seed}: expected a finite loss, got {float(metrics['loss'])}")
    loss, tests = jaxcnn.softmax_cross_entropy_with_integer_labels, (dataset.test_images, dataset.test_labels)
    tested = jaxcnn.evaluate(model, loss, state.params, batches(*tests, 1000))
    return Trained(name, seed, found, tested["accuracy"])


@functools.cache
def compiled(name: str, seed: int, model: "Serial", steps: int, batch_size: int) -> tuple[Any, Any]:
    """Return a training step, and a function from parameters and a batch to angles; each compiles once for all seeds.

    `seed` is the seed of the rule, not of the training.
    """
    import jax

    import jaxcnn
    from experiments.train import make_optimizer

    loss, rules = jaxcnn.softmax_cross_entropy_with_integer_labels, rules_of(name, seed, batch_size)

    @jax.jit
    def angles(params: Any, images: Any, labels: Any) -> dict[str, jax.Array]:
        def gradient(rules: Any) -> Any:
            return jax.grad(lambda p: loss(model.apply(p, images, rules=rules), labels).mean())(params)

        return layer_angles(gradient(rules), gradient(None))

    optimizer = make_optimizer("adam", LEARNING_RATE, steps)
    return jaxcnn.make_train_step(model, loss, optimizer, rules=rules), angles


def layer_angles(found: Mapping[str, Any], true: Mapping[str, Any]) -> dict[str, Any]:
    """Return the angle in degrees between two gradients, per layer over all its parameters.

    It is 2·atan2(‖u − v‖, ‖u + v‖) of the unit vectors, which is accurate for small angles, where arccos loses
    precision. The angle is NaN if a gradient is zero.
    """
    import jax
    import jax.numpy as jnp

    def angle(one: Any, two: Any) -> Any:
        u, v = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (one, two))
        u, v = u / jnp.linalg.norm(u), v / jnp.linalg.norm(v)
        return jnp.degrees(2 * jnp.arctan2(jnp.linalg.norm(u - v), jnp.linalg.norm(u + v)))

    return {layer: angle(found[layer], true[layer]) for layer in true}


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
    found: dict[str, list[Trained]] = {}
    for training in trainings:
        found.setdefault(training.rule, []).append(training)
    return found


def layers(trainings: Sequence[Trained]) -> list[str]:
    """Return the layers that have an angle, in the order of the net."""
    return sorted(next(iter(trainings[0].angles.values())), key=lambda name: (not name.startswith("conv"), name))


def show(trainings: Sequence[Trained]) -> None:
    """Print a table with the accuracy over all seeds per rule, and the first and last angle per layer."""
    from rich.console import Console
    from rich.table import Table

    names = layers(trainings)
    table = Table(
        title="test accuracy (mean, and least to most of all seeds); angle to the true gradient, first → last"
    )
    table.add_column("rule")
    table.add_column("test accuracy", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for rule, of in by_rule(trainings).items():
        accuracy = [t.accuracy for t in of]
        first, last = (
            [[by[name] for by in (list(t.angles.values())[i] for t in of)] for name in names] for i in (0, -1)
        )
        table.add_row(
            rule,
            f"{np.mean(accuracy):.3f} ({min(accuracy):.3f}–{max(accuracy):.3f})",
            *(f"{np.mean(a):.1f}° → {np.mean(b):.1f}°" for a, b in zip(first, last, strict=True)),
        )
    Console(width=118).print(table)


def picture(path: Path, trainings: Sequence[Trained]) -> None:
    """Write a PNG with one chart of angles per layer, all seeds, and the accuracy of each training at the right."""
    from experiments.lecture.drawing import figure, plain

    names = layers(trainings)
    colours = dict(zip(RULES, ("0.2", "tab:orange", "tab:red", "tab:purple", "tab:green", "tab:blue"), strict=True))
    made = figure(3.2 * (len(names) + 1), 3.9)
    made.suptitle("Angle between a rule's gradient and the true one, while the rule trains the net; a line a seed")
    *charts, last = made.subplots(1, len(names) + 1)
    for axes, name in zip(charts, names, strict=True):
        for t in trainings:
            steps = list(t.angles)
            label = t.rule if t.seed == 0 else None
            axes.plot(steps, [t.angles[s][name] for s in steps], color=colours[t.rule], linewidth=1.3, label=label)
        axes.axhline(90, color="0.8", linewidth=0.8, linestyle=":")
        axes.set_ylim(-5, 185)
        axes.set_yticks(range(0, 181, 30))
        plain(axes, name, "step", "degrees" if axes is charts[0] else "")
    for i, (rule, of) in enumerate(by_rule(trainings).items()):
        last.plot([t.accuracy for t in of], [-i] * len(of), "o", color=colours[rule], alpha=0.7, markersize=6)
    ran = list(by_rule(trainings))
    plain(last, "test accuracy", "", "")
    last.set_yticks([-i for i in range(len(ran))], ran)
    last.margins(y=0.15)
    made.legend(*charts[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ran), frameon=False)
    with replacing(path) as temporary:
        made.savefig(temporary, format="png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
