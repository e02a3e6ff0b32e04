"""The case table: every differentiable op, with arguments and options that reach every branch of its rule.

`CASES` has one row per way to call an op: its name, the shapes of the differentiable arrays, and its options. `OPS`
holds what all rows of an op share. `tests/checks.py` defines the checks that every row goes through.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

import jaxcnn
from tests import oracles
from tests.compilation import OPTIMIZED

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

# ---------------------------------------------------------------------------------------------------------------------
# How arguments are drawn


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def apart(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return a shuffled range from −3 to 3 in equal steps.

    All values differ and none is zero, so a small step crosses no kink.
    """
    n = math.prod(shape)
    return rng.permutation(6 * (np.arange(n) + 0.25) / n - 3).reshape(shape)


def wide(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return `apart`, scaled to −9 to 9: it covers all pieces of the piecewise linear activations."""
    return 3 * apart(rng, shape)


def ties(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return small integers with many ties and zeros, which finite differences cannot handle."""
    return rng.integers(-2, 3, shape).astype(float)


def positive(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(0.1, 1, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Ops as functions of the arrays that have a δ


def dropout(x: Array, *, rate: float, rule: Any = None) -> Array:
    return jaxcnn.dropout(x, rate, jax.random.key(3), rule=rule)


def kept(shape: tuple[int, ...], rate: float) -> np.ndarray:
    return np.asarray(jax.random.bernoulli(jax.random.key(3), 1 - rate, shape))


def of_labels(logits: Array) -> Array:
    return jaxcnn.softmax_cross_entropy_with_integer_labels(logits, labels(logits.shape))


def labels(shape: tuple[int, ...]) -> np.ndarray:
    *rows, classes = shape
    return (3 * np.arange(math.prod(rows), dtype=np.int32) % classes).reshape(rows)


def with_indices(x: Array, *, rule: Any = None, **options: Any) -> Array:
    """Return only the values; the indices have no δ."""
    return jaxcnn.max_pool_with_indices(x, rule=rule, **options)[0]


def unpooled(y: Array, *, spatial_shape: tuple[int, ...], rule: Any = None) -> Array:
    entries = math.prod(spatial_shape)
    return jaxcnn.max_unpool(y, indices(y.shape, entries), spatial_shape, rule=rule)


def indices(shape: tuple[int, ...], entries: int) -> np.ndarray:
    """Return indices below ``entries``, with repeats if ``shape`` has more elements than that."""
    return (7 * np.arange(math.prod(shape), dtype=np.int32) % entries).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Op:
    """Properties that all rows of an op share."""

    #: The op, as a function of the differentiable arrays and its options.
    function: Callable[..., Array]
    #: The same op in PyTorch, as a function of tensors and the same options.
    oracle: Callable[..., Any]
    #: The arguments in which the op is linear or affine.
    linear: tuple[int, ...] = ()
    #: How each argument is drawn; the last element is used for the remaining arguments.
    draw: tuple[Draw, ...] = (normal,)
    #: The arguments whose first dimension is the batch, like the result's.
    batched: tuple[int, ...] = (0,)
    #: The function that autodiff differentiates instead; None: the op itself with ``rule=jaxcnn.rules.autodiff``.
    plain: Callable[..., Array] | None = None


OPS = {
    "conv": Op(jaxcnn.conv, oracles.conv, linear=(0, 1, 2)),
    "conv_transpose": Op(jaxcnn.conv_transpose, oracles.conv_transpose, linear=(0, 1, 2)),
    "depthwise_conv": Op(jaxcnn.depthwise_conv, oracles.depthwise_conv, linear=(0, 1, 2)),
    "relu": Op(jaxcnn.relu, oracles.relu, draw=(apart,)),
    "leaky_relu": Op(jaxcnn.leaky_relu, oracles.leaky_relu, draw=(apart,)),
    "elu": Op(jaxcnn.elu, oracles.elu, draw=(apart,)),
    "selu": Op(jaxcnn.selu, oracles.selu, draw=(apart,)),
    "celu": Op(jaxcnn.celu, oracles.celu, draw=(apart,)),
    "relu6": Op(jaxcnn.relu6, oracles.relu6, draw=(wide,)),
    "hard_tanh": Op(jaxcnn.hard_tanh, oracles.hard_tanh, draw=(wide,)),
    "hard_sigmoid": Op(jaxcnn.hard_sigmoid, oracles.hard_sigmoid, draw=(wide,)),
    "hard_swish": Op(jaxcnn.hard_swish, oracles.hard_swish, draw=(wide,)),
    "mish": Op(jaxcnn.mish, oracles.mish),
    "softsign": Op(jaxcnn.softsign, oracles.softsign, draw=(apart,)),
    "squareplus": Op(jaxcnn.squareplus, oracles.squareplus),
    "log_sigmoid": Op(jaxcnn.log_sigmoid, oracles.log_sigmoid),
    "gelu": Op(jaxcnn.gelu, oracles.gelu),
    "silu": Op(jaxcnn.silu, oracles.silu),
    "softplus": Op(jaxcnn.softplus, oracles.softplus),
    "sigmoid": Op(jaxcnn.sigmoid, oracles.sigmoid),
    "tanh": Op(jaxcnn.tanh, oracles.tanh),
    "max_pool": Op(jaxcnn.max_pool, oracles.max_pool, draw=(apart,)),
    "max_pool_with_indices": Op(with_indices, oracles.max_pool_with_indices, draw=(apart,)),
    "max_unpool": Op(
        unpooled,
        lambda y, spatial_shape: oracles.max_unpool(
            y, index=lambda s: indices(s, math.prod(spatial_shape)), spatial_shape=spatial_shape),
        linear=(0,),
    ),
    "lp_pool": Op(jaxcnn.lp_pool, oracles.lp_pool),
    "global_max_pool": Op(jaxcnn.global_max_pool, oracles.global_max_pool, draw=(apart,)),
    "global_avg_pool": Op(jaxcnn.global_avg_pool, oracles.global_avg_pool, linear=(0,)),
    "adaptive_max_pool": Op(jaxcnn.adaptive_max_pool, oracles.adaptive_max_pool, draw=(apart,)),
    "adaptive_avg_pool": Op(jaxcnn.adaptive_avg_pool, oracles.adaptive_avg_pool, linear=(0,)),
    "avg_pool": Op(jaxcnn.avg_pool, oracles.avg_pool, linear=(0,)),
    "kron": Op(jaxcnn.kron, oracles.kron, linear=(0, 1), batched=()),
    "kron_up": Op(jaxcnn.kron_up, oracles.kron_up, linear=(0,)),
    "block_sum": Op(jaxcnn.block_sum, oracles.block_sum, linear=(0,)),
    "dense": Op(jaxcnn.dense, oracles.dense, linear=(0, 1, 2)),
    "dropout": Op(dropout, lambda x, rate: oracles.dropout(x, rate=rate, mask=lambda s: kept(s, rate)), linear=(0,)),
    "hidden_layer": Op(jaxcnn.hidden_layer, oracles.hidden_layer),
    "batch_norm": Op(jaxcnn.batch_norm, oracles.batch_norm, linear=(1, 2), draw=(normal,) * 4 + (positive,)),
    "layer_norm": Op(jaxcnn.layer_norm, oracles.layer_norm, linear=(1, 2)),
    "group_norm": Op(jaxcnn.group_norm, oracles.group_norm, linear=(1, 2)),
    "convolve": Op(jaxcnn.convolve, oracles.convolve, linear=(0, 1), batched=()),
    "correlate": Op(jaxcnn.correlate, oracles.cross_correlate, linear=(0, 1), batched=()),
    "autocorrelate": Op(jaxcnn.autocorrelate, oracles.autocorrelate, batched=()),
    "match_template": Op(jaxcnn.match_template, oracles.match_template, batched=()),
    "squared_error": Op(jaxcnn.squared_error, oracles.squared_error, batched=(0, 1), plain=optax.squared_error),
    "softmax_cross_entropy": Op(
        jaxcnn.softmax_cross_entropy, oracles.softmax_cross_entropy, linear=(1,), draw=(normal, positive),
        batched=(0, 1), plain=optax.softmax_cross_entropy,
    ),
    "softmax_cross_entropy_with_integer_labels": Op(
        of_labels, functools.partial(oracles.softmax_cross_entropy_with_integer_labels, labels=labels),
        plain=lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels(x.shape)),
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One row of the table.

    `dataclasses.replace(case, function=…)` is the same row for another op, such as a planted error.
    """

    op: str
    shapes: tuple[tuple[int, ...], ...]
    options: Mapping[str, Any]
    function: Callable[..., Array]
    #: The forward pass without its rule, for autodiff; None where stock JAX has no derivative or a wrong one.
    plain: Callable[..., Array] | None
    oracle: Callable[..., Any]
    draw: tuple[Draw, ...]

    def __str__(self) -> str:
        shapes = ("x".join(map(str, shape)) for shape in self.shapes)
        options = (f"{name}={value}".replace(" ", "") for name, value in self.options.items())
        return "-".join([self.op, *shapes, *options, *("ties" for d in self.draw if d is ties)])

    @property
    def linear(self) -> tuple[int, ...]:
        return tuple(i for i in OPS[self.op].linear if i < len(self.shapes))

    @property
    def batched(self) -> tuple[int, ...]:
        """The arguments split along the batch; empty if x or y does not have the batch as its first dimension."""
        layouts = self.options.get("dimension_numbers", ("N", "", "N"))
        has_batch = len(self.shapes[0]) > 1 and layouts[0][0] == layouts[2][0] == "N"
        return OPS[self.op].batched if has_batch else ()

    @property
    def takes_rule(self) -> bool:
        return OPS[self.op].plain is None

    def arrays(self, dtype: Any = np.float64, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Return the arguments: the same numbers, to float32 precision, in every dtype."""
        rng = np.random.default_rng([seed, zlib.crc32(str(self).encode())])
        draws = [self.draw[min(i, len(self.draw) - 1)] for i in range(len(self.shapes))]
        return tuple(f(rng, s).astype(np.float32).astype(dtype) for f, s in zip(draws, self.shapes, strict=True))

    # All checks use these functions, so that each is traced and compiled once per row and dtype.

    @functools.cached_property
    def forward(self) -> Callable[..., Any]:
        """The forward pass, for the types of its results."""
        return compiled(self.function)

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        """``run(args, δ)`` returns y and the cotangents of args."""
        return compiled(with_cotangents(self.function))

    @functools.cached_property
    def run_reference(self) -> Callable[..., Any]:
        return compiled(with_cotangents(self.plain))

    @functools.cached_property
    def twice(self) -> Callable[..., Any]:
        """``twice(args, δ, ξ)`` returns the cotangents of (args, δ), given ξ for the cotangents of args."""
        return compiled(cotangents_twice(self.function))

    @functools.cached_property
    def twice_reference(self) -> Callable[..., Any]:
        return compiled(cotangents_twice(self.plain))

    @functools.cached_property
    def thrice(self) -> Callable[..., Any]:
        """``thrice(inputs, ζ)`` returns the cotangents of inputs (args, δ, ξ), given ζ for the results of `twice`."""
        return compiled(lambda inputs, zeta: jax.vjp(cotangents_twice(self.function), *inputs)[1](zeta))


def with_cotangents(f: Callable[..., Array]) -> Callable[..., Any]:
    def run(args: tuple[Array, ...], delta: Array) -> tuple[Array, tuple[Array, ...]]:
        y, vjp = jax.vjp(f, *args)
        return y, vjp(delta)

    return run


def cotangents_twice(f: Callable[..., Array]) -> Callable[..., Any]:
    def twice(args: tuple[Array, ...], delta: Array, xis: tuple[Array, ...]) -> tuple[Array, ...]:
        _, vjp = jax.vjp(lambda args, delta: with_cotangents(f)(args, delta)[1], args, delta)
        cotangents, of_delta = vjp(xis)
        return *cotangents, of_delta

    return twice


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """Jit, which compiles quickly if `compilation.quickly` was called."""
    return jax.jit(f)


def optimized(f: Callable[..., Any]) -> Callable[..., Any]:
    """Jit with the default optimizations of XLA and LLVM."""
    return jax.jit(f, compiler_options=OPTIMIZED)


def row(op: str, *shapes: tuple[int, ...], draw: Draw | None = None, stock: bool = True, **options: Any) -> Case:
    """Make a row of the table.

    With ``stock=False``, stock JAX's autodiff is wrong or missing here and PyTorch is the only oracle.
    """
    of_op = OPS[op]
    plain = of_op.plain or functools.partial(of_op.function, rule=jaxcnn.rules.autodiff)
    return Case(
        op,
        shapes,
        options,
        functools.partial(of_op.function, **options),
        functools.partial(plain, **options) if stock else None,
        functools.partial(of_op.oracle, **options),
        of_op.draw if draw is None else (draw,),
    )


CASES = [
    # conv: x (N, *spatial, I), w (*K, I/groups, O), b (O,)
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4)),
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4), (4,)),
    row("conv", (2, 6, 6, 1), (5, 5, 1, 3), (3,)),  # the lecture's first layer
    row("conv", (2, 5, 6, 3), (5, 6, 3, 4)),  # a kernel as large as the input
    row("conv", (2, 5, 6, 2), (1, 4, 2, 1)),
    row("conv", (2, 7, 3), (3, 3, 4)),
    row("conv", (2, 7, 3), (3, 3, 4), (4,), stride=2, padding="SAME"),
    row("conv", (2, 4, 3, 5, 2), (2, 2, 3, 2, 3)),
    row("conv", (2, 5, 4, 5, 2), (3, 2, 3, 2, 3), (3,), stride=2, padding=1, dilation=(1, 2, 1)),
    # stride: exact, with a remainder, larger than the kernel
    row("conv", (2, 7, 6, 3), (3, 2, 3, 4), stride=2),
    row("conv", (2, 8, 9, 3), (3, 2, 3, 4), stride=2),
    row("conv", (2, 8, 7, 3), (3, 2, 3, 4), (4,), stride=(2, 3)),
    row("conv", (2, 9, 9, 2), (2, 2, 2, 3), stride=3),
    row("conv", (2, 9, 10, 2), (1, 2, 2, 3), stride=(4, 3)),
    row("conv", (2, 11, 2), (2, 2, 3), stride=4, padding=1),
    row("conv", (2, 6, 5, 7, 1), (2, 1, 2, 1, 2), stride=(3, 2, 4)),
    # padding
    row("conv", (2, 5, 6, 3), (3, 3, 3, 4), padding="SAME"),
    row("conv", (2, 5, 6, 3), (2, 4, 3, 4), padding="SAME"),
    row("conv", (2, 5, 6, 3), (2, 4, 3, 4), padding="SAME_LOWER"),
    row("conv", (2, 6, 7, 3), (3, 4, 3, 4), stride=2, padding="SAME_LOWER"),
    row("conv", (2, 7, 8, 3), (4, 3, 3, 4), stride=(3, 2), padding="SAME"),
    row("conv", (2, 4, 3, 5, 2), (2, 3, 2, 2, 3), padding="SAME"),
    row("conv", (2, 6, 2), (3, 2, 3), padding="CAUSAL"),
    row("conv", (2, 6, 2), (2, 2, 3), (3,), padding="CAUSAL", dilation=3),
    row("conv", (2, 7, 2), (3, 2, 3), padding="CAUSAL", stride=2),
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4), padding=1),
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4), padding=(1, 0)),
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4), padding=((0, 2), (1, 0))),
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4), stride=(2, 3), padding=((1, 2), (0, 3))),
    row("conv", (2, 3, 4, 2), (5, 6, 2, 3), padding=2),  # a kernel larger than the input
    # padding larger than the kernel's extent minus 1: δ_x is wrong on CPU (openxla/xla#48713)
    row("conv", (2, 4, 6, 8), (1, 2, 8, 8), padding=((0, 0), (4, 0)), stock=False),
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4), padding=((4, 0), (3, 1)), stock=False),
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4), padding=((0, 4), (0, 3)), stock=False),
    row("conv", (2, 5, 6, 3), (2, 2, 3, 4), (4,), padding=5, stock=False),
    row("conv", (2, 5, 6, 3), (2, 2, 3, 4), padding=((5, 4), (3, 6)), stride=(3, 2), stock=False),
    row("conv", (2, 4, 3), (2, 3, 4), padding=((7, 0),), dilation=2, stock=False),
    row("conv", (2, 3, 2, 3, 2), (2, 1, 2, 2, 3), padding=((3, 0), (1, 2), (0, 3)), stock=False),
    row("conv", (2, 5, 4, 3), (1, 1, 3, 4), padding=1, stock=False),
    # XLA aborts the process if the input gradient of these is one convolution: see `never_of_groups`
    row("conv", (2, 2, 4, 5), (3, 2, 5, 5), stride=(1, 2), padding=(1, 1), stock=False),
    row("conv", (2, 4, 3, 2, 5), (2, 2, 3, 5, 5), stride=(2, 2, 1), padding=1, stock=False),
    # repeated padding
    row("conv", (2, 5, 6, 3), (3, 4, 3, 4), padding="REFLECT"),
    row("conv", (2, 5, 6, 3), (3, 4, 3, 4), padding="REPLICATE"),
    row("conv", (2, 5, 6, 3), (3, 4, 3, 4), padding="CIRCULAR"),
    row("conv", (2, 6, 7, 2), (3, 2, 2, 3), (3,), padding="REFLECT", dilation=2),
    row("conv", (2, 3, 4, 2), (5, 7, 2, 3), padding="REPLICATE"),
    row("conv", (2, 6, 7, 2), (4, 3, 2, 3), padding="CIRCULAR", stride=2),
    row("conv", (2, 5, 2), (4, 2, 3), padding="REFLECT"),
    row("conv", (2, 3, 4, 3, 2), (3, 2, 3, 2, 2), padding="CIRCULAR"),
    # dilation
    row("conv", (2, 7, 6, 3), (3, 2, 3, 4), dilation=2),
    row("conv", (2, 7, 8, 3), (3, 2, 3, 4), dilation=(1, 3), padding="SAME"),
    row("conv", (2, 9, 8, 3), (2, 3, 3, 4), dilation=(3, 2), stride=(2, 3), padding=1),
    # groups; one input channel per group is depthwise, and more outputs than inputs its multiplier
    row("conv", (2, 5, 6, 4), (3, 2, 2, 6), groups=2),
    row("conv", (2, 6, 7, 6), (3, 2, 2, 3), (3,), groups=3, stride=2, padding="SAME"),
    row("conv", (2, 6, 5, 4), (2, 3, 2, 4), groups=2, padding=((0, 3), (2, 1)), dilation=2),
    row("conv", (2, 5, 6, 4), (1, 1, 2, 6), groups=2),
    row("conv", (2, 5, 6, 3), (3, 2, 1, 3), groups=3),
    row("conv", (2, 5, 6, 3), (3, 3, 1, 6), (6,), groups=3, padding="SAME"),
    row("conv", (2, 7, 8, 3), (3, 2, 1, 6), groups=3, stride=(2, 3), padding=1),
    row("conv", (2, 7, 8, 3), (3, 2, 1, 3), groups=3, dilation=2, padding=((3, 0), (0, 2))),
    row("conv", (2, 5, 6, 3), (2, 2, 1, 3), groups=3, padding=3, stock=False),
    row("conv", (2, 6, 4), (3, 1, 4), groups=4, padding="REFLECT"),
    row("conv", (2, 7, 4), (3, 2, 4), groups=2, stride=2),
    row("conv", (2, 3, 4, 3, 2), (2, 2, 2, 1, 4), groups=2, padding="SAME"),
    # a kernel with one tap is a matrix
    row("conv", (2, 5, 4, 3), (1, 1, 3, 4)),
    row("conv", (2, 5, 4, 3), (1, 1, 3, 4), (4,), stride=(2, 3)),
    row("conv", (2, 5, 3), (1, 3, 4), stride=2),
    # layouts, dtypes
    row("conv", (2, 3, 5, 6), (4, 3, 3, 2), (4,), dimension_numbers=("NCHW", "OIHW", "NCHW")),
    row("conv", (2, 5, 6, 4), (6, 2, 2, 3), groups=2, stride=2, dimension_numbers=("NHWC", "OIHW", "NCHW")),
    row("conv", (6, 2, 5, 3), (2, 4, 3, 3), padding="SAME", dimension_numbers=("WNHC", "WOIH", "CHWN")),
    row("conv", (2, 3, 7), (4, 3, 3), padding="CAUSAL", dimension_numbers=("NCW", "OIW", "NCW")),
    row("conv", (2, 2, 4, 3, 4), (3, 2, 2, 2, 2), dimension_numbers=("NCDHW", "OIDHW", "NCDHW")),
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4), (4,), preferred_element_type="float64"),
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4), (4,), preferred_element_type="float32"),
    row("conv", (2, 5, 6, 4), (3, 2, 2, 4), groups=2, preferred_element_type="float64"),
    row("conv", (2, 5, 6, 3), (3, 2, 3, 4), precision="highest"),
    # conv_transpose: x (N, *spatial, I), w (*K, O/groups, I), b (O,)
    row("conv_transpose", (2, 3, 4, 3), (3, 2, 4, 3)),
    row("conv_transpose", (2, 3, 4, 3), (3, 2, 4, 3), (4,), stride=2),
    row("conv_transpose", (2, 5, 3), (3, 4, 3), (4,), stride=2, padding=1, output_padding=1),
    row("conv_transpose", (2, 2, 3, 2, 2), (2, 3, 2, 3, 2), stride=(2, 1, 2), padding=1),
    row("conv_transpose", (2, 3, 4, 3), (2, 2, 4, 3), stride=(3, 2), output_padding=(2, 0)),
    row("conv_transpose", (2, 3, 4, 3), (3, 2, 4, 3), (4,), padding=((0, 2), (1, 0)), stride=(2, 1)),
    row("conv_transpose", (2, 3, 4, 3), (3, 4, 2, 3), padding="SAME"),
    row("conv_transpose", (2, 3, 4, 3), (3, 4, 2, 3), (2,), padding="SAME", stride=2),
    row("conv_transpose", (2, 3, 4, 3), (4, 3, 2, 3), padding="SAME_LOWER", stride=(1, 2)),
    row("conv_transpose", (2, 3, 4, 2), (2, 1, 2, 2), padding="SAME", stride=3),  # a stride larger than the kernel
    row("conv_transpose", (2, 4, 3), (2, 2, 3), padding="SAME_LOWER", stride=3),
    row("conv_transpose", (2, 6, 2), (3, 3, 2), padding="CAUSAL", stride=2, output_padding=1),
    row("conv_transpose", (2, 3, 4, 3), (3, 2, 4, 3), dilation=2, padding=(1, 0)),
    row("conv_transpose", (2, 4, 3, 2), (2, 3, 3, 2), dilation=(3, 2), stride=(2, 3), padding=1, output_padding=1),
    row("conv_transpose", (2, 4, 3, 2), (2, 3, 3, 2), (3,), dilation=(3, 2), padding=1, output_padding=(2, 1)),
    row("conv_transpose", (2, 4, 2), (2, 3, 2), dilation=6, stride=2, padding=3, output_padding=5),
    row("conv_transpose", (2, 3, 4, 4), (3, 2, 3, 4), (6,), groups=2, stride=2),
    row("conv_transpose", (2, 3, 4, 3), (2, 2, 2, 3), groups=3, padding=1),  # each channel separately
    row("conv_transpose", (2, 3, 4, 4), (1, 1, 3, 4), stride=2),
    row("conv_transpose", (2, 5, 6, 3), (3, 2, 4, 3), padding=((4, 0), (0, 3)), stock=False),  # crop exceeds kernel
    row("conv_transpose", (2, 3, 4, 5), (3, 2, 2, 3), (2,), stride=2, dimension_numbers=("NCHW", "OIHW", "NCHW")),
    row("conv_transpose", (2, 4, 5, 4), (3, 2, 4, 2), groups=2, dimension_numbers=("NHWC", "HWOI", "CHWN")),
    row("conv_transpose", (2, 3, 4, 3), (3, 2, 4, 3), (4,), preferred_element_type="float64"),
    row("conv_transpose", (2, 3, 4, 3), (3, 2, 4, 3), (4,), preferred_element_type="float32", stride=2),
    row("conv_transpose", (2, 3, 4, 3), (3, 2, 4, 3), precision="highest"),
    row("conv_transpose", (2, 2, 3, 5), (3, 2, 5, 5), stride=(1, 2), padding=1),  # as above, but in the forward pass
    # depthwise_conv: w (*K, 1, C·M)
    row("depthwise_conv", (2, 5, 6, 3), (3, 2, 1, 3)),
    row("depthwise_conv", (2, 5, 6, 3), (3, 2, 1, 6), (6,), stride=2, padding="SAME"),
    row("depthwise_conv", (2, 7, 3), (3, 1, 6), padding="CAUSAL", dilation=2),
    row("depthwise_conv", (2, 4, 3, 4, 2), (2, 2, 2, 1, 2), (2,), padding="CIRCULAR"),
    row("depthwise_conv", (2, 3, 5, 6), (6, 1, 3, 2), dimension_numbers=("NCHW", "OIHW", "NCHW")),
    row("depthwise_conv", (2, 5, 6, 3), (3, 2, 1, 3), preferred_element_type="float64", precision="highest"),
    # activations
    row("relu", (4, 3)),
    row("relu", (2, 3, 4, 2)),
    row("relu", (4, 6), draw=ties),
    row("leaky_relu", (4, 3)),
    row("leaky_relu", (4, 3), negative_slope=0.3),
    row("leaky_relu", (4, 6), draw=ties),
    row("elu", (4, 3)),
    row("elu", (4, 3), alpha=0.7),
    row("selu", (4, 3)),
    row("celu", (4, 3)),
    row("celu", (4, 3), alpha=0.7),
    row("relu6", (4, 6)),
    row("relu6", (4, 6), draw=ties),
    row("hard_tanh", (4, 6)),
    row("hard_tanh", (4, 6), draw=ties),
    row("hard_sigmoid", (4, 6)),
    row("hard_swish", (4, 6)),
    row("mish", (4, 3)),
    row("softsign", (4, 3)),
    row("squareplus", (4, 3)),
    row("squareplus", (4, 3), b=0.3),
    row("log_sigmoid", (4, 3)),
    row("gelu", (4, 3)),
    row("gelu", (4, 3), approximate=True),
    row("silu", (4, 3)),
    row("softplus", (4, 3)),
    row("sigmoid", (4, 3)),
    row("tanh", (4, 3)),
    # max_pool: x (N, *spatial, C)
    row("max_pool", (2, 6, 3), window=2),
    row("max_pool", (2, 4, 6, 3), window=2),
    row("max_pool", (2, 4, 6, 4, 2), window=2),
    row("max_pool", (2, 5, 7, 3), window=(2, 3)),  # a remainder
    row("max_pool", (2, 4, 6, 3), window=(4, 6)),
    row("max_pool", (2, 7, 7, 3), window=3, stride=2),
    row("max_pool", (2, 6, 5, 3), window=(3, 2), stride=1),
    row("max_pool", (2, 9, 9, 2), window=2, stride=(3, 4)),
    row("max_pool", (2, 5, 4, 5, 2), window=(3, 2, 3), stride=2, padding=1),
    row("max_pool", (2, 5, 7, 3), window=2, padding="SAME"),
    row("max_pool", (2, 5, 6, 3), window=(2, 3), stride=(1, 2), padding="SAME_LOWER"),
    row("max_pool", (2, 6, 3), window=3, stride=1, padding="CAUSAL"),
    row("max_pool", (2, 5, 6, 3), window=3, stride=2, padding=1),
    row("max_pool", (2, 5, 6, 3), window=(3, 2), stride=2, padding=((2, 0), (0, 1))),
    row("max_pool", (2, 5, 7, 3), window=2, ceil_mode=True),
    row("max_pool", (2, 6, 7, 3), window=3, stride=2, padding=1, ceil_mode=True),
    row("max_pool", (2, 5, 3), window=2, stride=3, ceil_mode=True),
    row("max_pool", (2, 4, 3), window=2, stride=3, padding=1, ceil_mode=True),  # a last window would begin in padding
    # stock JAX does not differentiate dilated windows
    row("max_pool", (2, 6, 7, 3), window=2, stride=1, dilation=2, stock=False),
    row("max_pool", (2, 7, 8, 3), window=(3, 2), stride=(1, 2), dilation=(2, 3), padding=((1, 0), (0, 2)), stock=False),
    row("max_pool", (2, 7, 8, 3), window=2, stride=2, dilation=3, ceil_mode=True, stock=False),
    row("max_pool", (2, 20, 2), window=70, stride=5, padding=60, stock=False),  # a window that is mostly padding
    # more elements than are unrolled (64), and more than one byte can index (255)
    row("max_pool", (2, 16, 9, 2), window=(8, 9)),
    row("max_pool", (2, 13, 11, 2), window=(9, 8), stride=(2, 3), padding=((4, 0), (1, 3))),
    row("max_pool", (2, 20, 17, 1), window=(9, 8), stride=2, dilation=2, stock=False),
    row("max_pool", (2, 18, 19, 1), window=(17, 16), stride=1),
    row("max_pool", (2, 34, 16, 1), window=(17, 16)),
    row("max_pool", (2, 6, 6, 6, 1), window=5, stride=1),
    row("max_pool", (2, 6, 6, 3), window=3, stride=2, draw=ties),
    row("max_pool", (2, 6, 6, 3), window=2, draw=ties),
    row("max_pool", (2, 10, 10, 2), window=9, stride=1, draw=ties),
    # max_pool_with_indices, max_unpool
    row("max_pool_with_indices", (2, 6, 3), window=2),
    row("max_pool_with_indices", (2, 4, 6, 3), window=(2, 3)),
    row("max_pool_with_indices", (2, 4, 3, 5, 2), window=2, stride=1),
    row("max_pool_with_indices", (2, 5, 6, 3), window=3, stride=2, padding=1, ceil_mode=True),
    row("max_pool_with_indices", (2, 6, 7, 3), window=2, stride=1, dilation=2, stock=False),
    row("max_pool_with_indices", (2, 13, 11, 2), window=(9, 8), stride=(2, 3), padding=((4, 0), (1, 3))),
    row("max_unpool", (2, 3, 2), spatial_shape=(7,)),
    row("max_unpool", (2, 2, 3, 3), spatial_shape=(5, 4)),
    row("max_unpool", (2, 2, 3, 2, 2), spatial_shape=(2, 3, 5)),
    row("max_unpool", (2, 3, 4, 2), spatial_shape=(2, 2)),  # more values than positions: some are summed
    # lp_pool
    row("lp_pool", (2, 6, 3), window=2),
    row("lp_pool", (2, 4, 6, 3), window=2),
    row("lp_pool", (2, 5, 7, 3), window=3, stride=2, p=2.0),
    row("lp_pool", (2, 5, 7, 3), window=(2, 3), p=3, draw=positive),
    row("lp_pool", (2, 5, 7, 3), window=2, stride=1, p=1.5, draw=positive),
    row("lp_pool", (2, 5, 7, 3), window=2, p=1),
    row("lp_pool", (2, 5, 7, 3), window=3, stride=2, p=4, ceil_mode=True),
    row("lp_pool", (2, 14, 8, 2), window=9, stride=1, p=4, padding=1, ceil_mode=True),
    row("lp_pool", (2, 5, 6, 3), window=(3, 2), stride=2, padding=((2, 0), (0, 1))),
    row("lp_pool", (2, 5, 6, 3), window=3, padding="SAME"),
    row("lp_pool", (2, 6, 7, 3), window=2, stride=1, dilation=2),
    row("lp_pool", (2, 4, 3, 4, 2), window=2),
    # global and adaptive pooling
    *(row(f"global_{kind}_pool", shape) for kind in ("max", "avg")
      for shape in [(2, 5, 3), (2, 3, 4, 3), (2, 2, 3, 2, 2)]),
    row("global_max_pool", (2, 9, 9, 2)),
    *(row(f"adaptive_{kind}_pool", shape, output_size=size) for kind in ("max", "avg") for shape, size in [
        ((2, 7, 3), 3), ((2, 4, 6, 3), 2), ((2, 5, 7, 3), (3, 2)), ((2, 6, 5, 3), (2, 1)), ((2, 3, 4, 2), (5, 4)),
        ((2, 5, 4, 3, 2), (2, 3, 3)), ((2, 19, 23, 1), (2, 2))]),
    row("adaptive_max_pool", (2, 5, 7, 3), output_size=(3, 2), draw=ties),
    # avg_pool
    row("avg_pool", (2, 6, 3), window=2),
    row("avg_pool", (2, 4, 6, 3), window=2),
    row("avg_pool", (2, 4, 6, 4, 2), window=2),
    row("avg_pool", (2, 5, 7, 3), window=(2, 3)),
    row("avg_pool", (2, 4, 6, 3), window=(4, 6)),
    row("avg_pool", (2, 7, 7, 3), window=3, stride=2),
    row("avg_pool", (2, 6, 5, 3), window=(3, 2), stride=1),
    row("avg_pool", (2, 9, 9, 2), window=2, stride=(3, 4)),
    row("avg_pool", (2, 5, 4, 5, 2), window=(3, 2, 3), stride=2, padding=1, count_include_pad=False),
    row("avg_pool", (2, 5, 7, 3), window=2, padding="SAME"),
    row("avg_pool", (2, 5, 6, 3), window=(2, 3), stride=(1, 2), padding="SAME_LOWER", count_include_pad=False),
    row("avg_pool", (2, 6, 3), window=3, stride=1, padding="CAUSAL"),
    row("avg_pool", (2, 5, 6, 3), window=3, stride=2, padding=1),
    row("avg_pool", (2, 5, 6, 3), window=(3, 2), stride=2, padding=((2, 0), (0, 1)), count_include_pad=False),
    row("avg_pool", (2, 5, 7, 3), window=2, ceil_mode=True),
    row("avg_pool", (2, 6, 7, 3), window=3, stride=2, padding=1, ceil_mode=True),
    row("avg_pool", (2, 4, 3), window=2, stride=3, padding=1, ceil_mode=True),
    row("avg_pool", (2, 6, 7, 3), window=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    row("avg_pool", (2, 6, 7, 3), window=2, stride=1, dilation=2),
    row("avg_pool", (2, 7, 8, 3), window=(3, 2), stride=(1, 2), dilation=(2, 3), padding=1, count_include_pad=False),
    row("avg_pool", (2, 6, 7, 3), window=3, stride=2, padding=1, ceil_mode=True, divisor=5),
    row("avg_pool", (2, 6, 3), window=2, divisor=-0.5),
    row("avg_pool", (2, 4, 6, 4, 2), window=2, padding=1, count_include_pad=False, divisor=3),
    row("avg_pool", (2, 20, 2), window=70, stride=5, padding=60),
    row("avg_pool", (2, 70, 2), window=66),
    row("avg_pool", (2, 80, 2), window=66, stride=3, padding=((5, 2),)),
    row("avg_pool", (2, 140, 2), window=66, stride=1, dilation=2, padding=1, count_include_pad=False),
    row("avg_pool", (2, 68, 70, 1), window=(66, 67), stride=1),
    # kron, kron_up, block_sum
    row("kron", (2, 3), (4, 2)),
    row("kron", (3,), (4,)),
    row("kron", (2, 3, 2), (1, 2, 3)),
    row("kron_up", (2, 3, 2), factor=2),
    row("kron_up", (2, 3, 2, 3), factor=2),
    row("kron_up", (2, 3, 2, 3), factor=(1, 3)),
    row("kron_up", (2, 3, 2, 2, 2), factor=(2, 1, 3)),
    row("block_sum", (2, 6, 2), factor=2),
    row("block_sum", (2, 4, 6, 3), factor=2),
    row("block_sum", (2, 4, 6, 3), factor=(1, 3)),
    row("block_sum", (2, 4, 3, 6, 2), factor=(2, 1, 3)),
    row("block_sum", (2, 70, 2), factor=70),
    # dense, dropout
    row("dense", (4, 3), (3, 5)),
    row("dense", (4, 3), (3, 5), (5,)),
    row("dense", (2, 3, 2, 4), (4, 5), (5,)),
    row("dense", (3,), (3, 5), (5,)),
    row("dropout", (4, 6), rate=0.5),
    row("dropout", (2, 3, 4, 2), rate=0.2),
    row("dropout", (4, 6), rate=0.0),
    row("dropout", (4, 6), rate=1.0),
    # hidden_layer: conv, relu and max_pool in one
    row("hidden_layer", (2, 6, 6, 2), (3, 3, 2, 4), (4,)),
    row("hidden_layer", (2, 7, 2), (3, 2, 3), (3,), window=2, pool_stride=1),
    row("hidden_layer", (2, 4, 5, 4, 2), (2, 2, 2, 2, 3), (3,), window=(3, 2, 2)),
    row("hidden_layer", (2, 9, 8, 2), (3, 2, 2, 4), (4,), window=3, pool_stride=2),
    row("hidden_layer", (2, 9, 8, 2), (3, 2, 2, 4), (4,), window=(2, 3), pool_stride=1, pool_padding=((1, 0), (1, 1))),
    row("hidden_layer", (2, 8, 9, 2), (3, 2, 2, 4), (4,), window=2, pool_padding="SAME", stride=(2, 1), padding="SAME"),
    row("hidden_layer", (2, 9, 8, 2), (3, 2, 2, 4), (4,), dilation=2, padding=((2, 1), (0, 1))),
    row("hidden_layer", (2, 6, 7, 4), (3, 2, 2, 6), (6,), groups=2),
    row("hidden_layer", (2, 6, 7, 3), (3, 2, 1, 6), (6,), groups=3, padding="REFLECT"),
    row("hidden_layer", (2, 11, 12, 1), (3, 3, 1, 2), (2,), window=9, pool_stride=1, precision="highest"),
    # normalization: x (N, …, C), scale and bias (C,), mean and var (C,)
    row("batch_norm", (6, 3)),
    row("batch_norm", (2, 3, 4, 3), (3,)),
    row("batch_norm", (2, 3, 4, 3), (3,), (3,)),
    row("batch_norm", (4, 5, 2), (2,), (2,), eps=0.1),
    row("batch_norm", (6, 2), (2,), (2,), axis_name=()),  # named axes: tests/ops/test_named_axes.py
    row("batch_norm", (2, 3, 2, 3, 2), (2,), (2,)),
    row("batch_norm", (2, 3, 4, 3), (3,), (3,), (3,), (3,)),
    row("batch_norm", (6, 3), (3,), (3,), (3,), (3,), eps=0.1),
    row("layer_norm", (4, 5)),
    row("layer_norm", (5,), (5,), (5,)),
    row("layer_norm", (2, 3, 4, 5), (5,)),
    row("layer_norm", (2, 3, 4, 5), (5,), (5,), eps=0.1),
    row("layer_norm", (2, 3, 2, 4), (3, 2, 4), (3, 2, 4), axes=(1, 2, 3)),
    row("layer_norm", (2, 3, 4, 2), (3, 4), (3, 4), axes=[2, -3]),
    row("group_norm", (4, 6), groups=2),
    row("group_norm", (2, 3, 4, 6), (6,), groups=3),
    row("group_norm", (2, 3, 4, 6), (6,), (6,), groups=2, eps=0.1),
    row("group_norm", (2, 5, 3), (3,), (3,), groups=3),
    row("group_norm", (2, 3, 2, 2, 4), (4,), (4,), groups=1),
    # signals
    row("convolve", (9,), (4,)),
    row("convolve", (9, 7), (2, 3), mode="same"),
    row("convolve", (4, 5, 6), (2, 3, 2), mode="valid"),
    row("convolve", (9, 7), (4, 3), method="fft"),
    row("correlate", (9,), (4,), mode="same"),
    row("correlate", (9, 7), (2, 3), mode="valid"),
    row("correlate", (4, 5, 6), (2, 3, 2)),
    row("correlate", (9, 7), (4, 3), method="fft"),
    row("autocorrelate", (7,)),
    row("autocorrelate", (5, 4), mode="same"),
    row("autocorrelate", (5, 4), method="fft"),
    row("match_template", (12,), (4,)),
    row("match_template", (7, 8), (3, 4)),
    row("match_template", (5, 6, 4), (2, 3, 2)),
    # losses
    row("squared_error", (4, 3), (4, 3)),
    row("squared_error", (2, 3, 2), (2, 3, 2)),
    row("softmax_cross_entropy", (4, 5), (4, 5)),
    row("softmax_cross_entropy", (2, 3, 5), (2, 3, 5)),
    row("softmax_cross_entropy_with_integer_labels", (4, 5)),
    row("softmax_cross_entropy_with_integer_labels", (2, 3, 5)),
]  # fmt: skip


