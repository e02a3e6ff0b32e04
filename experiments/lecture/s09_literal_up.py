"""§9, erratum 3: the literal up, which sends δ to every element of a max pooling window."""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcnn
from experiments.data import shuffled_batches
from experiments.lecture.drawing import BLUE, RED, figure, plain, signed
from experiments.lecture.numerical import fashion, initial_state
from experiments.lecture.statement import Result, Statement, at_least, at_most, main
from jaxcnn.rules import Call

STATEMENT = Statement(
    name="s09_literal_up",
    section="9",
    title="The literal up on max pooling",
    korean_title="up을 글자 그대로 맥스 풀링에 쓰면",
    korean="Kronecker product를 위 상황에서 사용하면 … B자리에 원소가 모두 1인 행렬을 대입한다",
    claim="up sends δ to all elements of a window, which is correct only for sum pooling. For max pooling it is "
    "another rule, at an angle to the gradient; a net trained with it can still learn.",
    formula="literal: δ<sub>l</sub> = up(w ∗ δ<sub>l+1</sub>) ∘ g′(x),  "
    "max pooling: δ<sub>l</sub> = up(w ∗ δ<sub>l+1</sub>) ∘ [x is the winner] ∘ g′(x)",
    functions=("jaxcnn/ops/pooling.py: max_pool", "jaxcnn/ops/kronecker.py: kron_up", "jaxcnn/ops/rule.py: Call"),
    test="tests/test_rules.py",
    errata=(
        (
            3,
            "Without further factors, up is the rule of sum pooling. For average pooling the rule is up(·) / window "
            "size, for max pooling up(·) at the winner of each window and 0 elsewhere.",
        ),
    ),
)

NET = jaxcnn.serial(
    jaxcnn.Conv(8, 5), jaxcnn.Relu(), jaxcnn.MaxPool(2),
    jaxcnn.Conv(16, 5), jaxcnn.Relu(), jaxcnn.MaxPool(2),
    jaxcnn.Flatten(), jaxcnn.Dense(10),
)  # fmt: skip
LOSS = jaxcnn.softmax_cross_entropy_with_integer_labels


def literal_up(call: Call, delta: Any) -> tuple[Any]:
    """Rule for max pooling: δ_x = up(δ), at every element of the window."""
    return (jaxcnn.kron_up(delta, call.static.size),)


def show(rule: Any = literal_up, *, steps: int = 80) -> Result:
    """Measure the angle of the literal to the true gradient, compare both with differences, and train two nets."""
    data = fashion()
    images, labels = data.train_images[:16].astype(np.float64), data.train_labels[:16]
    params = jax.tree.map(lambda p: p.astype(jnp.float64), initial_state(NET, optax.sgd(0)).params)

    def loss(params: Any, rules: Any = None) -> Any:
        return LOSS(NET.apply(params, images, rules=rules), labels).mean()

    exact = jax.jit(jax.grad(loss))(params)
    literal = jax.jit(jax.grad(lambda params: loss(params, {jaxcnn.MaxPool: rule})))(params)
    angles = {name: angle(exact[name]["weight"], literal[name]["weight"]) for name in exact}
    slopes = slopes_along(jax.jit(loss), params, exact["conv1"]["weight"])
    along = (float(jnp.vdot(g["conv1"]["weight"], exact["conv1"]["weight"])) for g in (exact, literal))
    to_exact, to_literal = (abs(slope - slopes) / abs(slopes) for slope in along)
    curves = {name: train(rules, steps) for name, rules in {"exact": None, "literal up": rule}.items()}
    checks = (
        at_most("slope of E along ∂E/∂w₁ by the exact rule and by differences, relative difference", to_exact, 1e-6),
        at_least("slope by the literal up and by differences, relative difference", to_literal, 0.01),
        at_least("literal up, angle of ∂E/∂w₁ to the gradient in degrees", angles["conv1"], 1),
        at_least("literal up, angle of ∂E/∂w₂", angles["conv2"], 1),
        at_most("literal up, angle of ∂E/∂w of the output layer, which is after all pooling", angles["dense1"], 1e-5),
        at_least(f"test accuracy after {steps} steps by the exact rule", curves["exact"][-1][1], 0.5),
    )
    final = {name: curve[-1][1] for name, curve in curves.items()}
    return Result(
        checks,
        draw(rule, images[:1], params, curves, angles),
        "Left and middle: δ of the input of max pooling by either rule, for the same δ of the output. Right: a net "
        f"trained with each rule, with final test accuracies {final['exact']:.3f} and {final['literal up']:.3f}. The "
        f"literal rule's ∂E/∂w₁ is at {angles['conv1']:.0f}° to the gradient, its ∂E/∂w₂ at {angles['conv2']:.0f}°.",
    )


