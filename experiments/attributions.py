"""Compare the methods of jaxcnn.attribute: python -m experiments.attributions --help."""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli
from experiments.deltas import describe, softmax
from experiments.files import replacing
from experiments.restore import Trained, TrainedNet, prepare
from experiments.run_folder import new_folder

if TYPE_CHECKING:
    from jaxcnn import Serial

PROG = "python -m experiments.attributions"
SAMPLES = 25
STEPS = 50


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw one row per chosen test image and one column per attribution method, for the predicted class.

    Red is positive evidence for that class, blue is negative evidence, white is 0. Each map has its own scale, printed
    below it. If a method conserves a quantity, that quantity is printed next to the sum of the map.
    """

    run: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of a run; if omitted, the newest finished run in runs/, or a new training if there is none."""
    fresh: FlagCreatePairsOff[bool] = False
    """Train a new net, even if there is a run. --model, --epochs and --max-steps do so as well."""
    images: tuple[int, ...] = (0, 1, 12, 17, 23)
    """Numbers of the test images, from 0."""
    model: str = "lecture"
    """Net to train, as for experiments.train."""
    epochs: int = 1
    """Passes over the 10,000 embedded training images."""
    max_steps: Annotated[int | None, arg(metavar="INT")] = None
    """Maximum number of training steps."""
    seed: int = 0
    """Seed of the training and of SmoothGrad's noise."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the figure, new or empty; if omitted, runs/<time>-attributions."""


@dataclasses.dataclass(frozen=True)
class Maps:
    """The maps (N, H, W) of one method, their sums over pixels and channels, and the conserved quantity or None."""

    heat: np.ndarray
    total: np.ndarray
    conserved: np.ndarray | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, draw, argv, prog=PROG)


def draw(config: Config) -> int:
    """Load or train a net, attribute, and draw. Return 0; raise UsageError, CheckpointError, DataError or RunError."""
    from experiments.own_nets import check_layers

    with new_folder(config.out, "attributions") as folder:
        trained = prepare(config, folder)
        check_layers(trained.net, "--run", "the run of a net of jaxcnn")
        chosen = list(config.images)
        x = trained.dataset.test_images[chosen]
        logits = np.asarray(trained.net.apply(trained.params, x))
        target = logits.argmax(1)
        results = maps(trained, x, target, config.seed)
        save_figure(folder / "attributions.png", trained, chosen, logits, results)
        for i, n in enumerate(chosen):
            print(describe(trained.dataset, n, softmax(logits[i])))
        print()
        print(table(chosen, results))
        print(f"\n{folder / 'attributions.png'}")
    return 0


def methods(net: "Serial", shape: tuple[int, ...], seed: int) -> "dict[str, tuple[str | None, Mapping[str, Any]]]":
    """Return the method and options of `jaxcnn.attribute` by title, without the methods that the net does not support.

    Args:
        net: The net.
        shape: The shape of one image. Pixels are between 0 and 1, the bounds of zᴮ.
        seed: The seed of SmoothGrad's noise.
    """
    import jax

    from jaxcnn import HiddenLayer, Relu, attribution, rules

    layers = [layer for _, layer in net.walk()]
    feature_maps = [row.name for row in net.summary(shape).rows if len(row.output_shape) == 3]
    result: dict[str, tuple[str | None, Mapping[str, Any]]] = {
        "gradient": ("gradient", {}),
        "gradient × input": ("gradient_times_input", {}),
        "integrated\ngradients": ("integrated_gradients", {"steps": STEPS}),
        "SmoothGrad": ("smooth_grad", {"key": jax.random.key(seed), "samples": SAMPLES}),
    }
    rectifiers = [kind for kind in (Relu, HiddenLayer) if any(isinstance(layer, kind) for layer in layers)]
    if rectifiers:
        for title, rule in (("guided\nbackprop", rules.guided_relu), ("deconvnet", rules.deconv_relu)):
            result[title] = ("gradient", {"rules": dict.fromkeys(rectifiers, rule)})
    if feature_maps:
        result["Grad-CAM"] = ("grad_cam", {"layer": feature_maps[-1]})
    return {
        **result,
        "occlusion": ("occlusion", {"window": 5, "stride": 2}),
        "LRP\nε, z⁺": ("relevance", {"rules": attribution.epsilon_plus()}),
        "LRP\nε, α2β1": ("relevance", {"rules": attribution.epsilon_alpha2_beta1()}),
        "LRP\nε, γ, zᴮ": ("relevance", {"rules": attribution.epsilon_gamma_box(net, 0.0, 1.0)}),
        "DeepLIFT": ("deep_lift", {}),
    }


