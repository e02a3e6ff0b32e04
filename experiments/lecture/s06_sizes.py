"""§6–7: pooling reduces 24×24 to 12×12, which does not match g'(x); ⊗ restores the size."""

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxcnn
from experiments.lecture.drawing import figure, gray, sign, signed
from experiments.lecture.numerical import as_batch, boot, normal
from experiments.lecture.statement import Result, Statement, equal, main, raises
from jaxcnn.ops.signal import convolve

STATEMENT = Statement(
    name="s06_sizes",
    section="6–7",
    title="Pooling changes the size: 24×24 becomes 12×12",
    korean_title="풀링에 의한 크기의 변화: 24×24에서 12×12로",
    korean="δ가 24*24 였다면 2*2로 pooling하면 12*12크기행렬로 줄어들게 된다 … 크기가 달라서 문제가 생긴다",
    claim="The next layer returns δ in the size after pooling, 12×12, but g′(x) has the size before pooling, 24×24: "
    "their elementwise product does not exist. The Kronecker product with ones enlarges δ to 24×24.",
    formula="24×24 →(2×2 pooling)→ 12×12 →(⊗ 1<sub>2×2</sub>)→ 24×24",
    functions=("jaxcnn/ops/pooling.py: max_pool", "jaxcnn/ops/kronecker.py: kron_up"),
    test="tests/test_rules.py",
)


def show(kron_up: Any = jaxcnn.kron_up) -> Result:
    """Check the lecture's sizes in the forward and backward pass, with a 28×28 image and 5×5 kernels."""
    w_1, w_2, delta_y = normal(5, (5, 5, 1, 1), (5, 5), (8, 8))
    image = boot()
    x = jaxcnn.conv(as_batch(image), w_1)
    pooled = jaxcnn.max_pool(jaxcnn.relu(x), 2)
    slope = (x > 0).astype(x.dtype)
    y = jaxcnn.conv(pooled, as_batch(w_2)[0, :, :, :, None])
    delta = as_batch(convolve(delta_y, w_2))
    enlarged = kron_up(delta, 2)
    checks = (
        equal("the image, X", image.shape, (28, 28)),
        equal("after the first convolution", x.shape[1:3], (24, 24)),
        equal("after pooling", pooled.shape[1:3], (12, 12)),
        equal("after the second convolution, y", y.shape[1:3], (8, 8)),
        equal("w₂ ∗ δ_y, in the backward pass", delta.shape[1:3], (12, 12)),
        equal("g′(x)", slope.shape[1:3], (24, 24)),
        raises("their product, (w₂ ∗ δ_y) ∘ g′(x)", lambda: delta[0, :, :, 0] * slope[0, :, :, 0]),
        equal("up(w₂ ∗ δ_y)", enlarged.shape[1:3], (24, 24)),
        equal("up(w₂ ∗ δ_y) ∘ g′(x)", (enlarged * slope).shape[1:3], (24, 24)),
        equal("2×2 blocks with more than one number", blocks_that_differ(enlarged), 0),
    )
    caption = (
        "All images are to one scale. Top: the forward pass. Bottom, from right to left: the backward pass, where up "
        "enlarges 12×12 to 24×24 by repeating each element in a 2×2 block, as in this section. With max pooling, only "
        "the winner of each block keeps its δ (erratum 3, §9)."
    )
    return Result(checks, draw([image, x, slope, pooled, y, delta, enlarged]), caption)


def blocks_that_differ(x: Any) -> int:
    """Return the number of 2×2 blocks that contain more than one number."""
    blocks = x[0, :, :, 0].reshape(12, 2, 12, 2)
    return int(jnp.sum(jnp.any(blocks != blocks[:, :1, :, :1], axis=(1, 3))))


def draw(steps: list[Any]) -> Any:
    """Draw the forward and the backward pass, all images to one scale."""
    image, *rest = map(np.asarray, steps)
    x, slope, pooled, y, delta, enlarged = (p[0, :, :, 0] for p in rest)
    fig = figure(10, 5.4)
    limit = float(np.abs(delta).max())
    rows: Any = (
        (
            (gray, image, "$X$", {}),
            "→",
            (signed, x, r"$x = X \star w_1$", {}),
            "→",
            (gray, pooled, "pooled $g(x)$", {}),
            "→",
            (signed, y, r"$y =$ pooled $g(x) \star\, w_2$", {}),
        ),
        (
            (signed, enlarged * slope, r"$up(w_2 * \delta_y) \circ g'(x)$", {"limit": limit}),
            "=",
            (gray, slope, "$g'(x)$", {}),
            "∘",
            (signed, enlarged, r"$up(w_2 * \delta_y)$", {"limit": limit}),
            "←",
            (signed, delta, r"$w_2 * \delta_y$", {"limit": limit}),
        ),
    )
    grid = fig.subplots(2, 7, width_ratios=(1, 0.16, 1, 0.16, 1, 0.16, 1))
    for axes, part in zip(grid.flat, (part for row in rows for part in row), strict=True):
        if isinstance(part, str):
            sign(axes, part)
            continue
        show, values, title, options = part
        show(axes, values, title, **options)
        to_scale(axes, len(values))
    return fig


def to_scale(axes: Any, size: int) -> None:
    """Shrink an image around its center, in proportion to 28×28, and frame it."""
    from matplotlib.patches import Rectangle

    center, radius = (size - 1) / 2, 14.2
    axes.set(xlim=(center - radius, center + radius), ylim=(center + radius, center - radius))
    axes.spines[:].set_visible(False)
    axes.add_patch(Rectangle((-0.5, -0.5), size, size, fill=False, edgecolor="0.7", linewidth=1))


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
