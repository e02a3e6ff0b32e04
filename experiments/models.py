"""The nets that the experiments train, by name. Nets of other libraries are in `experiments.own_nets`."""

import functools
from collections.abc import Callable, Mapping

from jaxcnn import (
    AvgPool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DepthwiseConv,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    HiddenLayer,
    Layer,
    MaxPool,
    Relu,
    Relu6,
    Serial,
    Sigmoid,
    Tanh,
    branches,
    residual,
    serial,
)

Norm = Callable[[], Layer]


def lecture(classes: int) -> Serial:
    """Return the lecture's net: two hidden layers (convolution, ReLU, pooling) and dropout before the output layer.

    28×28 → 24×24×32 → 12×12×32 → 8×8×64 → 4×4×64 → classes (lecture §2, §7).
    """
    return serial(HiddenLayer(32, 5), HiddenLayer(64, 5), Flatten(), Dropout(0.5), Dense(classes))


def mlp(classes: int) -> Serial:
    """Return the ordinary network of the lecture's §3, with matrix products and sigmoids.

    Its widths are those of LeNet-300-100 (LeCun et al. 1998).
    """
    return serial(Flatten(), Dense(300), Sigmoid(), Dense(100), Sigmoid(), Dense(classes))


def lenet5(classes: int) -> Serial:
    """Return LeNet-5 with tanh and average pooling; its 28×28 input is padded to the paper's 32×32.

    28×28×6 → 14×14×6 → 10×10×16 → 5×5×16 → 120 → 84 → classes (LeCun et al. 1998).
    """
    return serial(
        Conv(6, 5, padding=2),
        Tanh(),
        AvgPool(2),
        Conv(16, 5),
        Tanh(),
        AvgPool(2),
        Flatten(),
        Dense(120),
        Tanh(),
        Dense(84),
        Tanh(),
        Dense(classes),
    )


def small(classes: int) -> Serial:
    """Return a net of five normalized convolutions, with dropout and less than 100,000 parameters, for any image size.

    28×28×24 ×2 → 14×14×48 ×2 → 7×7×96 → 96 → classes.
    """
    return serial(
        *_normalized(24),
        *_normalized(24),
        MaxPool(2, padding="SAME"),
        Dropout(0.15),
        *_normalized(48),
        *_normalized(48),
        MaxPool(2, padding="SAME"),
        Dropout(0.2),
        *_normalized(96),
        Dropout(0.3),
        GlobalAvgPool(),
        Dense(classes),
    )


def small_resnet(classes: int) -> Serial:
    """Return a net of four normalized convolutions and two residual blocks, with dropout, for any image size.

    28×28×24 ×2 → 14×14×64, block → 7×7×128, block → 128 → classes.
    """
    return serial(
        *_normalized(24),
        *_normalized(24),
        MaxPool(2, padding="SAME"),
        Dropout(0.1),
        *_normalized(64),
        _block(64, 64, 1, BatchNorm),
        MaxPool(2, padding="SAME"),
        Dropout(0.1),
        *_normalized(128),
        _block(128, 128, 1, BatchNorm),
        Dropout(0.2),
        GlobalAvgPool(),
        Dense(classes),
    )


def resnet(classes: int, *, norm: Norm = BatchNorm, width: int = 64) -> Serial:
    """Return ResNet-18 for small images: a 3×3 convolution instead of the 7×7 one and the pooling of the first stage.

    H×W×64 → H×W×64 → H/2×W/2×128 → H/4×W/4×256 → H/8×W/8×512 → 512 → classes (He et al. 2015, §4.2).

    Args:
        classes: Number of classes.
        norm: Makes each normalization, such as `BatchNorm` or `group_norm`.
        width: Number of channels of the first stage.
    """
    blocks, channels = [], width
    for stage in range(4):
        outputs = width * 2**stage
        for n in range(2):
            blocks.append(_block(channels, outputs, 2 if stage and not n else 1, norm))
            channels = outputs
    return serial(*_normalized(width, norm), *blocks, GlobalAvgPool(), Dense(classes))


def group_norm() -> GroupNorm:
    """Return the normalization of `resnet-gn`: 8 groups of channels (Wu and He 2018)."""
    return GroupNorm(8)


