"""The ops that are timed, each in jaxcnn, as users would write it in stock JAX, and in PyTorch.

Arguments have names. `x` is an input, channels last. The last two dims of `w` are channels, (…, I, O). PyTorch's
functions get them in PyTorch's layout.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxcnn

Shape = tuple[int, ...]
#: Arguments whose first dim is the batch.
BATCHED = ("x", "logits", "labels", "targets", "y", "target")


@dataclasses.dataclass(frozen=True)
class Row:
    """One op on arguments of given shapes."""

    name: str
    shapes: Mapping[str, Shape]
    ours: Callable[..., Any]
    stock: Callable[..., Any]
    torch: Callable[..., Any] | None
    #: Whether the backward pass needs more than the arguments. If so, both passes in one program are a row as well.
    together: bool = False
    #: Relative L2 distance of equal results, if larger than the default in `ops`.
    equal: float = 0.0
    #: Products that crash PyTorch's process if computed without the others.
    torch_crashes: tuple[str, ...] = ()
    #: Multiplications and additions of one product, for rows that report a fraction of the GEMM rate.
    flops: int | None = None
    #: Upper bound (exclusive) of the integers in the argument `labels`.
    classes: int = 10

    def arguments(self, batch: int | None = None) -> dict[str, np.ndarray]:
        """Return random arguments; `batch` replaces the batch size if it is smaller."""
        rng = np.random.default_rng(0)
        arrays = {}
        for name, full in self.shapes.items():
            shape = full if batch is None or name not in BATCHED else (min(batch, full[0]), *full[1:])
            if name == "labels":
                arrays[name] = rng.integers(0, self.classes, shape).astype(np.int32)
            else:
                scale = 1 / math.sqrt(math.prod(shape[:-1])) if name == "w" else 1.0
                arrays[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
        return arrays

    @property
    def differentiable(self) -> list[str]:
        """Return the names of the arguments that have a gradient."""
        return [name for name in self.shapes if name != "labels"]


def rows() -> Iterator[Row]:
    """Yield all rows."""
    yield from convolutions()
    yield from pools()
    yield from pointwise()
    yield from others()


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions

LAYOUTS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def conv(
    name: str,
    x: Shape,
    kernel_size: Shape,
    features: int,
    *,
    stride: int = 1,
    padding: int | tuple[tuple[int, int], ...] = 0,
    dilation: int = 1,
    groups: int = 1,
    share: bool = False,
) -> Row:
    """Return a convolution; `padding` is one number for all sides, or a pair per dim."""
    dims = len(kernel_size)
    pairs = ((padding, padding),) * dims if isinstance(padding, int) else padding

    def ours(x: Any, w: Any) -> Any:
        return jaxcnn.conv(x, w, stride=stride, padding=pairs, dilation=dilation, groups=groups)

    def stock(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x, w, (stride,) * dims, pairs, None, (dilation,) * dims, LAYOUTS[dims], feature_group_count=groups
        )

    def torch(x: Any, w: Any) -> Any:
        from torch.nn import functional as F

        f = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        if isinstance(padding, int):
            return f(x, w, None, stride, padding, dilation, groups)
        return f(F.pad(x, [n for pair in reversed(pairs) for n in pair]), w, None, stride, 0, dilation, groups)

    w = (*kernel_size, x[-1] // groups, features)
    out = [
        (n + lo + hi - dilation * (k - 1) - 1) // stride + 1
        for n, k, (lo, hi) in zip(x[1:], kernel_size, pairs, strict=False)
    ]
    flops = 2 * x[0] * math.prod(out) * math.prod(w) if share else None
    return Row(f"conv {name}", {"x": x, "w": w}, ours, stock, torch, flops=flops)


def conv_transpose(name: str, x: Shape, kernel_size: Shape, features: int, stride: int, padding: int) -> Row:
    """Return a transposed convolution."""
    dims = len(kernel_size)

    def ours(x: Any, w: Any) -> Any:
        return jaxcnn.conv_transpose(x, w, stride=stride, padding=padding)

    def stock(x: Any, w: Any) -> Any:
        pads = [(k - 1 - padding,) * 2 for k in kernel_size]
        return lax.conv_transpose(x, w, (stride,) * dims, pads, dimension_numbers=LAYOUTS[dims], transpose_kernel=True)

    def torch(x: Any, w: Any) -> Any:
        from torch.nn import functional as F

        return (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1](x, w, None, stride, padding)

    return Row(f"conv_transpose {name}", {"x": x, "w": (*kernel_size, features, x[-1])}, ours, stock, torch)


def convolutions() -> Iterator[Row]:
    """Yield dense, strided, dilated, 1×1, depthwise, grouped and transposed convolutions in 1-D, 2-D and 3-D."""
    yield conv("5×5 1→32, 128×28×28", (128, 28, 28, 1), (5, 5), 32)
    yield conv("5×5 32→64, 128×12×12", (128, 12, 12, 32), (5, 5), 64, share=True)
    yield conv("3×3 64→64 same, 32×32×32", (32, 32, 32, 64), (3, 3), 64, padding=1, share=True)
    yield conv("3×3 64→128 same, 64×16×16", (64, 16, 16, 64), (3, 3), 128, padding=1, share=True)
    yield conv("3×3 3→64 same, 64×32×32", (64, 32, 32, 3), (3, 3), 64, padding=1)
    yield conv("3×3 128→128 same, 64×16×16", (64, 16, 16, 128), (3, 3), 128, padding=1)
    yield conv("3×3 256→256 same, 16×8×8", (16, 8, 8, 256), (3, 3), 256, padding=1)
    yield conv("5×5 6→16, 128×14×14", (128, 14, 14, 6), (5, 5), 16)
    yield conv("1×1 64→128, 32×32×32", (32, 32, 32, 64), (1, 1), 128)
    yield conv("1×1 64→128 stride 2, 32×32×32", (32, 32, 32, 64), (1, 1), 128, stride=2)
    yield conv("3×3 64→128 stride 2, 32×32×32", (32, 32, 32, 64), (3, 3), 128, stride=2, padding=1)
    yield conv("7×7 3→64 stride 2, 8×112×112", (8, 112, 112, 3), (7, 7), 64, stride=2, padding=3)
    yield conv("3×3 64→64 dilation 2, 32×32×32", (32, 32, 32, 64), (3, 3), 64, padding=2, dilation=2)
    yield conv("3×3 64→64 same, 1×64×64", (1, 64, 64, 64), (3, 3), 64, padding=1)
    yield conv("depthwise 3×3 64, 32×32×32", (32, 32, 32, 64), (3, 3), 64, padding=1, groups=64)
    yield conv("depthwise 3×3 64 stride 2, 32×32×32", (32, 32, 32, 64), (3, 3), 64, stride=2, padding=1, groups=64)
    yield conv("depthwise 3×3 32→64, 32×32×32", (32, 32, 32, 32), (3, 3), 64, padding=1, groups=32)
    yield conv("8 groups 3×3 64→64, 32×32×32", (32, 32, 32, 64), (3, 3), 64, padding=1, groups=8)
    yield conv("32 groups 3×3 128→128, 16×16×16", (16, 16, 16, 128), (3, 3), 128, padding=1, groups=32)
    yield conv("8 groups 3×3 64→64 stride 2, 32×32×32", (32, 32, 32, 64), (3, 3), 64, stride=2, padding=1, groups=8)
    yield conv("1-D 9 32→64, 64×1024", (64, 1024, 32), (9,), 64)
    yield conv("1-D 2 32→64 dilation 8, 64×1024", (64, 1024, 32), (2,), 64, padding=((8, 0),), dilation=8)
    yield conv("1-D depthwise 7 128, 64×512", (64, 512, 128), (7,), 128, padding=3, groups=128)
    yield conv("3-D 3×3×3 16→32, 8×16×16×16", (8, 16, 16, 16, 16), (3, 3, 3), 32, padding=1)
    yield conv("3-D depthwise 3×3×3 32, 8×16×16×16", (8, 16, 16, 16, 32), (3, 3, 3), 32, padding=1, groups=32)
    yield conv("1×2 32→32 padding 4 in front, 16×32×32", (16, 32, 32, 32), (1, 2), 32, padding=((0, 0), (4, 0)))
    yield conv_transpose("4×4 64→32 stride 2, 32×16×16", (32, 16, 16, 64), (4, 4), 32, 2, 1)
    yield conv_transpose("3×3 64→64, 32×16×16", (32, 16, 16, 64), (3, 3), 64, 1, 1)
    yield conv_transpose("1-D 4 64→32 stride 2, 32×512", (32, 512, 64), (4,), 32, 2, 1)
    yield conv_transpose("3-D 2×2×2 32→16 stride 2, 8×8×8×8", (8, 8, 8, 8, 32), (2, 2, 2), 16, 2, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Pools


def pool(
    kind: str,
    name: str,
    x: Shape,
    window: int,
    stride: int | None = None,
    padding: int = 0,
    dilation: int = 1,
) -> Row:
    """Return max_pool, avg_pool or lp_pool with the same padding on both sides of each dim."""
    dims = len(x) - 2
    stride = window if stride is None else stride
    options: dict[str, Any] = {"stride": stride, "padding": padding}
    if dilation > 1:
        options["dilation"] = dilation
    reduce = functools.partial(
        lax.reduce_window,
        window_dimensions=(1, *(window,) * dims, 1),
        window_strides=(1, *(stride,) * dims, 1),
        padding=((0, 0), *((padding, padding),) * dims, (0, 0)),
        window_dilation=(1, *(dilation,) * dims, 1),
    )

    def ours(x: Any) -> Any:
        return {"max": jaxcnn.max_pool, "avg": jaxcnn.avg_pool, "lp": jaxcnn.lp_pool}[kind](x, window, **options)

    def stock(x: Any) -> Any:
        if kind == "max":
            return reduce(x, -jnp.inf, lax.max)
        if kind == "avg":
            return reduce(x, 0.0, lax.add) / window**dims
        return jnp.sqrt(reduce(x * x, 0.0, lax.add))

    def torch(x: Any) -> Any:
        from torch.nn import functional as F

        at = dims - 1
        if kind == "max":
            return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[at](x, window, stride, padding, dilation)
        if kind == "avg":
            return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[at](x, window, stride, padding)
        return (F.lp_pool1d, F.lp_pool2d, F.lp_pool3d)[at](x, 2.0, window, stride)

    return Row(f"{kind}_pool {name}", {"x": x}, ours, stock, torch, together=kind != "avg")


def pools() -> Iterator[Row]:
    """Yield adjacent, overlapping, padded, dilated and global pools, up and its adjoint."""
    for kind in ("max", "avg", "lp"):
        yield pool(kind, "2×2, 128×24×24×32", (128, 24, 24, 32), 2)
        if kind != "lp":
            yield pool(kind, "3×3 stride 2 padded, 32×32×32×64", (32, 32, 32, 64), 3, 2, 1)
        yield pool(kind, "3×3 stride 1, 32×16×16×64", (32, 16, 16, 64), 3, 1)
        yield pool(kind, "1-D 4, 64×1024×32", (64, 1024, 32), 4)
    yield pool("max", "3-D 2×2×2, 8×16×16×16×32", (8, 16, 16, 16, 32), 2)
    yield pool("max", "2×2 dilation 2, 32×32×32×64", (32, 32, 32, 64), 2, 2, 0, 2)
    for kind in ("max", "avg"):
        yield pool(kind, "3×3 stride 2 padded, 16×112×112×64", (16, 112, 112, 64), 3, 2, 1)
        yield pool(kind, "3×3 stride 1 padded, 16×56×56×64", (16, 56, 56, 64), 3, 1, 1)
    yield pool("avg", "11×11 stride 1, 8×32×32×64", (8, 32, 32, 64), 11, 1)
    yield pool("max", "11×11 stride 1, 8×32×32×64", (8, 32, 32, 64), 11, 1)
    shape = {"x": (64, 8, 8, 512)}
    yield Row(
        "global_max_pool 64×8×8×512", shape, jaxcnn.global_max_pool, lambda x: x.max((1, 2)), lambda x: x.amax((2, 3)),
        together=True,
    )  # fmt: skip
    yield Row(
        "global_avg_pool 64×8×8×512", shape, jaxcnn.global_avg_pool, lambda x: x.mean((1, 2)), lambda x: x.mean((2, 3))
    )
    yield Row(
        "kron_up 2, 32×16×16×64",
        {"x": (32, 16, 16, 64)},
        lambda x: jaxcnn.kron_up(x, 2),
        lambda x: jnp.repeat(jnp.repeat(x, 2, 1), 2, 2),
        lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
    )
    yield Row(
        "block_sum 2, 32×32×32×64",
        {"x": (32, 32, 32, 64)},
        lambda x: jaxcnn.block_sum(x, 2),
        lambda x: x.reshape(x.shape[0], 16, 2, 16, 2, 64).sum((2, 4)),
        lambda x: x.unflatten(3, (16, 2)).unflatten(2, (16, 2)).sum((3, 5)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Elementwise


def pointwise() -> Iterator[Row]:
    """Yield activations."""

    def torch(name: str) -> Callable[[Any], Any]:
        def f(x: Any) -> Any:
            from torch.nn import functional as F

            return getattr(F, name)(x)

        return f

    names = (
        "relu", "leaky_relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "sigmoid", "tanh", "softplus", "mish",
        "hard_tanh", "hard_sigmoid", "hard_swish", "log_sigmoid", "softsign", "squareplus",
    )  # fmt: skip
    torch_names = {"log_sigmoid": "logsigmoid", "hard_tanh": "hardtanh", "hard_sigmoid": "hardsigmoid"}
    torch_names |= {"hard_swish": "hardswish"}
    for name in names:
        stock = jnp.tanh if name == "tanh" else getattr(jax.nn, {"softsign": "soft_sign"}.get(name, name))
        if name == "gelu":
            stock = functools.partial(jax.nn.gelu, approximate=False)
        theirs = None if name == "squareplus" else torch(torch_names.get(name, name))
        row = Row(f"{name} 32×32×32×64", {"x": (32, 32, 32, 64)}, getattr(jaxcnn, name), stock, theirs, together=True)
        yield row


# ---------------------------------------------------------------------------------------------------------------------
# The rest of a net


def others() -> Iterator[Row]:
    """Yield dense layers, normalization, losses and the hidden layer."""

    def linear(x: Any, w: Any, b: Any) -> Any:
        from torch.nn import functional as F

        return F.linear(x, w, b)

    for rows, inputs, outputs in ((128, 1024, 10), (128, 3136, 512), (64, 8192, 10)):
        shapes = {"x": (rows, inputs), "w": (inputs, outputs), "b": (outputs,)}
        yield Row(f"dense {inputs}→{outputs}, {rows}", shapes, jaxcnn.dense, lambda x, w, b: x @ w + b, linear)
    yield from normalizations()
    yield from losses()
    for size, inputs, features in ((28, 1, 32), (12, 32, 64)):
        yield hidden_layer(f"5×5 {inputs}→{features}, 128×{size}×{size}", (128, size, size, inputs), features)


def hidden_layer(name: str, x: Shape, features: int) -> Row:
    """Return a convolution with a 5×5 kernel and a bias, ReLU, and 2×2 max pooling."""

    def stock(x: Any, w: Any, b: Any) -> Any:
        y = jax.nn.relu(lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=LAYOUTS[2]) + b)
        return lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def torch(x: Any, w: Any, b: Any) -> Any:
        from torch.nn import functional as F

        return F.max_pool2d(F.relu(F.conv2d(x, w, b)), 2)

    shapes = {"x": x, "w": (5, 5, x[-1], features), "b": (features,)}
    # If two elements of a window differ by less than rounding, the winners may differ, and one δ is at another place.
    return Row(f"hidden_layer {name}", shapes, jaxcnn.hidden_layer, stock, torch, together=True, equal=5e-3)


def normalizations() -> Iterator[Row]:
    """Yield batch, layer and group norm, with scale and bias."""
    shapes = {"x": (32, 32, 32, 64), "scale": (64,), "bias": (64,)}

    def stock(axes: tuple[int, ...]) -> Callable[..., Any]:
        def f(x: Any, scale: Any, bias: Any) -> Any:
            return normal(x, axes) * scale + bias

        return f

    def normal(x: Any, axes: tuple[int, ...]) -> Any:
        return (x - x.mean(axes, keepdims=True)) * lax.rsqrt(x.var(axes, keepdims=True) + 1e-5)

    def grouped(x: Any, scale: Any, bias: Any) -> Any:
        return normal(x.reshape(*x.shape[:-1], 8, -1), (1, 2, 4)).reshape(x.shape) * scale + bias

    def batch(x: Any, scale: Any, bias: Any) -> Any:
        from torch.nn import functional as F

        return F.batch_norm(x, None, None, scale, bias, training=True)

    def layer(x: Any, scale: Any, bias: Any) -> Any:
        from torch.nn import functional as F

        return F.layer_norm(x.movedim(1, -1), (64,), scale, bias).movedim(-1, 1)

    def group(x: Any, scale: Any, bias: Any) -> Any:
        from torch.nn import functional as F

        return F.group_norm(x, 8, scale, bias)

    name = "32×32×32×64"
    yield Row(f"batch_norm {name}", shapes, jaxcnn.batch_norm, stock((0, 1, 2)), batch, together=True)
    yield Row(f"layer_norm {name}", shapes, jaxcnn.layer_norm, stock((-1,)), layer, together=True)
    ours = functools.partial(jaxcnn.group_norm, groups=8)
    # PyTorch 2.13 on CPU has a segmentation fault unless δ_x is computed as well.
    crashes = ("δ_scale", "δ_bias")
    yield Row(f"group_norm 8, {name}", shapes, ours, grouped, group, together=True, torch_crashes=crashes)


def losses() -> Iterator[Row]:
    """Yield the losses, one number per example."""

    def with_labels(logits: Any, labels: Any) -> Any:
        from torch.nn import functional as F

        return F.cross_entropy(logits, labels.long(), reduction="none")

    def soft(logits: Any, targets: Any) -> Any:
        from torch.nn import functional as F

        return F.cross_entropy(logits, targets, reduction="none")

    for rows, classes in ((128, 10), (1024, 1000)):
        yield Row(
            f"softmax_cross_entropy_with_integer_labels {rows}×{classes}",
            {"logits": (rows, classes), "labels": (rows,)},
            jaxcnn.softmax_cross_entropy_with_integer_labels,
            optax.softmax_cross_entropy_with_integer_labels,
            with_labels,
            together=True,
            classes=classes,
        )
    yield Row(
        "softmax_cross_entropy 1024×1000",
        {"logits": (1024, 1000), "targets": (1024, 1000)},
        jaxcnn.softmax_cross_entropy,
        optax.softmax_cross_entropy,
        soft,
        together=True,
    )
    yield Row(
        "squared_error 1024×1000",
        {"y": (1024, 1000), "target": (1024, 1000)},
        jaxcnn.squared_error,
        lambda y, target: jnp.square(y - target),
        lambda y, target: (y - target) ** 2,
        together=True,
    )
