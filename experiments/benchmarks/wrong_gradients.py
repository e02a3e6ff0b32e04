"""Find wrong gradients of JAX's own convolution: python -m experiments.benchmarks.wrong_gradients --help.

For stride 1, several channels, padding in front that is wider than the kernel's reach, and little padding behind, the
input gradient of autodiff has negative padding, and XLA:CPU reads out of bounds (openxla/xla#48713). The rules of
jaxcnn never use negative padding. The reference is the definition, term by term, in float64.
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

WRONG = 1e-3
"""Error of a wrong gradient, relative to the largest element; float32 rounds to about 1e-6 here."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare δ_x of 90 one-row convolutions by stock JAX and by jaxcnn with the definition."""

    channels: int = 8
    """Channels of inputs and outputs."""
    seed: int = 0
    """Seed of inputs, kernels and δ."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One convolution and the errors of δ_x, relative to its largest element; inf if not finite."""

    kernel_size: int
    padding: tuple[int, int]
    width: int
    stock: float
    ours: float

    def __str__(self) -> str:
        shape = f"kernel 1×{self.kernel_size}, padding {self.padding}, width {self.width}"
        return f"{shape:40}  {self.stock:10.2g}  {self.ours:10.2g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, report, argv, prog=PROG)


def report(config: Config) -> int:
    """Print the wrong gradients and the counts. Return 0, or 1 if a gradient of jaxcnn is wrong."""
    cli.check_count("--channels", config.channels)
    import jax

    results = list(measure_all(config))
    print(f"jax {jax.__version__}, jaxlib {version('jaxlib')}, {jax.default_backend()}, float32")
    print(f"{'relative error of δ_x':40}  {'stock':>10}  {'jaxcnn':>10}")
    for result in results:
        if max(result.stock, result.ours) > WRONG:
            print(result)
    stock, ours = (sum(getattr(result, name) > WRONG for result in results) for name in ("stock", "ours"))
    print(f"{len(results)} convolutions: {stock} wrong by stock JAX, {ours} by jaxcnn")
    return 1 if ours else 0


def measure_all(config: Config) -> Iterator[Measured]:
    """Measure all combinations of kernels, paddings and widths."""
    for kernel_size, lo, hi, width in itertools.product((1, 2, 3), (0, 2, 3, 4, 5), (0, 1, 3), (6, 7)):
        yield measure(kernel_size, (lo, hi), width, config)


def measure(kernel_size: int, padding: tuple[int, int], width: int, config: Config) -> Measured:
    """Measure one convolution in both libraries."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jaxcnn

    rng = np.random.default_rng(config.seed)
    x = rng.standard_normal((1, 4, width, config.channels)).astype(np.float32)
    w = rng.standard_normal((1, kernel_size, config.channels, config.channels)).astype(np.float32)
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
    return Measured(kernel_size, padding, width, *errors)


def delta_x(delta: np.ndarray, w: np.ndarray, lo: int, width: int) -> np.ndarray:
    """Return δ_x of one-row kernels by the definition: δ[o]·w[k]ᵀ is added to element o + k − lo."""
    result = np.zeros((*delta.shape[:2], width, w.shape[2]))
    for o, k in np.ndindex(delta.shape[2], w.shape[1]):
        if 0 <= o + k - lo < width:
            result[:, :, o + k - lo] += delta[:, :, o] @ w[0, k].T
    return result


if __name__ == "__main__":
    sys.exit(main())
