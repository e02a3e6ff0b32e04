"""The nets that are timed, defined with jaxcnn's layers; `contenders` builds them in the other libraries."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax

from experiments import models
from jaxcnn import (
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    HiddenLayer,
    Layer,
    MaxPool,
    Relu,
    Serial,
    residual,
    serial,
)
from jaxcnn.layers import out_shape

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Timed:
    """A net, the shape of one example, and the batch size."""

    net: Serial
    shape: tuple[int, ...]
    batch: int
    #: Examples per microbatch in jaxcnn's training step; None means the whole batch.
    microbatch: int | None = None
    #: Shape of the labels of one example.
    labels: tuple[int, ...] = ()
    #: Number of steps in one call, by `jax.lax.scan`; None means one step without a loop.
    scan: int | None = None


def vgg() -> Serial:
    """Return 3×3 convolutions that keep the size: 64, 64, pool, 128, 128, pool (Simonyan & Zisserman 2014)."""
    layers: list[Layer] = []
    for features in (64, 128):
        layers += [Conv(features, 3, padding="SAME"), Relu(), Conv(features, 3, padding="SAME"), Relu(), MaxPool(2)]
    return serial(*layers, Flatten(), Dense(CLASSES))


def mobile() -> Serial:
    """Return depthwise-separable convolutions: 3×3 per channel, then 1×1 across channels (Howard et al. 2017)."""
    layers: list[Layer] = [Conv(32, 3, padding="SAME"), Relu()]
    inputs = 32
    for features, stride in ((64, 1), (128, 2), (128, 1), (256, 2)):
        layers += [Conv(inputs, 3, stride, padding="SAME", groups=inputs), Relu(), Conv(features, 1), Relu()]
        inputs = features
    return serial(*layers, MaxPool(2), Flatten(), Dense(CLASSES))


def resnext() -> Serial:
    """Return residual blocks whose 3×3 convolution has 8 groups (Xie et al. 2016)."""
    block = residual(Conv(64, 1), Relu(), Conv(64, 3, padding="SAME", groups=8), Relu(), Conv(64, 1))
    layers = [Conv(64, 3, padding="SAME"), Relu(), block, Relu(), MaxPool(2), block, Relu(), MaxPool(2)]
    return serial(*layers, Flatten(), Dense(CLASSES))


def resnet18() -> Serial:
    """Return ResNet-18 with batch norm, for images of 224×224 (He et al. 2015)."""
    first = (Conv(64, 7, 2, padding="SAME", bias=False), BatchNorm(), Relu(), MaxPool(3, 2, padding="SAME"))
    return serial(*first, *(layer for _, layer in models.resnet(1000).layers[3:]))


def unet() -> Serial:
    """Return a U-Net without norms for images of 128×128 (Ronneberger et al. 2015)."""
    return models.unet(CLASSES, width=32, norm=None)


NETS: Mapping[str, Callable[[], Timed]] = {
    "lecture": lambda: Timed(models.lecture(CLASSES), (28, 28, 1), 128),
    "lenet5": lambda: Timed(models.lenet5(CLASSES), (28, 28, 1), 128),
    "vgg": lambda: Timed(vgg(), (32, 32, 3), 64),
    "mobile": lambda: Timed(mobile(), (32, 32, 3), 64),
    "resnext": lambda: Timed(resnext(), (32, 32, 3), 64),
}

LARGE: Mapping[str, Callable[[], Timed]] = {
    "resnet18": lambda: Timed(resnet18(), (224, 224, 3), 32),
    "unet": lambda: Timed(unet(), (128, 128, 1), 16, labels=(128, 128)),
}
"""Nets that are only compiled, and not written in other libraries."""


def parts(net: Serial, shape: tuple[int, ...]) -> Iterator[tuple[Layer, tuple[int, ...]]]:
    """Yield each layer with its input shape; a hidden layer is split into its three ops, as in other libraries."""
    for _, layer in net.layers:
        if isinstance(layer, HiddenLayer):
            conv = Conv(layer.features, layer.kernel_size, layer.stride, layer.padding)
            yield conv, shape
            inner = layer.inner_shape(shape)
            yield from ((Relu(), inner), (MaxPool(layer.window, layer.pool_stride), inner))
        else:
            yield layer, shape
        shape = shape_after(layer, shape)


def shape_after(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the output shape of a layer."""
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), shape))
    return out_shape(layer, params, shape)
