"""Load the net of an earlier run, or train one, for the scripts that inspect a net."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments import train
from experiments.data import SOURCES, is_path, load
from experiments.dataset import Dataset, Inputs
from experiments.errors import CheckpointError, UsageError, bad_value
from experiments.run_folder import Run
from experiments.tasks import TASKS, task_of

if TYPE_CHECKING:
    from experiments.checkpoints import Params
    from jaxcnn import Serial


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedNet:
    """A net, its parameters, the facts about its images, and whether it is averaged over flips in predictions."""

    model: str
    net: "Serial"
    params: "Params"
    inputs: Inputs
    flip_test: bool

    @property
    def evaluated(self) -> "Serial":
        """The net whose outputs are predictions; its parameters are `params`."""
        from experiments.flips import averaged_over_flips

        return averaged_over_flips(self.net, task_of(self.inputs)) if self.flip_test else self.net


@dataclasses.dataclass(frozen=True, eq=False)
class Trained(TrainedNet):
    """A net, its parameters, and the images it was trained on."""

    dataset: Dataset


def restore_net(folder: Path) -> TrainedNet:
    """Return the net of the run in `folder`, without its data set; raise CheckpointError."""
    run = Run(folder)
    config = read_config(run)
    return _with_params(run, config, read_inputs(run, config))


def _with_params(run: Run, config: Mapping[str, Any], inputs: Inputs) -> TrainedNet:
    from experiments import checkpoints, own_nets

    model, classes, shape = config["model"], len(inputs.class_names), inputs.image_shape
    net = own_nets.build(model, classes, shape, task_of(inputs).output_shape(shape, classes))
    like = own_nets.evaluated_shapes(net, inputs.image_shape)
    return TrainedNet(model, net, checkpoints.load(run.weights, like), inputs, bool(config.get("flip_test")))


def restore(folder: Path) -> Trained:
    """Return the net of the run in `folder` and its data set; raise CheckpointError or DataError."""
    run = Run(folder)
    config = read_config(run)
    folder_of_data = Path(config["data_dir"]) if config["data_dir"] else None
    dataset = load(config["data"], folder_of_data, config.get("size"), bool(config.get("stream")))
    if dataset.sha256 != config["data_sha256"]:
        name, expected = f"data of {run.folder}", f"the set with SHA-256 {config['data_sha256']}"
        raise bad_value(CheckpointError, name, expected, dataset.sha256)
    trained = _with_params(run, config, dataset.inputs)
    return Trained(trained.model, trained.net, trained.params, trained.inputs, trained.flip_test, dataset)


class Options(Protocol):
    """The options of a script that inspects a net: a run or a training, and the test images."""

    @property
    def run(self) -> Path | None:
        """The run's folder; None means the newest finished run, or a new training if there is none."""

    @property
    def fresh(self) -> bool:
        """Whether to train even if there is a run."""

    @property
    def images(self) -> tuple[int, ...]:
        """Numbers of the test images."""

    @property
    def model(self) -> str:
        """Name of the net to train."""

    @property
    def epochs(self) -> int:
        """Number of passes over the training images."""

    @property
    def max_steps(self) -> int | None:
        """Maximum number of steps."""

    @property
    def seed(self) -> int:
        """The seed of the training."""


TRAINING = ("model", "epochs", "max_steps")
"""Options that describe a training, and have no effect on a trained net."""


def prepare(options: Options, folder: Path) -> Trained:
    """Return the net of a run, or train one in `folder`/run, and print which.

    The run is `options.run`, else the newest finished one in runs/. A net is trained if there is none, or if an option
    requests it.

    Args:
        options: The options of the script.
        folder: The script's own folder.

    Raises:
        UsageError: The options conflict, or name images that do not exist; no net is trained.
        CheckpointError: The run's files are missing or do not match.
        DataError: The images of the run are missing.
        RunError: The training failed.
    """
    training = [name for name in TRAINING if getattr(options, name) != getattr(type(options), name)]
    training += ["fresh"] if options.fresh else []
    if options.run is not None and training:
        name = training[0]
        expected = "omitted with --run, whose net is already trained"
        raise bad_value(UsageError, f"--{name.replace('_', '-')}", expected, getattr(options, name))
    run = options.run if options.run is not None or training else newest_finished()
    if run is not None:
        trained = restore(run)
        if trained.inputs.task != "classification":
            raise bad_value(UsageError, "--run", "a run with one label per image", f"{run}, whose images have masks")
        check_images(options.images, trained.dataset)
        reason = "" if options.run is not None else ", the newest finished run; --fresh trains a new net"
        print(f"{trained.model} from {run}{reason}", flush=True)
        return trained
    config = train.Config(
        options.model, epochs=options.epochs, max_steps=options.max_steps, seed=options.seed, out=folder / "run"
    )
    check_images(options.images, load(config.data))
    if train.train(config):
        raise KeyboardInterrupt
    return restore(folder / "run")


