"""Draw the activation and δ of each layer: python -m experiments.deltas --help."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli
from experiments.dataset import Dataset
from experiments.files import replacing
from experiments.restore import Trained, prepare
from experiments.run_folder import new_folder

if TYPE_CHECKING:
    from jaxcnn import BackpropResult, Serial

PROG = "python -m experiments.deltas"


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw every layer's activation next to its δ, one PNG per chosen test image.

    The net is that of a run, or is first trained briefly. E is the cross-entropy with the true class.
    """

    run: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of a run; if omitted, the newest finished run in runs/, or a new training if there is none."""
    fresh: FlagCreatePairsOff[bool] = False
    """Train a new net, even if there is a run. --model, --epochs and --max-steps do so as well."""
    images: tuple[int, ...] = (0, 12, 17)
    """Numbers of the test images, from 0."""
    channels: int = 4
    """Number of channels to draw of each layer: those with the largest Σ |a∘δ|."""
    model: str = "lecture"
    """Net to train, as for experiments.train."""
    epochs: int = 1
    """Passes over the 10,000 embedded training images."""
    max_steps: Annotated[int | None, arg(metavar="INT")] = None
    """Maximum number of training steps."""
    seed: int = 0
    """Seed of the training."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the figures, new or empty; if omitted, runs/<time>-deltas."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of one image; a and δ are (H, W, drawn channels) or (features,)."""

    name: str
    shape: tuple[int, ...]
    activation: np.ndarray
    delta: np.ndarray
    channels: tuple[int, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, draw, argv, prog=PROG)


def draw(config: Config) -> int:
    """Load or train a net, compute δ, and draw. Return 0; raise UsageError, CheckpointError, DataError or RunError."""
    cli.check_count("--channels", config.channels)
    with new_folder(config.out, "deltas") as folder:
        trained = prepare(config, folder)
        result = compute(trained, config.images)
        probabilities = softmax(np.asarray(result.activations[last(trained.net)]))
        for i, n in enumerate(config.images):
            rows = [row(trained.net, result, names, i, config.channels) for names in evaluated(trained.net, result)]
            path = folder / f"deltas-{n}.png"
            save_figure(path, trained.dataset, n, probabilities[i], rows)
            print(describe(trained.dataset, n, probabilities[i]))
            for line in rows:
                size = "×".join(map(str, line.shape))
                maxima = f"max|a| {max_abs(line.activation):<9.3g} max|δ| {max_abs(line.delta):.3g}"
                print(f"  {line.name:<36} {size:>9}   {maxima}")
            print(f"  {path}", flush=True)
    return 0


def compute(trained: Trained, images: Sequence[int]) -> "BackpropResult":
    """Return activations and δ of all layers, by name, for the chosen test images."""
    chosen = list(images)
    x, labels = trained.dataset.test_images[chosen], trained.dataset.test_labels[chosen]
    return backprop(trained.net, trained.params, x, labels)


def backprop(net: "Serial", params: Any, x: np.ndarray, labels: np.ndarray) -> "BackpropResult":
    """Return activations and δ of all layers, by name; δ is ∂E/∂a of each image."""
    import jax

    import jaxcnn

    @jax.jit
    def run(params: Any) -> "BackpropResult":
        def total_loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
            return jaxcnn.softmax_cross_entropy_with_integer_labels(outputs, labels).sum()

        return jaxcnn.backprop(net, total_loss, params, x, labels)

    return jax.device_get(run(params))


def groups(net: "Serial", path: str = "") -> list[tuple[str, ...]]:
    """Return the layers' names, in order of execution.

    A layer that passes values on unchanged (flatten, inactive dropout, the end of a nested net) is grouped with the
    layer before it.
    """
    from jaxcnn import Dropout, Flatten, Serial

    result: list[tuple[str, ...]] = []
    for name, layer in net.layers:
        if isinstance(layer, Serial):
            result += groups(layer, f"{path}{name}/")
        if result and (isinstance(layer, Flatten | Dropout) or type(layer) is Serial):
            result[-1] = (*result[-1], f"{path}{name}")
        else:
            result.append((f"{path}{name}",))
    return result


def last(net: "Serial") -> str:
    """Return the name of the last layer, whose output is the net's output."""
    return net.layers[-1][0]


