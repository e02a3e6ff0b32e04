"""Our nets as `torch.nn` modules in float64, for zennit and captum, which hook into modules."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import zennit.layer
from torch import nn

import jaxcnn


class Flatten(nn.Module):
    """Flattens in our channels-last order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(1, -1).flatten(1)


class Residual(nn.Sequential):
    """A residual block whose sum is a module, as in zennit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *branch, total = self
        y = x
        for part in branch:
            y = part(y)
        return total(torch.stack([x, y], -1))


def sequential(net: jaxcnn.Serial, params: Mapping[str, Any]) -> nn.Sequential:
    """Convert the net to a sequence of modules with our names; 2-D layers with int padding only."""
    made = (Residual if type(net).__name__ == "Residual" else nn.Sequential)()
    for name, layer in net.layers:
        made.add_module(name, module(layer, params.get(name, {})))
    if isinstance(made, Residual):
        made.add_module("sum", zennit.layer.Sum())
    return made.double().eval()


def module(layer: jaxcnn.Layer, own: Mapping[str, Any]) -> nn.Module:
    match layer:
        case jaxcnn.Serial():
            return sequential(layer, own)
        case jaxcnn.HiddenLayer():
            conv = jaxcnn.Conv(layer.features, layer.kernel_size, layer.stride, layer.padding)
            pool = nn.MaxPool2d(layer.window, layer.pool_stride)
            return nn.Sequential(module(conv, own), nn.ReLU(), pool)
        case jaxcnn.Conv():
            w = np.moveaxis(np.asarray(own["weight"]), (-1, -2), (0, 1))
            padding = 0 if layer.padding == "VALID" else layer.padding
            made = nn.Conv2d(
                w.shape[1] * layer.groups, layer.features, w.shape[2:], layer.stride, padding, layer.dilation,
                layer.groups, bias="bias" in own,
            )  # fmt: skip
            return filled(made, w, own.get("bias"))
        case jaxcnn.DepthwiseConv():
            features = np.shape(own["weight"])[-1]
            groups = features // layer.multiplier
            conv = jaxcnn.Conv(features, layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups)
            return module(conv, own)
        case jaxcnn.ConvTranspose():
            w = np.moveaxis(np.asarray(own["weight"]), (-1, -2), (0, 1))
            padding = 0 if layer.padding == "VALID" else layer.padding
            made = nn.ConvTranspose2d(
                w.shape[0], layer.features, w.shape[2:], layer.stride, padding, layer.output_padding, layer.groups,
                bias="bias" in own, dilation=layer.dilation,
            )  # fmt: skip
            return filled(made, w, own.get("bias"))
        case jaxcnn.BatchNorm():
            made = filled(nn.BatchNorm2d(len(own["mean"]), layer.eps), own["scale"], own["bias"])
            made.running_mean.copy_(torch.tensor(np.asarray(own["mean"])))
            made.running_var.copy_(torch.tensor(np.asarray(own["var"])))
            return made
        case jaxcnn.GlobalAvgPool():
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        case jaxcnn.AdaptiveAvgPool():
            return nn.AdaptiveAvgPool2d(layer.output_size)
        case jaxcnn.Dense():
            w = np.asarray(own["weight"]).T
            return filled(nn.Linear(*w.shape[::-1], bias="bias" in own), w, own.get("bias"))
        case jaxcnn.MaxPool():
            return nn.MaxPool2d(layer.window, layer.stride, 0 if layer.padding == "VALID" else layer.padding)
        case jaxcnn.AvgPool():
            padding = 0 if layer.padding == "VALID" else layer.padding
            counts, divisor = layer.count_include_pad, layer.divisor
            return nn.AvgPool2d(layer.window, layer.stride, padding, count_include_pad=counts, divisor_override=divisor)
        case jaxcnn.Relu():
            return nn.ReLU()
        case jaxcnn.Tanh():
            return nn.Tanh()
        case jaxcnn.Flatten():
            return Flatten()
        case jaxcnn.Dropout():
            return nn.Dropout(layer.rate)
    raise NotImplementedError(layer)


def filled(made: nn.Module, w: np.ndarray, b: Any) -> nn.Module:
    made.double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor(w))
        if b is not None:
            made.bias.copy_(torch.tensor(np.asarray(b)))
    return made


def channels_first(x: Any) -> torch.Tensor:
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1)) if np.ndim(x) > 2 else torch.tensor(np.asarray(x))


def channels_last(x: torch.Tensor) -> np.ndarray:
    x = x.detach()
    return (x.movedim(1, -1) if x.ndim > 2 else x).numpy()
