"""Print a trained net's predictions for chosen test images: python -m experiments.predict --help."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from experiments import cli
from experiments.restore import check_images, newest, restore

PROG = "python -m experiments.predict"


@dataclasses.dataclass(frozen=True)
class Config:
    """Load a run's weights and print, for each chosen test image, its label and the prediction."""

    run: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the run; if omitted, the newest in runs/."""
    images: tuple[int, ...] = tuple(range(10))
    """Numbers of the test images, from 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, predict, argv, prog=PROG)


def predict(config: Config) -> int:
    """Print the predictions; raise UsageError, CheckpointError or DataError."""
    folder = newest() if config.run is None else config.run
    trained = restore(folder)
    net, params, dataset = trained.net, trained.params, trained.dataset
    check_images(config.images, dataset)

    import jax

    chosen = list(config.images)
    probabilities = jax.device_get(jax.nn.softmax(net.apply(params, dataset.test_images[chosen])))

    names, correct = dataset.class_names, 0
    width = max(map(len, names))
    print(f"{trained.model} from {folder.absolute()}, test images of {dataset.name}")
    print(f"{'image':>6}  {'label':<{width}}  {'prediction':<{width}}  probability")
    for n, row in zip(chosen, probabilities, strict=True):
        label, predicted = int(dataset.test_labels[n]), int(row.argmax())
        correct += predicted == label
        mark = "" if predicted == label else "  wrong"
        print(f"{n:>6}  {names[label]:<{width}}  {names[predicted]:<{width}}  {row[predicted]:.3f}{mark}")
    print(f"{correct} of {len(chosen)} correct")
    return 0


if __name__ == "__main__":
    sys.exit(main())
