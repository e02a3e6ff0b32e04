"""Train a net with explicit backward rules: python -m experiments.train --help."""

import contextlib
import dataclasses
import functools
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli, process, terminal
from experiments.data import IN_FOLDERS, SOURCES, Batch, Batches, Dataset, batches, is_path, load, split_validation
from experiments.errors import CheckpointError, RunError, UsageError, WriteError, bad_value, check_packages, explain
from experiments.run_folder import Epoch, History, Run, as_json, best, check_folder, finite_or_none, locked, new_folder

if TYPE_CHECKING:  # importing jax takes a second, and --help does not need it
    import optax

    from experiments.training_loop import Metrics, Outcome, Step
    from jaxcnn import Serial, TrainState

PROG = "python -m experiments.train"
LEARNING_RATES = {"adam": 2e-3, "sgd": 5e-2}
DTYPES = ("float32", "bfloat16", "float16")
EVALUATION_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a net on labeled images, with the explicit backward rules of jaxcnn.

    The run's folder receives its options, environment, metrics, checkpoints, curves and the weights of the best epoch.
    Ctrl-C and SIGTERM save a checkpoint. A run that was interrupted or killed continues with --resume.
    """

    model: str = "lecture"
    """Net: lecture, mlp or lenet5."""
    data: str = "fashion-mnist-sample"
    """Images: fashion-mnist-sample (10,000, embedded), fashion-mnist (60,000), digits (8×8), idx (your own, in idx
    files), the path of a folder of PNG and JPEG files in one subfolder per class, or the path of an .npz file."""
    size: Annotated[int | None, arg(metavar="INT")] = None
    """Height and width to which the images of a folder are resized; if omitted, all must have one size."""
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
    dtype: str = "float32"
    """Dtype of activations and δ: float32, bfloat16 or float16. Parameters and loss are float32 in any case."""
    max_steps: Annotated[int | None, arg(metavar="INT")] = None
    """Maximum number of steps."""
    validation: float = 0.1
    """Share of the training images, by class, that choose the best epoch instead of training; 0 for none."""
    save_every: int = 1000
    """Steps between two checkpoints; there is also one after each epoch."""
    keep: int = 2
    """Number of checkpoints to keep, the newest ones; the best epoch's is kept as well."""
    norms_every: int = 100
    """Steps between two measurements of the norms of all gradients, activations and δ, by layer; 0 for none."""
    resume: Annotated[Path | None, arg(metavar="RUN")] = None
    """Folder of a run to continue. The options are those of the run; a different one is an error."""
    check_grads: FlagCreatePairsOff[bool] = False
    """Before training, compare the rules with autodiff on this net and its first batch; stop if they differ."""
    allocator: str = "tuned"
    """tuned: glibc keeps freed memory. stock: glibc's defaults, with which large steps on CPU are a third slower."""
    report: bool = True
    """Whether to write report.html at the end: one page with all figures and numbers of the run."""
    tensorboard: FlagCreatePairsOff[bool] = False
    """Write event files for TensorBoard into the run's folder; needs the extra tensorboard."""
    keep_compiled: FlagCreatePairsOff[bool] = False
    """Keep compiled programs in the user's cache, so that the next run of the same net starts faster."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the run, new or empty; if omitted, runs/<time>-<model>."""


