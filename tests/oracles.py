"""Reference implementations: PyTorch for every op, and NumPy loops over windows for the kernels.

The PyTorch functions take and return channels-last tensors and take the options of the jaxcnn op of the same name, so
`torch.autograd` gives first and second derivatives. The loops implement the definitions term by term.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jaxcnn.geometry import Correlation, Window

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
PAD_MODE = {"REFLECT": "reflect", "REPLICATE": "replicate", "CIRCULAR": "circular"}

# ---------------------------------------------------------------------------------------------------------------------
# PyTorch


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride=1,
    padding="VALID",
    dilation=1,
    groups: int = 1,
    dimension_numbers=None,
    preferred_element_type=None,
    precision=None,
) -> Tensor:
    if dimension_numbers is not None:
        of_x, of_w, of_y = dimension_numbers
        space = [d for d in of_w if d not in "OI"]
        x = x.permute([of_x.index(d) for d in ["N", *space, "C"]])
        w = w.permute([of_w.index(d) for d in [*space, "I", "O"]])
        y = conv(x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups)
        return y.permute([["N", *space, "C"].index(d) for d in of_y])
    spatial, size = x.shape[1:-1], w.shape[:-2]
    stride, dilation = per_dim(stride, len(spatial)), per_dim(dilation, len(spatial))
    mode = PAD_MODE.get(padding, "constant") if isinstance(padding, str) else "constant"
    pads = pad_widths(padding, spatial, size, stride, dilation)
    x = F.pad(x.movedim(-1, 1), flat(pads), mode=mode)
    w = w.movedim(-1, 0).movedim(-1, 1).contiguous()  # slow_conv2d requires it
    return CONV[len(spatial)](x, w, b, stride=stride, dilation=dilation, groups=groups).movedim(1, -1)


def depthwise_conv(x: Tensor, *w_and_b: Tensor, dimension_numbers=None, **options) -> Tensor:
    channels = x.shape[-1 if dimension_numbers is None else dimension_numbers[0].index("C")]
    return conv(x, *w_and_b, groups=channels, dimension_numbers=dimension_numbers, **options)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride=1,
    padding="VALID",
    output_padding=0,
    dilation=1,
    groups: int = 1,
    dimension_numbers=None,
    preferred_element_type=None,
    precision=None,
) -> Tensor:
    """Use PyTorch's own op if it crops both sides equally; otherwise crop its uncropped result."""
    if dimension_numbers is not None:
        of_x, of_w, of_y = dimension_numbers
        space = [d for d in of_w if d not in "OI"]
        x = x.permute([of_x.index(d) for d in ["N", *space, "C"]])
        w = w.permute([of_w.index(d) for d in [*space, "I", "O"]])
        options = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
        y = conv_transpose(x, w, b, **options, groups=groups)
        return y.permute([["N", *space, "C"].index(d) for d in of_y])
    spatial, size = x.shape[1:-1], w.shape[:-2]
    ndim = len(spatial)
    stride, dilation, more = (per_dim(value, ndim) for value in (stride, dilation, output_padding))
    sizes = [n * s for n, s in zip(spatial, stride, strict=True)]
    pads = pad_widths(padding, sizes, size, stride, dilation)
    if padding in ("SAME", "SAME_LOWER"):  # stride times as large, even if the stride is larger than the kernel
        extent = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
        more = tuple(max(s - e, 0) for s, e in zip(stride, extent, strict=True))
    x, w = x.movedim(-1, 1), w.movedim(-1, 0).movedim(-1, 1).contiguous()
    transposed = CONV_TRANSPOSE[ndim]
    if all(lo == hi for lo, hi in pads):
        return transposed(x, w, b, stride, [lo for lo, _ in pads], more, groups, dilation).movedim(1, -1)
    y = transposed(x, w, b, stride, 0, more, groups, dilation)
    for dim, (lo, hi) in enumerate(pads, start=2):
        y = y.narrow(dim, lo, y.shape[dim] - lo - hi)
    return y.movedim(1, -1)


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def leaky_relu(x: Tensor, *, negative_slope: float = 0.01) -> Tensor:
    return F.leaky_relu(x, negative_slope)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def selu(x: Tensor) -> Tensor:
    return F.selu(x)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return alpha * F.elu(x / alpha)  # F.celu keeps 1/alpha in float32 in its backward pass


