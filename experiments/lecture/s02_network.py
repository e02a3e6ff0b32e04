"""§2: the network of hidden layers, and dropout before the output layer in training."""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcnn
from experiments.data import shuffled_batches
from experiments.dataset import batches
from experiments.lecture.drawing import BLUE, GRAY, figure, gray, parts, plain
from experiments.lecture.numerical import boot, fashion, initial_state, normal
from experiments.lecture.statement import Result, Statement, at_least, at_most, equal, main, relative

STATEMENT = Statement(
    name="s02_network",
    section="2",
    title="The network: hidden layers, and dropout at the output layer",
    korean_title="CNN의 구조: 은닉층의 반복과 드롭아웃",
    korean="a + pooling = 하나의 hidden layer … hidden layer 반복 … drop out : in output layer. 트레이닝 시 feature를 "
    "감소시켜 정확도, 성능을 향상시킴",
    claim="Convolution, ReLU and pooling are one hidden layer, and hidden layers repeat. Dropout before the output "
    "layer is active only in training, and lowers the test loss of a net that is trained on few images.",
    formula="X →(w<sub>1</sub>)→ (a: ReLU) → pooling →(w<sub>2</sub>)→ Y",
    functions=(
        "jaxcnn/ops/hidden.py: hidden_layer",
        "jaxcnn/ops/dropout.py: dropout",
        "jaxcnn/net.py: serial",
    ),
    test="tests/test_rules.py",
)

FEATURES = (6, 12)


def net(rate: float) -> jaxcnn.Serial:
    """Return a small version of the lecture's net: two hidden layers, dropout, output layer."""
    hidden = (jaxcnn.HiddenLayer(features, 5) for features in FEATURES)
    return jaxcnn.serial(*hidden, jaxcnn.Flatten(), jaxcnn.Dropout(rate), jaxcnn.Dense(10))


def show(hidden_layer: Any = jaxcnn.hidden_layer, *, epochs: int = 30, examples: int = 300) -> Result:
    """Compare the hidden layer with its three parts, show dropout on and off, and train with and without it."""
    losses, params = {}, {}
    for rate in (0.0, 0.5):
        losses[rate], params[rate] = train(rate, epochs, examples)
    trained = net(0.5)
    maps = layers(params[0.5], boot())
    batch = fashion().test_images[:4]

    evaluate = jax.jit(lambda: trained.apply(params[0.5], batch))
    evaluated = evaluate()
    keys = jax.random.split(jax.random.key(1, impl="rbg"), 200)  # rbg, because it compiles fast
    in_training = jax.lax.map(lambda key: trained.apply(params[0.5], batch, key=key), keys)

    checks = (
        equal("sizes from X to the second pooling", np.array([m.shape[0] for m in maps]), np.array([28, 24, 12, 8, 4])),
        at_most(
            "hidden layer and its three ops, relative difference of y, δ, ∂E/∂w, ∂E/∂b",
            one_against_three(hidden_layer),
            1e-10,
        ),
        equal("two evaluations, maximum difference", abs(evaluated - evaluate()).max(), 0),
        at_least("two forward passes in training, relative difference", relative(*in_training[:2]), 0.01),
        at_most(
            "mean of 200 forward passes in training and evaluation, relative difference",
            relative(in_training.mean(0), evaluated),
            0.05,
        ),
        at_least(
            "test loss without dropout minus test loss with dropout", losses[0.0][1][-1] - losses[0.5][1][-1], 0.05
        ),
    )
    return Result(checks, draw(maps, losses), caption(losses, examples))


def one_against_three(hidden_layer: Any) -> float:
    """Return the relative difference between the hidden layer and its three ops, forward and backward."""
    x, w, b, delta = normal(0, (2, 28, 28, 1), (5, 5, 1, 3), (3,), (2, 12, 12, 3))

    def three_ops(x: Any, w: Any, b: Any) -> Any:
        return jaxcnn.max_pool(jaxcnn.relu(jaxcnn.conv(x, w, b)), 2)

    def both_passes(f: Any) -> list[Any]:
        y, pull = jax.vjp(f, x, w, b)
        return [y, *pull(delta)]

    return relative(*jax.jit(lambda: (both_passes(hidden_layer), both_passes(three_ops)))())