def evaluated(net: "Serial", result: "BackpropResult") -> list[tuple[str, ...]]:
    """Return the `groups` of a net without the operations of training that its evaluation does not have."""
    return [names for names in groups(net) if names[0] in result.deltas]


def row(net: "Serial", result: "BackpropResult", names: tuple[str, ...], i: int, channels: int) -> Row:
    """Return the data to draw for a layer and image `i`; for feature maps, the `channels` with the largest Σ |a∘δ|."""
    a, delta = np.asarray(result.activations[names[0]][i]), np.asarray(result.deltas[names[0]][i])
    shape = a.shape
    chosen: tuple[int, ...] = ()
    if a.ndim == 3:
        weight = np.abs(a * delta).sum((0, 1))
        chosen = tuple(int(c) for c in np.argsort(-weight, kind="stable")[:channels])
        a, delta = a[..., list(chosen)], delta[..., list(chosen)]
    return Row(", ".join(names), shape, a, delta, chosen)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of the logits."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def max_abs(values: np.ndarray) -> float:
    """Return the largest absolute value."""
    return float(np.abs(values).max())


def describe(dataset: Dataset, n: int, probabilities: np.ndarray) -> str:
    """Return an image's class and the predicted class in one line."""
    label, predicted = int(dataset.test_labels[n]), int(probabilities.argmax())
    verdict = "correct" if predicted == label else "wrong"
    names = dataset.class_names
    return f"test image {n}: {names[label]}, predicted {names[predicted]} ({probabilities[predicted]:.0%}, {verdict})"


def save_figure(path: Path, dataset: Dataset, n: int, probabilities: np.ndarray, rows: Sequence[Row]) -> None:
    """Write a PNG: the image at the top, then one row per layer, with activations at the left and δ at the right."""
    from experiments.lecture.drawing import BLUE, RED, figure, gray, parts, plain, signed

    columns = max([row.activation.shape[-1] for row in rows if row.activation.ndim == 3], default=4)
    fig = figure(2.2 * columns + 1.2, 1.95 + 1.55 * len(rows))
    head, *below = parts(fig, len(rows) + 1, 1, height_ratios=[1.2, *[1] * len(rows)])
    key = "left: activation a; right: δ = ∂E/∂a of the same channels; red > 0, blue < 0, each panel on its own scale ±"
    head.suptitle(f"{describe(dataset, n, probabilities)}\n{key}", fontsize=10.5)
    shown, bars = head.subplots(1, 2, width_ratios=[1, 3])
    gray(shown, dataset.test_images[n][..., 0], "", "")
    colors = ["0.6"] * len(probabilities)
    colors[int(dataset.test_labels[n])] = "tab:green"
    bars.bar(range(len(probabilities)), probabilities, color=colors)
    plain(bars, "", "", "probability")
    bars.set_xticks(range(len(probabilities)), dataset.class_names, rotation=30, ha="right")
    bars.tick_params(labelsize=7)
    for part, line in zip(below, rows, strict=True):
        left, right = parts(part, 1, 2)
        size = "×".join(map(str, line.shape))
        for side, values, what in ((left, line.activation, "a"), (right, line.delta, "δ")):
            limit = max_abs(values) or 1.0
            title = f"{line.name}  {size}: {what}" if what == "a" else "δ = ∂E/∂a"
            side.suptitle(f"{title},  ±{limit:.2g}", fontsize=9.5)
            if values.ndim == 3:
                for axes, channel, c in zip(
                    np.ravel(side.subplots(1, columns)), np.moveaxis(values, -1, 0), line.channels, strict=False
                ):
                    signed(axes, channel, "", f"channel {c}", limit=limit)
                for axes in side.axes[values.shape[-1] :]:
                    axes.axis("off")
            else:
                axes = side.subplots()
                axes.bar(range(values.size), values.ravel(), width=1, color=np.where(values.ravel() > 0, RED, BLUE))
                axes.axhline(0, color="0.6", linewidth=0.6)
                plain(axes, "", "", "")
                axes.set_ylim(-1.08 * limit, 1.08 * limit)
                axes.tick_params(labelsize=7)
                if line is rows[-1] and values.size == len(dataset.class_names):
                    axes.set_xticks(range(values.size), dataset.class_names, rotation=30, ha="right")
                elif values.size <= 20:
                    axes.set_xticks(range(values.size))
    with replacing(path) as temporary:
        fig.savefig(temporary, format="png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
