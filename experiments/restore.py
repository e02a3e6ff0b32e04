"""A trained net to inspect: that of an earlier run, or one trained for the purpose."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments import train
from experiments.data import SOURCES, Dataset, load
from experiments.errors import CheckpointError, UsageError
from experiments.run_folder import Run

if TYPE_CHECKING:
    from experiments.checkpoints import Params
    from jaxcnn import Serial


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A net, its parameters, and the images it was trained on."""

    model: str
    net: "Serial"
    params: "Params"
    dataset: Dataset


def restore(folder: Path) -> Trained:
    """Return the net of the run in `folder`; raises CheckpointError or DataError."""
    run = Run(folder)
    config = read_config(run)
    dataset = load(config["data"], Path(config["data_dir"]) if config["data_dir"] else None)
    if dataset.sha256 != config["data_sha256"]:
        raise CheckpointError(f"{run.folder}: expected data {config['data_sha256']}, got {dataset.sha256}")

    import jax

    from experiments import checkpoints
    from experiments.models import MODELS

    net = MODELS[config["model"]](len(dataset.class_names))
    like = jax.eval_shape(lambda: net.init(jax.random.key(0), dataset.image_shape))
    return Trained(config["model"], net, checkpoints.load(run.weights, like), dataset)


class Asked(Protocol):
    """The options of a script that inspects a net: a run, or how to train one, and the test images."""

    @property
    def run(self) -> Path | None:
        """The run's folder; None means the newest finished one, or train."""

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
        """Number of passes over the images."""

    @property
    def max_steps(self) -> int | None:
        """Maximum number of steps."""

    @property
    def seed(self) -> int:
        """The seed of the training."""


TRAINING = ("model", "epochs", "max_steps")
"""The options that describe a training, and mean nothing for a net that is trained already."""


def prepare(asked: Asked, folder: Path) -> Trained:
    """Return the net of a run, or train one in `folder`/run; print which.

    The run is the requested one, else the newest finished one in runs/. A net is trained if there is none, or if an
    option requests it.

    Args:
        asked: The options of the script.
        folder: The script's own folder.

    Raises:
        UsageError: The options conflict, or name images that do not exist; nothing is trained then.
        CheckpointError: The run's files are missing or do not match.
        DataError: The images of the run are missing.
        RunError: The training failed.
    """
    trains = [name for name in TRAINING if getattr(asked, name) != getattr(type(asked), name)]
    trains += ["fresh"] if asked.fresh else []
    if asked.run is not None and trains:
        raise UsageError(f"--{trains[0].replace('_', '-')}: expected without --run, whose net is trained already")
    found = asked.run if asked.run is not None or trains else newest_finished()
    if found is not None:
        trained = restore(found)
        check_images(asked.images, trained.dataset)
        why = "" if asked.run is not None else ", the newest run that is finished; --fresh trains a net"
        print(f"{trained.model} of {found}{why}", flush=True)
        return trained
    wanted = train.Config(
        asked.model, epochs=asked.epochs, max_steps=asked.max_steps, seed=asked.seed, out=folder / "run"
    )
    check_images(asked.images, load(wanted.data))
    if train.train(wanted):
        raise KeyboardInterrupt
    return restore(folder / "run")


def check_images(images: Sequence[int], dataset: Dataset) -> None:
    """Raise UsageError if there are no test images, or some do not exist."""
    if not images:
        raise UsageError("--images: expected at least one, got none")
    for n in images:
        if not 0 <= n < len(dataset.test_labels):
            raise UsageError(f"--images: expected 0 to {len(dataset.test_labels) - 1}, got {n}")


def newest(runs: Path = Path("runs")) -> Path:
    """Return the run in `runs` whose weights were written last; raises UsageError if there is none."""
    found = by_age(runs)
    if not found:
        raise UsageError(f"--run: expected a run's folder, since {runs.absolute()} holds none")
    return found[0]


def newest_finished(runs: Path = Path("runs")) -> Path | None:
    """Return the run in `runs` whose weights were written last among the finished runs; None if there is none."""
    for folder in by_age(runs):
        try:
            if read_config(Run(folder)).get("end") == "finished":
                return folder
        except CheckpointError:  # not a run, or one of another version
            continue
    return None


def by_age(runs: Path) -> list[Path]:
    """Return the runs in `runs`, and those that other scripts trained in their own folders there, newest first."""
    weights = [path for pattern in ("*", "*/run") for path in runs.glob(f"{pattern}/weights.safetensors")]
    return [path.parent for path in sorted(weights, key=lambda path: path.stat().st_mtime, reverse=True)]


def read_config(run: Run) -> dict[str, Any]:
    """Return a run's config.json; raises CheckpointError if it is missing or was not written by training."""
    from experiments.models import MODELS

    path = run.folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: expected a run's config, got {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: expected a run's config, got no JSON ({error})") from None
    wanted = {"model", "data", "data_dir", "data_sha256"}
    if not isinstance(config, dict) or not wanted <= set(config):
        raise CheckpointError(f"{path}: expected a run's config with {', '.join(sorted(wanted))}, got others")
    for key, names in (("model", MODELS), ("data", SOURCES)):
        if config[key] not in names:
            raise CheckpointError(f"{path}: {key}: expected one of {', '.join(names)}, got {config[key]!r}")
    return config
