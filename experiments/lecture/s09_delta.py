"""§9: δ and ∂E/∂w through a hidden layer, step by step for one image."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcnn
from experiments.lecture.drawing import figure, gray, signed
from experiments.lecture.numerical import as_batch, boot, normal, slopes_by_differences
from experiments.lecture.statement import Result, Statement, at_most, equal, main, raises, relative
from jaxcnn.ops.signal import convolve, correlate

STATEMENT = Statement(
    name="s09_delta",
    section="9",
    title="δ and ∂E/∂w through a hidden layer",
    korean_title="은닉층의 δ와 기울기 ∂E/∂w",
    korean="해당 weight에 대한 E의 미분(기울기)는 δ 곱하기 그 전 레이어로부터의 입력이다 … 곱할때도 convolution이다",
    claim="δ of a hidden layer is the δ that the next layer returns, enlarged by up and multiplied by the slope of the "
    "ReLU. ∂E/∂w is the correlation of the layer's input with δ. Autodiff and differences give the same results.",
    formula="δ<sub>l</sub> = up(w ∗ δ<sub>l+1</sub>) ∘ g′(x),  ∂E/∂w = a ⋆ δ<sub>l</sub>",
    functions=(
        "jaxcnn/ops/hidden.py: hidden_layer",
        "jaxcnn/ops/convolution.py: conv",
        "jaxcnn/ops/signal.py: correlate",
    ),
    test="tests/test_rules.py",
    errata=(
        (
            2,
            "The lecture writes δ<sub>l</sub> = w ∗ δ<sub>l+1</sub> ∘ up(g′(x)), with up on the wrong operand: g′(x) "
            "already has the size before pooling, and up would enlarge it to 48×48. The operand to enlarge is "
            "w ∗ δ<sub>l+1</sub>. The sizes do not match with g′ after pooling either.",
        ),
        (
            3,
            "For max pooling, up sends δ only to the winner of each window; the next section shows the difference.",
        ),
        (5, "∂E/∂w = δ ∗ a is a valid cross-correlation of a with δ, without a flip, summed over the batch."),
        (6, "“Cost is δ times the input”: that product is the gradient ∂E/∂w, not the cost E."),
    ),
)


BIAS = 0.1
"""A bias, because the black background of the image would be at the corner of the ReLU."""


def show(hidden_layer: Any = jaxcnn.hidden_layer) -> Result:
    """Compute both passes by hand with the public functions, then compare op, autodiff and differences."""
    a = jnp.asarray(boot())
    w_1, w_2 = normal(8, (5, 5), (5, 5))
    target = normal(9, (8, 8))[0]

    # Forward pass, one kernel per layer: (28, 28) → (24, 24) → (12, 12) → (8, 8)
    x = correlate(a, w_1, "valid") + BIAS  # a ⋆ w₁ + b
    g = jaxcnn.relu(x)
    pooled = jaxcnn.max_pool(as_batch(g), 2)[0, :, :, 0]
    y = correlate(pooled, w_2, "valid")
    loss = jaxcnn.squared_error(y, target).sum()

    # Backward pass
    delta_y = 2 * (y - target)
    returned = convolve(delta_y, w_2)  # w₂ ∗ δ_y
    up = enlarged(returned) * winners(g)
    delta_l = up * (x > 0)
    grad_w = correlate(a, delta_l, "valid")  # ∂E/∂w₁ = a ⋆ δ_l

    def e(w: Any, batch: Any = a[None], hidden_layer: Any = hidden_layer) -> Any:
        h = hidden_layer(batch[..., None], w[:, :, None, None], jnp.array([BIAS]))
        return jaxcnn.squared_error(jaxcnn.conv(h, w_2[:, :, None, None])[..., 0], target + 0 * batch[:, :8, :8]).sum()

    def without_rule(x: Any, w: Any, b: Any) -> Any:
        return jaxcnn.hidden_layer(x, w, b, rule=jaxcnn.rules.autodiff)

    slope = jax.jit(jax.grad(e))
    by_rule = slope(w_1, a[None])
    by_autodiff = jax.jit(jax.grad(lambda w: e(w, hidden_layer=without_rule)))(w_1)
    (by_differences,) = slopes_by_differences(e, (w_1,), jnp.ones(()))
    two = jnp.stack([a, a[:, ::-1]])
    checks = (
        equal("sizes of x, w₂ ∗ δ_y, δ_l, ∂E/∂w", (x.shape, returned.shape, delta_l.shape, grad_w.shape),
              ((24, 24), (12, 12), (24, 24), (5, 5))),
        at_most("∂E/∂w step by step and by autodiff, relative difference", relative(grad_w, by_autodiff), 1e-10),
        at_most("∂E/∂w step by step and by differences, relative difference", relative(grad_w, by_differences), 1e-7),
        at_most("∂E/∂w by hidden_layer's rule and step by step, relative difference", relative(by_rule, grad_w), 1e-10),
        at_most("erratum 5: ∂E/∂w of two images and the sum over the images, relative difference",
                relative(slope(w_1, two), sum(slope(w_1, one[None]) for one in two)), 1e-10),
        raises("erratum 2, literally: (w₂ ∗ δ_y) ∘ up(g′(x))", lambda: returned * enlarged(g > 0)),
        raises("erratum 2, with g′ after pooling: (w₂ ∗ δ_y) ∘ up(g′)", lambda: returned * enlarged(pooled > 0)),
        at_most("erratum 6: decrease of E in a step and η‖∂E/∂w‖², relative difference",
                abs(decrease(jax.jit(e), w_1, by_rule) - 1), 0.01),
    )  # fmt: skip
    steps = [a, w_1, x, g, pooled, y, delta_y, returned, up, delta_l, grad_w, by_differences]
    return Result(
        checks,
        draw([np.asarray(step) for step in steps]),
        f"1–6: the forward pass; 7–11: the backward pass; E = {float(loss):.4g}. The last two images are ∂E/∂w, by the "
        f"formula and by {2 * w_1.size} evaluations of E.",
    )


def enlarged(x: Any) -> Any:
    """Return up of one feature map."""
    return jaxcnn.kron_up(as_batch(x).astype(float), 2)[0, :, :, 0]


def winners(g: Any) -> Any:
    """Return 1 at the first largest element of each 2×2 window, 0 elsewhere."""
    tiles = np.asarray(g).reshape(12, 2, 12, 2).transpose(0, 2, 1, 3).reshape(144, 4)
    return np.eye(4)[tiles.argmax(1)].reshape(12, 12, 2, 2).transpose(0, 2, 1, 3).reshape(24, 24)


def decrease(e: Any, w: Any, grad_w: Any) -> float:
    """Return the decrease of E after a small gradient step, relative to the predicted decrease."""
    rate = 1e-7
    optimizer = optax.sgd(rate)
    updates, _ = optimizer.update(grad_w, optimizer.init(w), w)
    return float((e(w) - e(optax.apply_updates(w, updates))) / (rate * jnp.sum(grad_w**2)))


def draw(steps: list[np.ndarray]) -> Any:
    """Draw the steps of `show` in order."""
    returned, by_differences = steps[7], steps[11]
    limits = dict.fromkeys((7, 8, 9), float(np.abs(returned).max())) | dict.fromkeys(
        (10, 11), np.abs(by_differences).max()
    )
    titles = (
        r"$a$, the input", r"$w_1$, the kernel", r"$x = a \star w_1 + b$", r"$g(x)$, the ReLU",
        "max pooling", r"$y =$ pooled $g(x) \star\, w_2$", r"$\delta_y = \partial E/\partial y$", r"$w_2 * \delta_y$",
        r"$up(w_2 * \delta_y)$ at the winners", r"$\delta_l = up(w_2 * \delta_y) \circ g'(x)$",
        r"$\partial E/\partial w_1 = a \star \delta_l$", r"$\partial E/\partial w_1$ by differences",
    )  # fmt: skip
    fig = figure(10, 8)
    for i, (axes, step, title) in enumerate(zip(fig.subplots(3, 4).flat, steps, titles, strict=True)):
        if i in (0, 3, 4):
            gray(axes, step, f"{i + 1}  {title}")
        else:
            signed(axes, step, f"{i + 1}  {title}", limit=limits.get(i))
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
