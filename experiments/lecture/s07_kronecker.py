"""§7–8: the Kronecker product with the lecture's numbers and letters, and *up*."""

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxcnn
from experiments.lecture.drawing import figure, numbers, parts, sign
from experiments.lecture.numerical import normal, slopes_by_differences, slopes_by_rule
from experiments.lecture.statement import Result, Statement, at_least, at_most, equal, main, relative

A, B = np.array([[1.0, 2], [3, 4]]), np.array([[4.0, 5], [6, 7]])
PRINTED = np.array([[4.0, 8, 5, 10], [12, 16, 15, 20], [6, 12, 7, 14], [18, 24, 21, 28]])
"""The matrix that §7 prints as A ⊗ B."""


def _product(*matrices: Any) -> str:
    """Return the equation first ⊗ second = third as HTML for the style of the page."""
    first, second, third = (
        f'<span class="matrix" style="--columns: {len(matrix[0])}">'
        + "".join(f"<span>{value}</span>" for row in matrix for value in row)
        + "</span>"
        for matrix in matrices
    )
    return f"{first} ⊗ {second} = {third}"


STATEMENT = Statement(
    name="s07_kronecker",
    section="7–8",
    title="The Kronecker product, and <i>up</i>",
    korean_title="크로네커 곱과 up 함수",
    korean="크기를 늘려주는 연산인 Kronecker product … 함수가 scaled up된것을 up function이라고 부른다",
    claim="The Kronecker product of two 2×2 matrices is 4×4. With a matrix of ones, it repeats each element in a "
    "block; the lecture calls this up. Its adjoint sums each block.",
    formula=f"B ⊗ A = {_product(B.astype(int), A.astype(int), PRINTED.astype(int))},  "
    f"up(x) = {_product(('ab', 'cd'), ('11', '11'), ('aabb', 'aabb', 'ccdd', 'ccdd'))}",
    functions=(
        "jaxcnn/ops/kronecker.py: kron",
        "jaxcnn/ops/kronecker.py: kron_up",
        "jaxcnn/ops/kronecker.py: block_sum",
    ),
    test="tests/test_rules.py",
    errata=(
        (
            1,
            "In the standard order, that of <code>numpy.kron</code>, the numbers in §7 are B ⊗ A: each block is A "
            "times an element of B. The letters in §8 are in the standard order.",
        ),
    ),
)


def show(kron: Any = jaxcnn.kron, kron_up: Any = jaxcnn.kron_up) -> Result:
    """Check the lecture's two examples, and the rules of ⊗ and up."""
    letters, ones = np.array([[1.0, 2], [3, 4]]), np.ones((2, 2))  # a, b, c, d
    repeated = np.array([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    a, b, delta = normal(0, (2, 3), (4, 2), (8, 6))
    x, delta_up = normal(1, (2, 5, 4, 3), (2, 10, 8, 3))
    (delta_x,) = slopes_by_rule(lambda x: kron_up(x, 2), (x,), delta_up)
    pairs = slopes_by_rule(kron, (a, b), delta), slopes_by_differences(kron, (a, b), delta)
    checks = (
        equal("§7, as printed: kron(B, A)", kron(B, A), PRINTED),
        at_least("elements in which kron(A, B) differs from the printed matrix", np.sum(kron(A, B) != PRINTED), 1),
        equal("kron(A, B) and numpy.kron(A, B), maximum difference", jnp.abs(kron(A, B) - np.kron(A, B)).max(), 0),
        equal("§8, a b c d = 1 2 3 4: kron(x, ones)", kron(letters, ones), repeated),
        equal("§8: kron_up(x, 2)", kron_up(letters[None, :, :, None], 2)[0, :, :, 0], repeated),
        at_most("kron: rule and differences, relative difference", relative(*pairs), 1e-7),
        at_most("kron_up: δ of x and the sum of each block", relative(delta_x, jaxcnn.block_sum(delta_up, 2)), 1e-12),
    )
    caption = (
        "Top, §7: the printed matrix is B ⊗ A, not A ⊗ B; each block has one color. Bottom, §8: up repeats each letter "
        "in a block, and its adjoint in the backward pass sums each block."
    )
    return Result(checks, draw(kron(B, A), kron(A, B)), caption)


def draw(as_printed: Any, standard: Any) -> Any:
    """Draw the two products of numbers, and up of letters with its adjoint."""
    letters = np.array([list("ab"), list("cd")])
    up = np.repeat(np.repeat(letters, 2, 0), 2, 1)
    fig = figure(10, 5.6)
    above, below = parts(fig, 2, 1)
    row = above.subplots(1, 7, width_ratios=(2, 0.6, 2, 0.6, 4, 0.6, 4))
    numbers(row[0], A.astype(int), "A")
    sign(row[1], "⊗")
    numbers(row[2], B.astype(int), "B")
    sign(row[3], "=")
    numbers(row[4], np.asarray(as_printed, int), "printed in the lecture", 2, "kron(B, A): blocks A·b")
    sign(row[5], "≠")
    numbers(row[6], np.asarray(standard, int), "in the standard order", 2, "kron(A, B): blocks a·B")
    row = below.subplots(1, 7, width_ratios=(2, 0.6, 2, 0.6, 4, 0.6, 4))
    numbers(row[0], letters, "x", 1)
    sign(row[1], "⊗")
    numbers(row[2], np.ones((2, 2), int), "ones")
    sign(row[3], "=")
    numbers(row[4], up, "up(x)", 2, "kron_up(x, 2)")
    sign(row[5], "→")
    numbers(row[6], np.char.add("4", letters), "the sum of each block", 1, "block_sum(up(x), 2)", span=4)
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
