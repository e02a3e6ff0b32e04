"""Predict masks with a net that was trained on masks; `experiments.predict` has the options."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.files import replacing
from experiments.mask_files import palette
from experiments.run_folder import new_folder

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.restore import Trained


def write(
    console: "Console",
    out: Path | None,
    paths: Sequence[Path],
    images: Sequence[np.ndarray],
    masks: np.ndarray,
    names: Sequence[str],
    stretch: bool,
) -> None:
    """Write the mask of each image as a PNG with a palette, and print the share of pixels of each class.

    Args:
        console: Where to print.
        out: The folder to create, or an empty one; None means runs/<time>-masks.
        paths: The image files.
        images: The images (H, W, 3).
        masks: The predicted masks (N, h, w) of the images as the net received them.
        names: The names of the classes.
        stretch: Whether the images were stretched to the shape of the masks; otherwise they were padded.
    """
    with new_folder(out, "masks") as folder:
        for n, (path, image, mask) in enumerate(zip(paths, images, masks, strict=True)):
            result = resized(mask, image.shape[:2], stretch)
            target = folder / f"{n + 1:0{len(str(len(paths)))}}-{path.stem}.png"
            save(target, result)
            shares = np.bincount(result.ravel(), minlength=len(names)) / result.size
            console.print(f"\n{path} → {target}", markup=False)
            for label in np.argsort(-shares, kind="stable"):
                if shares[label]:
                    console.print(f"  {names[label]}  {shares[label]:.1%}", markup=False)


def save(path: Path, mask: np.ndarray) -> None:
    """Write a mask (H, W) uint8 as a PNG whose values are the numbers of the classes, and whose palette has colors."""
    from PIL import Image

    indexed = Image.fromarray(mask)
    indexed.putpalette(palette().tobytes())
    with replacing(path) as temporary:
        indexed.save(temporary, "PNG")


def padded_size(shape: tuple[int, ...], like: tuple[int, ...]) -> tuple[int, int]:
    """Return the smallest height and width of at least `shape` in the proportions of `like`."""
    scale = max(shape[0] / like[0], shape[1] / like[1])
    return max(shape[0], math.ceil(scale * like[0])), max(shape[1], math.ceil(scale * like[1]))


def resized(mask: np.ndarray, shape: tuple[int, ...], stretch: bool) -> np.ndarray:
    """Return the mask of an image of a shape (H, W) from that of the image as the net received it."""
    from PIL import Image

    height, width = shape if stretch else padded_size(shape, mask.shape)
    pixels = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    return pixels[top : top + shape[0], left : left + shape[1]]


def print_test_images(trained: "Trained", chosen: Sequence[int], predicted: np.ndarray) -> None:
    """Print the accuracy and mean IoU of the masks that are predicted for some test images."""
    from experiments.tasks import confusion, intersection_over_union

    print(f"{'image':>6}  {'pixels':>7}  {'correct':>7}  mean IoU")
    classes = len(trained.inputs.class_names)
    total = np.zeros((classes, classes), np.int64)
    for n, mask in zip(chosen, predicted, strict=True):
        counts = np.asarray(confusion(trained.dataset.test_labels[n], mask, classes), np.int64)
        total = total + counts
        share, mean = np.trace(counts) / counts.sum(), np.nanmean(intersection_over_union(counts))
        print(f"{n:>6}  {counts.sum():>7,}  {share:>7.1%}  {mean:.3f}")
    share, mean = np.trace(total) / total.sum(), np.nanmean(intersection_over_union(total))
    print(f"{share:.1%} of the pixels correct, mean IoU {mean:.3f}")