MAY_DIFFER = (
    *("resume", "out", "data_dir", "save_every", "keep", "check_grads", "allocator", "keep_compiled"),
    *("report", "tensorboard"),
)
"""Options that do not change the results, so that --resume accepts other values than the run's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, train, argv, prog=PROG, defaults=defaults)


def defaults(config: Config) -> Config | None:
    """Return the options that apply where the command line has none: with --resume those of the run."""
    return None if config.resume is None else saved_options(config.resume)


def saved_options(folder: Path) -> Config:
    """Return the options of the run in `folder`, to resume it; raise CheckpointError if there is no such run."""
    from experiments.restore import read_config

    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise bad_value(UsageError, f"--resume {folder}", "the folder of a run", got)
    saved = read_config(Run(folder))
    names = [field.name for field in dataclasses.fields(Config)]
    missing = [name for name in names if name not in saved]
    if missing:
        got = f"one without {', '.join(missing)}"
        raise bad_value(CheckpointError, folder / "config.json", "the config of a run of this version", got)
    options = {name: saved[name] for name in names}
    data_dir = None if options["data_dir"] is None else Path(options["data_dir"])
    return Config(**{**options, "data_dir": data_dir, "out": None, "resume": folder})


def train(config: Config) -> int:
    """Validate the options, then train. Return 0, or 128 + the signal that ended the run.

    Raises:
        UsageError: An option is invalid, or differs from that of the run to resume.
        CheckpointError: The run to resume is damaged, or its data have changed.
        DataError: The images cannot be read.
        RunError: The training failed.
    """
    check(config)
    if config.resume is None:
        check_folder(config.out)
    else:
        check_resumable(config, config.resume)
    dataset = load(config.data, config.data_dir, config.size)
    chosen, validation = split(config, dataset)
    if config.batch_size > len(chosen):
        expected = f"at most {len(chosen)}, the training images of {dataset.name} without those for validation"
        raise bad_value(UsageError, "--batch-size", expected, config.batch_size)
    tuned = config.allocator == "tuned" and process.keep_freed_memory()
    if config.keep_compiled:
        process.keep_compiled_programs()
    net, table = build(config, dataset)

    steps = min(config.epochs * (len(chosen) // config.batch_size), config.max_steps or sys.maxsize)
    rate = config.learning_rate or LEARNING_RATES[config.optimizer]
    facts = {
        "versions": ", ".join(f"{name} {version}" for name, version in terminal.versions().items()),
        "device": terminal.describe_device(),
        "data": terminal.describe_data(dataset),
        "validation": f"{len(validation):,} of the training images",
        "training": f"{config.model}, {steps:,} steps of {config.batch_size} images, {config.optimizer} at {rate:g}",
        "seed": str(config.seed),
        "memory": "freed memory is kept (--allocator tuned)" if tuned else "the allocator's defaults",
    }
    with contextlib.ExitStack() as stack:
        if config.resume is None:
            record = describe(config, facts, dataset, rate)
            files = {"config.json": as_json(record), "environment.json": as_json(environment())}
            folder = stack.enter_context(new_folder(config.out, config.model, files=files))
        else:
            folder = config.resume.absolute()
            stack.enter_context(locked(folder))
            original = dataclasses.replace(config, resume=None, out=folder)
            record = describe(original, facts, dataset, rate)
        print(terminal.banner(facts), table, sep="\n\n", end="\n\n", flush=True)
        return fit(config, net, dataset, Run(folder), steps, rate, record)


def check_resumable(config: Config, folder: Path) -> None:
    """Raise UsageError if the run in `folder` cannot be resumed with these options."""
    from experiments.restore import read_config

    saved, run = saved_options(folder), read_config(Run(folder))
    if config.out is not None:
        raise bad_value(UsageError, "--out", "omitted with --resume, which continues in the run's folder", config.out)
    for field in dataclasses.fields(Config):
        wanted, got = getattr(saved, field.name), getattr(config, field.name)
        if field.name not in MAY_DIFFER and got != wanted:
            flag = f"--{field.name.replace('_', '-')}"
            raise bad_value(UsageError, flag, f"{wanted}, as in the run to resume, or omitted", got)
    if run.get("end") == "finished":
        raise bad_value(UsageError, f"--resume {folder}", "a run that has not finished", "one that has")


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
        0, or 128 + the number of the signal that ended the run.

    Raises:
        RunError: The gradients differ, a metric is not finite, or a file cannot be written.
        CheckpointError: The run to resume is damaged, or its data have changed.
    """
    import jax

    import jaxcnn
    from experiments import checkpoints, event_files, report, training_loop, training_state, watch
    from experiments.restore import Trained

    optimizer = make_optimizer(config.optimizer, rate, steps)
    loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    state = jaxcnn.TrainState.create(net, optimizer, jax.random.key(config.seed), dataset.image_shape)
    chosen, held_out = split(config, dataset)
    training = Batches(dataset.train_images, dataset.train_labels, chosen, config.batch_size, seed=config.seed)
    validation = dataset.train_images[held_out], dataset.train_labels[held_out]
    checkpoints_folder = run.folder / "checkpoints"
    options = training_options(config, record, steps)

    def evaluate(params: Any, examples: Batch = validation) -> dict[str, float]:
        images, labels = examples
        return jaxcnn.evaluate(net, loss, params, batches(images, labels, EVALUATION_BATCH))

    first_step, history = 0, History()
    if config.resume is not None:
        check_data(run, dataset)
        restored = training_state.restore_newest(checkpoints_folder, state, options)
        if restored is not None:
            state, first_step, history = restored.state, restored.step, restored.history
        print(f"resumed after step {first_step} of {steps}", flush=True)
        run.rewind(history, first_step)
        run.describe(record)
        run.add_environment(environment())

    if config.check_grads:
        check_gradients(net, state, training(first_step % steps))
    step = compiled_step(config, net, optimizer, state, training(0), first_step, steps)

    events = event_files.EventFiles(run.folder, first_step) if config.tensorboard else None

    def log(records: Sequence[Mapping[str, Any]]) -> None:
        run.log(records)
        if events is not None:
            events.log(records)

    def save(state: "TrainState", step: int, history: History) -> None:
        if events is not None and history.epochs and history.epochs[-1].step == step:
            events.end_epoch(history.epochs[-1])
        row = best(history.epochs)
        if row is None or row.step == step:
            run.save(history.epochs, state.params, step, record)
        else:
            run.save_metrics(history.epochs)
        training_state.save(checkpoints_folder, state, step, history, options, config.keep)

    resume_command = f"python -m experiments.train --resume {shlex.quote(str(relative(run.folder)))}"
    try:
        began = time.perf_counter()
        with terminal.progress(steps) as progress:
            outcome = training_loop.fit(
                step,
                state,
                training,
                evaluate if len(held_out) else None,
                max_steps=steps,
                per_epoch=training.per_epoch,
                batch_size=config.batch_size,
                progress=progress,
                save=save,
                describe=lambda row: terminal.describe_epoch(row, config.epochs),
                log=log,
                save_every=config.save_every,
                first_step=first_step,
                history=history,
            )
        wall = time.perf_counter() - began
        row = best(outcome.history.epochs)
        if row is None:
            run.save(outcome.rows, outcome.params, outcome.step, record)
        end: dict[str, Any] = {"end": outcome.end, "steps": outcome.step}
        tested: dict[str, float] | None = None
        if outcome.end == "finished":
            params = outcome.params if row is None else best_params(run, row.step, outcome, checkpoints_folder)
            tested = evaluate(params, (dataset.test_images, dataset.test_labels))
            run.save(outcome.rows, params, outcome.step if row is None else row.step, record)
            best_step = outcome.step if row is None else row.step
            end |= {"best_step": best_step} | {f"test_{name}": finite_or_none(x) for name, x in tested.items()}
        run.save_metrics(outcome.rows)
        run.plot(outcome.rows, f"{config.model} on {config.data}, seed {config.seed}")
        run.describe({**record, **end})
        print(summarize(outcome.rows, wall, tested), f"results in {run.folder}", sep="\n", flush=True)
        if config.report and outcome.end != "interrupted":  # a process that is terminated has little time
            report.write(run.folder, Trained(config.model, net, checkpoints.load(run.weights, state.params), dataset))
    except KeyboardInterrupt:  # a second Ctrl-C, which does not wait for the current step
        print(f"{PROG}: interrupted; {run.saved_weights()}; to continue: {resume_command}", file=sys.stderr)
        return cli.INTERRUPTED
    except BrokenPipeError:
        raise
    except (OSError, WriteError) as error:
        hint = f"{run.saved_weights()}; to continue: {resume_command}"
        raise RunError(f"{explain(error)}; {hint}") from error

    if outcome.end == "diverged":
        layers = jaxcnn.make_train_step(net, loss, optimizer, compute_dtype=config.dtype, measure=watch.norms_by_layer)
        where = watch.locate(net, layers, outcome.state, training, outcome.step, outcome.bad_step)
        hint = f"try a --learning-rate below {rate:g}; the weights after step {saved_step(run)} are saved"
        name = f"{outcome.bad_metric} of step {outcome.bad_step}"
        raise bad_value(RunError, name, "finite", outcome.bad_value, hint + (f"; {where}" if where else ""))
    if outcome.end == "interrupted":
        verb = "interrupted" if outcome.signal == signal.SIGINT else "terminated"
        line = f"{verb} after step {outcome.step}; its checkpoint is saved; to continue: {resume_command}"
        print(f"{PROG}: {line}", file=sys.stderr)
        return 128 + outcome.signal
    if tested is not None and not math.isfinite(tested["loss"]):
        raise bad_value(RunError, "test loss", "finite", tested["loss"])
    return 0


