"""Random changes of training images, as jitted functions of a key and a batch of images.

    crop      pad by zeros at each side, and cut a window of the original size at a random place
    flip      mirror left and right with probability 1/2
    cutout    set a square to zero (DeVries and Taylor 2017)
    mixup     mix each image, and its label, with another of the batch (Zhang et al. 2017)

Images are (N, H, W, C), uint8 or floating-point. A change keeps their shape and dtype; its values lie between the
smallest and the largest value of the input, or are 0. The same key gives the same result. In a training, the key is a
function of seed and step alone, so the draws of a resumed run are those of an undisturbed one.

A mask is moved together with its image by `crop` and `flip`, and is IGNORED where zeros enter the image.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.dataset import IGNORED, scaled

SHARE = 1 / 8
"""Padding of `crop`, as a share of the image's side; that of 4 pixels of 32 (He et al. 2015, §4.2)."""
CUTOUT = 1 / 2
"""Side of the square of `cutout`, as a share of the image's shorter side."""
ALPHA = 0.2
"""Parameter of the Beta distribution of `mixup`."""


@functools.partial(jax.jit, static_argnames=("padding", "fill"))
def crop(key: Array, images: Array, padding: int | None = None, fill: int = 0) -> Array:
    """Return images moved by up to `padding` pixels in each direction; `fill` enters at the edges.

    Args:
        key: From `jax.random.key`.
        images: (N, H, W, C).
        padding: Number of pixels; None means SHARE of the longer side, at least 1.
        fill: The value of new pixels.
    """
    count, height, width, channels = images.shape
    margin = max(1, round(SHARE * max(height, width))) if padding is None else padding
    padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), constant_values=fill)
    offsets = jax.random.randint(key, (count, 2), 0, 2 * margin + 1)

    def cut(image: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(cut)(padded, offsets)


@jax.jit
def flip(key: Array, images: Array) -> Array:
    """Return images, each mirrored left and right with probability 1/2.

    Args:
        key: From `jax.random.key`.
        images: (N, H, W, C).
    """
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


@functools.partial(jax.jit, static_argnames="side")
def cutout(key: Array, images: Array, side: int | None = None) -> Array:
    """Return images with a square of zeros, whose center is any pixel; parts of it may be outside of the image.

    Args:
        key: From `jax.random.key`.
        images: (N, H, W, C).
        side: Side of the square; None means CUTOUT of the image's shorter side.
    """
    count, height, width, _ = images.shape
    size = round(CUTOUT * min(height, width)) if side is None else side
    center = jax.random.randint(key, (2, count, 1), 0, jnp.array([height, width])[:, None, None])
    first = center - size // 2
    rows, columns = (
        (jnp.arange(length) >= at) & (jnp.arange(length) < at + size)
        for length, at in zip((height, width), first, strict=True)
    )
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(inside, jnp.zeros((), images.dtype), images)


@functools.partial(jax.jit, static_argnames=("classes", "alpha"))
def mixup(key: Array, images: Array, labels: Array, classes: int, alpha: float = ALPHA) -> tuple[Array, Array]:
    """Return λx + (1 − λ)x′ and λy + (1 − λ)y′, where x′ is a permutation of the batch and λ ≥ 1/2 has a Beta law.

    Args:
        key: From `jax.random.key`.
        images: (N, H, W, C).
        labels: (N,) int.
        classes: Number of classes.
        alpha: Both parameters of the law. The larger of λ and 1 − λ is taken.

    Returns:
        The images, and targets (N, classes) float32 that sum to 1.
    """
    draw, shuffle = jax.random.split(key)
    share = jax.random.beta(draw, alpha, alpha, (len(images),))
    share = jnp.maximum(share, 1 - share)
    other = jax.random.permutation(shuffle, len(images))
    targets = jax.nn.one_hot(labels, classes, dtype=jnp.float32)

    def mixed(a: Array) -> Array:
        part = share.reshape(-1, *(1,) * (a.ndim - 1))
        return part * a + (1 - part) * a[other]

    result = mixed(images.astype(jnp.float32))
    integers = jnp.issubdtype(images.dtype, jnp.integer)
    return (jnp.round(result) if integers else result).astype(images.dtype), mixed(targets)


AUGMENTATIONS: Mapping[str, Callable[..., Any]] = {"crop": crop, "flip": flip, "cutout": cutout, "mixup": mixup}
"""The functions by name, in the order in which they are applied."""
_KEY = 2
"""Number folded into the key of a run for augmentation; the order of the data and dropout use other keys."""


def augmented(names: Sequence[str], seed: int, step: int, batch: Any, classes: int, largest: int = 255) -> Any:
    """Return the batch of a step after the augmentations `names`.

    Args:
        names: Names in AUGMENTATIONS.
        seed: The seed of the run.
        step: The number of the step, from 0.
        batch: Images (N, H, W, C), and labels (N,) or masks (N, H, W). Masks have only crop and flip.
        classes: Number of classes.
        largest: The pixel of uint8 images that the net receives as 1.

    Returns:
        Floating-point images, and the labels or masks, or targets (N, classes) after mixup.
    """
    return _augmented(tuple(sorted(names)), classes, largest, np.uint32(seed), np.uint32(step), *batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _augmented(
    names: tuple[str, ...], classes: int, largest: int, seed: Array, step: Array, images: Array, labels: Array
) -> Any:
    images = scaled(images, largest)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _KEY), step)
    for n, (name, function) in enumerate(AUGMENTATIONS.items()):
        if name in names:
            each = jax.random.fold_in(key, n)
            if name == "mixup":
                images, labels = mixup(each, images, labels, classes)
            else:
                if labels.ndim == 3:  # the same key gives the same offsets
                    options = {"fill": IGNORED} if name == "crop" else {}
                    labels = function(each, labels[..., None], **options)[..., 0]
                images = function(each, images)
    return images, labels