def relu6(x: Tensor) -> Tensor:
    return F.relu6(x)


def hard_tanh(x: Tensor) -> Tensor:
    return F.hardtanh(x)


def hard_sigmoid(x: Tensor) -> Tensor:
    return F.relu6(x + 3) / 6  # F.hardsigmoid has no second derivative


def hard_swish(x: Tensor) -> Tensor:
    return F.hardswish(x)


def mish(x: Tensor) -> Tensor:
    return F.mish(x)


def softsign(x: Tensor) -> Tensor:
    return F.softsign(x)


def squareplus(x: Tensor, *, b: float = 4.0) -> Tensor:
    return (x + torch.sqrt(x * x + b)) / 2


def log_sigmoid(x: Tensor) -> Tensor:
    return F.logsigmoid(x)


def gelu(x: Tensor, *, approximate: bool = False) -> Tensor:
    return F.gelu(x, approximate="tanh" if approximate else "none")


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # F.softplus is only approximate above a threshold


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


def max_pool(x: Tensor, *, window, stride=None, padding="VALID", dilation=1, ceil_mode=False) -> Tensor:
    size, stride, pads, dilation = pool_options(x, window, stride, padding, dilation)
    x = x.movedim(-1, 1)
    own = native(pads, size)
    if own is None:
        x = F.pad(x, flat(pads), value=-math.inf)
    pool = MAX_POOL[len(size)]
    return pool(x, size, stride, own or 0, dilation=dilation, ceil_mode=ceil_mode).movedim(1, -1)


def avg_pool(
    x: Tensor,
    *,
    window,
    stride=None,
    padding="VALID",
    dilation=1,
    ceil_mode=False,
    count_include_pad=True,
    divisor=None,
) -> Tensor:
    """Average pooling; PyTorch has no ``divisor_override`` in 1-D, so there the mean of whole windows is scaled."""
    size, stride, pads, dilation = pool_options(x, window, stride, padding, dilation)
    x = x.movedim(-1, 1)
    own = native(pads, size)
    larger = len(size) == 3 and any(k > n for k, n in zip(size, x.shape[2:], strict=True))  # PyTorch refuses these
    if own is not None and set(dilation) == {1} and not larger:
        pool = AVG_POOL[len(size)]
        by = {} if divisor is None or len(size) == 1 else {"divisor_override": divisor}
        y = pool(x, size, stride, own, ceil_mode=ceil_mode, count_include_pad=count_include_pad, **by).movedim(1, -1)
        return y * math.prod(size) / divisor if divisor is not None and len(size) == 1 else y
    assert not ceil_mode, "PyTorch has no such pooling"
    ones = torch.ones(x.shape[1], 1, *size, dtype=x.dtype)

    def total(a: Tensor) -> Tensor:
        return CONV[len(size)](a, ones, stride=stride, dilation=dilation, groups=x.shape[1])

    seen = F.pad(torch.ones_like(x), flat(pads), value=float(count_include_pad))
    count = total(seen) if divisor is None else divisor
    return (total(F.pad(x, flat(pads))) / count).movedim(1, -1)


def max_pool_with_indices(x: Tensor, **options) -> Tensor:
    """Return the values without the indices."""
    return max_pool(x, **options)


def max_unpool(y: Tensor, *, index, spatial_shape) -> Tensor:
    """Unpool with `scatter_add`, because PyTorch's op drops one of two equal indices."""
    flat_x = torch.zeros(y.shape[0], math.prod(spatial_shape), y.shape[-1], dtype=y.dtype)
    at = torch.tensor(index(tuple(y.shape))).flatten(1, -2).long()
    return flat_x.scatter_add(1, at, y.flatten(1, -2)).unflatten(1, tuple(spatial_shape))


