"""The same net in PyTorch: the source of a module that builds it, and the conversion of its parameters.

Images are channels-first in PyTorch, so kernels are transposed, and the rows of a dense layer after `Flatten` are in
another order. The names of the state dict are those of the layers, such as "conv1.weight".
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

import jaxcnn
from experiments.errors import CheckpointError, UsageError, bad_value
from jaxcnn import geometry
from jaxcnn.layers import out_shape

Convert = Callable[[np.ndarray], np.ndarray]
Order = tuple[int, ...] | None
"""The shape (H, W, C) that was flattened before, or None: the order of the features is then the same in PyTorch."""

HEADER = '''"""{title} in PyTorch. Written by python -m experiments.export.

    net = load()
    logits = net(images)  # images: float32 (N, {channels}, {height}, {width}) in [0, 1]
"""

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

CLASSES = {classes!r}
'''
HELPERS = {
    "Residual": """

class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)
""",
    "Branches": """

class Branches(nn.Module):
    def __init__(self, join, layers):
        super().__init__()
        self.join = join
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        outputs = [layer(x) for layer in self.children()]
        return sum(outputs[1:], outputs[0]) if self.join == "add" else torch.cat(outputs, 1)
""",
    "PaddedConv2d": '''

class PaddedConv2d(nn.Conv2d):
    """A convolution whose padding (left, right, top, bottom) is not symmetric."""

    def __init__(self, *args, pads, **options):
        super().__init__(*args, **options)
        self.pads = pads

    def forward(self, x):
        return super().forward(F.pad(x, self.pads))
''',
    "ChannelNorm": '''

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of channels-first images."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
''',
}
FOOTER = '''

def make():
    """Return the net with initial parameters."""
    return {expression}


def load(path=Path(__file__).with_suffix(".safetensors")):
    """Return the trained net, in evaluation mode."""
    net = make()
    net.load_state_dict(load_file(path))
    return net.eval()
'''


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its path in the tree of parameters, and the conversions to and from PyTorch."""

    path: tuple[str, ...]
    to_torch: Convert
    from_torch: Convert