#: Rows with sums of hundreds or thousands of terms in the forward or backward pass, too many for 16-bit accumulation.
LONG_SUMS = [
    row("conv", (2, 48, 48, 1), (48, 48, 1, 2), (2,)),
    row("conv", (2, 40, 40, 1), (3, 3, 1, 2), (2,)),
    row("conv", (2, 40, 40, 2), (1, 1, 2, 3), (3,)),
    row("conv", (2, 40, 40, 2), (2, 2, 1, 2), (2,), groups=2),
    row("conv", (2, 1000, 4), (2, 2, 4), groups=2),
    row("conv", (2, 3, 2, 2000), (2, 1, 2000, 3)),
    row("conv", (2, 3, 2, 3), (2, 1, 3, 2000)),
    row("conv", (2, 3, 1), (1201, 1, 1), padding="REPLICATE"),
    row("conv_transpose", (2, 40, 40, 1), (3, 3, 2, 1), (2,)),
    row("conv_transpose", (2, 3, 2, 2000), (2, 1, 3, 2000)),
    row("conv_transpose", (2, 3, 2, 3), (2, 1, 2000, 3)),
    row("depthwise_conv", (2, 40, 40, 2), (2, 2, 1, 2), (2,)),
    row("max_unpool", (2, 2000, 1), spatial_shape=(2,)),
    row("lp_pool", (2, 48, 48, 2), window=48),
    row("lp_pool", (2, 150, 1), window=60, stride=1, p=3, draw=positive),
    row("global_avg_pool", (2, 48, 48, 2)),
    row("adaptive_avg_pool", (2, 1201, 1), output_size=2),
    row("adaptive_avg_pool", (2, 2, 1), output_size=1201),
    row("adaptive_max_pool", (2, 2, 1), output_size=1201),
    row("max_pool", (2, 150, 1), window=64, stride=1),
    row("max_pool", (2, 1200, 1), window=600, stride=1),
    row("avg_pool", (2, 48, 48, 2), window=48),
    row("avg_pool", (2, 1200, 1), window=600, stride=1),
    row("avg_pool", (2, 150, 1), window=60, stride=1),
    row("kron", (1, 1), (48, 48)),
    row("kron_up", (2, 1, 1, 2), factor=48),
    row("block_sum", (2, 48, 48, 2), factor=48),
    row("dense", (2, 2000), (2000, 3), (3,)),
    row("dense", (2000, 2), (2, 3), (3,)),
    row("dense", (2, 3), (3, 2000), (2000,)),
    row("hidden_layer", (2, 40, 40, 1), (3, 3, 1, 2), (2,)),
    row("batch_norm", (2, 40, 40, 2), (2,), (2,)),
    row("batch_norm", (2, 40, 40, 2), (2,), (2,), (2,), (2,)),
    row("layer_norm", (2, 3, 2000), (2000,), (2000,)),
    row("group_norm", (2, 40, 40, 4), (4,), (4,), groups=2),
    row("softmax_cross_entropy", (4, 2000), (4, 2000)),
    row("softmax_cross_entropy_with_integer_labels", (4, 2000)),
]


def covering(cases: Sequence[Case]) -> Iterator[Case]:
    """Yield a few rows that together cover each op, rank, option and named option value, for the expensive checks."""
    unseen = set().union(*map(shows, cases))
    while unseen:
        case = max(cases, key=lambda case: len(shows(case) & unseen))
        unseen -= shows(case)
        yield case


def one_each(cases: Sequence[Case]) -> list[Case]:
    """Return the first row of each op."""
    return [next(case for case in cases if case.op == op) for op in OPS]


def shows(case: Case) -> set[Any]:
    x, *rest = case.shapes
    found = {("rank", len(x)), ("arrays", len(case.shapes))}
    found |= {(name, value if isinstance(value, str | bool) else "") for name, value in case.options.items()}
    # Kernels and windows that have dedicated lowerings.
    if case.op == "conv":
        found |= {("depthwise", rest[0][-2] == 1), ("one entry", math.prod(rest[0][:-2]) == 1)}
    if "window" in case.options:
        found.add(("long", math.prod(oracles.per_dim(case.options["window"], len(x) - 2)) > 64))
    return {(case.op, *entry) for entry in found}
