"""Our nets as `torch.nn` modules in float64, for the libraries that hook into modules: zennit and captum."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

import jaxcnn


class Flatten(nn.Module):
    """In our order: channels last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(1, -1).flatten(1)


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def sequential(net: jaxcnn.Serial, params: Mapping[str, Any]) -> nn.Sequential:
    """The net as a row of modules, by our names; 2-D, int padding."""
    made = (Residual if type(net).__name__ == "Residual" else nn.Sequential)()
    for name, layer in net.layers:
        made.add_module(name, module(layer, params.get(name, {})))
    return made.double().eval()


def module(layer: jaxcnn.Layer, own: Mapping[str, Any]) -> nn.Module:
    match layer:
        case jaxcnn.Serial():
            return sequential(layer, own)
        case jaxcnn.HiddenLayer():
            conv = jaxcnn.Conv(layer.features, layer.patch, layer.stride, layer.padding)
            pool = nn.MaxPool2d(layer.window, layer.pool_stride)
            return nn.Sequential(module(conv, own), nn.ReLU(), pool)
        case jaxcnn.Conv():
            w = np.moveaxis(np.asarray(own["w"]), (-1, -2), (0, 1))
            padding = 0 if layer.padding == "VALID" else layer.padding
            made = nn.Conv2d(
                w.shape[1] * layer.groups, layer.features, w.shape[2:], layer.stride, padding, layer.dilation,
                layer.groups, bias="b" in own,
            )  # fmt: skip
            return filled(made, w, own.get("b"))
        case jaxcnn.Dense():
            w = np.asarray(own["w"]).T
            return filled(nn.Linear(*w.shape[::-1], bias="b" in own), w, own.get("b"))
        case jaxcnn.MaxPool():
            return nn.MaxPool2d(layer.window, layer.stride, 0 if layer.padding == "VALID" else layer.padding)
        case jaxcnn.AvgPool():
            padding = 0 if layer.padding == "VALID" else layer.padding
            return nn.AvgPool2d(layer.window, layer.stride, padding, count_include_pad=layer.count_include_pad)
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