@functools.cache
def train(rate: float, epochs: int, examples: int) -> tuple[tuple[list[float], list[float]], Any]:
    """Train on few examples; return the (training, test) losses after every third epoch, and the parameters."""
    data, loss = fashion(), jaxcnn.softmax_cross_entropy_with_integer_labels
    x, labels = data.train_images[:examples], data.train_labels[:examples]
    optimizer = optax.adam(6e-3)
    state = initial_state(net(rate), optimizer)
    step = jaxcnn.make_train_step(net(rate), loss, optimizer)
    test = data.test_images[: 2 * examples], data.test_labels[: 2 * examples]
    curves: tuple[list[float], list[float]] = ([], [])
    for epoch in range(1, epochs + 1):
        for batch in shuffled_batches(x, labels, 50, seed=0, epoch=epoch):
            state, _ = step(state, batch)
        if epoch % 3 == 0:
            for losses, split in zip(curves, ((x, labels), test), strict=True):
                # The dropout rate has no effect in evaluation, and one net for both rates compiles once.
                losses.append(jaxcnn.evaluate(net(0), loss, state.params, batches(*split, examples))["loss"])
    return curves, state.params


def layers(params: Any, image: np.ndarray) -> list[np.ndarray]:
    """Return the input and the outputs of each convolution with ReLU and each pooling, (H, W, C)."""

    @jax.jit
    def maps(x: Any) -> list[Any]:
        outputs = [x]
        for i in range(1, len(FEATURES) + 1):
            layer = params[f"hidden_layer{i}"]
            outputs.append(jaxcnn.relu(jaxcnn.conv(outputs[-1], layer["weight"], layer["bias"])))
            outputs.append(jaxcnn.max_pool(outputs[-1], 2))
        return outputs

    return [np.asarray(m[0]) for m in maps(jnp.asarray(image[None, :, :, None], jnp.float32))]


def caption(losses: Any, examples: int) -> str:
    """Return the caption of the figure."""
    with_it, without = losses[0.5][1][-1], losses[0.0][1][-1]
    return (
        "Top: the output of each part of the net for one image, two feature maps each. Bottom: trained on only "
        f"{examples} images, the net ends at a test loss of {without:.2f} without dropout and {with_it:.2f} with it."
    )


def draw(maps: list[np.ndarray], losses: Any) -> Any:
    """Draw the maps from X to the second pooling, above the losses."""
    fig = figure(9.5, 6.9)
    top, bottom = parts(fig, 2, 1, height_ratios=(1.25, 1))
    names = ("X", "convolution, ReLU", "pooling", "convolution, ReLU", "pooling")
    grid = top.subplots(2, len(maps))
    for column, (m, name) in enumerate(zip(maps, names, strict=True)):
        strongest = np.argsort(-m.mean((0, 1)), kind="stable")[:2]
        for row, axes in enumerate(grid[:, column]):
            if row < len(strongest):
                below = "×".join(map(str, m.shape)) if row == len(strongest) - 1 else ""
                gray(axes, m[:, :, strongest[row]], name if row == 0 else "", below)
            else:
                axes.axis("off")
    panels = bottom.subplots(1, 2, sharey=True)
    for axes, i, name in ((panels[0], 0, "training images"), (panels[1], 1, "test images")):
        plain(axes, name, "epoch", "loss" if i == 0 else "")
        for rate, color, label in ((0.0, GRAY, "without dropout"), (0.5, BLUE, "with dropout")):
            epochs = 3 * np.arange(1, len(losses[rate][i]) + 1)
            axes.plot(epochs, losses[rate][i], color=color, label=label, linewidth=2)
    panels[0].set_ylim(0)  # after drawing both panels, which share this axis
    panels[0].legend(frameon=False, fontsize=9)
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