def check_images(images: Sequence[int], dataset: Dataset) -> None:
    """Raise UsageError if there are no test images, or some do not exist."""
    if not images:
        raise bad_value(UsageError, "--images", "at least one number", "none")
    for n in images:
        if not 0 <= n < len(dataset.test_labels):
            raise bad_value(UsageError, "--images", f"from 0 to {len(dataset.test_labels) - 1}", n)


def newest(runs: Path = Path("runs")) -> Path:
    """Return the run in `runs` whose weights were written last; raise UsageError if there is none."""
    folders = by_age(runs)
    if not folders:
        raise bad_value(UsageError, "--run", "the folder of a run", f"none, and {runs.absolute()} contains no run")
    return folders[0]


def newest_finished(runs: Path = Path("runs")) -> Path | None:
    """Return the finished run in `runs` whose weights were written last, or None if there is none."""
    for folder in by_age(runs):
        try:
            if read_config(Run(folder)).get("end") == "finished":
                return folder
        except CheckpointError:  # not a run, or one of another version
            continue
    return None


def by_age(runs: Path) -> list[Path]:
    """Return the runs in `runs`, including those that scripts trained in their own folders there, newest first."""
    weights = [path for pattern in ("*", "*/run") for path in runs.glob(f"{pattern}/weights.safetensors")]
    return [path.parent for path in sorted(weights, key=lambda path: path.stat().st_mtime, reverse=True)]


def read_config(run: Run) -> dict[str, Any]:
    """Return a run's config.json; raise CheckpointError if it is missing or was not written by a training."""
    from experiments.models import MODELS
    from experiments.own_nets import is_reference

    path = run.folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise bad_value(CheckpointError, path, "the config of a run", error.strerror) from None
    except ValueError as error:
        raise bad_value(CheckpointError, path, "the config of a run", f"invalid JSON ({error})") from None
    keys = {"model", "data", "data_dir", "data_sha256"}
    if not isinstance(config, dict) or not keys <= set(config):
        got = ", ".join(map(str, config)) if isinstance(config, dict) else type(config).__name__
        raise bad_value(CheckpointError, path, f"the config of a run, with {', '.join(sorted(keys))}", got or "{}")
    for key, names, is_other in (("model", MODELS, is_reference), ("data", SOURCES, is_path)):
        if config[key] not in names and not is_other(config[key]):
            raise bad_value(CheckpointError, f"{path}: {key}", f"one of {', '.join(names)}", repr(config[key]))
    return config


def read_inputs(run: Run, config: Mapping[str, Any]) -> Inputs:
    """Return the facts about the images of a run; raise CheckpointError if its config does not have them."""
    name, got = f"{run.folder / 'config.json'}: inputs", config.get("inputs")
    fields = [field.name for field in dataclasses.fields(Inputs)]
    facts = {"task": "classification", **got} if isinstance(got, Mapping) else {}  # a run before masks has no task
    if set(facts) != set(fields):
        expected = f"the {', '.join(fields)} of the images, which a run of this version has"
        raise bad_value(CheckpointError, name, expected, "none" if got is None else str(got))
    names, shape = facts["class_names"], facts["image_shape"]
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise bad_value(CheckpointError, f"{name}: class_names", "a list of names", str(names))
    if not (isinstance(shape, list) and shape and all(type(size) is int and size > 0 for size in shape)):
        raise bad_value(CheckpointError, f"{name}: image_shape", "a list of sizes", str(shape))
    for key in ("largest", "border"):
        if type(facts[key]) not in (int, float):
            raise bad_value(CheckpointError, f"{name}: {key}", "a number", str(facts[key]))
    if facts["task"] not in TASKS:
        raise bad_value(CheckpointError, f"{name}: task", f"one of {', '.join(TASKS)}", repr(facts["task"]))
    return Inputs(**{**facts, "name": str(facts["name"]), "class_names": tuple(names), "image_shape": tuple(shape)})
