"""Train a net with explicit backward rules: python -m experiments.train --help."""

import contextlib
import dataclasses
import functools
import json
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

from experiments import cli, data, devices, private, process, processes, recipe, seeds, terminal
from experiments.data import Batches, DataOptions, is_path, load, split, training_batches
from experiments.dataset import Batch, Dataset, scaled
from experiments.devices import DeviceOptions, Placement
from experiments.errors import (
    CheckpointError,
    DataError,
    RunError,
    UsageError,
    WriteError,
    bad_value,
    check_packages,
    explain,
)
from experiments.private import Mechanism, PrivacyOptions
from experiments.processes import ProcessOptions
from experiments.recipe import RecipeOptions
from experiments.run_folder import (
    Epoch,
    History,
    Run,
    Unwritten,
    as_json,
    best,
    check_folder,
    check_run,
    finite_or_none,
    locked,
    new_folder,
)

if TYPE_CHECKING:  # importing jax takes a second, and --help does not need it
    import optax

    from experiments.evaluation import Evaluation
    from experiments.training_loop import Metrics, Outcome, Step
    from jaxcnn import Serial, TrainState
    from jaxcnn.net import Loss

PROG = "python -m experiments.train"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Option of the net."""

    model: str = "lecture"
    """Net: lecture, mlp, lenet5, small (79,000 parameters), resnet (ResNet-18), resnet-gn (with group norm), vgg,
    mobile, or module:function, which returns a net of jaxcnn, Flax or Equinox, or a pair (init, apply)."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of the run: its length, its checkpoints, its folder."""

    seed: int = 0
    """Seed of the initial weights, the order of the images, their augmentation, and the dropout."""
    seeds: int = 1
    """Number of runs, with consecutive seeds from --seed; the mean of their test accuracies is printed."""
    dtype: str = "float32"
    """Dtype of activations and δ: float32, bfloat16 or float16. Parameters and loss are float32 in any case."""
    max_steps: Annotated[int | None, arg(metavar="INT")] = None
    """Maximum number of steps."""
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


# The fields of the last class come first.
@dataclasses.dataclass(frozen=True)
class Config(RunOptions, ProcessOptions, DeviceOptions, PrivacyOptions, RecipeOptions, DataOptions, ModelOptions):
    """Train a net on labeled images, with the explicit backward rules of jaxcnn.

    The run's folder receives its options, environment, metrics, checkpoints, curves and the weights of the best epoch.
    Ctrl-C and SIGTERM save a checkpoint. A run that was interrupted or killed continues with --resume.
    """