def angle(a: Any, b: Any) -> float:
    """Return the angle between two arrays in degrees, from the chord, which is precise for small angles."""
    a, b = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
    return float(np.degrees(2 * np.arcsin(min(1.0, float(jnp.linalg.norm(a - b)) / 2))))


def slopes_along(loss: Any, params: Any, direction: Any) -> float:
    """Return the slope of E by differences when the first kernels move along a direction."""
    h = 1e-5 / float(jnp.linalg.norm(direction))

    def at(by: float) -> float:
        first = params["conv1"]
        return float(loss({**params, "conv1": {**first, "weight": first["weight"] + by * direction}}))

    return (at(h) - at(-h)) / (2 * h)


@functools.cache
def train(rule: Any, steps: int) -> list[tuple[int, float]]:
    """Return (step, test accuracy) for every 20 steps."""
    data, optimizer = fashion(), optax.adam(2e-3)
    state = initial_state(NET, optimizer)
    rules = None if rule is None else {jaxcnn.MaxPool: rule}
    step = jaxcnn.make_train_step(NET, LOSS, optimizer, rules=rules)
    test = [(data.test_images[:500], data.test_labels[:500])]
    curve = [(0, jaxcnn.evaluate(NET, LOSS, state.params, test)["accuracy"])]
    for i, batch in enumerate(shuffled_batches(data.train_images, data.train_labels, 64, seed=0, epoch=1), start=1):
        if i > steps:
            break
        state, _ = step(state, batch)
        if i % 20 == 0 or i == steps:
            curve.append((i, jaxcnn.evaluate(NET, LOSS, state.params, test)["accuracy"]))
    return curve


def draw(rule: Any, image: Any, params: Any, curves: Any, angles: dict[str, float]) -> Any:
    """Draw δ of the input of the pooling by either rule, and the accuracies."""
    layer = params["conv1"]
    x = jaxcnn.relu(jaxcnn.conv(image, layer["weight"], layer["bias"]))[..., :1]
    delta = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, 12, 1)))
    exact, literal = (
        np.asarray(jax.vjp(lambda x, r=r: jaxcnn.max_pool(x, 2, rule=r), x)[1](delta)[0])[0, :, :, 0]
        for r in (None, rule)
    )
    fig = figure(10.4, 3.7)
    panels = fig.subplots(1, 3, width_ratios=(1, 1, 1.25))
    limit = float(jnp.abs(delta).max())
    signed(panels[0], exact, "exact: at the winners", "δ of the input of max pooling, 24×24", limit=limit)
    signed(panels[1], literal, "literal up: at all elements", "δ of the input of max pooling, 24×24", limit=limit)
    plain(panels[2], "test accuracy", "step", "")
    for (name, curve), color in zip(curves.items(), (BLUE, RED), strict=True):
        panels[2].plot(*zip(*curve, strict=True), "o-", color=color, markersize=3, label=name, linewidth=1.8)
    panels[2].set_ylim(0, 1)
    panels[2].legend(frameon=False, fontsize=9, loc="lower right")
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
