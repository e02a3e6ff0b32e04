"""Show what a trained net says about chosen test images: python -m experiments.predict --help."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from experiments import cli
from experiments.data import SOURCES, load
from experiments.errors import CheckpointError, UsageError
from experiments.runs import Run

PROG = "python -m experiments.predict"


@dataclasses.dataclass(frozen=True)
class Config:
    """Load a run's weights and print, for each chosen test image, its label and what the net takes it for."""

    run: Annotated[Path | None, arg(metavar="PATH")] = None
    """The run's folder; without it, the newest in runs/."""
    images: tuple[int, ...] = tuple(range(10))
    """Which test images, counted from 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, predict, argv, prog=PROG)


def predict(config: Config) -> int:
    """Print the predictions; raises UsageError, CheckpointError or DataError."""
    run = Run(newest() if config.run is None else config.run)
    trained = read_config(run)
    dataset = load(trained["data"], Path(trained["data_dir"]) if trained["data_dir"] else None)
    if dataset.sha256 != trained["data_sha256"]:
        raise CheckpointError(f"{run.folder}: expected data {trained['data_sha256']}, got {dataset.sha256}")
    for n in config.images:
        if not 0 <= n < len(dataset.test_labels):
            raise UsageError(f"--images: expected 0 to {len(dataset.test_labels) - 1}, got {n}")

    import jax

    from experiments import checkpoints
    from experiments.models import MODELS

    net = MODELS[trained["model"]](len(dataset.class_names))
    like = jax.eval_shape(lambda: net.init(jax.random.key(0), dataset.image_shape))
    params = checkpoints.load(run.weights, like)
    chosen = list(config.images)
    probabilities = jax.device_get(jax.nn.softmax(net.apply(params, dataset.test_images[chosen])))

    names, right = dataset.class_names, 0
    width = max(map(len, names))
    print(f"{trained['model']} of {run.folder.absolute()} on test images of {dataset.name}")
    print(f"{'image':>6}  {'label':<{width}}  {'prediction':<{width}}  probability")
    for n, row in zip(chosen, probabilities, strict=True):
        label, said = int(dataset.test_labels[n]), int(row.argmax())
        right += said == label
        mark = "" if said == label else "  wrong"
        print(f"{n:>6}  {names[label]:<{width}}  {names[said]:<{width}}  {row[said]:.3f}{mark}")
    print(f"{right} of {len(chosen)} right")
    return 0


def newest(runs: Path = Path("runs")) -> Path:
    """Return the run in `runs` whose weights were written last; raises UsageError if there is none."""
    weights = sorted(runs.glob("*/weights.safetensors"), key=lambda path: path.stat().st_mtime)
    if not weights:
        raise UsageError(f"--run: expected a run's folder, since {runs.absolute()} holds none")
    return weights[-1].parent


def read_config(run: Run) -> dict[str, Any]:
    """Return a run's config.json; raises CheckpointError if it is missing or not one that training wrote."""
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


if __name__ == "__main__":
    sys.exit(main())
