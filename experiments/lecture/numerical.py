"""Numbers that several scripts need: slopes by differences, pictures of the real world."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Dataset, load

Array = jax.Array


def slopes_by_differences(f: Callable[..., Array], inputs: tuple[Array, ...], delta: Array) -> tuple[Array, ...]:
    """The slope of ⟨f(inputs), δ⟩ in every entry of every input: two evaluations each, no calculus (lecture §5).

    Central differences, (E(x + h) − E(x − h)) / 2h. In float64 with h = 1e-5 they err by about 1e-10.
    """
    step = 1e-5
    flat = jnp.concatenate([x.ravel() for x in inputs])
    ends = np.cumsum([x.size for x in inputs])[:-1]

    @jax.jit
    def rises(flat: Array) -> Array:
        def error(at: Array) -> Array:
            moved = (part.reshape(x.shape) for part, x in zip(jnp.split(at, ends), inputs, strict=True))
            return jnp.vdot(f(*moved), delta)

        # One entry after the other, and either way: the loop holds one copy of f, which compiles fast.
        def rise(i: Array) -> Array:
            shifted = jax.lax.map(lambda h: error(flat.at[i].add(h)), jnp.array([step, -step], flat.dtype))
            return shifted[0] - shifted[1]

        return jax.lax.map(rise, jnp.arange(flat.size))

    slopes = jnp.split(rises(flat) / (2 * step), ends)
    return tuple(slope.reshape(x.shape) for slope, x in zip(slopes, inputs, strict=True))


def slopes_by_rule(f: Callable[..., Array], inputs: tuple[Array, ...], delta: Array) -> tuple[Array, ...]:
    """The same by the backward half of `f`."""
    return jax.jit(lambda *inputs: jax.vjp(f, *inputs)[1](delta))(*inputs)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    """Normal numbers, float64."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


@functools.cache
def fashion() -> Dataset:
    """The embedded sample of Fashion-MNIST."""
    return load("fashion-mnist-sample")


def boot() -> np.ndarray:
    """A picture of an ankle boot, the first of the training set: (28, 28), float64, 0 … 1."""
    data = fashion()
    return data.train_images[np.argmax(data.train_labels == 9), :, :, 0].astype(np.float64)


def portrait() -> np.ndarray:
    """Grace Hopper before a flag (US Navy, public domain; matplotlib brings it): (600, 512), float64, grey, 0 … 1."""
    from matplotlib import cbook, image

    with cbook.get_sample_data("grace_hopper.jpg", asfileobj=True) as file:  # type: ignore[union-attr]
        rgb = np.asarray(image.imread(file, format="jpg"))  # type: ignore[arg-type]
    return rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255


def as_picture(x: Any) -> Array:
    """(H, W) → (1, H, W, 1)."""
    return jnp.asarray(x)[None, :, :, None]
