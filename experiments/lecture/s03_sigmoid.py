"""§3: the ordinary network, δ_l = w δ_{l+1} g'(x) with g' = g(1 − g), and a convolutional one."""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcnn
from experiments.data import shuffled_batches
from experiments.lecture.drawing import BLUE, DARK, GRAY, RED, figure, plain
from experiments.lecture.numerical import fashion, initial_state, normal
from experiments.lecture.statement import Result, Statement, at_least, at_most, main, relative

STATEMENT = Statement(
    name="s03_sigmoid",
    section="3",
    title="The ordinary network with sigmoids",
    korean_title="일반적인 신경망과 시그모이드, 복습",
    korean="미분한 상태의 sigmoid function g′(x) = g(x)(1−g(x)) 가 각각의 항(weight)에 곱해지는것 기억해라",
    claim="In an ordinary network, the backward pass multiplies δ by w and by g′ = g(1 − g), and ∂E/∂w is δ times the "
    "input. Such a net learns, and so does a convolutional net with the same training step.",
    formula="δ<sub>l</sub> = w δ<sub>l+1</sub> g′(x),  g′(x) = g(x)(1 − g(x))",
    functions=(
        "jaxcnn/ops/linear.py: dense",
        "jaxcnn/ops/activation.py: sigmoid",
        "jaxcnn/training.py: make_train_step",
    ),
    test="tests/test_rules.py",
)

NETS = {
    "sigmoid MLP": lambda: jaxcnn.serial(jaxcnn.Flatten(), jaxcnn.Dense(100), jaxcnn.Sigmoid(), jaxcnn.Dense(10)),
    "CNN": lambda: jaxcnn.serial(
        jaxcnn.HiddenLayer(8, 5), jaxcnn.HiddenLayer(16, 5), jaxcnn.Flatten(), jaxcnn.Dense(10)
    ),
}


def show(sigmoid: Any = jaxcnn.sigmoid, *, steps: int = 150) -> Result:
    """Compute the slope of the sigmoid and the δ of a small net by hand, and train two nets."""
    x = jnp.linspace(-6, 6, 241)
    g = sigmoid(x)
    slope = jax.vjp(sigmoid, x)[1](jnp.ones_like(x))[0]
    h = 1e-5
    differences = (sigmoid(x + h) - sigmoid(x - h)) / (2 * h)
    curves = {name: train(make(), steps) for name, make in NETS.items()}
    checks = (
        at_most("g′ by the rule and g(1 − g), relative difference", relative(slope, g * (1 - g)), 1e-12),
        at_most("g′ by the rule and by differences, relative difference", relative(slope, differences), 1e-8),
        at_most(
            "∂E/∂w₁ and ∂E/∂w₂ by the rules and by the formula in NumPy, relative difference", by_hand(sigmoid), 1e-12
        ),
        *(at_least(f"test accuracy of the {name} (chance: 0.1)", curve[1], 0.5) for name, curve in curves.items()),
    )
    caption = (
        "Left: the sigmoid and its slope. Right: both nets with one training step function, "
        f"{steps} steps of 64 images."
    )
    return Result(checks, draw(x, g, slope, curves), caption)


def by_hand(sigmoid: Any) -> float:
    """Return the relative difference of ∂E/∂w between δ_l = w δ_{l+1} g'(x) in NumPy and jaxcnn's rules."""
    x, w1, w2, target = normal(0, (4, 6), (6, 5), (5, 3), (4, 3))

    def loss(w1: Any, w2: Any) -> Any:
        return jaxcnn.squared_error(jaxcnn.dense(sigmoid(jaxcnn.dense(x, w1)), w2), target).sum()

    a = 1 / (1 + np.exp(-np.asarray(x @ w1)))
    delta_2 = 2 * (a @ w2 - target)  # of the output layer
    delta_1 = (delta_2 @ w2.T) * a * (1 - a)  # w δ g'
    return relative(list(jax.jit(jax.grad(loss, (0, 1)))(w1, w2)), [x.T @ delta_1, a.T @ delta_2])


@functools.cache
def train(net: jaxcnn.Serial, steps: int) -> tuple[list[float], float]:
    """Return the loss of each step, and the final test accuracy."""
    data, loss = fashion(), jaxcnn.softmax_cross_entropy_with_integer_labels
    optimizer = optax.adam(3e-3)
    state = initial_state(net, optimizer)
    step = jaxcnn.make_train_step(net, loss, optimizer)
    losses: list[float] = []
    while len(losses) < steps:
        for batch in shuffled_batches(data.train_images, data.train_labels, 64, seed=0, epoch=len(losses)):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            if len(losses) == steps:
                break
    tested = jaxcnn.evaluate(net, loss, state.params, [(data.test_images, data.test_labels)])
    return losses, tested["accuracy"]


def draw(x: Any, g: Any, slope: Any, curves: dict[str, tuple[list[float], float]]) -> Any:
    """Draw the sigmoid with its slope, and the losses."""
    fig = figure(9.2, 3.7)
    left, right = fig.subplots(1, 2)
    plain(left, "the sigmoid", "x", "")
    left.plot(x, g, color=DARK, label="g(x)", linewidth=2)
    left.plot(x, slope, color=RED, label="g′(x) = g(x)(1 − g(x)), by the rule", linewidth=2)
    left.legend(frameon=False, fontsize=9, loc="upper left")
    plain(right, "two nets, one training step function", "step", "training loss")
    for (name, (losses, accuracy)), color in zip(curves.items(), (GRAY, BLUE), strict=True):
        right.plot(losses, color=color, alpha=0.25, linewidth=0.8)
        smooth = running_mean(np.asarray(losses))
        right.plot(np.arange(len(smooth)) + len(losses) - len(smooth), smooth, color=color, linewidth=2,
                   label=f"{name}, test accuracy {accuracy:.3f}")  # fmt: skip
    right.set_ylim(0, 2.4)
    right.legend(frameon=False, fontsize=9)
    return fig


def running_mean(losses: np.ndarray) -> np.ndarray:
    """Return the mean over 10 steps, computed by a convolution."""
    from jaxcnn.ops.signal import convolve

    width = min(10, len(losses))
    return np.asarray(convolve(losses, np.full(width, 1 / width), "valid"))


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
