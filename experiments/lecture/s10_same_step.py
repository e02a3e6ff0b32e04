"""§10: the only difference from an ordinary network is that convolutions replace matrix products."""

import functools
import sys
from typing import Any

import jax
import numpy as np
import optax

import jaxcnn
from experiments.lecture.drawing import BLUE, GRAY, figure, parts, plain, signed
from experiments.lecture.numerical import fashion, initial_state, normal
from experiments.lecture.statement import Result, Statement, at_least, at_most, main, relative

STATEMENT = Statement(
    name="s10_same_step",
    section="10",
    title="Convolutions replace products, and nothing else changes",
    korean_title="곱하기가 합성곱으로 바뀔 뿐",
    korean="일반적인 NN과 차이점이라면 곱하기 연산을 일반 행렬곱 말고 convolution 연산으로 해준것 차이밖에 없다",
    claim="A matrix product equals a convolution whose kernel is as large as the image: output, δ and ∂E/∂w are the "
    "same. One training step function trains an ordinary network and a convolutional one.",
    formula="y = x·w is y = x ⋆ w with a 28×28 kernel",
    functions=("jaxcnn/training.py: make_train_step", "jaxcnn/ops/linear.py: dense", "jaxcnn/ops/convolution.py: conv"),
    test="tests/experiments/test_gradients.py",
)

LOSS = jaxcnn.softmax_cross_entropy_with_integer_labels


def nets() -> dict[str, jaxcnn.Serial]:
    """Return a net with matrix products, one with a convolution, and the first with its product as a convolution."""
    return {
        "products": jaxcnn.serial(jaxcnn.Flatten(), jaxcnn.Dense(16), jaxcnn.Relu(), jaxcnn.Dense(10)),
        "convolutions": jaxcnn.serial(
            jaxcnn.Conv(12, 5), jaxcnn.Relu(), jaxcnn.MaxPool(2), jaxcnn.Flatten(), jaxcnn.Dense(10)
        ),
        "the product as a convolution": jaxcnn.serial(
            jaxcnn.Conv(16, 28), jaxcnn.Relu(), jaxcnn.Flatten(), jaxcnn.Dense(10)
        ),
    }


def show(conv: Any = jaxcnn.conv, *, steps: int = 100) -> Result:
    """Compare a matrix product with the equivalent convolution, then train three nets with one step function."""
    x, w, b, delta = normal(0, (4, 28, 28, 1), (28, 28, 1, 16), (16,), (4, 16))

    def product(x: Any, w: Any, b: Any) -> Any:
        return jaxcnn.dense(x.reshape(4, -1), w.reshape(-1, 16), b)

    def convolution(x: Any, w: Any, b: Any) -> Any:
        return conv(x, w, b).reshape(4, 16)

    y, pull = jax.vjp(product, x, w, b)
    y_conv, pull_conv = jax.vjp(convolution, x, w, b)
    (delta_x, grad_w, grad_b), by_conv = pull(delta), pull_conv(delta)
    curves = {name: train(net, steps) for name, net in nets().items()}
    a, c = (curves[name][1]["dense1"]["weight"] if name == "products" else curves[name][1]["conv1"]["weight"]
            for name in ("products", "the product as a convolution"))  # fmt: skip
    checks = (
        at_most("product and convolution with a 28×28 kernel, relative difference of y", relative(y_conv, y), 1e-12),
        at_most("relative difference of δ", relative(by_conv[0], delta_x), 1e-12),
        at_most("relative difference of ∂E/∂w and ∂E/∂b", relative([by_conv[1], by_conv[2]], [grad_w, grad_b]), 1e-12),
        at_most(f"relative difference of the weights after {steps} steps in float32 from the same initial weights",
                relative(c.reshape(a.shape), a), 0.05),
        *(at_least(f"{name}: mean loss of the first 20 steps / of the last 20 steps", ratio(curve[0]), 1.5)
          for name, curve in curves.items()),
    )  # fmt: skip
    caption = (
        "Left: the loss of each net with one training step function (the curves of the product and of the product as a "
        "convolution coincide). Right: learned kernels, 5×5 of the convolutions and 28×28 of the product."
    )
    return Result(checks, draw(curves), caption)


def ratio(losses: list[float]) -> float:
    """Return the factor by which the loss has decreased."""
    width = max(1, min(20, len(losses) // 4))
    return float(np.mean(losses[:width]) / np.mean(losses[-width:]))


@functools.cache
def train(net: jaxcnn.Serial, steps: int) -> tuple[list[float], Any]:
    """Train a net with the update of §9; return the losses and the parameters."""
    data, optimizer = fashion(), optax.sgd(0.05, momentum=0.9)
    state = initial_state(net, optimizer)  # product and equivalent convolution start with equal weights
    step = jaxcnn.make_train_step(net, LOSS, optimizer)
    losses = []
    for i in range(steps):
        part = slice(64 * i % 9984, 64 * i % 9984 + 64)
        state, metrics = step(state, (data.train_images[part], data.train_labels[part]))
        losses.append(float(metrics["loss"]))
    return losses, state.params


def draw(curves: Any) -> Any:
    """Draw the losses, and the kernels of the convolutions and of the product."""
    fig = figure(10.4, 3.6)
    left, right = parts(fig, 1, 2, width_ratios=(1.2, 1))
    axes = left.subplots()
    plain(axes, "three nets, one training step function", "step", "training loss")
    styles = {
        "products": (GRAY, "-", 3.5),
        "convolutions": (BLUE, "-", 1.6),
        "the product as a convolution": ("black", ":", 1.6),
    }
    for name, (losses, _) in curves.items():
        color, line, width = styles[name]
        axes.plot(losses, line, color=color, linewidth=width, label=name)
    axes.set_ylim(0)
    axes.legend(frameon=False, fontsize=9)
    grid = right.subplots(2, 4)
    for row, (name, title) in enumerate(
        (("convolutions", "5×5 kernels"), ("the product as a convolution", "28×28 kernels"))
    ):
        w = np.asarray(curves[name][1]["conv1"]["weight"])
        strongest = np.argsort(-np.square(w).sum((0, 1, 2)))[:4]
        for axes, k in zip(grid[row], strongest, strict=True):
            signed(axes, w[:, :, 0, k], title if k == strongest[0] else "", "")
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
