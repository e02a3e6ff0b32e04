"""Wrong gradients of JAX's own convolution on XLA:CPU: python -m experiments.benchmarks.wrong_gradients --help.

For stride 1, several channels, more padding in front than the kernel extends and little behind, the input gradient of
autodiff has negative padding, and XLA:CPU reads out of bounds (openxla/xla#48713). The rules of jaxcnn never use
negative padding. The reference is the definition, term by term, in float64.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from experiments import cli

PROG = "python -m experiments.benchmarks.wrong_gradients"

#: Relative to the largest element; float32 rounds to about 1e-6 here.
WRONG = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare δ_x of 90 one-row convolutions, by `jax.vjp` of stock JAX and by jaxcnn, with the definition."""

    channels: int = 8
    """Of pictures and of results."""
    seed: int = 0
    """Of pictures, patches and δ."""


@dataclasses.dataclass(frozen=True)
class Found:
    """One convolution, and the error of δ_x: the largest error relative to the largest element, inf if not finite."""

    kernel_size: int
    padding: tuple[int, int]
    width: int
    stock: float
    ours: float

    def __str__(self) -> str:
        shape = f"patch 1×{self.kernel_size}, padding {self.padding}, width {self.width}"
        return f"{shape:40}  {self.stock:10.2g}  {self.ours:10.2g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, report, argv, prog=PROG)


def report(config: Config) -> int:
    """Print the wrong gradients and the counts. Returns 0, or 1 if jaxcnn is wrong anywhere."""
    cli.check_count("--channels", config.channels)
    import jax

    found = list(sweep(config))
    print(f"jax {jax.__version__}, jaxlib {version('jaxlib')}, {jax.default_backend()}, float32")
    print(f"{'relative error of δ_x':40}  {'stock':>10}  {'jaxcnn':>10}")
    wrong = [one for one in found if max(one.stock, one.ours) > WRONG]
    for one in wrong:
        print(one)
    ours = sum(one.ours > WRONG for one in found)
    print(
        f"of {len(found)} convolutions {sum(one.stock > WRONG for one in found)} wrong by stock JAX, {ours} by jaxcnn"
    )
    return 1 if ours else 0


def sweep(config: Config) -> Iterator[Found]:
    """Yield all combinations of kernels, paddings and widths."""
    for patch, lo, hi, width in itertools.product((1, 2, 3), (0, 2, 3, 4, 5), (0, 1, 3), (6, 7)):
        yield measured(patch, (lo, hi), width, config)


def measured(patch: int, padding: tuple[int, int], width: int, config: Config) -> Found:
    """Measure one convolution in both libraries."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jaxcnn

    rng = np.random.default_rng(config.seed)
    x = rng.standard_normal((1, 4, width, config.channels)).astype(np.float32)
    w = rng.standard_normal((1, patch, config.channels, config.channels)).astype(np.float32)
    pads = ((0, 0), padding)

    def stock(x: Any) -> Any:
        return lax.conv_general_dilated(x, jnp.asarray(w), (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def ours(x: Any) -> Any:
        return jaxcnn.conv(x, w, padding=pads)

    delta = rng.standard_normal(jax.eval_shape(ours, x).shape).astype(np.float32)
    expected = delta_x(delta.astype(np.float64), w.astype(np.float64), padding[0], width)
    errors = []
    for f in (stock, ours):
        pull = jax.jit(lambda x, delta, f=f: jax.vjp(f, x)[1](delta)[0])
        error = np.abs(np.asarray(pull(x, delta), np.float64) - expected).max() / np.abs(expected).max()
        errors.append(float(error) if np.isfinite(error) else float("inf"))
    return Found(patch, padding, width, *errors)


def delta_x(delta: np.ndarray, w: np.ndarray, lo: int, width: int) -> np.ndarray:
    """Return the definition for one-row kernels: element o + k − lo gets δ[o]·w[k]ᵀ."""
    found = np.zeros((*delta.shape[:2], width, w.shape[2]))
    for o, k in np.ndindex(delta.shape[2], w.shape[1]):
        if 0 <= o + k - lo < width:
            found[:, :, o + k - lo] += delta[:, :, o] @ w[0, k].T
    return found


if __name__ == "__main__":
    sys.exit(main())