@dataclasses.dataclass(frozen=True)
class Source:
    """The text of a module with functions `make` and `load`, and the entries of the state dict by name."""

    text: str
    entries: Mapping[str, Entry]

    def tensors(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the state dict of the parameters."""
        result = {}
        for name, entry in self.entries.items():
            result[name] = np.ascontiguousarray(entry.to_torch(_get(params, entry.path)))
            if name.endswith("running_var"):
                result[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
        return result

    def params(self, tensors: Mapping[str, np.ndarray], like: Mapping[str, Any], file: object) -> dict[str, Any]:
        """Return the parameters of a state dict.

        Args:
            tensors: The state dict. Its names are those of `entries`, or those of torchvision's sequential nets:
                numbers after "features." and "classifier.", in the order of the layers.
            like: The expected shapes and dtypes, as a tree.
            file: The name of the file in messages.

        Raises:
            CheckpointError: A tensor is missing, unexpected or of another shape or dtype.
        """
        tensors = {name: a for name, a in tensors.items() if not name.endswith("num_batches_tracked")}
        if set(tensors) != set(self.entries) and all(map(_NUMBERED.fullmatch, tensors)):
            ordered = sorted(tensors, key=_position)
            if len(ordered) == len(self.entries):
                tensors = {mine: tensors[name] for mine, name in zip(self._by_layer(), ordered, strict=True)}
        result: dict[str, Any] = {}
        for name in (*self.entries, *tensors):
            shape = dtype = None
            if name in self.entries:
                entry = self.entries[name]
                leaf = _get(like, entry.path)
                shape, dtype = entry.to_torch(np.empty(leaf.shape, np.bool_)).shape, leaf.dtype
            expected = "absent" if shape is None else f"{dtype} {shape}"
            got = f"{tensors[name].dtype} {tensors[name].shape}" if name in tensors else "no such tensor"
            if got != expected:
                raise bad_value(CheckpointError, f"{file}: {name}", expected, got)
            inner = result
            for key in entry.path[:-1]:
                inner = inner.setdefault(key, {})
            inner[entry.path[-1]] = np.ascontiguousarray(entry.from_torch(tensors[name]))
        return result

    def _by_layer(self) -> list[str]:
        """Return the names by layer, and in each layer in the order in which `_position` sorts."""
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in self.entries))
        return sorted(self.entries, key=lambda name: (layers.index(name.rpartition(".")[0]), name.rpartition(".")[2]))


_NUMBERED = re.compile(r"((features|classifier)\.)?(\d+\.)+(weight|bias|running_mean|running_var)")


def _position(name: str) -> tuple[Any, ...]:
    first, *rest = name.split(".")
    place = ("features", "classifier").index(first) if not first.isdigit() else int(first)
    return place, [int(part) for part in rest if part.isdigit()], rest[-1]


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def convert(net: jaxcnn.Serial, params: Mapping[str, Any], shape: tuple[int, ...], title: str, classes: Any) -> Source:
    """Return the source of a net in PyTorch.

    Args:
        net: The net.
        params: Its parameters, or their shapes; batch norms need statistics.
        shape: The shape (H, W, C) of an image.
        title: The name of the net in the source.
        classes: The names of the classes.

    Raises:
        UsageError: A layer has no equivalent in PyTorch, or uses an option that PyTorch's does not have.
    """
    writer = _Writer()
    expression, _, order = writer.module(net, params, shape, (), None)
    if order is not None:
        raise _refusal((net.layers[-1][0],), "Flatten at the end, whose order is another in PyTorch")
    height, width, channels = shape
    head = HEADER.format(title=title, height=height, width=width, channels=channels, classes=tuple(classes))
    helpers = "".join(HELPERS[name] for name in HELPERS if name in writer.helpers)
    imports = head
    for name, line in (("torch.cat", "import torch\n"), ("F.pad", "from torch.nn import functional as F\n")):
        if name not in helpers:
            imports = imports.replace(line, "")
    if "OrderedDict" not in expression:
        imports = imports.replace("from collections import OrderedDict\n", "")
    return Source(imports + helpers + FOOTER.format(expression=expression), writer.entries)


def _refusal(path: tuple[str, ...], got: object) -> UsageError:
    return bad_value(UsageError, f"layer {'/'.join(path)}", "one that PyTorch has as well", got)


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _first(a: np.ndarray) -> np.ndarray:
    """Return a kernel (h, w, i, o) as (o, i, h, w)."""
    return a.transpose(3, 2, 0, 1)


def _last(a: np.ndarray) -> np.ndarray:
    return a.transpose(2, 3, 1, 0)


def _lines(entries: Iterator[tuple[str, str]], depth: int) -> str:
    """Return an OrderedDict of named modules."""
    indent = "    " * (depth + 2)
    body = "".join(f'{indent}("{name}", {text}),\n' for name, text in entries)
    return f"OrderedDict([\n{body}{'    ' * (depth + 1)}])"


class _Writer:
    """Collects the entries of the state dict and the helper classes of a module."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.helpers: set[str] = set()

    def module(
        self, layer: Any, params: Mapping[str, Any], shape: tuple[int, ...], path: tuple[str, ...], order: Order
    ) -> tuple[str, tuple[int, ...], Order]:
        """Return the expression of a layer, the shape of its output, and the order of its features."""
        if isinstance(layer, jaxcnn.Serial):
            return self._net(layer, params, shape, path, order)
        out = out_shape(layer, dict(params), shape)
        if isinstance(layer, jaxcnn.Dropout):
            return f"nn.Dropout({layer.rate})", out, order
        if (text := _activation(layer)) is not None:
            return text, out, order
        if isinstance(layer, jaxcnn.Dense):
            return self._dense(layer, params, shape, path, order), out, None
        if order is not None:
            raise _refusal(path, f"{type(layer).__name__} of flattened images")
        if isinstance(layer, jaxcnn.Flatten):
            return "nn.Flatten()", out, shape if len(shape) == 3 and shape[:2] != (1, 1) else None
        if len(shape) == 3 or isinstance(layer, jaxcnn.BatchNorm | jaxcnn.LayerNorm):
            match layer:
                case jaxcnn.HiddenLayer():
                    inner = layer.inner_shape(shape)
                    conv = self._conv(layer, params, shape, (*path, "conv"), layer.features, layer.groups, path)
                    pool = _max_pool(layer.window, layer.pool_stride, layer.pool_padding, 1, False, inner)
                    parts = (("conv", conv), ("relu", "nn.ReLU()"), ("pool", pool))
                    return f"nn.Sequential({_lines(iter(parts), len(path))})", out, None
                case jaxcnn.Conv():
                    return self._conv(layer, params, shape, path, layer.features, layer.groups, path), out, None
                case jaxcnn.DepthwiseConv():
                    return self._conv(layer, params, shape, path, out[-1], shape[-1], path), out, None
                case jaxcnn.ConvTranspose():
                    return self._conv_transpose(layer, params, shape, path), out, None
                case jaxcnn.BatchNorm() | jaxcnn.GroupNorm() | jaxcnn.LayerNorm():
                    return self._norm(layer, params, shape, path), out, None
                case jaxcnn.MaxPool():
                    options = (layer.window, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
                    return _max_pool(*options, shape), out, None
                case jaxcnn.AvgPool():
                    return _avg_pool(layer, shape, path), out, None
                case jaxcnn.GlobalAvgPool() | jaxcnn.GlobalMaxPool():
                    kind = "Avg" if isinstance(layer, jaxcnn.GlobalAvgPool) else "Max"
                    return f"nn.Sequential(nn.Adaptive{kind}Pool2d(1), nn.Flatten())", out, None
                case jaxcnn.AdaptiveAvgPool() | jaxcnn.AdaptiveMaxPool():
                    kind = "Avg" if isinstance(layer, jaxcnn.AdaptiveAvgPool) else "Max"
                    return f"nn.Adaptive{kind}Pool2d({out[:2]})", out, None
        raise _refusal(path, f"{layer!r} for inputs of shape {shape}")

    def _net(
        self, net: jaxcnn.Serial, params: Mapping[str, Any], shape: tuple[int, ...], path: tuple[str, ...], order: Order
    ) -> tuple[str, tuple[int, ...], Order]:
        kind = type(net)
        branched = kind is jaxcnn.Branches
        if kind not in (jaxcnn.Serial, jaxcnn.Residual, jaxcnn.Branches):
            raise _refusal(path, kind.__name__)
        if kind is not jaxcnn.Serial:
            self.helpers.add(kind.__name__)
        parts: list[tuple[str, str]] = []
        size, now, shapes = shape, order, []
        for name, layer in net.layers:
            if branched:
                size, now = shape, order
            text, size, now = self.module(layer, params.get(name, {}), size, (*path, name), now)
            parts.append((name, text))
            shapes.append(size)
            if branched and now is not None:
                raise _refusal((*path, name), "a branch that ends with flattened images")
        lines = _lines(iter(parts), len(path))
        if branched:
            assert isinstance(net, jaxcnn.Branches)
            size = (*shapes[0][:-1], sum(s[-1] for s in shapes)) if net.join == "concatenate" else shapes[0]
            return f'Branches("{net.join}", {lines})', size, None
        return f"{'Residual' if kind is jaxcnn.Residual else 'nn.Sequential'}({lines})", size, now

    def _add(self, path: tuple[str, ...], own: tuple[str, ...], name: str, ours: str, *fs: Convert) -> None:
        to_torch, from_torch = fs or (_same, _same)
        self.entries[".".join((*path, name))] = Entry((*own, ours), to_torch, from_torch)

    def _dense(
        self, layer: Any, params: Mapping[str, Any], shape: tuple[int, ...], path: tuple[str, ...], order: Order
    ) -> str:
        if len(shape) != 1:
            raise _refusal(path, f"Dense for inputs of shape {shape}")

        def to_torch(w: np.ndarray) -> np.ndarray:
            if order is not None:
                w = w.reshape(*order, -1).transpose(2, 0, 1, 3).reshape(w.shape)
            return w.T

        def from_torch(w: np.ndarray) -> np.ndarray:
            w = w.T
            if order is not None:
                height, width, channels = order
                w = w.reshape(channels, height, width, -1).transpose(1, 2, 0, 3).reshape(w.shape)
            return w

        self._add(path, path, "weight", "weight", to_torch, from_torch)
        if "bias" in params:
            self._add(path, path, "bias", "bias")
        bias = "" if "bias" in params else ", bias=False"
        return f"nn.Linear({shape[0]}, {layer.features}{bias})"

    def _conv(
        self,
        layer: Any,
        params: Mapping[str, Any],
        shape: tuple[int, ...],
        path: tuple[str, ...],
        features: int,
        groups: int,
        own: tuple[str, ...],
    ) -> str:
        if str(layer.padding).upper() in geometry.PADDING_MODES:
            raise _refusal(own, f"padding {layer.padding!r}")
        win = geometry.window(
            "conv", shape[:2], layer.kernel_size, stride=layer.stride, padding=layer.padding, dilation=layer.dilation
        )
        self._add(path, own, "weight", "weight", _first, _last)
        if "bias" in params:
            self._add(path, own, "bias", "bias")
        options = "" if win.stride == (1, 1) else f", stride={win.stride}"
        options += "" if win.dilation == (1, 1) else f", dilation={win.dilation}"
        options += "" if groups == 1 else f", groups={groups}"
        options += "" if "bias" in params else ", bias=False"
        (top, bottom), (left, right) = win.padding
        kind = "nn.Conv2d"
        if (top, left) != (bottom, right):
            self.helpers.add(kind := "PaddedConv2d")
            options += f", pads=({left}, {right}, {top}, {bottom})"
        elif (top, left) != (0, 0):
            options += f", padding=({top}, {left})"
        return f"{kind}({shape[-1]}, {features}, {win.size}{options})"

    def _conv_transpose(
        self, layer: Any, params: Mapping[str, Any], shape: tuple[int, ...], path: tuple[str, ...]
    ) -> str:
        padding = 0 if layer.padding == "VALID" else layer.padding
        if not isinstance(padding, int):
            raise _refusal(path, f"ConvTranspose with padding {layer.padding!r}")
        self._add(path, path, "weight", "weight", _first, _last)
        if "bias" in params:
            self._add(path, path, "bias", "bias")
        return (
            f"nn.ConvTranspose2d({shape[-1]}, {layer.features}, {layer.kernel_size}, {layer.stride}, {padding}, "
            f"{layer.output_padding}, {layer.groups}, {'bias' in params}, {layer.dilation})"
        )

    def _norm(self, layer: Any, params: Mapping[str, Any], shape: tuple[int, ...], path: tuple[str, ...]) -> str:
        channels, kind = shape[-1], type(layer).__name__
        if layer.scale != layer.bias:
            raise _refusal(path, f"{kind} with only one of scale and bias")
        if layer.scale:
            self._add(path, path, "weight", "scale")
            self._add(path, path, "bias", "bias")
        options = f"eps={layer.eps!r}" + ("" if layer.scale else ", affine=False")
        if isinstance(layer, jaxcnn.BatchNorm):
            if "mean" not in params:
                raise _refusal(path, "BatchNorm without statistics, which jaxcnn.calibrate adds")
            self._add(path, path, "running_mean", "mean")
            self._add(path, path, "running_var", "var")
            return f"nn.BatchNorm{'2d' if len(shape) == 3 else '1d'}({channels}, {options})"
        if isinstance(layer, jaxcnn.GroupNorm):
            return f"nn.GroupNorm({layer.groups}, {channels}, {options})"
        if layer.axes not in (-1, (-1,), len(shape)):
            raise _refusal(path, f"LayerNorm over {layer.axes}")
        options = options.replace("affine", "elementwise_affine")
        if len(shape) == 3:
            self.helpers.add("ChannelNorm")
        return f"{'ChannelNorm' if len(shape) == 3 else 'nn.LayerNorm'}({channels}, {options})"


def _activation(layer: Any) -> str | None:
    """Return the expression of an activation, or None for another layer or another option."""
    name = type(layer).__name__
    match layer:
        case jaxcnn.LeakyRelu():
            return f"nn.LeakyReLU({layer.negative_slope})"
        case jaxcnn.Elu() | jaxcnn.Celu():
            return f"nn.{name.upper()}({layer.alpha})"
        case jaxcnn.Gelu():
            return f'nn.GELU("{"tanh" if layer.approximate else "none"}")'
    names = {
        "Relu": "ReLU",
        "Silu": "SiLU",
        "Softplus": "Softplus",
        "Sigmoid": "Sigmoid",
        "Tanh": "Tanh",
        "Selu": "SELU",
        "Relu6": "ReLU6",
        "HardTanh": "Hardtanh",
        "HardSigmoid": "Hardsigmoid",
        "HardSwish": "Hardswish",
        "Mish": "Mish",
        "Softsign": "Softsign",
        "LogSigmoid": "LogSigmoid",
    }
    # A subclass may compute something else.
    return f"nn.{names[name]}()" if name in names and type(layer) is getattr(jaxcnn, name) else None


def _max_pool(window: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, shape: tuple[int, ...]) -> str:
    stride = window if stride is None else stride
    win = geometry.window(
        "max_pool", shape[:2], window, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode
    )
    dilated = "" if win.dilation == (1, 1) else f", dilation={win.dilation}"
    pool = f"nn.MaxPool2d({win.size}, {win.stride}{dilated})"
    if not win.padded:
        return pool
    (top, bottom), (left, right) = win.padding
    return f'nn.Sequential(nn.ConstantPad2d(({left}, {right}, {top}, {bottom}), -float("inf")), {pool})'


def _avg_pool(layer: Any, shape: tuple[int, ...], path: tuple[str, ...]) -> str:
    stride = layer.window if layer.stride is None else layer.stride
    win = geometry.window("avg_pool", shape[:2], layer.window, stride=stride, padding=layer.padding)
    (top, bottom), (left, right) = win.padding
    symmetric = (top, left) == (bottom, right)
    if layer.ceil_mode or layer.dilation not in (1, (1, 1)) or not (symmetric or layer.count_include_pad):
        raise _refusal(path, repr(layer))
    divisor = None if layer.divisor is None else int(layer.divisor)
    if divisor != layer.divisor:
        raise _refusal(path, f"AvgPool with divisor {layer.divisor}")
    options = f"count_include_pad={layer.count_include_pad}" + (f", divisor_override={divisor}" if divisor else "")
    if not layer.count_include_pad:
        return f"nn.AvgPool2d({win.size}, {win.stride}, ({top}, {left}), {options})"
    pool = f"nn.AvgPool2d({win.size}, {win.stride}, {options})"
    return f"nn.Sequential(nn.ZeroPad2d(({left}, {right}, {top}, {bottom})), {pool})" if win.padded else pool
