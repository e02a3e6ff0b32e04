"""Train a net with explicit backward rules: python -m experiments.train --help."""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli, data, devices, private, process, processes, recipe, seeds, terminal
from experiments.data import DataOptions, is_path, load, split
from experiments.dataset import Dataset
from experiments.devices import DeviceOptions, Placement
from experiments.errors import CheckpointError, UsageError, bad_value, check_packages
from experiments.private import PrivacyOptions
from experiments.processes import ProcessOptions
from experiments.recipe import RecipeOptions
from experiments.run_folder import (
    TRAIN,
    Run,
    Unwritten,
    as_json,
    check_folder,
    check_run,
    locked,
    new_folder,
)
from experiments.tasks import task_of

if TYPE_CHECKING:  # importing jax takes a second, and --help does not need it
    from jaxcnn import Serial

PROG = TRAIN
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Option of the net."""

    model: str = "lecture"
    """Net: lecture, mlp, lenet5, small (79,000 parameters), small-resnet (464,000), resnet (ResNet-18), resnet-gn
    (with group norm), vgg, mobile, unet (for masks), or module:function, which returns a net of jaxcnn, Flax or
    Equinox, or a pair (init, apply)."""


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
    """Train a net on images with labels or masks, with the explicit backward rules of jaxcnn.

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
    devices.check(config, recipe.sizes(config), processes.count())
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
    from experiments.training_run import Plan, fit

    dataset = load(config.data, config.data_dir, config.size, config.stream)
    chosen, validation = split(config, dataset, config.seed)
    if config.batch_size > len(chosen):
        expected = f"at most {len(chosen)}, the training images of {dataset.name} without those for validation"
        raise bad_value(UsageError, "--batch-size", expected, config.batch_size)
    task_of(dataset).check(config, config, dataset, validation)
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
            files = {"config.json": as_json(record), "environment.json": as_json(terminal.environment())}
            folder = stack.enter_context(new_folder(config.out, seeds.folder_name(config.model), files=files))
        else:
            folder = config.resume.absolute()
            stack.enter_context(locked(folder))
            original = dataclasses.replace(config, resume=None, out=folder)
            record = describe(original, dataset)
        print(terminal.banner(facts), table, sep="\n\n", end="\n\n", flush=True)
        folder = Path(processes.text_from_first(str(folder)))
        run = Unwritten(folder) if processes.index() else Run(folder)
        options = training_options(config, record, steps)
        return fit(Plan(config, net, dataset, run, steps, record, options, placement, mechanism))


def training_options(config: Config, record: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the options that a checkpoint depends on: those that change the results, the data, and the steps."""
    options = {name: record[name] for name in dataclasses.asdict(config) if name not in MAY_DIFFER}
    return {**options, "data_sha256": record["data_sha256"], "total steps": steps}


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


def check(config: Config) -> None:
    """Raise UsageError for every error that can be detected before anything is read or created."""
    from experiments import own_nets
    from experiments.models import MODELS

    data.check(config)
    recipe.check(config)
    private.check(config, config, config.dtype)
    processes.check(config)
    devices.check(config, recipe.sizes(config), config.processes)
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
    """Return the net and its table of layers; raise UsageError if it is not one for these images and labels."""
    from experiments import own_nets
    from experiments.models import MODELS, MULTIPLES

    task, shape, classes = task_of(dataset), dataset.image_shape, len(dataset.class_names)
    outputs = task.output_shape(shape, classes)
    net = own_nets.build(config.model, classes, shape, outputs)
    if config.private:
        private.check_net(config.model, net)
    multiple = MULTIPLES.get(config.model, 1)
    if dataset.task == "segmentation" and any(side % multiple for side in shape[:2]):
        expected = f"images with sides that are multiples of {multiple} for --model {config.model}"
        raise bad_value(
            UsageError, f"images of {dataset.name}", expected, "×".join(map(str, shape[:2])), "choose --size"
        )
    try:
        table = net.summary(shape)
        result = table.rows[-1].output_shape
        if result == outputs:
            return net, str(table)
        got = f"outputs (N, {', '.join(map(str, result))})"
    except ValueError as error:
        got = "an output for each pixel" if multiple > 1 else str(error)
    possible = [name for name, make in MODELS.items() if _outputs(make(classes), shape) == outputs]
    expected = f"a net for {task.images.format(dataset.name)} ({', '.join(possible) or 'none'})"
    raise bad_value(UsageError, "--model", expected, f"{config.model} ({got})")


def _outputs(net: "Serial", shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of a net's output for an image of a shape, or None if it does not take such images."""
    try:
        return net.summary(shape).rows[-1].output_shape
    except ValueError:
        return None


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


if __name__ == "__main__":
    sys.exit(main())
