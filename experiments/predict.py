"""Predict the classes of image files with a trained net: python -m experiments.predict --help."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from tyro.conf import FlagCreatePairsOff, Positional, arg

from experiments import cli, predict_masks
from experiments.dataset import border
from experiments.errors import DataError, UsageError, bad_value
from experiments.files import replacing
from experiments.image_files import SUFFIXES, decode
from experiments.report import predicted_classes, probabilities
from experiments.restore import TrainedNet, check_images, newest, read_config, restore, restore_net
from experiments.run_folder import Run, new_folder

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.attributions import Maps

PROG = "python -m experiments.predict"
INVERT = ("auto", "always", "never")
TEST_IMAGES = tuple(range(10))
METHODS = ("integrated\ngradients", "LRP\nε, z⁺", "Grad-CAM")
"""The methods of experiments.attributions that --explain applies."""
BAR = 24
"""Width of the bar of a probability of 1, in characters."""
MARGIN = 0.15
"""A border is dark below 0.5 - MARGIN and light above 0.5 + MARGIN."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Print the most probable classes of image files. Without files, print the predictions for test images.

    If the net was trained on masks, write the mask of each file, and print the shares of its pixels.

    The files are PNG or JPEG images of any size, gray or color. They are padded to the shape of the net's images in the
    color of their border, and resized. If the net was trained with --size, they are stretched instead, as in training.
    """

    files: Positional[tuple[Path, ...]] = ()
    """Image files, and folders of such files."""
    run: Annotated[Path | None, arg(metavar="RUN")] = None
    """Folder of the run; if omitted, the newest in runs/."""
    images: tuple[int, ...] = TEST_IMAGES
    """Numbers of the test images, from 0, if there are no files."""
    top: int = 3
    """Number of classes to print for each file."""
    invert: str = "auto"
    """auto: invert a gray image if its border is light and that of the training images is dark, or the other way round.
    always, never."""
    explain: FlagCreatePairsOff[bool] = False
    """Draw heat maps of the evidence for the most probable class of each file."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the heat maps or masks, new or empty; if omitted, runs/<time>-explanations or runs/<time>-masks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, predict, argv, prog=PROG)


def predict(config: Config) -> int:
    """Print the predictions; raise UsageError, CheckpointError, DataError or RunError."""
    cli.check_choice("--invert", config.invert, INVERT)
    cli.check_count("--top", config.top)
    if config.files and config.images != TEST_IMAGES:
        raise bad_value(UsageError, "--images", "omitted with files", " ".join(map(str, config.images)))
    if config.explain and not config.files:
        raise bad_value(UsageError, "--explain", "given with image files", "no file")
    if config.out is not None and not config.files:
        raise bad_value(UsageError, "--out", "omitted without image files", config.out)
    paths = find(config.files)
    folder = newest() if config.run is None else config.run
    if config.files:
        predict_files(config, folder, paths)
    else:
        predict_test_images(folder, config.images)
    return 0


def find(files: Sequence[Path]) -> list[Path]:
    """Return the image files among `files`, and in the folders among them; raise DataError for an empty folder."""
    paths = []
    for path in files:
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
            if not inside:
                expected = f"a folder with at least one file {' or '.join('*' + suffix for suffix in SUFFIXES)}"
                raise bad_value(DataError, path, expected, "none")
            paths += inside
        else:
            paths.append(path)
    return paths


def predict_files(config: Config, folder: Path, paths: Sequence[Path]) -> None:
    """Print the most probable classes of each file, and draw heat maps if they are requested."""
    from rich.console import Console

    from experiments.own_nets import check_layers

    images = [decode(path)[0] for path in paths]  # before the net is loaded: a wrong file is found sooner
    trained = restore_net(folder)
    masks = trained.inputs.task == "segmentation"
    if config.out is not None and not config.explain and not masks:
        raise bad_value(UsageError, "--out", "omitted without --explain", config.out)
    if config.explain and masks:
        raise bad_value(UsageError, "--explain", "omitted for a net that was trained on masks", "it")
    if config.explain:
        check_layers(trained.net, "--explain", "omitted unless the net is one of jaxcnn")
    names, shape = trained.inputs.class_names, trained.inputs.image_shape
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise bad_value(UsageError, "--run", "a net for gray or color images", f"one for images of shape {shape}")
    stretch = read_config(Run(folder)).get("size") is not None
    inverted = [inverts(config.invert, image, shape, trained.inputs.border) for image in images]
    x = np.stack([to_input(image, shape, stretch, flag) for image, flag in zip(images, inverted, strict=True)])
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{trained.model} from {folder.absolute()}, trained on {trained.inputs.name}", markup=False)
    if masks:
        predict_masks.write(console, config.out, paths, images, predicted_classes(trained, x), names, stretch)
        return
    predicted = probabilities(trained, x)
    for path, row, flag in zip(paths, predicted, inverted, strict=True):
        show(console, f"{path}{', inverted' if flag else ''}", row, names, config.top)
    if config.explain:
        explain(config.out, trained, paths, x, predicted)


def inverts(choice: str, image: np.ndarray, shape: tuple[int, ...], usual: float) -> bool:
    """Whether to invert an image (H, W, 3) uint8.

    Args:
        choice: One of INVERT.
        image: The image.
        shape: The shape of the net's images. In color, "auto" never inverts.
        usual: The brightness of the border of the training images.
    """
    if choice != "auto":
        return choice == "always"
    mine = border(image[None] / 255)
    low, high = sorted((mine, usual))
    return shape[2] == 1 and low < 0.5 - MARGIN and high > 0.5 + MARGIN