def lp_pool(x: Tensor, *, window, p=2, stride=None, padding="VALID", dilation=1, ceil_mode=False) -> Tensor:
    size, strides, pads, dilations = pool_options(x, window, stride, padding, dilation)
    if len(size) < 3 and set(dilations) == {1} and not any(map(any, pads)):
        pool = {1: F.lp_pool1d, 2: F.lp_pool2d}[len(size)]
        of_size = [k[0] if len(size) == 1 else k for k in (size, strides)]
        return pool(x.movedim(-1, 1), p, *of_size, ceil_mode).movedim(1, -1)
    mean = avg_pool(x**p, window=window, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode)
    return (mean * math.prod(size)) ** (1 / p)


def global_max_pool(x: Tensor) -> Tensor:
    return x.flatten(1, -2).max(1).values


def global_avg_pool(x: Tensor) -> Tensor:
    return x.flatten(1, -2).mean(1)


def adaptive_max_pool(x: Tensor, *, output_size) -> Tensor:
    pool = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[x.ndim - 2]
    return pool(x.movedim(-1, 1), per_dim(output_size, x.ndim - 2)).movedim(1, -1)


def adaptive_avg_pool(x: Tensor, *, output_size) -> Tensor:
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[x.ndim - 2]
    return pool(x.movedim(-1, 1), per_dim(output_size, x.ndim - 2)).movedim(1, -1)


def kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.kron(a, b)


def kron_up(x: Tensor, *, factor) -> Tensor:
    for dim, k in enumerate(per_dim(factor, x.ndim - 2)):
        x = x.repeat_interleave(k, dim + 1)
    return x


def block_sum(x: Tensor, *, factor) -> Tensor:
    for dim, k in enumerate(per_dim(factor, x.ndim - 2)):
        x = x.unflatten(dim + 1, (-1, k)).sum(dim + 2)
    return x