def relative(folder: Path) -> Path:
    """Return the shortest path of a folder that is valid in the current folder."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def split(config: Config, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the images for training and for validation: the set's own, or those of --validation."""
    if dataset.validation is None or not config.validation:
        return split_validation(dataset.train_labels, config.validation, config.seed)
    return np.setdiff1d(np.arange(len(dataset.train_labels)), dataset.validation), dataset.validation


def training_options(config: Config, record: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the options that a checkpoint depends on: those that change the results, the data, and the steps."""
    options = {name: record[name] for name in dataclasses.asdict(config) if name not in MAY_DIFFER}
    return {**options, "data_sha256": record["data_sha256"], "total steps": steps}


def check_data(run: Run, dataset: Dataset) -> None:
    """Raise CheckpointError if the images are not those that the run has started with."""
    from experiments.restore import read_config

    expected = read_config(run)["data_sha256"]
    if dataset.sha256 != expected:
        name = f"data of {run.folder}"
        raise bad_value(CheckpointError, name, f"the set with SHA-256 {expected}", dataset.sha256)


def compiled_step(
    config: Config,
    net: "Serial",
    optimizer: "optax.GradientTransformation",
    state: "TrainState",
    batch: Batch,
    first_step: int,
    steps: int,
) -> "Step":
    """Compile the steps, and return a function that measures norms by layer in every `config.norms_every`-th one."""
    import jaxcnn
    from experiments import watch

    loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    every = config.norms_every
    # Before the first step, so that compile time is reported separately from training time.
    print("compiling … ", end="", flush=True)
    began = time.perf_counter()
    make_step = functools.partial(jaxcnn.make_train_step, net, loss, optimizer, compute_dtype=config.dtype)
    plain = by_layer = compiled(make_step(measure=watch.norms), state, batch)
    if every and first_step // every != steps // every:
        by_layer = compiled(make_step(measure=watch.norms_by_layer), state, batch)
    print(f"{time.perf_counter() - began:.1f} s", flush=True)
    taken = first_step

    def step(state: "TrainState", batch: Batch) -> "tuple[TrainState, Metrics]":
        nonlocal taken
        taken += 1
        return (by_layer if every and taken % every == 0 else plain)(state, batch)

    return step


def best_params(run: Run, step: int, outcome: "Outcome", folder: Path) -> Any:
    """Return the parameters after `step`, from the weights file, or from a checkpoint if the file has others."""
    from experiments import checkpoints, training_state

    if step == outcome.step:
        return outcome.params
    if saved_step(run) == step:
        return checkpoints.load(run.weights, outcome.params)
    path = folder / f"{step:08d}"
    training_state.verify(path)
    return training_state.load(path, outcome.state).params


def saved_step(run: Run) -> int | None:
    """Return the step of the weights file, or None if there is none."""
    from experiments import checkpoints

    step = checkpoints.metadata(run.weights).get("step")
    return None if step is None else int(step)


def environment() -> dict[str, Any]:
    """Return the contents of environment.json: the exact command, the versions, and what else results depend on."""
    prefixes = ("JAX_", "XLA_", "JAXCNN_", "CUDA_VISIBLE", "OMP_")
    return {
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": terminal.versions(),
        "device": terminal.describe_device(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)},
    }


def check(config: Config) -> None:
    """Raise UsageError for every error that can be detected before anything is read or created."""
    from experiments.models import MODELS

    if not is_path(config.data):
        cli.check_choice("--data", config.data, SOURCES)
    cli.check_count("--size", config.size)
    if config.size is not None and not is_path(config.data):
        raise bad_value(UsageError, "--size", "omitted unless --data is a folder of images", config.size)
    cli.check_choice("--optimizer", config.optimizer, LEARNING_RATES)
    cli.check_choice("--dtype", config.dtype, DTYPES)
    cli.check_choice("--model", config.model, MODELS)
    cli.check_choice("--allocator", config.allocator, process.ALLOCATORS)
    for flag, number in {
        "--epochs": config.epochs,
        "--batch-size": config.batch_size,
        "--max-steps": config.max_steps,
        "--save-every": config.save_every,
        "--keep": config.keep,
    }.items():
        cli.check_count(flag, number)
    if config.tensorboard:
        check_packages("tensorboard")
    if config.norms_every < 0:
        raise bad_value(UsageError, "--norms-every", "at least 0", config.norms_every)
    if not 0 <= config.validation < 1:
        raise bad_value(UsageError, "--validation", "from 0 up to, but not including, 1", config.validation)
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
    """Compile a jitted step before its first call."""
    import jax

    return cast(jax.stages.Wrapped, jitted).lower(state, batch).compile()


def describe(config: Config, facts: dict[str, str], dataset: Dataset, rate: float) -> dict[str, Any]:
    """Return the contents of config.json: the options (with `rate` filled in), data, device and versions."""
    return {
        **dataclasses.asdict(config),
        "data": str(Path(config.data).absolute()) if is_path(config.data) else config.data,
        "learning_rate": rate,
        "data_dir": None if config.data_dir is None else config.data_dir.absolute(),
        "data_source": dataset.source,
        "data_sha256": dataset.sha256,
        "device": facts["device"],
        "versions": terminal.versions(),
    }


def summarize(rows: Sequence[Epoch], wall: float, tested: Mapping[str, float] | None) -> str:
    """Return a summary of the run in a few lines.

    Args:
        rows: The epochs of the run.
        wall: Seconds from the first step to the last evaluation, in this process.
        tested: The test loss and accuracy, or None if the run has not finished.
    """
    if not rows:
        return "no epoch was finished"
    seconds = sum(row.seconds for row in rows)
    images = sum(row.seconds * row.images_per_second for row in rows)
    lines = [
        f"trained {rows[-1].step:,} steps in {seconds:.1f} s, {images / seconds:,.0f} images/s; {wall:.1f} s in all"
    ]
    row = best(rows)
    if row is not None:
        lines.append(f"validation accuracy {row.validation_accuracy:.4f} after epoch {row.epoch}, the best one")
    test = "not measured, because the run has not finished" if tested is None else f"{tested['accuracy']:.4f}"
    return "\n" + "\n".join([*lines, f"test accuracy {test}"])


if __name__ == "__main__":
    sys.exit(main())