def vgg(classes: int) -> Serial:
    """Return a net of 3×3 convolutions and max pooling, with dropout (Simonyan and Zisserman 2014, first 3 stages).

    H×W×64 ×2 → H/2×W/2×128 ×2 → H/4×W/4×256 ×3 → 256 → classes.
    """
    layers: list[Layer] = []
    for channels, count in ((64, 2), (128, 2), (256, 3)):
        for _ in range(count):
            layers += [Conv(channels, 3, padding="SAME"), Relu()]
        layers.append(MaxPool(2, padding="SAME"))
    return serial(*layers, GlobalAvgPool(), Dropout(0.5), Dense(classes))


def mobile(classes: int) -> Serial:
    """Return a net of inverted residual blocks with depthwise convolutions (MobileNetV2, Sandler et al. 2018).

    H×W×16 → H/2×W/2×24 → H/4×W/4×40 → H/4×W/4×160 → 160 → classes.
    """
    blocks = [_inverted(16, 24, 2), _inverted(24, 24, 1), _inverted(24, 40, 2), _inverted(40, 40, 1)]
    return serial(*_mobile_stage(16, 3), *blocks, *_mobile_stage(160, 1), GlobalAvgPool(), Dense(classes))


def unet(classes: int, *, depth: int = 3, width: int = 16, norm: Norm | None = group_norm) -> Serial:
    """Return a U-Net, which predicts the class of each pixel; its convolutions keep the size (Ronneberger et al. 2015).

    H×W×16 → H/2×W/2×32 → H/4×W/4×64 → H/8×W/8×128 and back, where each level also receives the H×W×16, … of its size.

    Args:
        classes: Number of classes.
        depth: Number of poolings; the sides of images are multiples of 2^depth.
        width: Number of channels of the first level, which doubles with each pooling.
        norm: Makes each normalization; None for none.
    """

    def convolutions(channels: int) -> list[Layer]:
        if norm is None:
            return [Conv(channels, 3, padding="SAME"), Relu()] * 2
        return [*_normalized(channels, norm), *_normalized(channels, norm)]

    def level(depth: int, channels: int) -> Serial:
        if depth == 0:
            return serial(*convolutions(channels))
        below = serial(MaxPool(2), level(depth - 1, 2 * channels), ConvTranspose(channels, 2, stride=2))
        return serial(*convolutions(channels), branches(serial(), below), *convolutions(channels))

    return serial(level(depth, width), Conv(classes, 1))


def _normalized(channels: int, norm: Norm = BatchNorm, *, kernel: int = 3, stride: int = 1) -> list[Layer]:
    return [Conv(channels, kernel, stride=stride, padding="SAME", bias=False), norm(), Relu()]


def _block(inputs: int, outputs: int, stride: int, norm: Norm) -> Serial:
    """Return a residual block of two convolutions; its shortcut is a projection if the shape changes."""
    layers = [*_normalized(outputs, norm, stride=stride), *_normalized(outputs, norm)[:-1]]
    if inputs == outputs and stride == 1:
        return serial(residual(*layers), Relu())
    shortcut = _normalized(outputs, norm, kernel=1, stride=stride)[:-1]
    return serial(branches(serial(*layers), serial(*shortcut), join="add"), Relu())


def _mobile_stage(channels: int, kernel: int) -> list[Layer]:
    return [*_normalized(channels, kernel=kernel)[:-1], Relu6()]


def _inverted(inputs: int, outputs: int, stride: int) -> Serial:
    """Return an inverted residual block: 1×1 to 4 times the channels, 3×3 depthwise, 1×1 to the outputs."""
    layers = [
        *_mobile_stage(4 * inputs, 1),
        DepthwiseConv(3, stride=stride, padding="SAME", bias=False),
        BatchNorm(),
        Relu6(),
        *_normalized(outputs, kernel=1)[:-1],
    ]
    return residual(*layers) if inputs == outputs and stride == 1 else serial(*layers)


CLASSIFIERS: Mapping[str, Callable[[int], Serial]] = {
    "lecture": lecture,
    "mlp": mlp,
    "lenet5": lenet5,
    "small": small,
    "small-resnet": small_resnet,
    "resnet": resnet,
    "resnet-gn": functools.partial(resnet, norm=group_norm),
    "vgg": vgg,
    "mobile": mobile,
}
"""The function that builds each net with one output per image from the number of classes, by name."""
MODELS: Mapping[str, Callable[[int], Serial]] = {**CLASSIFIERS, "unet": unet}
"""The function that builds each net from the number of classes, by name."""
MULTIPLES: Mapping[str, int] = {"unet": 8}
"""The number that must divide both sides of the images of a net, by name."""