def maps(
    trained: TrainedNet, x: np.ndarray, target: np.ndarray, seed: int, titles: Sequence[str] = ()
) -> dict[str, Maps]:
    """Return the maps of each method by title, for images `x` and classes `target`.

    Args:
        trained: The net.
        x: Images (N, H, W, C).
        target: Classes (N,).
        seed: The seed of SmoothGrad's noise.
        titles: The methods to apply, if the net supports them; empty means all.
    """
    import jax

    import jaxcnn

    net, params = trained.net, trained.params
    at = np.arange(len(x)), target
    logit = np.asarray(net.apply(params, x))[at]
    increase = logit - np.asarray(net.apply(params, np.zeros_like(x)))[at]
    conserved = {"integrated_gradients": increase, "deep_lift": increase, "relevance": logit}
    result = {}
    for title, (method, options) in methods(net, x.shape[1:], seed).items():
        if titles and title not in titles:
            continue
        run = jax.jit(functools.partial(jaxcnn.attribute, net, method=method, **options))
        heat = np.asarray(run(params, x, target))
        heat = heat.sum(-1) if heat.ndim == 4 else heat  # sum over channels
        result[title] = Maps(heat, heat.sum((1, 2)), conserved.get(method or ""))
    return result


def table(images: Sequence[int], results: Mapping[str, Maps]) -> str:
    """Return a table of Σ of each map and of the conserved quantity; the difference is the share of biases and of ε."""
    lines = [f"{'':<34}{'Σ map':>10} {'conserved':>10} {'difference':>10}"]
    for title, result in results.items():
        if result.conserved is not None:
            name = title.replace("\n", " ")
            lines += [
                f"{name:<24}{'image ' + str(n):<10}{total:>10.4f} {quantity:>10.4f} {quantity - total:>10.4f}"
                for n, total, quantity in zip(images, result.total, result.conserved, strict=True)
            ]
    return "\n".join(lines)


def save_figure(
    path: Path, trained: Trained, images: Sequence[int], logits: np.ndarray, results: Mapping[str, Maps]
) -> None:
    """Write a PNG with one row per image and one column per method."""
    from experiments.lecture.drawing import SIGNED, figure

    columns = len(results) + 1
    fig = figure(1.12 * columns + 0.6, 1.42 * len(images) + 0.75)
    fig.suptitle(
        "Evidence for (red) and against (blue) the predicted class, by pixel; Σ: sum of the map and conserved quantity",
        fontsize=11,
    )
    grid = fig.subplots(len(images), columns, squeeze=False)
    names = trained.dataset.class_names
    for i, (n, row) in enumerate(zip(images, grid, strict=True)):
        label, predicted = int(trained.dataset.test_labels[n]), int(logits[i].argmax())
        row[0].imshow(trained.dataset.test_images[n][..., 0], cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(names[label], fontsize=9, color="black" if predicted == label else "tab:red")
        mistake = "" if predicted == label else f"predicted\n{names[predicted]}, "
        row[0].set_xlabel(f"{mistake}logit {logits[i, predicted]:.2f}", fontsize=7.5)
        for axes, (title, result) in zip(row[1:], results.items(), strict=True):
            limit = float(np.abs(result.heat[i]).max()) or 1.0
            axes.imshow(result.heat[i], cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
            total = "" if result.conserved is None else f"\nΣ {result.total[i]:.2f} of {result.conserved[i]:.2f}"
            axes.set_xlabel(f"±{limit:.2g}{total}", fontsize=7.5)
            if i == 0:
                axes.set_title(title, fontsize=9)
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("0.7")
    with replacing(path) as temporary:
        fig.savefig(temporary, format="png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
