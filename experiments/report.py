"""Write report.html, one self-contained page about a run: python -m experiments.report --help."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from experiments import cli, data
from experiments.dataset import Pixels, most_images, scaled
from experiments.errors import CheckpointError
from experiments.files import replacing
from experiments.run_folder import REPORT, Epoch, Run, check_run, curves_title, read_epochs

if TYPE_CHECKING:
    import jax

    from experiments.report_masks import MaskExamples
    from experiments.restore import Trained, TrainedNet

PROG = REPORT
FILE = "report.html"
BATCH = 500
"""Images per prediction call."""
MISTAKES = 12
"""Number of mistakes to show, the most confident ones."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Write report.html and curves.png into the folder of a run, again or for the first time.

    Training writes them at its end.
    """

    run: Positional[Path]
    """Folder of the run."""


@dataclasses.dataclass(frozen=True, eq=False)
class Labeled:
    """The images that a report is about, and their labels or masks.

    `largest` is the pixel that the net receives as 1.
    """

    what: str
    pixels: Pixels
    largest: int
    labels: np.ndarray

    def images(self, chosen: Sequence[int]) -> np.ndarray:
        """Return some of the images (N, H, W, C), as the net receives them."""
        return np.asarray(scaled(np.asarray(self.pixels[list(chosen)]), self.largest))


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Labeled):
    """Images, their labels, and the probabilities (N, classes) that the net predicts."""

    probabilities: np.ndarray

    unit = "images"

    @property
    def counted(self) -> str:
        """What the confusion matrix counts."""
        return f"{len(self.labels):,} {self.what}"

    def result(self, config: Mapping[str, Any]) -> str:
        """Return the test results of a config.json in words."""
        test, count = config["test_accuracy"], len(self.labels)
        error = math.sqrt(max(test * (1 - test), 0) / count)
        return (
            f"<strong>{100 * test:.2f} %</strong> of the {count:,} {self.what} are classified correctly "
            f"(standard error {100 * error:.2f} %)."
        )

    @property
    def predicted(self) -> np.ndarray:
        """The predicted classes."""
        return self.probabilities.argmax(1)

    def mistakes(self) -> np.ndarray:
        """Return the indices of the wrong predictions, the most confident first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.probabilities[wrong].max(1), kind="stable")]

    def confusion(self) -> np.ndarray:
        """Return the number of images (true class, predicted class)."""
        classes = self.probabilities.shape[1]
        return np.bincount(classes * self.labels + self.predicted, minlength=classes**2).reshape(classes, classes)


@dataclasses.dataclass(frozen=True, eq=False)
class Story:
    """All that the page shows of a run.

    `steps` has the lines of metrics.jsonl, `epochs` the rows of metrics.csv. `examples` is None if there are no images
    that the run may look at: the test set is evaluated once, at the end.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[Epoch]
    steps: list[dict[str, Any]]
    trained: "Trained"
    examples: "Examples | MaskExamples | None"

    @property
    def end(self) -> str:
        """How the run ended."""
        return str(self.config.get("end", "killed"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, report, argv, prog=PROG)


def report(config: Config) -> int:
    """Write the report and curves of a run, and print the path of the report; raise CheckpointError or DataError."""
    from experiments.restore import read_config, restore

    check_run(config.run, config.run, CheckpointError)
    run, trained = Run(config.run), restore(config.run)
    run.plot(read_epochs(run.folder / "metrics.csv"), curves_title(read_config(run)))
    print(write(config.run, trained))
    return 0


def write(folder: Path, trained: "Trained") -> Path:
    """Write the report of the run in `folder`, whose net is `trained`, and return its path."""
    from experiments import report_page

    path = folder / FILE
    text = report_page.page(collect(folder, trained))
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path


def collect(folder: Path, trained: "Trained") -> Story:
    """Read the files of a run, and predict its test images, or its validation images if it has not finished."""
    from experiments.report_masks import make_examples
    from experiments.restore import read_config

    config = read_config(Run(folder))
    examples: Examples | MaskExamples | None = None
    if chosen := _examples(config, trained):
        what, pixels, labels = chosen
        if trained.inputs.task == "segmentation":
            examples = make_examples(what, trained, pixels, labels)
        else:
            predicted = probabilities(trained, pixels)
            examples = Examples(what, pixels, trained.inputs.largest, labels, predicted)
    return Story(
        folder,
        config,
        _environment(folder / "environment.json"),
        read_epochs(folder / "metrics.csv"),
        read_steps(folder / "metrics.jsonl"),
        trained,
        examples,
    )


def _examples(config: Mapping[str, Any], trained: "Trained") -> tuple[str, Pixels, np.ndarray] | None:
    """Return a description of the images to look at, their pixels and labels, or None."""
    dataset = trained.dataset
    if config.get("end") == "finished":
        return "test images", dataset.test_pixels, dataset.test_labels
    options = data.DataOptions(validation=config.get("validation", 0.0))
    _, held_out = data.split(options, dataset, config.get("seed", 0))
    if not len(held_out):
        return None
    return "validation images", dataset.train_pixels[held_out], dataset.train_labels[held_out]


def _environment(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; none if it is missing. A line that is incomplete is omitted."""
    if not path.exists():
        return []
    steps = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            steps.append(_numbers(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return [step for step in steps if isinstance(step, dict) and "step" in step]


def _numbers(value: Any) -> Any:
    """Return `value` with numbers for "nan" and "inf"."""
    return {key: _numbers(item) for key, item in value.items()} if isinstance(value, dict) else float(value)


def probabilities(trained: "TrainedNet", images: Pixels) -> np.ndarray:
    """Return the predicted probabilities (N, classes) of images (N, H, W, C), uint8 or float32."""
    import jax

    return _in_batches(trained, images, jax.nn.softmax)


def predicted_classes(trained: "TrainedNet", images: Pixels) -> np.ndarray:
    """Return the predicted masks (N, H, W), uint8, of images (N, H, W, C), uint8 or float32."""
    return _in_batches(trained, images, lambda logits: logits.argmax(-1).astype(np.uint8))


def _in_batches(trained: "TrainedNet", images: Pixels, of: "Callable[[jax.Array], jax.Array]") -> np.ndarray:
    """Return a function of the logits of images."""
    import jax

    net = trained.evaluated

    @jax.jit
    def predict(params: Any, x: np.ndarray) -> jax.Array:
        return of(net.apply(params, scaled(x, trained.inputs.largest)))

    size = min(most_images(images, BATCH), len(images))
    results = []
    for first in range(0, len(images), size):
        x = np.asarray(images[first : first + size])
        padded = np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])  # one shape, one compilation
        results.append(np.asarray(predict(trained.params, padded))[: len(x)])
    return np.concatenate(results)


if __name__ == "__main__":
    sys.exit(main())
