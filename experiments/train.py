"""Train a net with explicit backward rules: python -m experiments.train --help."""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli, process, report
from experiments.data import IN_FOLDERS, SOURCES, Batch, Dataset, batches, load, shuffled_batches
from experiments.errors import RunError, UsageError, WriteError, bad_value, explain
from experiments.run_folder import Epoch, Run, check_folder, new_folder

if TYPE_CHECKING:  # importing jax takes a second, and --help does not need it
    import optax

    from experiments.training_loop import Step
    from jaxcnn import Serial, TrainState

PROG = "python -m experiments.train"
LEARNING_RATES = {"adam": 2e-3, "sgd": 5e-2}
EVALUATION_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a net on labeled images, with the explicit backward rules of jaxcnn.

    The run's folder receives config.json, metrics.csv, curves.png and weights.safetensors.
    """

    model: str = "lecture"
    """Net: lecture, mlp or lenet5."""
    data: str = "fashion-mnist-sample"
    """Images: fashion-mnist-sample (10,000, embedded), fashion-mnist (60,000), digits (8×8), or idx (your own)."""
    data_dir: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of idx files for --data idx or fashion-mnist; if omitted, the system's copy, the cache, or a download."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step."""
    optimizer: str = "adam"
    """Optimizer: adam, or sgd with momentum 0.9. The learning rate decays to 0 along a cosine."""
    learning_rate: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Learning rate of the first step; if omitted, 0.002 for adam, 0.05 for sgd."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the dropout."""
    max_steps: Annotated[int | None, arg(metavar="INT")] = None
    """Maximum number of steps."""
    check_grads: FlagCreatePairsOff[bool] = False
    """Before training, compare the rules with autodiff on this net and its first batch; stop if they differ."""
    allocator: str = "tuned"
    """tuned: glibc keeps freed memory. stock: glibc's defaults, with which large steps on CPU are a third slower."""
    keep_compiled: FlagCreatePairsOff[bool] = False
    """Keep compiled programs in the user's cache, so that the next run of the same net starts faster."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the run, new or empty; if omitted, runs/<time>-<model>."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, train, argv, prog=PROG)


def train(config: Config) -> int:
    """Validate the options, then train. Return 0, or 130 after Ctrl-C; raise UsageError, DataError or RunError."""
    check(config)
    check_folder(config.out)
    dataset = load(config.data, config.data_dir)
    examples = len(dataset.train_labels)
    if config.batch_size > examples:
        expected = f"at most {examples}, the size of {dataset.name}"
        raise bad_value(UsageError, "--batch-size", expected, config.batch_size)
    tuned = config.allocator == "tuned" and process.keep_freed_memory()
    if config.keep_compiled:
        process.keep_compiled_programs()
    net, table = build(config, dataset)

    steps = min(config.epochs * (examples // config.batch_size), config.max_steps or sys.maxsize)
    rate = config.learning_rate or LEARNING_RATES[config.optimizer]
    facts = {
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions().items()),
        "device": report.describe_device(),
        "data": report.describe_data(dataset),
        "training": f"{config.model}, {steps:,} steps of {config.batch_size} images, {config.optimizer} at {rate:g}",
        "seed": str(config.seed),
        "memory": "freed memory is kept (--allocator tuned)" if tuned else "the allocator's defaults",
    }
    with new_folder(config.out, config.model) as folder:
        print(report.banner(facts), table, sep="\n\n", end="\n\n", flush=True)
        return fit(config, net, dataset, Run(folder), steps, rate, describe(config, facts, dataset, rate))


def fit(
    config: Config, net: "Serial", dataset: Dataset, run: Run, steps: int, rate: float, record: Mapping[str, Any]
) -> int:
    """Compile, train, and save the results.

    Args:
        config: The options.
        net: The net to train.
        dataset: The training and test images.
        run: Destination of the results; its folder exists.
        steps: Total number of steps.
        rate: The learning rate of the first step.
        record: Initial contents of config.json. At the end, the outcome of the run is added.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        RunError: The gradients differ, the loss is not finite, or a file cannot be written.
    """
    import jax

    import jaxcnn
    from experiments import training_loop

    optimizer = make_optimizer(config.optimizer, rate, steps)
    loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    state = jaxcnn.TrainState.create(net, optimizer, jax.random.key(config.seed), dataset.image_shape)

    def epoch(number: int) -> Iterator[Batch]:
        images, labels = dataset.train_images, dataset.train_labels
        return shuffled_batches(images, labels, config.batch_size, seed=config.seed, epoch=number)

    def evaluate(params: Any) -> dict[str, float]:
        return jaxcnn.evaluate(net, loss, params, batches(dataset.test_images, dataset.test_labels, EVALUATION_BATCH))

    if config.check_grads:
        check_gradients(net, state, next(epoch(1)))
    step = compiled(jaxcnn.make_train_step(net, loss, optimizer), state, next(epoch(1)))

    try:
        run.describe(record)
        began = time.perf_counter()
        with report.progress(steps) as progress:
            outcome = training_loop.fit(
                step,
                state,
                epoch,
                evaluate,
                count=config.epochs,
                batch_size=config.batch_size,
                max_steps=steps,
                progress=progress,
                on_epoch=run.save,
                describe=lambda row: report.describe_epoch(row, config.epochs),
            )
        wall = time.perf_counter() - began
        run.save(outcome.rows, outcome.params, outcome.step)
        run.describe({**record, "end": outcome.end, "steps": outcome.step})
        run.plot(outcome.rows, f"{config.model} on {config.data}, seed {config.seed}")
        print(summarize(outcome.rows, wall), f"results in {run.folder}", sep="\n", flush=True)
    except KeyboardInterrupt:  # a second Ctrl-C, which does not wait for the current step
        print(f"{PROG}: interrupted; {run.saved_weights()}", file=sys.stderr)
        return cli.INTERRUPTED
    except BrokenPipeError:
        raise
    except (OSError, WriteError) as error:
        raise RunError(f"{explain(error)}; {run.saved_weights()}") from error

    if outcome.end == "diverged":
        hint = f"try a --learning-rate below {rate:g}; the weights after step {outcome.step} are saved"
        raise bad_value(RunError, f"loss of step {outcome.bad_step}", "finite", outcome.bad_loss, hint)
    if outcome.end == "interrupted":
        print(f"{PROG}: interrupted after step {outcome.step}; its weights are saved", file=sys.stderr)
        return cli.INTERRUPTED
    return 0


def check(config: Config) -> None:
    """Raise UsageError for every error that can be detected before anything is read or created."""
    from experiments.models import MODELS

    cli.check_choice("--data", config.data, SOURCES)
    cli.check_choice("--optimizer", config.optimizer, LEARNING_RATES)
    cli.check_choice("--model", config.model, MODELS)
    cli.check_choice("--allocator", config.allocator, process.ALLOCATORS)
    for flag, number in {
        "--epochs": config.epochs,
        "--batch-size": config.batch_size,
        "--max-steps": config.max_steps,
    }.items():
        cli.check_count(flag, number)
    if not 0 <= config.seed < 2**32:
        raise bad_value(UsageError, "--seed", f"from 0 to {2**32 - 1}", config.seed)
    rate = config.learning_rate
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise bad_value(UsageError, "--learning-rate", "a finite number > 0", rate)
    if config.data_dir is not None and config.data not in IN_FOLDERS:
        expected = f"omitted unless --data is {' or '.join(IN_FOLDERS)}"
        raise bad_value(UsageError, "--data-dir", expected, config.data_dir)
    if config.data_dir is None and config.data == "idx":
        raise bad_value(UsageError, "--data-dir", "the folder of the idx files if --data is idx", "none")


def build(config: Config, dataset: Dataset) -> "tuple[Serial, str]":
    """Return the net and its table of layers; raise UsageError if the images are too small for it."""
    from experiments.models import MODELS

    classes = len(dataset.class_names)
    net = MODELS[config.model](classes)
    try:
        return net, str(net.summary(dataset.image_shape))
    except ValueError as error:
        possible = [name for name, make in MODELS.items() if _accepts(make(classes), dataset.image_shape)]
        expected = f"a net for the images of {dataset.name} ({', '.join(possible) or 'none'})"
        raise bad_value(UsageError, "--model", expected, f"{config.model} ({error})") from None


def _accepts(net: "Serial", shape: tuple[int, ...]) -> bool:
    try:
        net.summary(shape)
    except ValueError:
        return False
    return True


def make_optimizer(name: str, rate: float, steps: int) -> "optax.GradientTransformation":
    """Return the optimizer called `name`, one of LEARNING_RATES, whose learning rate decays to 0 within `steps`."""
    import optax

    schedule = optax.cosine_decay_schedule(rate, steps)
    return optax.adam(schedule) if name == "adam" else optax.sgd(schedule, momentum=0.9)


def check_gradients(net: "Serial", state: "TrainState", batch: Batch) -> None:
    """Print the difference between rules and autodiff for each parameter; raise RunError if any is too large."""
    import jaxcnn
    from experiments import gradients

    loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    differences = gradients.compare(net, loss, state.params, batch, state.key)
    print("largest relative difference between rules and autodiff")
    print("\n".join(f"  {name:<16} {difference:.1e}" for name, difference in differences.items()), end="\n\n")
    wrong = [name for name, difference in differences.items() if not difference <= gradients.TOLERANCE]
    if wrong:
        got = f"{max(differences[name] for name in wrong):.1e} for {', '.join(wrong)}"
        raise bad_value(RunError, "gradient differences", f"at most {gradients.TOLERANCE:g}", got)


def compiled(jitted: "Step", state: "TrainState", batch: Batch) -> "Step":
    """Compile a jitted step before its first call, so that compile time is reported separately from training time."""
    import jax

    print("compiling … ", end="", flush=True)
    began = time.perf_counter()
    step = cast(jax.stages.Wrapped, jitted).lower(state, batch).compile()
    print(f"{time.perf_counter() - began:.1f} s", flush=True)
    return step


def describe(config: Config, facts: dict[str, str], dataset: Dataset, rate: float) -> dict[str, Any]:
    """Return the contents of config.json: the options (with `rate` filled in), data, device and versions."""
    return {
        **dataclasses.asdict(config),
        "learning_rate": rate,
        "data_dir": None if config.data_dir is None else config.data_dir.absolute(),
        "data_source": dataset.source,
        "data_sha256": dataset.sha256,
        "device": facts["device"],
        "versions": report.versions(),
    }


def summarize(rows: Sequence[Epoch], wall: float) -> str:
    """Return a summary of the run in a line or two; `wall` is the seconds from first step to last evaluation."""
    if not rows:
        return "no epoch was finished"
    seconds = sum(row.seconds for row in rows)
    images = sum(row.seconds * row.images_per_second for row in rows)
    tested = [row for row in rows if math.isfinite(row.test_accuracy)]
    if not tested:
        accuracy = "not measured, because no epoch was finished"
    elif tested[-1] is rows[-1]:
        accuracy = f"{tested[-1].test_accuracy:.4f}"
    else:
        accuracy = f"{tested[-1].test_accuracy:.4f} after epoch {tested[-1].epoch}, the last finished one"
    return (
        f"\ntrained {rows[-1].step:,} steps in {seconds:.1f} s, {images / seconds:,.0f} images/s; "
        f"{wall - seconds:.1f} s for evaluating and saving\n"
        f"test accuracy {accuracy}"
    )


if __name__ == "__main__":
    sys.exit(main())
