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
from experiments.restore import Trained, prepare
from experiments.run_folder import new_folder

if TYPE_CHECKING:
    from jaxcnn import Serial

PROG = "python -m experiments.attributions"
SAMPLES = 25
STEPS = 50


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw a gallery with a row per chosen test image and a column per method, for the predicted class.

    Red is positive evidence for that class, blue negative evidence, white is 0. Each map has its own scale, printed
    below it. For each method that conserves a quantity, that quantity is printed next to the sum of the map.
    """

    run: Annotated[Path | None, arg(metavar="PATH")] = None
    """The run's folder; without it, the newest in runs/ that is finished, and a net is trained if there is none."""
    fresh: FlagCreatePairsOff[bool] = False
    """Train a net, even if there is a run; so does each option of the training but --seed."""
    images: tuple[int, ...] = (0, 1, 12, 17, 23)
    """Which test images, counted from 0."""
    model: str = "lecture"
    """The net to train: lecture, mlp or lenet5."""
    epochs: int = 1
    """Passes over the 10,000 embedded images."""
    max_steps: Annotated[int | None, arg(metavar="INT")] = None
    """Stop the training after so many steps."""
    seed: int = 0
    """Of the training, and of SmoothGrad's noise."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the picture, new or empty; without it, runs/<time>-attributions."""


@dataclasses.dataclass(frozen=True)
class Maps:
    """The maps of one method, (N, H, W), each original map's sum, and the value it should have if conserved."""

    heat: np.ndarray
    total: np.ndarray
    promised: np.ndarray | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, draw, argv, prog=PROG)


def draw(config: Config) -> int:
    """Train or load, attribute, draw. Returns 0; raises UsageError, CheckpointError, DataError or RunError."""
    with new_folder(config.out, "attributions") as folder:
        trained = prepare(config, folder)
        chosen = list(config.images)
        x = trained.dataset.test_images[chosen]
        logits = np.asarray(trained.net.apply(trained.params, x))
        target = logits.argmax(1)
        found = maps(trained, x, target, config.seed)
        picture(folder / "attributions.png", trained, chosen, logits, found)
        for i, n in enumerate(chosen):
            print(describe(trained.dataset, n, softmax(logits[i])))
        print()
        print(table(chosen, found))
        print(f"\n{folder / 'attributions.png'}")
    return 0


def methods(net: "Serial", shape: tuple[int, ...], seed: int) -> "dict[str, tuple[str | None, Mapping[str, Any]]]":
    """Return, by title, the method and options of `jaxcnn.attribute`; inapplicable methods are omitted.

    `shape` is that of one image. Pixels are between 0 and 1, which are the bounds of zᴮ.
    """
    import jax

    from jaxcnn import HiddenLayer, Relu, attribution, rules

    layers = [layer for _, layer in net.walk()]
    pictures = [row.name for row in net.summary(shape).rows if len(row.output_shape) == 3]
    found: dict[str, tuple[str | None, Mapping[str, Any]]] = {
        "gradient": ("gradient", {}),
        "gradient × input": ("gradient_times_input", {}),
        "integrated\ngradients": ("integrated_gradients", {"steps": STEPS}),
        "SmoothGrad": ("smooth_grad", {"key": jax.random.key(seed), "samples": SAMPLES}),
    }
    rectifiers = [kind for kind in (Relu, HiddenLayer) if any(isinstance(layer, kind) for layer in layers)]
    if rectifiers:
        for title, rule in (("guided\nbackprop", rules.guided_relu), ("deconvnet", rules.deconv_relu)):
            found[title] = ("gradient", {"rules": dict.fromkeys(rectifiers, rule)})
    if pictures:
        found["Grad-CAM"] = ("grad_cam", {"layer": pictures[-1]})
    return {
        **found,
        "occlusion": ("occlusion", {"window": 5, "stride": 2}),
        "LRP\nε, z⁺": ("relevance", {"rules": attribution.epsilon_plus()}),
        "LRP\nε, α2β1": ("relevance", {"rules": attribution.epsilon_alpha2_beta1()}),
        "LRP\nε, γ, zᴮ": ("relevance", {"rules": attribution.epsilon_gamma_box(net, 0.0, 1.0)}),
        "DeepLIFT": ("deep_lift", {}),
    }


def maps(trained: Trained, x: np.ndarray, target: np.ndarray, seed: int) -> dict[str, Maps]:
    """Return the maps of each method, by title, for images `x` and the classes `target`."""
    import jax

    import jaxcnn

    net, params = trained.net, trained.params
    at = np.arange(len(x)), target
    logit = np.asarray(net.apply(params, x))[at]
    rise = logit - np.asarray(net.apply(params, np.zeros_like(x)))[at]
    promises = {"integrated_gradients": rise, "deep_lift": rise, "relevance": logit}
    found = {}
    for title, (method, options) in methods(net, x.shape[1:], seed).items():
        run = jax.jit(functools.partial(jaxcnn.attribute, net, method=method, **options))
        heat = np.asarray(run(params, x, target))
        heat = heat.sum(-1) if heat.ndim == 4 else heat  # sum over channels
        found[title] = Maps(heat, heat.sum((1, 2)), promises.get(method or ""))
    return found


def table(images: Sequence[int], found: Mapping[str, Maps]) -> str:
    """Return a table of Σ of each map and of the conserved quantity; the difference is the share of biases and of ε."""
    lines = [f"{'':<34}{'Σ map':>10} {'should be':>10} {'rest':>10}"]
    for title, of in found.items():
        if of.promised is not None:
            name = title.replace("\n", " ")
            lines += [
                f"{name:<24}{'image ' + str(n):<10}{total:>10.4f} {should:>10.4f} {should - total:>10.4f}"
                for n, total, should in zip(images, of.total, of.promised, strict=True)
            ]
    return "\n".join(lines)


def picture(path: Path, trained: Trained, images: Sequence[int], logits: np.ndarray, found: Mapping[str, Maps]) -> None:
    """Write a PNG with one row per image and one column per method."""
    from experiments.lecture.drawing import SIGNED, figure

    columns = len(found) + 1
    made = figure(1.12 * columns + 0.6, 1.42 * len(images) + 0.75)
    made.suptitle(
        "Which pixels speak for (red) and against (blue) the class the net says; Σ: the sum of the map", fontsize=11
    )
    grid = made.subplots(len(images), columns, squeeze=False)
    names = trained.dataset.class_names
    for i, (n, row) in enumerate(zip(images, grid, strict=True)):
        label, said = int(trained.dataset.test_labels[n]), int(logits[i].argmax())
        row[0].imshow(trained.dataset.test_images[n][..., 0], cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(names[label], fontsize=9, color="black" if said == label else "tab:red")
        taken = "" if said == label else f"taken for\n{names[said]}, "
        row[0].set_xlabel(f"{taken}logit {logits[i, said]:.2f}", fontsize=7.5)
        for axes, (title, of) in zip(row[1:], found.items(), strict=True):
            limit = float(np.abs(of.heat[i]).max()) or 1.0
            axes.imshow(of.heat[i], cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
            total = "" if of.promised is None else f"\nΣ {of.total[i]:.2f} of {of.promised[i]:.2f}"
            axes.set_xlabel(f"±{limit:.2g}{total}", fontsize=7.5)
            if i == 0:
                axes.set_title(title, fontsize=9)
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("0.7")
    with replacing(path) as temporary:
        made.savefig(temporary, format="png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
