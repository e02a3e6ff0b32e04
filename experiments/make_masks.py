"""Write a small data set with masks, clothes of Fashion-MNIST on noise: python -m experiments.make_masks --help."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from experiments import cli
from experiments.errors import RunError, bad_value
from experiments.idx_files import fashion_mnist_sample
from experiments.predict_masks import save

PROG = "python -m experiments.make_masks"
CHOSEN = ("Trouser", "Bag", "Ankle boot")
"""The classes of Fashion-MNIST that are pasted. Class 0 is the background."""
SIDE = 32
VISIBLE = 30
"""The smallest pixel of an item; darker ones are background."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Write gray images of 32×32 pixels and their masks, one item of the embedded Fashion-MNIST in each."""

    folder: Positional[Path]
    """The folder, which does not exist yet."""
    count: int = 600
    """Number of images."""
    seed: int = 0
    """Seed of the items, their places, and the noise."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, write, argv, prog=PROG)


def write(config: Config) -> int:
    """Write the files, and return 0; raise RunError if the folder exists."""
    from PIL import Image

    cli.check_count("--count", config.count)
    if config.folder.exists():
        raise bad_value(RunError, config.folder, "a new folder", "one that exists")
    for name in ("images", "masks"):
        (config.folder / name).mkdir(parents=True)
    for n, (image, mask) in enumerate(zip(*draw(config.count, config.seed), strict=True)):
        Image.fromarray(image).save(config.folder / "images" / f"{n:05d}.png")
        save(config.folder / "masks" / f"{n:05d}.png", mask)
    (config.folder / "classes.txt").write_text("\n".join(("background", *CHOSEN)) + "\n", "utf-8")
    print(f"{config.count} images with masks in {config.folder}")
    return 0


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images and masks (N, 32, 32), uint8."""
    random, source = np.random.default_rng(seed), fashion_mnist_sample()
    images = random.integers(0, 100, (count, SIDE, SIDE)).astype(np.uint8)
    masks = np.zeros((count, SIDE, SIDE), np.uint8)
    members = [np.flatnonzero(source.train_labels == source.class_names.index(name)) for name in CHOSEN]
    for image, mask, chosen in zip(images, masks, random.integers(0, len(CHOSEN), count), strict=True):
        item = np.asarray(source.train_pixels[random.choice(members[chosen])])[..., 0]
        top, left = random.integers(0, SIDE - item.shape[0] + 1, 2)
        rows, columns = slice(top, top + item.shape[0]), slice(left, left + item.shape[1])
        visible = item >= VISIBLE
        image[rows, columns][visible] = item[visible]
        mask[rows, columns][visible] = chosen + 1
    return images, masks


if __name__ == "__main__":
    sys.exit(main())
