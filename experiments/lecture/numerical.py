"""Functions shared by several scripts: slopes by differences, initial states, and images."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import load
from experiments.dataset import Dataset
from jaxcnn import Serial, TrainState

Array = jax.Array

STEP = 1e-5
"""Step h of the differences; in float64 the error of the slope is about 1e-10."""


def slopes_by_differences(f: Callable[..., Array], inputs: tuple[Array, ...], delta: Array) -> tuple[Array, ...]:
    """Return the slope of ⟨f(inputs), δ⟩ with respect to every element of every input, by central differences.

    A slope is (E(x + h) − E(x − h)) / 2h, two evaluations per element (lecture §5).
    """
    ends = np.cumsum([x.size for x in inputs])[:-1]

    @jax.jit
    def slopes(inputs: tuple[Array, ...], delta: Array) -> tuple[Array, ...]:
        flat = jnp.concatenate([x.ravel() for x in inputs])

        def parts(flat: Array) -> tuple[Array, ...]:
            return tuple(part.reshape(x.shape) for part, x in zip(jnp.split(flat, ends), inputs, strict=True))

        # A loop over elements and directions contains one copy of f, so it compiles fast.
        def slope(i: Array) -> Array:
            steps = jnp.array([STEP, -STEP], flat.dtype)
            above, below = jax.lax.map(lambda h: jnp.vdot(f(*parts(flat.at[i].add(h))), delta), steps)
            return (above - below) / (2 * STEP)

        return parts(jax.lax.map(slope, jnp.arange(flat.size)))

    return slopes(inputs, delta)


def slopes_by_rule(f: Callable[..., Array], inputs: tuple[Array, ...], delta: Array) -> tuple[Array, ...]:
    """Return the same slopes, by the backward rule of `f`."""
    return jax.jit(lambda *inputs: jax.vjp(f, *inputs)[1](delta))(*inputs)


def initial_state(net: Serial, optimizer: optax.GradientTransformation) -> TrainState:
    """Return a TrainState for 28×28 images, with weights drawn by NumPy.

    JAX's generator would compile for each shape. Two nets whose layers have the same numbers of weights start with the
    same weights, even if the shapes differ.
    """
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> Array:
        if len(leaf.shape) == 1:  # a bias
            return jnp.zeros(leaf.shape, leaf.dtype)
        inputs = math.prod(leaf.shape[:-1])
        return jnp.asarray(rng.normal(size=leaf.shape) / math.sqrt(inputs), leaf.dtype)

    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), (28, 28, 1)))
    params = jax.tree.map(draw, shapes)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key(0, impl="rbg"))


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    """Return one array of normally distributed float64 numbers per shape."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


@functools.cache
def fashion() -> Dataset:
    """Return the embedded sample of Fashion-MNIST."""
    return load("fashion-mnist-sample")


def boot() -> np.ndarray:
    """Return the first ankle boot of the training set: (28, 28), float64, 0 … 1."""
    data = fashion()
    return data.train_images[np.argmax(data.train_labels == 9), :, :, 0].astype(np.float64)


def portrait() -> np.ndarray:
    """Return a portrait of Grace Hopper (US Navy, public domain; in matplotlib): (600, 512), float64, gray, 0 … 1."""
    from matplotlib import cbook, image

    with cbook.get_sample_data("grace_hopper.jpg", asfileobj=True) as file:  # type: ignore[union-attr]
        rgb = np.asarray(image.imread(file, format="jpg"))  # type: ignore[arg-type]
    return rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255


def as_batch(x: Any) -> Array:
    """Return the image with a batch and a channel dim: (H, W) → (1, H, W, 1)."""
    return jnp.asarray(x)[None, :, :, None]
