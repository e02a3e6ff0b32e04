"""Numbers shared by several scripts: slopes by differences, and real images."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import Dataset, load
from jaxcnn import Serial, TrainState

Array = jax.Array

STEP = 1e-5
"""How far an entry is moved; in float64 the slope then errs by about 1e-10."""


def slopes_by_differences(f: Callable[..., Array], inputs: tuple[Array, ...], delta: Array) -> tuple[Array, ...]:
    """Return the slope of ⟨f(inputs), δ⟩ with respect to every element of every input, without calculus (lecture §5).

    These are central differences, (E(x + h) − E(x − h)) / 2h, with two evaluations per element.
    """
    ends = np.cumsum([x.size for x in inputs])[:-1]

    @jax.jit
    def slopes(inputs: tuple[Array, ...], delta: Array) -> tuple[Array, ...]:
        flat = jnp.concatenate([x.ravel() for x in inputs])

        def parts(flat: Array) -> tuple[Array, ...]:
            return tuple(part.reshape(x.shape) for part, x in zip(jnp.split(flat, ends), inputs, strict=True))

        # A loop over the elements and both directions: it holds one copy of f, which compiles fast.
        def slope(i: Array) -> Array:
            moved = jnp.array([STEP, -STEP], flat.dtype)
            above, below = jax.lax.map(lambda h: jnp.vdot(f(*parts(flat.at[i].add(h))), delta), moved)
            return (above - below) / (2 * STEP)

        return parts(jax.lax.map(slope, jnp.arange(flat.size)))

    return slopes(inputs, delta)


def slopes_by_rule(f: Callable[..., Array], inputs: tuple[Array, ...], delta: Array) -> tuple[Array, ...]:
    """Return the same slopes by the backward rule of `f`."""
    return jax.jit(lambda *inputs: jax.vjp(f, *inputs)[1](delta))(*inputs)


def started(net: Serial, optimizer: optax.GradientTransformation) -> TrainState:
    """Return a TrainState for 28×28 images with NumPy weights, because JAX's generator compiles for each shape.

    Nets whose layers have equal numbers of weights start with equal weights, whatever shape the layers give them.
    """
    rng = np.random.default_rng(0)

    def drawn(layer: jax.ShapeDtypeStruct) -> Array:
        if len(layer.shape) == 1:  # a bias
            return jnp.zeros(layer.shape, layer.dtype)
        inputs = math.prod(layer.shape[:-1])
        return jnp.asarray(rng.normal(size=layer.shape) / math.sqrt(inputs), layer.dtype)

    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), (28, 28, 1)))
    params = jax.tree.map(drawn, shapes)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key(0, impl="rbg"))


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    """Return normally distributed numbers, float64."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


@functools.cache
def fashion() -> Dataset:
    """Return the embedded sample of Fashion-MNIST."""
    return load("fashion-mnist-sample")


def boot() -> np.ndarray:
    """Return an image of an ankle boot, the first of the training set: (28, 28), float64, 0 … 1."""
    data = fashion()
    return data.train_images[np.argmax(data.train_labels == 9), :, :, 0].astype(np.float64)


def portrait() -> np.ndarray:
    """Return a portrait of Grace Hopper (US Navy, public domain; in matplotlib): (600, 512), float64, gray, 0 … 1."""
    from matplotlib import cbook, image

    with cbook.get_sample_data("grace_hopper.jpg", asfileobj=True) as file:  # type: ignore[union-attr]
        rgb = np.asarray(image.imread(file, format="jpg"))  # type: ignore[arg-type]
    return rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255


def as_picture(x: Any) -> Array:
    """Add a batch and a channel dim: (H, W) → (1, H, W, 1)."""
    return jnp.asarray(x)[None, :, :, None]
