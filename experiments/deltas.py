"""Draw activations and δ of each layer: python -m experiments.deltas --help."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli
from experiments.data import Dataset
from experiments.files import replacing
from experiments.restore import Trained, prepare
from experiments.run_folder import new_folder

if TYPE_CHECKING:
    from jaxcnn import BackpropResult, Serial

PROG = "python -m experiments.deltas"


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw every layer's activation next to its δ, one PNG per chosen test image.

    The net is that of a run, or is trained briefly first. E is the cross entropy with the true class.
    """

    run: Annotated[Path | None, arg(metavar="PATH")] = None
    """The run's folder; without it, the newest in runs/ that is finished, and a net is trained if there is none."""
    fresh: FlagCreatePairsOff[bool] = False
    """Train a net, even if there is a run; so does each option of the training but --seed."""
    images: tuple[int, ...] = (0, 12, 17)
    """Which test images, counted from 0."""
    channels: int = 4
    """Channels drawn of each layer: those with the largest Σ |a∘δ|."""
    model: str = "lecture"
    """The net to train: lecture, mlp or lenet5."""
    epochs: int = 1
    """Passes over the 10,000 embedded images."""
    max_steps: Annotated[int | None, arg(metavar="INT")] = None
    """Stop the training after so many steps."""
    seed: int = 0
    """Of the training."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the pictures, new or empty; without it, runs/<time>-deltas."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of one image; a and δ are (H, W, channels drawn) or (features,)."""

    name: str
    shape: tuple[int, ...]
    activation: np.ndarray
    delta: np.ndarray
    channels: tuple[int, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, draw, argv, prog=PROG)


def draw(config: Config) -> int:
    """Train or load, compute, draw. Returns 0; raises UsageError, CheckpointError, DataError or RunError."""
    cli.check_count("--channels", config.channels)
    with new_folder(config.out, "deltas") as folder:
        trained = prepare(config, folder)
        found = sweep(trained, config.images)
        probabilities = softmax(np.asarray(found.activations[last(trained.net)]))
        for i, n in enumerate(config.images):
            rows = [row(trained.net, found, names, i, config.channels) for names in groups(trained.net)]
            path = folder / f"deltas-{n}.png"
            picture(path, trained.dataset, n, probabilities[i], rows)
            print(describe(trained.dataset, n, probabilities[i]))
            for line in rows:
                size = "×".join(map(str, line.shape))
                tops = f"max|a| {top(line.activation):<9.3g} max|δ| {top(line.delta):.3g}"
                print(f"  {line.name:<36} {size:>9}   {tops}")
            print(f"  {path}", flush=True)
    return 0


def sweep(trained: Trained, images: Sequence[int]) -> "BackpropResult":
    """Return activations and δ of all layers, by name, for the chosen test images; each image's δ is its own ∂E/∂a."""
    import jax

    import jaxcnn

    chosen = list(images)
    x, labels = trained.dataset.test_images[chosen], trained.dataset.test_labels[chosen]

    @jax.jit
    def run(params: Any) -> "BackpropResult":
        def total(outputs: jax.Array, labels: jax.Array) -> jax.Array:
            return jaxcnn.softmax_cross_entropy_with_integer_labels(outputs, labels).sum()

        return jaxcnn.backprop(trained.net, total, params, x, labels)

    return jax.device_get(run(trained.params))


def groups(net: "Serial", path: str = "") -> list[tuple[str, ...]]:
    """Return the layers' names, in order of execution.

    A layer that only passes values on (flatten; dropout, which is inactive; the end of a nested net) is grouped with
    the layer before it.
    """
    from jaxcnn import Dropout, Flatten, Serial

    found: list[tuple[str, ...]] = []
    for name, layer in net.layers:
        if isinstance(layer, Serial):
            found += groups(layer, f"{path}{name}/")
        if found and (isinstance(layer, Flatten | Dropout) or type(layer) is Serial):
            found[-1] = (*found[-1], f"{path}{name}")
        else:
            found.append((f"{path}{name}",))
    return found


def last(net: "Serial") -> str:
    """Return the name of the last layer, whose output is the net's output."""
    return net.layers[-1][0]


def row(net: "Serial", found: "BackpropResult", names: tuple[str, ...], i: int, channels: int) -> Row:
    """Return the data to draw of a layer for image `i`; of a feature map, the `channels` that matter most."""
    a, delta = np.asarray(found.activations[names[0]][i]), np.asarray(found.deltas[names[0]][i])
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


def top(values: np.ndarray) -> float:
    """Return the largest absolute value."""
    return float(np.abs(values).max())


def describe(dataset: Dataset, n: int, probabilities: np.ndarray) -> str:
    """Return an image's class and the predicted class in one line."""
    label, said = int(dataset.test_labels[n]), int(probabilities.argmax())
    verdict = "right" if said == label else "wrong"
    names = dataset.class_names
    return f"test image {n}: {names[label]}, taken for {names[said]} ({probabilities[said]:.0%}, {verdict})"


def picture(path: Path, dataset: Dataset, n: int, probabilities: np.ndarray, rows: Sequence[Row]) -> None:
    """Write a PNG: the image on top, then one row per layer, with activations at the left and δ at the right."""
    from experiments.lecture.drawing import BLUE, RED, figure, grey, parts, plain, signed

    wide = max([row.activation.shape[-1] for row in rows if row.activation.ndim == 3], default=4)
    made = figure(2.2 * wide + 1.2, 1.95 + 1.55 * len(rows))
    head, *below = parts(made, len(rows) + 1, 1, height_ratios=[1.2, *[1] * len(rows)])
    key = "left: activation a; right: δ = ∂E/∂a of the same channels; red above 0, blue below, each on its own scale ±"
    head.suptitle(f"{describe(dataset, n, probabilities)}\n{key}", fontsize=10.5)
    shown, bars = head.subplots(1, 2, width_ratios=[1, 3])
    grey(shown, dataset.test_images[n][..., 0], "", "")
    colours = ["0.6"] * len(probabilities)
    colours[int(dataset.test_labels[n])] = "tab:green"
    bars.bar(range(len(probabilities)), probabilities, color=colours)
    plain(bars, "", "", "probability")
    bars.set_xticks(range(len(probabilities)), dataset.class_names, rotation=30, ha="right")
    bars.tick_params(labelsize=7)
    for part, line in zip(below, rows, strict=True):
        left, right = parts(part, 1, 2)
        size = "×".join(map(str, line.shape))
        for side, values, what in ((left, line.activation, "a"), (right, line.delta, "δ")):
            limit = top(values) or 1.0
            title = f"{line.name}  {size}: {what}" if what == "a" else "δ = ∂E/∂a"
            side.suptitle(f"{title},  ±{limit:.2g}", fontsize=9.5)
            if values.ndim == 3:
                for axes, channel, c in zip(
                    np.ravel(side.subplots(1, wide)), np.moveaxis(values, -1, 0), line.channels, strict=False
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
        made.savefig(temporary, format="png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