MAY_DIFFER = (
    *("resume", "out", "data_dir", "stream", "device", "devices", "save_every", "keep", "check_grads", "allocator"),
    *("keep_compiled", "report", "tensorboard"),
    *(field.name for field in dataclasses.fields(ProcessOptions)),
)
"""Options that change the results by rounding at most, so that --resume accepts other values than the run's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return processes.run(lambda: cli.run(Config, train, argv, prog=PROG, defaults=defaults))


def defaults(config: Config) -> Config | None:
    """Return the options that apply where the command line has none: with --resume those of the run."""
    return None if config.resume is None else saved_options(config.resume)


def saved_options(folder: Path) -> Config:
    """Return the options of the run in `folder`, to resume it; raise CheckpointError if there is no such run."""
    from experiments.restore import read_config

    check_run(folder, f"--resume {folder}", UsageError)
    saved = read_config(Run(folder))
    names = [field.name for field in dataclasses.fields(Config)]
    missing = [name for name in names if name not in saved]
    if missing:
        got = f"one without {', '.join(missing)}"
        raise bad_value(CheckpointError, folder / "config.json", "the config of a run of this version", got)
    options = {name: saved[name] for name in names}
    options["data_dir"] = None if options["data_dir"] is None else Path(options["data_dir"])
    options["augment"] = tuple(options["augment"])
    options |= dataclasses.asdict(ProcessOptions())
    return Config(**{**options, "out": None, "resume": folder})


def train(config: Config) -> int:
    """Validate the options, then train once, or once per seed. Return 0, or 128 + the signal that ended a run.

    Raises:
        UsageError: An option is invalid, or differs from that of the run to resume.
        CheckpointError: The run to resume is damaged, or its data have changed.
        DataError: The images cannot be read.
        RunError: The training failed, or the coordinator of several processes cannot be reached.
    """
    check(config)
    # Before the devices are looked for, because XLA's threads then start, and each might get an arena of its own.
    tuned = config.allocator == "tuned" and process.keep_freed_memory()
    if config.keep_compiled:
        process.keep_compiled_programs()
    processes.start(config)
    placement = devices.choose(config)
    devices.check(config, config.batch_size, processes.count())
    if config.seeds > 1:
        return seeds.train(config, lambda each: train_one(each, placement, tuned))
    if config.resume is not None:
        check_resumable(config, config.resume)
    elif processes.index() == 0:
        check_folder(config.out)
    return train_one(config, placement, tuned)


def train_one(config: Config, placement: Placement, tuned: bool) -> int:
    """Train once, or continue a run.

    Args:
        config: The options, which have been checked.
        placement: Where to put the state and the batches.
        tuned: Whether the allocator keeps freed memory.

    Returns:
        0, or 128 + the number of the signal that ended the run.
    """
    dataset = load(config.data, config.data_dir, config.size, config.stream)
    chosen, validation = split(config, dataset, config.seed)
    if config.batch_size > len(chosen):
        expected = f"at most {len(chosen)}, the training images of {dataset.name} without those for validation"
        raise bad_value(UsageError, "--batch-size", expected, config.batch_size)
    net, table = build(config, dataset)
    mechanism = private.mechanism(config, config.batch_size, len(chosen), placement.devices)

    steps = min(config.epochs * (len(chosen) // config.batch_size), config.max_steps or sys.maxsize)
    of_processes = f" of {processes.count()} processes" if processes.count() > 1 else ""
    split_over = f"; each batch is split over {placement.devices}{of_processes}" if placement.devices > 1 else ""
    facts = {
        "versions": ", ".join(f"{name} {version}" for name, version in terminal.versions().items()),
        "device": terminal.describe_device() + split_over,
        "data": terminal.describe_data(dataset),
        "validation": f"{len(validation):,} of the training images",
        "training": f"{config.model}, {steps:,} steps of {config.batch_size} images, {recipe.describe(config)}",
        "seed": str(config.seed),
        "memory": "freed memory is kept (--allocator tuned)" if tuned else "the allocator's defaults",
    }
    if mechanism is not None:
        facts["privacy"] = mechanism.describe(steps)
    with contextlib.ExitStack() as stack:
        if processes.index():
            folder = Path() if config.resume is None else config.resume.absolute()
            record = describe(config, dataset)
        elif config.resume is None:
            record = describe(config, dataset)
            files = {"config.json": as_json(record), "environment.json": as_json(environment())}
            folder = stack.enter_context(new_folder(config.out, seeds.folder_name(config.model), files=files))
        else:
            folder = config.resume.absolute()
            stack.enter_context(locked(folder))
            original = dataclasses.replace(config, resume=None, out=folder)
            record = describe(original, dataset)
        print(terminal.banner(facts), table, sep="\n\n", end="\n\n", flush=True)
        folder = Path(processes.text_from_first(str(folder)))
        run = Unwritten(folder) if processes.index() else Run(folder)
        return fit(config, net, dataset, run, steps, record, placement, mechanism)


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
    config: Config,
    net: "Serial",
    dataset: Dataset,
    run: Run,
    steps: int,
    record: Mapping[str, Any],
    placement: Placement,
    mechanism: Mechanism | None = None,
) -> int:
    """Compile, train, and save the results.

    Args:
        config: The options.
        net: The net to train.
        dataset: The training and test images.
        run: Destination of the results; its folder exists.
        steps: Total number of steps.
        record: Initial contents of config.json. At the end, the outcome of the run is added.
        placement: Where to put the state and the batches.
        mechanism: What ε depends on, or None if the training is not private.

    Returns:
        0, or 128 + the number of the signal that ended the run.

    Raises:
        RunError: The gradients differ, a metric is not finite, or a file cannot be written.
        CheckpointError: The run to resume is damaged, or its data have changed.
    """
    import jax

    import jaxcnn
    from experiments import (
        augmentation,
        checkpoints,
        event_files,
        gradients,
        own_nets,
        report,
        training_loop,
        training_state,
        watch,
    )
    from experiments.evaluation import Evaluation
    from experiments.restore import Trained

    chosen, held_out = split(config, dataset, config.seed)
    first, largest = processes.index() == 0, dataset.largest
    training: Batches | private.PoissonBatches
    if mechanism is None:
        part = placement.part(config.batch_size)
        training = training_batches(dataset, chosen, config.batch_size, seed=config.seed, part=part)
    else:
        images = dataset.train_pixels, dataset.train_labels
        training = private.PoissonBatches(*images, chosen, mechanism, placement.part(mechanism.capacity))
    of_optimizer = config if mechanism is None else dataclasses.replace(config, clip_norm=0.0)
    optimizer = recipe.make_optimizer(of_optimizer, steps, training.per_epoch, net)
    loss = recipe.make_loss(config.label_smoothing)
    state = jaxcnn.TrainState.create(net, optimizer, jax.random.key(config.seed), dataset.image_shape)
    if mechanism is not None:
        state = dataclasses.replace(state, key=private.secret_key())
    in_weights = record if mechanism is None else private.public(record)
    checkpoints_folder = run.folder / "checkpoints"
    options = training_options(config, record, steps)
    evaluation = Evaluation(net, config, dataset.train_pixels[chosen], dataset.largest, placement)
    classes = len(dataset.class_names)

    def batch(step: int) -> Batch:
        plain, names = placement.join(training(step)), config.augment
        if not names:
            return plain
        return placement.join(augmentation.augmented(names, config.seed, step, plain, classes, largest))

    def validate(state: "TrainState") -> dict[str, float]:
        images, labels = dataset.train_pixels[held_out], dataset.train_labels[held_out]
        return evaluation.evaluate(evaluation.params(state), images, labels)

    first_step, history = 0, History()
    if config.resume is not None:
        check_data(run, dataset)
        restored = training_state.restore_newest(checkpoints_folder, state, options) if first else None
        if restored is not None:
            state, first_step, history = restored.state, restored.step, restored.history
        first_step = int(processes.from_first(np.int64(first_step)))
        history = History.from_json(json.loads(processes.text_from_first(json.dumps(history.as_json()))))
        print(f"resumed after step {first_step} of {steps}", flush=True)
        run.rewind(history, first_step)
        run.describe(record)
        run.add_environment(environment())

    state = placement.replicate(processes.from_first(state))
    if isinstance(training, private.PoissonBatches):
        training.draw_from(state.key)
    if config.check_grads:
        checked = loss if mechanism is None else private.masked(loss)
        examples, targets = batch(first_step % steps)
        gradients.check(net, checked, state.params, (scaled(examples, largest), targets), state.key)
    step = compiled_step(config, net, loss, optimizer, state, batch(0), first_step, steps, largest, mechanism)

    events = event_files.EventFiles(run.folder, first_step) if config.tensorboard and first else None

    def log(records: Sequence[Mapping[str, Any]]) -> None:
        if mechanism is not None and first:
            records = mechanism.logged(records, training.per_epoch, steps)
        run.log(records)
        if events is not None:
            events.log(records)

    def describe_epoch(row: Epoch) -> str:
        spent = f"   ε {mechanism.epsilon(row.step):.2f}" if mechanism is not None and first else ""
        return terminal.describe_epoch(row, config.epochs) + spent

    def save(state: "TrainState", step: int, history: History) -> None:
        if events is not None and history.epochs and history.epochs[-1].step == step:
            events.end_epoch(history.epochs[-1])
        row = best(history.epochs)
        if row is None or row.step == step:
            run.save(history.epochs, evaluation.params(state), step, in_weights)
        else:
            run.save_metrics(history.epochs)
        if first:
            training_state.save(checkpoints_folder, state, step, history, options, config.keep)

    resume_command = f"python -m experiments.train --resume {shlex.quote(str(relative(run.folder)))}"
    processes.continue_with(resume_command)
    try:
        began = time.perf_counter()
        with terminal.progress(steps) as progress:
            outcome = training_loop.fit(
                step,
                state,
                batch,
                validate if len(held_out) else None,
                max_steps=steps,
                per_epoch=training.per_epoch,
                batch_size=config.batch_size,
                progress=progress,
                save=save,
                describe=describe_epoch,
                log=log,
                save_every=config.save_every,
                first_step=first_step,
                history=history,
                agree=processes.largest if processes.count() > 1 else None,
            )
        wall = time.perf_counter() - began
        row = best(outcome.history.epochs)
        if row is None:
            run.save(outcome.rows, evaluation.params(outcome.state), outcome.step, in_weights)
        end: dict[str, Any] = {"end": outcome.end, "steps": outcome.step}
        if mechanism is not None:
            end["privacy"] = mechanism.as_json(outcome.step)
        tested: dict[str, float] | None = None
        if outcome.end == "finished":
            best_step = outcome.step if row is None else row.step
            params = best_params(run, best_step, outcome, checkpoints_folder, evaluation, placement)
            tested = evaluation.evaluate(params, dataset.test_pixels, dataset.test_labels)
            run.save(outcome.rows, params, best_step, in_weights)
            end |= {"best_step": best_step} | {f"test_{name}": finite_or_none(x) for name, x in tested.items()}
        run.save_metrics(outcome.rows)
        run.plot(outcome.rows, f"{config.model} on {config.data}, seed {config.seed}")
        run.describe({**record, **end})
        spent = [] if mechanism is None else [mechanism.describe(outcome.step)]
        print(summarize(outcome.rows, wall, tested), *spent, f"results in {run.folder}", sep="\n", flush=True)
        if config.report and first and outcome.end != "interrupted":  # a process that is terminated has little time
            like = own_nets.evaluated_shapes(net, dataset.image_shape)
            report.write(
                run.folder, Trained(config.model, net, checkpoints.load(run.weights, like), dataset.inputs, dataset)
            )
    except KeyboardInterrupt:  # a second Ctrl-C, which does not wait for the current step
        print(f"{PROG}: interrupted; {run.saved_weights()}; to continue: {resume_command}", file=sys.stderr)
        return cli.INTERRUPTED
    except BrokenPipeError:
        raise
    except (OSError, WriteError, DataError) as error:
        hint = f"{run.saved_weights()}; to continue: {resume_command}"
        raise RunError(f"{explain(error)}; {hint}") from error

    if outcome.end == "diverged":
        where = ""
        if mechanism is None:
            layers = watch.make_step(net, loss, optimizer, by_layer=True, dtype=config.dtype, largest=largest)
            where = watch.locate(net, layers, outcome.state, batch, outcome.step, outcome.bad_step)
        rate = record["learning_rate"]
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
    loss: "Loss",
    optimizer: "optax.GradientTransformation",
    state: "TrainState",
    batch: Batch,
    first_step: int,
    steps: int,
    largest: int,
    mechanism: Mechanism | None = None,
) -> "Step":
    """Compile the steps, and return a function that measures norms by layer in every `config.norms_every`-th one."""
    from experiments import watch

    every = config.norms_every if mechanism is None else 0
    # Before the first step, so that compile time is reported separately from training time.
    print("compiling … ", end="", flush=True)
    began = time.perf_counter()
    make_step = functools.partial(watch.make_step, net, loss, optimizer, dtype=config.dtype, largest=largest)
    if mechanism is None:
        step_without_norms = make_step(by_layer=False)
    else:
        step_without_norms = private.make_step(net, loss, optimizer, config.clip_norm, mechanism, largest)
    plain = by_layer = compiled(step_without_norms, state, batch)
    if every and first_step // every != steps // every:
        by_layer = compiled(make_step(by_layer=True), state, batch)
    print(f"{time.perf_counter() - began:.1f} s", flush=True)
    taken = first_step

    def step(state: "TrainState", batch: Batch) -> "tuple[TrainState, Metrics]":
        nonlocal taken
        taken += 1
        return (by_layer if every and taken % every == 0 else plain)(state, batch)

    return step


def best_params(
    run: Run, step: int, outcome: "Outcome", folder: Path, evaluation: "Evaluation", placement: Placement
) -> Any:
    """Return the parameters to evaluate after `step`: of the end, the weights file, or a checkpoint."""
    from experiments import checkpoints, training_state

    params = evaluation.params(outcome.state)
    if step == outcome.step:
        return params
    first = processes.index() == 0  # reads the file; then all processes make the same calls
    if processes.from_first(np.bool_(first and saved_step(run) == step)):
        return processes.from_first(checkpoints.load(run.weights, params) if first else params)
    path, state = folder / f"{step:08d}", outcome.state
    if first:
        training_state.verify(path)
        state = training_state.load(path, state)
    return evaluation.params(placement.replicate(processes.from_first(state)))


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
    from experiments import own_nets
    from experiments.models import MODELS

    data.check(config)
    recipe.check(config)
    private.check(config, config, config.dtype)
    processes.check(config)
    devices.check(config, config.batch_size, config.processes)
    cli.check_choice("--dtype", config.dtype, DTYPES)
    if own_nets.is_reference(config.model):
        own_nets.check_reference(config.model)
        if config.dtype != "float32":
            raise bad_value(UsageError, "--dtype", "float32 with a net of your own", config.dtype)
    else:
        cli.check_choice("--model", config.model, MODELS)
    cli.check_choice("--allocator", config.allocator, process.ALLOCATORS)
    for flag, number in {
        "--seeds": config.seeds,
        "--max-steps": config.max_steps,
        "--save-every": config.save_every,
        "--keep": config.keep,
    }.items():
        cli.check_count(flag, number)
    if config.tensorboard:
        check_packages("tensorboard")
    if config.norms_every < 0:
        raise bad_value(UsageError, "--norms-every", "at least 0", config.norms_every)
    if not 0 <= config.seed <= 2**32 - config.seeds:
        raise bad_value(UsageError, "--seed", f"from 0 to {2**32 - config.seeds}", config.seed)
    if config.seeds > 1 and config.resume is not None:
        raise bad_value(UsageError, "--seeds", "omitted with --resume, which continues one run", config.seeds)
    if config.seeds > 1 and (config.processes > 1 or config.cluster):
        raise bad_value(UsageError, "--seeds", "1 with several processes", config.seeds, "start one training per seed")


def build(config: Config, dataset: Dataset) -> "tuple[Serial, str]":
    """Return the net and its table of layers; raise UsageError if the images are too small for it."""
    from experiments import own_nets
    from experiments.models import MODELS

    classes = len(dataset.class_names)
    net = own_nets.build(config.model, classes, dataset.image_shape)
    if config.private:
        private.check_net(config.model, net)
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


def compiled(jitted: "Step", state: "TrainState", batch: Batch) -> "Step":
    """Compile a jitted step before its first call."""
    import jax

    return cast(jax.stages.Wrapped, jitted).lower(state, batch).compile()


def describe(config: Config, dataset: Dataset) -> dict[str, Any]:
    """Return the contents of config.json: the options (with the optimizer's defaults), data and versions."""
    return {
        **dataclasses.asdict(config),
        "data": str(Path(config.data).absolute()) if is_path(config.data) else config.data,
        **recipe.filled_in(config),
        "augment": list(config.augment),
        "data_dir": None if config.data_dir is None else config.data_dir.absolute(),
        "data_source": dataset.source,
        "data_sha256": dataset.sha256,
        "inputs": dataclasses.asdict(dataset.inputs),
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