def to_input(image: np.ndarray, shape: tuple[int, ...], stretch: bool, invert: bool) -> np.ndarray:
    """Return an image of the shape and range of the net's images.

    Args:
        image: (H, W, 3) uint8.
        shape: The shape (h, w, 1 or 3) of the result.
        stretch: Whether to resize both sides independently. Otherwise the image is padded to the proportions of the
            result, in the color of its border.
        invert: Whether to replace x by 1 - x.
    """
    from PIL import Image

    height, width, channels = shape
    pixels = Image.fromarray(image).convert("L" if channels == 1 else "RGB")
    if not stretch and pixels.width * height != pixels.height * width:
        values = np.asarray(pixels).reshape(pixels.height, pixels.width, channels)
        edges = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
        color = tuple(int(c) for c in np.median(edges, 0))
        size = predict_masks.padded_size((pixels.height, pixels.width), shape)[::-1]
        padded = Image.new(pixels.mode, size, color if channels == 3 else color[0])
        padded.paste(pixels, ((size[0] - pixels.width) // 2, (size[1] - pixels.height) // 2))
        pixels = padded
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    x = (np.asarray(pixels, np.float32) / 255).reshape(shape)
    return 1 - x if invert else x


def show(console: "Console", title: str, row: np.ndarray, names: Sequence[str], top: int) -> None:
    """Print the `top` most probable classes as bars."""
    from rich.text import Text

    block, parts = ("█", " ▏▎▍▌▋▊▉") if console.encoding.lower().startswith("utf") else ("#", " ")
    chosen = np.argsort(-row, kind="stable")[:top]
    wide = max(len(names[label]) for label in chosen)
    console.print(Text(f"\n{title}", "bold"))
    for n, label in enumerate(chosen):
        whole, rest = divmod(round(float(row[label]) * BAR * len(parts)), len(parts))
        bar = f"{block * whole}{parts[rest] if rest else ''}"
        style = "green" if n == 0 else "cyan"
        console.print(Text.assemble(f"  {names[label]:<{wide}}  ", (f"{bar:<{BAR}}", style), f"  {row[label]:6.1%}"))


def explain(out: Path | None, trained: TrainedNet, paths: Sequence[Path], x: np.ndarray, predicted: np.ndarray) -> None:
    """Draw the evidence for the most probable class of each image, one PNG per image, and print the folder."""
    from experiments import attributions

    with new_folder(out, "explanations") as folder:
        target = predicted.argmax(1)
        results = attributions.maps(trained, x, target, seed=0, titles=METHODS)
        for n, path in enumerate(paths):
            name = trained.inputs.class_names[target[n]]
            title = f"{path.name}: {name} {predicted[n, target[n]]:.1%}"
            draw(folder / f"{n + 1:0{len(str(len(paths)))}}-{path.stem}.png", title, x[n], results, n)
        print(f"\nheat maps of the evidence for (red) and against (blue) the first class in {folder}")


def draw(path: Path, title: str, image: np.ndarray, results: "dict[str, Maps]", n: int) -> None:
    """Write a PNG with the image as the net sees it, and the maps of image `n`."""
    from experiments.lecture.drawing import figure, gray, signed

    fig = figure(2.2 * (len(results) + 1), 2.9)
    fig.suptitle(title, fontsize=10.5)
    first, *others = fig.subplots(1, len(results) + 1)
    if image.shape[-1] == 3:
        gray(first, np.zeros(image.shape[:2]), "input", "")
        first.imshow(image)
    else:
        gray(first, image[..., 0], "input", "")
    for axes, (method, maps) in zip(others, results.items(), strict=True):
        limit = float(np.abs(maps.heat[n]).max()) or 1.0
        signed(axes, maps.heat[n], method.replace("\n", " "), f"±{limit:.2g}", limit=limit)
    with replacing(path) as temporary:
        fig.savefig(temporary, format="png", dpi=100)


def predict_test_images(folder: Path, chosen: Sequence[int]) -> None:
    """Print the label and the prediction of each chosen test image."""
    trained = restore(folder)
    check_images(chosen, trained.dataset)
    dataset, chosen = trained.dataset, list(chosen)
    if trained.inputs.task == "segmentation":
        print(f"{trained.model} from {folder.absolute()}, test images of {dataset.name}")
        predict_masks.print_test_images(trained, chosen, predicted_classes(trained, dataset.test_pixels[chosen]))
        return
    predicted = probabilities(trained, dataset.test_pixels[chosen])

    names, correct = dataset.class_names, 0
    width = max(map(len, names))
    print(f"{trained.model} from {folder.absolute()}, test images of {dataset.name}")
    print(f"{'image':>6}  {'label':<{width}}  {'prediction':<{width}}  probability")
    for n, row in zip(chosen, predicted, strict=True):
        label, best = int(dataset.test_labels[n]), int(row.argmax())
        correct += best == label
        mark = "" if best == label else "  wrong"
        print(f"{n:>6}  {names[label]:<{width}}  {names[best]:<{width}}  {row[best]:.3f}{mark}")
    print(f"{correct} of {len(chosen)} correct")


if __name__ == "__main__":
    sys.exit(main())
