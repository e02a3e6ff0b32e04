"""§9, erratum 3: the effect of the literal up, where every element of a max pooling window gets the window's δ."""

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
from experiments.lecture.numerical import fashion, started
from experiments.lecture.statement import Shown, Statement, at_least, at_most, main
from jaxcnn.rules import Call

STATEMENT = Statement(
    name="s09_literal_up",
    section="9",
    title="up taken literally, on max pooling",
    korean_title="up을 글자 그대로 맥스 풀링에 쓰면",
    korean="Kronecker product를 위 상황에서 사용하면 … B자리에 원소가 모두 1인 행렬을 대입한다",
    claim="up sends δ to all entries of a window, which is right for sum pooling alone. On max pooling it is another "
    "rule, at an angle to the gradient; a net trained with it may still learn.",
    formula="literally: δ<sub>l</sub> = up(w ∗ δ<sub>l+1</sub>) ∘ g′(x),  "
    "max pooling: δ<sub>l</sub> = up(w ∗ δ<sub>l+1</sub>) ∘ [x is the winner] ∘ g′(x)",
    functions=("jaxcnn/ops/pooling.py: max_pool", "jaxcnn/ops/kronecker.py: kron_up", "jaxcnn/ops/rule.py: Call"),
    test="tests/test_rules.py",
    errata=(
        (
            3,
            "up alone is the gradient of sum pooling. For average pooling it is up(·) / window size, for max pooling "
            "up(·) at the winner of each window and 0 elsewhere.",
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
    """Rule for max pooling: δ_x = up(δ), to every element of the window."""
    return (jaxcnn.kron_up(delta, call.static.size),)


def show(rule: Any = literal_up, *, steps: int = 80) -> Shown:
    """Measure the angle between literal and true gradient, compare both with differences, and train two nets."""
    data = fashion()
    images, labels = data.train_images[:16].astype(np.float64), data.train_labels[:16]
    params = jax.tree.map(lambda p: p.astype(jnp.float64), started(NET, optax.sgd(0)).params)

    def error(params: Any, rules: Any = None) -> Any:
        return LOSS(NET.apply(params, images, rules=rules), labels).mean()

    exact = jax.jit(jax.grad(error))(params)
    literal = jax.jit(jax.grad(lambda params: error(params, {jaxcnn.MaxPool: rule})))(params)
    angles = {name: angle(exact[name]["weight"], literal[name]["weight"]) for name in exact}
    slopes = slopes_along(jax.jit(error), params, exact["conv1"]["weight"])
    along = (float(jnp.vdot(g["conv1"]["weight"], exact["conv1"]["weight"])) for g in (exact, literal))
    to_exact, to_literal = (abs(slope - slopes) / abs(slopes) for slope in along)
    curves = {name: train(rules, steps) for name, rules in {"exact": None, "literal up": rule}.items()}
    checks = (
        at_most("slope of E along ∂E/∂w₁, exact rule: relative distance from differences", to_exact, 1e-6),
        at_least("the same, literal up", to_literal, 0.01),
        at_least("angle of ∂E/∂w₁ to the gradient, literal up, in degrees", angles["conv1"], 1),
        at_least("angle of ∂E/∂w₂", angles["conv2"], 1),
        at_most("angle of ∂E/∂w of the output layer, above all pooling", angles["dense1"], 1e-5),
        at_least(f"test accuracy after {steps} steps, exact", curves["exact"][-1][1], 0.5),
    )
    reached = {name: curve[-1][1] for name, curve in curves.items()}
    return Shown(
        checks,
        draw(rule, images[:1], params, curves, angles),
        "Left and middle: the same δ sent through max pooling by either rule. Right: a net trained with each; test "
        f"accuracy {reached['exact']:.3f} and {reached['literal up']:.3f}. The literal rule is off the gradient by "
        f"{angles['conv1']:.0f}° for w₁ and {angles['conv2']:.0f}° for w₂.",
    )


def angle(a: Any, b: Any) -> float:
    """Return the angle between two arrays, in degrees, from the chord, which keeps precision for small angles."""
    a, b = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
    return float(np.degrees(2 * np.arcsin(min(1.0, float(jnp.linalg.norm(a - b)) / 2))))


def slopes_along(error: Any, params: Any, direction: Any) -> float:
    """Return the slope of E by differences when the first kernels move along a direction."""
    h = 1e-5 / float(jnp.linalg.norm(direction))

    def moved(by: float) -> float:
        first = params["conv1"]
        return float(error({**params, "conv1": {**first, "weight": first["weight"] + by * direction}}))

    return (moved(h) - moved(-h)) / (2 * h)


@functools.cache
def train(rule: Any, steps: int) -> list[tuple[int, float]]:
    """Return (step, test accuracy) for every 20 steps."""
    data, optimizer = fashion(), optax.adam(2e-3)
    state = started(NET, optimizer)
    rules = None if rule is None else {jaxcnn.MaxPool: rule}
    step = jaxcnn.make_train_step(NET, LOSS, optimizer, rules=rules)
    test = [(data.test_images[:500], data.test_labels[:500])]
    found = [(0, jaxcnn.evaluate(NET, LOSS, state.params, test)["accuracy"])]
    for i, batch in enumerate(shuffled_batches(data.train_images, data.train_labels, 64, seed=0, epoch=1), start=1):
        if i > steps:
            break
        state, _ = step(state, batch)
        if i % 20 == 0 or i == steps:
            found.append((i, jaxcnn.evaluate(NET, LOSS, state.params, test)["accuracy"]))
    return found


def draw(rule: Any, picture: Any, params: Any, curves: Any, angles: dict[str, float]) -> Any:
    """Draw δ before the pooling by either rule, and the accuracies."""
    x = jaxcnn.relu(jaxcnn.conv(picture, **params["conv1"]))[..., :1]
    delta = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, 12, 1)))
    exact, literal = (
        np.asarray(jax.vjp(lambda x, r=r: jaxcnn.max_pool(x, 2, rule=r), x)[1](delta)[0])[0, :, :, 0]
        for r in (None, rule)
    )
    fig = figure(10.4, 3.7)
    panels = fig.subplots(1, 3, width_ratios=(1, 1, 1.25))
    limit = float(jnp.abs(delta).max())
    signed(panels[0], exact, "exact: to the winners", "δ below max pooling, 24×24", limit=limit)
    signed(panels[1], literal, "literal up: to all entries", "δ below max pooling, 24×24", limit=limit)
    plain(panels[2], "test accuracy", "step", "")
    for (name, curve), colour in zip(curves.items(), (BLUE, RED), strict=True):
        panels[2].plot(*zip(*curve, strict=True), "o-", color=colour, markersize=3, label=name, linewidth=1.8)
    panels[2].set_ylim(0, 1)
    panels[2].legend(frameon=False, fontsize=9, loc="lower right")
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
