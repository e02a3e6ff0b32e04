"""§7–8: the Kronecker product in the lecture's numbers and letters, and *up*."""

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxcnn
from experiments.lecture.drawing import figure, numbers
from experiments.lecture.numerical import drawn, slopes_by_differences, slopes_by_rule
from experiments.lecture.statement import Shown, Statement, at_least, at_most, equal, main, relative

A, B = np.array([[1.0, 2], [3, 4]]), np.array([[4.0, 5], [6, 7]])
PRINTED = np.array([[4.0, 8, 5, 10], [12, 16, 15, 20], [6, 12, 7, 14], [18, 24, 21, 28]])
"""What §7 prints as A ⊗ B."""


def _matrix(rows: Any) -> str:
    """MathML."""
    cells = ("".join(f"<mtd><mn>{value}</mn></mtd>" for value in row) for row in rows)
    body = "".join(f"<mtr>{row}</mtr>" for row in cells)
    return f'<mrow><mo stretchy="true">[</mo><mtable>{body}</mtable><mo stretchy="true">]</mo></mrow>'


STATEMENT = Statement(
    name="s07_kronecker",
    section="7–8",
    title="The Kronecker product, and <i>up</i>",
    korean="크기를 늘려주는 연산인 Kronecker product … 함수가 scaled up된것을 up function이라고 부른다",
    claim="The Kronecker product makes 4×4 of two 2×2 matrices; with ones it repeats each entry in a block, which is "
    "called up. Its adjoint is the sum of each block.",
    formula=f"<math>{_matrix(['ab', 'cd'])}<mo>⊗</mo>{_matrix([[1, 1], [1, 1]])}<mo>=</mo>"
    f"{_matrix(('aabb', 'aabb', 'ccdd', 'ccdd'))}</math>",
    functions=(
        "jaxcnn/ops/kronecker.py: kron",
        "jaxcnn/ops/kronecker.py: kron_up",
        "jaxcnn/ops/kronecker.py: block_sum",
    ),
    test="tests/test_rules.py",
    errata=(
        (
            1,
            "The numbers of §7 are B ⊗ A in the standard order, as <code>numpy.kron</code> has it: each block is A "
            "times an entry of B. The letters of §8 are in the standard order.",
        ),
    ),
)


def show(kron: Any = jaxcnn.kron, kron_up: Any = jaxcnn.kron_up) -> Shown:
    """The lecture's two examples; the rules of ⊗ and of up."""
    letters, ones = np.array([[1.0, 2], [3, 4]]), np.ones((2, 2))  # a, b, c, d
    repeated = np.array([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    a, b, delta = drawn(0, (2, 3), (4, 2), (8, 6))
    x, delta_up = drawn(1, (2, 5, 4, 3), (2, 10, 8, 3))
    (delta_x,) = slopes_by_rule(lambda x: kron_up(x, 2), (x,), delta_up)
    pairs = slopes_by_rule(kron, (a, b), delta), slopes_by_differences(kron, (a, b), delta)
    checks = (
        equal("§7, as printed: kron(B, A)", kron(B, A), PRINTED),
        at_least("entries in which kron(A, B) differs from the print", np.sum(kron(A, B) != PRINTED), 1),
        equal("kron(A, B) less numpy.kron(A, B), largest entry", jnp.abs(kron(A, B) - np.kron(A, B)).max(), 0),
        equal("§8, a b c d = 1 2 3 4: kron(x, ones)", kron(letters, ones), repeated),
        equal("§8: kron_up(x, 2)", kron_up(letters[None, :, :, None], 2)[0, :, :, 0], repeated),
        at_most("kron: rule against differences", relative(*pairs), 1e-7),
        at_most(
            "kron_up: δ of x against the sum of each block", relative(delta_x, jaxcnn.block_sum(delta_up, 2)), 1e-12
        ),
    )
    caption = "Above: §7's numbers; a colour is a block. Below: §8's letters, and the sum of each block, the way back."
    return Shown(checks, draw(kron(B, A), kron(A, B)), caption)


def draw(as_printed: Any, standard: Any) -> Any:
    """The products of numbers; the letters; up and its adjoint."""
    fig = figure(10, 6.2)
    top, bottom = fig.subplots(2, 4)
    letters = np.array([list("ab"), list("cd")])
    numbers(top[0], A.astype(int), "A")
    numbers(top[1], B.astype(int), "B")
    numbers(top[2], np.asarray(as_printed, int), "as the lecture prints it", 2, "kron(B, A): blocks A·b")
    numbers(top[3], np.asarray(standard, int), "the standard A ⊗ B", 2, "kron(A, B): blocks a·B")
    numbers(bottom[0], letters, "x", 1)
    numbers(bottom[1], np.repeat(np.repeat(letters, 2, 0), 2, 1), "up(x) = x ⊗ ones", 2, "kron_up(x, 2)")
    numbers(bottom[2], np.char.add("4", letters), "the sum of each block", 1, "block_sum(up(x), 2)")
    bottom[3].axis("off")
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