def cross_correlate(a: Tensor, v: Tensor, mode: str = "full", *, method: str = "auto") -> Tensor:
    """Correlate with `F.conv…`, which does not flip v, at every shift, and return the part that ``mode`` selects."""
    full = CONV[a.ndim](a[None, None], v[None, None], padding=[k - 1 for k in v.shape])[0, 0]
    for dim, (n, k) in enumerate(zip(a.shape, v.shape, strict=True)):
        start, size = {"full": (0, n + k - 1), "same": ((k - 1) // 2, n), "valid": (k - 1, n - k + 1)}[mode]
        full = full.narrow(dim, start, size)
    return full


def convolve(a: Tensor, v: Tensor, mode: str = "full", *, method: str = "auto") -> Tensor:
    return cross_correlate(a, v.flip(tuple(range(v.ndim))), mode)


def autocorrelate(a: Tensor, mode: str = "full", *, method: str = "auto") -> Tensor:
    return cross_correlate(a, a, mode)


def match_template(image: Tensor, template: Tensor) -> Tensor:
    """Correlate window by window, as in the formula."""
    windows = image
    for dim, k in enumerate(template.shape):
        windows = windows.unfold(dim, k, 1)
    inner = tuple(range(image.ndim, 2 * image.ndim))
    x, t = windows - windows.mean(inner, keepdim=True), template - template.mean()
    return (x * t).sum(inner) / ((x * x).sum(inner) * (t * t).sum()).sqrt()


def dense(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.linear(x, w.T, b)


def dropout(x: Tensor, *, rate: float, mask) -> Tensor:
    """Drop elements; ``mask(shape)`` gives those that are kept, drawn as in the op."""
    if rate == 1:
        return F.dropout(x, 1.0)
    return x * torch.tensor(mask(tuple(x.shape))) / (1 - rate)


def hidden_layer(x: Tensor, *w_and_b: Tensor, window=2, pool_stride=None, pool_padding="VALID", **of_conv) -> Tensor:
    return max_pool(relu(conv(x, *w_and_b, **of_conv)), window=window, stride=pool_stride, padding=pool_padding)


def batch_norm(x: Tensor, *of_channels: Tensor, eps: float = 1e-5, axis_name: tuple[()] = ()) -> Tensor:
    """Take scale, bias, mean and var; use the formula for mean and var, which PyTorch does not differentiate."""
    scale, bias, *statistics = (*of_channels, None, None)[: max(len(of_channels), 2)]
    if statistics:
        mean, var = statistics
        return (x - mean) / torch.sqrt(var + eps) * scale + bias
    flat_x = x.reshape(-1, x.shape[-1])  # this avoids a batch norm of rank 5
    return F.batch_norm(flat_x, None, None, scale, bias, training=True, eps=eps).reshape(x.shape)


def layer_norm(x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, axes=-1, eps=1e-5) -> Tensor:
    """Move ``axes`` to the end, because PyTorch normalizes over the last dims."""
    dims = sorted(a % x.ndim for a in ((axes,) if isinstance(axes, int) else axes))
    last = tuple(range(x.ndim - len(dims), x.ndim))
    moved = x.movedim(dims, last)
    return F.layer_norm(moved, [x.shape[d] for d in dims], scale, bias, eps).movedim(last, dims)


def group_norm(x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, groups=32, eps=1e-5) -> Tensor:
    return F.group_norm(x.movedim(-1, 1), groups, scale, bias, eps).movedim(1, -1)


def squared_error(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(y, target, reduction="none")


def softmax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    flat_logits, flat_targets = logits.flatten(0, -2), targets.flatten(0, -2)
    return F.cross_entropy(flat_logits, flat_targets, reduction="none").reshape(logits.shape[:-1])


def softmax_cross_entropy_with_integer_labels(logits: Tensor, *, labels) -> Tensor:
    found = torch.tensor(labels(tuple(logits.shape))).flatten().long()
    return F.cross_entropy(logits.flatten(0, -2), found, reduction="none").reshape(logits.shape[:-1])


# How windows are described


def per_dim(value, ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def pad_widths(padding, spatial: Sequence[int], size, stride, dilation) -> list[tuple[int, int]]:
    extent = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    if padding == "VALID":
        return [(0, 0)] * len(spatial)
    if padding == "CAUSAL":
        return [(extent[0] - 1, 0)]
    if isinstance(padding, str):  # one output per step that starts inside; odd padding at the end, _LOWER: first
        totals = [max((math.ceil(n / s) - 1) * s + e - n, 0) for n, s, e in zip(spatial, stride, extent, strict=True)]
        return [(t - t // 2, t // 2) if padding == "SAME_LOWER" else (t // 2, t - t // 2) for t in totals]
    each = (padding,) * len(spatial) if isinstance(padding, int) else padding
    return [(p, p) if isinstance(p, int) else tuple(p) for p in each]


def pool_options(x: Tensor, window, stride, padding, dilation):
    ndim = x.ndim - 2
    size, dilation = per_dim(window, ndim), per_dim(dilation, ndim)
    stride = size if stride is None else per_dim(stride, ndim)
    return size, stride, pad_widths(padding, x.shape[1:-1], size, stride, dilation), dilation


def native(pads: Sequence[tuple[int, int]], size: Sequence[int]) -> tuple[int, ...] | None:
    """Return the padding if PyTorch's pooling accepts it (symmetric, at most half the window), otherwise None."""
    fits = all(lo == hi and 2 * lo <= k for (lo, hi), k in zip(pads, size, strict=True))
    return tuple(lo for lo, _ in pads) if fits else None


def flat(pads: Sequence[tuple[int, int]]) -> list[int]:
    """Return the padding in the order of F.pad: last dimension first."""
    return [p for pair in reversed(pads) for p in pair]


# First and second derivatives


def gradients(f, args: Sequence[np.ndarray], delta: np.ndarray, xis: Sequence[np.ndarray]):
    """Return y, the cotangents of args for δ, and the cotangents of (args, δ) for ξ."""
    leaves = [torch.tensor(a, requires_grad=True) for a in args]
    d = torch.tensor(delta, requires_grad=True)
    y = f(*leaves)
    first = torch.autograd.grad(y, leaves, d, create_graph=True)
    second = torch.autograd.grad(
        first, [*leaves, d], [torch.tensor(xi) for xi in xis], allow_unused=True, materialize_grads=True
    )
    numbers = [t.detach().numpy() for t in (y, *first, *second)]
    return numbers[0], numbers[1 : 1 + len(args)], numbers[1 + len(args) :]


# ---------------------------------------------------------------------------------------------------------------------
# NumPy loops


def meetings(win: Window) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Yield every (output o, tap k, input i) with ``i = o·stride + k·dilation − lo`` in each dim."""
    per_dim = []
    for n, size, s, d, (lo, hi) in zip(win.shape, win.size, win.stride, win.dilation, win.padding, strict=True):
        starts = range(0, lo + n + hi - (size - 1) * d, s)
        triples = ((o, k, start + k * d - lo) for o, start in enumerate(starts) for k in range(size))
        per_dim.append([(o, k, i) for o, k, i in triples if 0 <= i < n])
    for triples in itertools.product(*per_dim):
        yield tuple(zip(*triples, strict=True))


def channels(c: Correlation, inputs: int, outputs: int) -> list[tuple[slice, slice]]:
    """Return the input and output channels of each group."""
    i, o = inputs // c.groups, outputs // c.groups
    return [(slice(g * i, g * i + i), slice(g * o, g * o + o)) for g in range(c.groups)]


def correlate(c: Correlation, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    y = np.zeros((x.shape[0], *c.window.out, w.shape[-1]))
    for o, k, i in meetings(c.window):
        for of_x, of_y in channels(c, x.shape[-1], y.shape[-1]):
            y[:, *o, of_y] += x[:, *i, of_x] @ w[*k, :, of_y]
    return y


def input_grad(c: Correlation, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    x = np.zeros((y.shape[0], *c.window.shape, w.shape[-2] * c.groups))
    for o, k, i in meetings(c.window):
        for of_x, of_y in channels(c, x.shape[-1], y.shape[-1]):
            x[:, *i, of_x] += y[:, *o, of_y] @ w[*k, :, of_y].T
    return x


def kernel_grad(c: Correlation, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    w = np.zeros((*c.window.size, x.shape[-1] // c.groups, y.shape[-1]))
    for o, k, i in meetings(c.window):
        for of_x, of_y in channels(c, x.shape[-1], y.shape[-1]):
            w[*k, :, of_y] += x[:, *i, of_x].T @ y[:, *o, of_y]
    return w


def max_and_winner(win: Window, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the maximum and its tap: the first NaN if any, otherwise the first maximum; padding never wins."""
    y = np.full((x.shape[0], *win.out, x.shape[-1]), -np.inf)
    winner = np.full(y.shape, -1)
    for o, k, i in meetings(win):  # for one window, taps come in row-major order
        old, new = y[:, *o], x[:, *i]
        better = (winner[:, *o] < 0) | (new > old) | (np.isnan(new) & ~np.isnan(old))
        y[:, *o] = np.where(better, new, old)
        winner[:, *o] = np.where(better, np.ravel_multi_index(k, win.size), winner[:, *o])
    return y, winner


def scatter_to_winners(win: Window, y: np.ndarray, winner: np.ndarray) -> np.ndarray:
    x = np.zeros((y.shape[0], *win.shape, y.shape[-1]))
    for o, k, i in meetings(win):
        x[:, *i] += np.where(winner[:, *o] == np.ravel_multi_index(k, win.size), y[:, *o], 0)
    return x


def gather_winners(win: Window, x: np.ndarray, winner: np.ndarray) -> np.ndarray:
    y = np.zeros((x.shape[0], *win.out, x.shape[-1]))
    for o, k, i in meetings(win):
        y[:, *o] += np.where(winner[:, *o] == np.ravel_multi_index(k, win.size), x[:, *i], 0)
    return y


def window_sum(win: Window, x: np.ndarray) -> np.ndarray:
    y = np.zeros((x.shape[0], *win.out, x.shape[-1]))
    for o, _, i in meetings(win):
        y[:, *o] += x[:, *i]
    return y


def window_sum_adjoint(win: Window, y: np.ndarray) -> np.ndarray:
    x = np.zeros((y.shape[0], *win.shape, y.shape[-1]))
    for o, _, i in meetings(win):
        x[:, *i] += y[:, *o]
    return x
