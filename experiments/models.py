"""The nets that the experiments train, by name."""

from collections.abc import Callable, Mapping

from jaxcnn import AvgPool, Conv, Dense, Dropout, Flatten, HiddenLayer, Serial, Sigmoid, Tanh, serial


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


MODELS: Mapping[str, Callable[[int], Serial]] = {"lecture": lecture, "mlp": mlp, "lenet5": lenet5}
"""The function that builds each net from the number of classes, by name."""
