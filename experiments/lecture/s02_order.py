"""§2, erratum 8: the order of ReLU and pooling."""

import sys
from typing import Any

import jax
import jax.numpy as jnp

import jaxcnn
from experiments.lecture.drawing import figure, gray, signed
from experiments.lecture.numerical import as_batch, boot, normal
from experiments.lecture.statement import Result, Statement, at_least, equal, main, relative

STATEMENT = Statement(
    name="s02_order",
    section="2",
    title="ReLU and pooling in the other order",
    korean_title="ReLU와 풀링의 순서",
    korean="pooling : in hidden layer. ReLu function을 통과하고 나서는 CNN에서는 이 과정이 있다",
    claim="The lecture has the ReLU before the pooling. With max pooling the order changes neither the output nor the "
    "δ of x; with average pooling it changes both.",
    formula="relu(max_pool(x)) = max_pool(relu(x)),  relu(avg_pool(x)) ≠ avg_pool(relu(x))",
    functions=("jaxcnn/ops/activation.py: relu", "jaxcnn/ops/pooling.py: max_pool", "jaxcnn/ops/pooling.py: avg_pool"),
    test="tests/test_rules.py",
    errata=(
        (
            8,
            "The ReLU is monotone, so the largest element of a window is also the largest after the ReLU: max pooling "
            "and ReLU commute. If all elements of a window are ≤ 0, no δ passes in either order.",
        ),
    ),
)


def show(max_pool: Any = jaxcnn.max_pool) -> Result:
    """Compare both orders, forward and backward, for both kinds of pooling."""
    (w, delta) = normal(3, (5, 5, 1, 1), (1, 12, 12, 1))
    x = jaxcnn.conv(as_batch(boot()), w)
    results = {}
    for name, pool in (("max", max_pool), ("average", jaxcnn.avg_pool)):
        for order, f in (
            ("ReLU first", lambda x, pool=pool: pool(jaxcnn.relu(x), 2)),
            ("pooling first", lambda x, pool=pool: jaxcnn.relu(pool(x, 2))),
        ):
            y, pull = jax.vjp(f, x)
            results[name, order] = y, pull(delta)[0]
    (y, d), (y_other, d_other) = results["max", "ReLU first"], results["max", "pooling first"]
    (a, e), (a_other, e_other) = results["average", "ReLU first"], results["average", "pooling first"]
    checks = (
        equal("max pooling, outputs of the two orders, maximum difference", jnp.abs(y - y_other).max(), 0),
        equal("max pooling, δ of the two orders, maximum difference", jnp.abs(d - d_other).max(), 0),
        at_least("windows without an element above 0, of 144", jnp.sum(y == 0), 1),
        at_least("average pooling, outputs of the two orders, relative difference", relative(a_other, a), 0.01),
        at_least("average pooling, δ of the two orders, relative difference", relative(e_other, e), 0.01),
    )
    return Result(
        checks,
        draw(x, results),
        "In each pair, left the output, right the δ of x. Bottom row: the difference of the two orders.",
    )


def draw(x: Any, results: Any) -> Any:
    """Draw output and δ of each pooling in columns; the rows are the two orders and their difference."""
    fig = figure(9.2, 6.8)
    grid = fig.subplots(3, 4)
    for column, name in ((0, "max"), (2, "average")):
        rows = [results[name, "ReLU first"], results[name, "pooling first"]]
        rows.append(tuple(q - p for p, q in zip(*rows, strict=True)))
        limit = float(jnp.abs(rows[0][1]).max())
        highest = float(jnp.abs(rows[0][0]).max())
        for row, ((y, delta), order) in enumerate(
            zip(rows, ("ReLU first", "pooling first", "difference"), strict=True)
        ):
            left, right = grid[row, column], grid[row, column + 1]
            if row < 2:
                gray(left, y[0, :, :, 0], f"{name} pooling: output" if row == 0 else "", "")
            else:
                signed(left, y[0, :, :, 0], "", "", limit=highest)
            signed(right, delta[0, :, :, 0], f"{name} pooling: δ of x" if row == 0 else "", "", limit=limit)
            if row == 2:
                for axes, values in ((left, y), (right, delta)):
                    axes.set_xlabel(f"maximum: {float(jnp.abs(values).max()):.2g}", fontsize=9)
            if column == 0:
                left.set_ylabel(order, fontsize=10)
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
