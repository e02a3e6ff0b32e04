"""Winograd's form of `correlate`, `input_grad` and `kernel_grad`, which saves multiplications.

It is a product of short polynomials. In one dim, m outputs of a kernel of r taps cost n = m + r − 1 multiplications
instead of m·r:

    y = Aᵀ[(G·w) ∘ (Bᵀ·x)]        x: n elements of the image, a *tile*; w: the kernel; y: m outputs

In several dims the matrices are Kronecker products with themselves, such as A ⊗ A. With channels, ∘ becomes a matrix
product for each of the n·n elements of a tile. The adjoints use the same three matrices, transposed:

    correlate     y = Aᵀ[ (G·w)·(Bᵀ·x) ]    summed over I
    input_grad    x = B [ (G·w)·(A·y)  ]    summed over O; tiles overlap, and are added
    kernel_grad   w = Gᵀ[ (Bᵀ·x)·(A·y) ]    summed over tiles

The matrices multiply by small numbers and their quotients, which costs precision. In float32 the relative error of a
product (of its L2 norm) is up to 2.5e-6 for 3 × 3 kernels and up to 9e-6 for 5 × 5 kernels, compared with 6e-7 for
direct sums. An element reaches its whole tile: a NaN or an infinity makes outputs up to 3 positions beyond its windows
NaN, and a large number adds an error of its own scale there. `kernels.lowering` therefore selects this form on request
only.

Source: Winograd 1980; Lavin & Gray 2015, "Fast algorithms for convolutional neural networks".
"""

import functools
import math
from collections.abc import Callable
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels.materialize import materialize
from jaxcnn.kernels.parallel import batched_product
from jaxcnn.kernels.shapes import largest_divisor

#: Target size in bytes of a batch block's transforms: below 32 MB, above which glibc returns memory to the OS on every
#: call and page faults recur.
WINOGRAD_BLOCK_BYTES = 30 << 20
#: m, the outputs of a tile in each dim.
OUTPUTS = 4
#: Upper bound of the relative L2 error of the three products in float32, by kernel size.
RELATIVE_ERROR = {3: 2.5e-6, 5: 9e-6}
#: The n − 1 finite points at which polynomials are evaluated, by kernel size; the last point is infinity.
POINTS = {
    3: (0, 1, -1, Fraction(1, 2), -2),
    5: (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2)),
}


def applies(c: Correlation) -> bool:
    """Whether there are matrices for this kernel, and stride, dilation and groups are all 1."""
    win = c.window
    dense = all(n == 1 for n in (*win.stride, *win.dilation, c.groups))
    return dense and all(size in POINTS for size in win.size) and math.prod(win.out) > 0


def cost(c: Correlation, batch: int, inputs: int, outputs: int) -> int:
    """Return the number of multiplications of one product."""
    win = c.window
    n, m, r = _tile_elements(win), OUTPUTS**win.ndim, win.entries
    tiles = batch * math.prod(_tile_counts(win))
    return tiles * n * (n * inputs + m * outputs + inputs * outputs) + n * r * inputs * outputs


def correlate(c: Correlation, x: Array, w: Array) -> Array:
    """Lowering of `correlate`; the result is ``(N, *out, O)``."""
    kernel = _transform_kernel(c, w)

    def block(x: Array) -> Array:
        products = batched_product(_transform_image(c, x), kernel, 2, 1, c.precision)
        return _outputs_of_tiles(c.window, _multiply(_matrix(c.window, "A"), products, c), x.shape[0])

    return _map_blocks(block, _split_into_blocks(c, x, sum(w.shape[-2:])))


def input_grad(c: Correlation, y: Array, w: Array) -> Array:
    """Lowering of `input_grad`; the result is ``(N, *shape, I)``."""
    kernel = _transform_kernel(c, w)

    def block(y: Array) -> Array:
        products = batched_product(_transform_result(c, y), kernel, 2, 2, c.precision)
        return _add_overlapping_tiles(c.window, _multiply(_matrix(c.window, "B").T, products, c), y.shape[0])

    return _map_blocks(block, _split_into_blocks(c, y, sum(w.shape[-2:])))


def kernel_grad(c: Correlation, x: Array, y: Array) -> Array:
    """Lowering of `kernel_grad`; the result is ``(*size, I, O)``."""
    inputs, outputs = x.shape[-1], y.shape[-1]

    def one_block(x: Array, y: Array) -> Array:
        image, delta = _transform_image(c, x), _transform_result(c, y)
        image = materialize(jnp.swapaxes(image, 1, 2))  # jaxlib 0.10 is twice as fast if the summed dim is contiguous
        return batched_product(image, delta, 2, 1, c.precision)

    blocks = [_split_into_blocks(c, a, 2 * inputs + outputs) for a in (x, y)]  # the tiles of x are in memory as well
    if len(blocks[0]) == 1:
        products = one_block(x, y)
    else:
        zero = jnp.zeros((_tile_elements(c.window), inputs, outputs), y.dtype)
        products, _ = lax.scan(lambda total, block: (total + one_block(*block), None), zero, tuple(blocks))
    w = _multiply(_matrix(c.window, "G").T, products, c)
    return w.reshape(*c.window.size, inputs, outputs)


def in_one_block(c: Correlation, a: Array, inputs: int, outputs: int) -> bool:
    """Whether `correlate` and `input_grad` transform the batch as a whole."""
    return _block_size(c, a, inputs + outputs) == a.shape[0]


def _block_size(c: Correlation, a: Array, channels: int) -> int:
    """Return how many examples of a batch ``(N, …)`` to transform at a time, with ``channels`` channels in memory."""
    example_bytes = _tile_elements(c.window) * math.prod(_tile_counts(c.window)) * channels * a.dtype.itemsize
    return largest_divisor(a.shape[0], WINOGRAD_BLOCK_BYTES // max(example_bytes, 1))


def _split_into_blocks(c: Correlation, a: Array, channels: int) -> Array:
    """Reshape a batch ``(N, …)`` to ``(blocks, N/blocks, …)``."""
    size = _block_size(c, a, channels)
    return a.reshape(a.shape[0] // size if size else 0, size, *a.shape[1:])


def _map_blocks(f: Callable[[Array], Array], blocks: Array) -> Array:
    """Map ``f`` over blocks, without a loop for one: XLA then shares the transforms of a step's three products."""
    if len(blocks) == 1:
        return f(blocks[0])
    result = lax.map(f, blocks)
    return result.reshape(result.shape[0] * result.shape[1], *result.shape[2:])


# ---------------------------------------------------------------------------------------------------------------------
# The three transforms, each ``(n·n, …)``


def _transform_image(c: Correlation, x: Array) -> Array:
    """Return ``Bᵀ·x``, ``(n·n, N·tiles, I)``."""
    win = c.window
    entries = tuple(OUTPUTS + size - 1 for size in win.size)
    return _multiply(_matrix(win, "B"), _cut_into_tiles(win, x, entries, [lo for lo, _ in win.padding]), c)


def _transform_kernel(c: Correlation, w: Array) -> Array:
    """Return ``G·w``, ``(n·n, I, O)``."""
    return _multiply(_matrix(c.window, "G"), w.reshape(c.window.entries, *w.shape[-2:]), c)


def _transform_result(c: Correlation, y: Array) -> Array:
    """Return ``A·y``, ``(n·n, N·tiles, O)``."""
    win = c.window
    return _multiply(_matrix(win, "A").T, _cut_into_tiles(win, y, (OUTPUTS,) * win.ndim, [0] * win.ndim), c)


def _cut_into_tiles(win: Window, a: Array, entries: tuple[int, ...], before: list[int]) -> Array:
    """Convert ``(N, *spatial, C)`` to ``(entries, N·tiles, C)``: one image per tile element, padded to whole tiles."""
    tiles = _tile_counts(win)
    spans = [(t - 1) * OUTPUTS + size for t, size in zip(tiles, entries, strict=True)]
    pads = [(lo, span - lo - n, 0) for span, n, lo in zip(spans, a.shape[1:-1], before, strict=True)]
    a = lax.pad(a, np.zeros((), a.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    for stacked, dim in enumerate(reversed(range(win.ndim))):  # dim by dim: fewer slices than one per element
        axis, reach = stacked + 1 + dim, (tiles[dim] - 1) * OUTPUTS + 1
        a = jnp.stack([lax.slice_in_dim(a, i, i + reach, OUTPUTS, axis) for i in range(entries[dim])])
    return a.reshape(math.prod(entries), a.shape[win.ndim] * math.prod(tiles), a.shape[-1])


def _multiply(matrix: np.ndarray, x: Array, c: Correlation) -> Array:
    """Multiply the matrix by x, over the first dim of x."""
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    product = lax.dot(matrix.astype(x.dtype), rows, precision=c.precision)
    return product.reshape(matrix.shape[0], *x.shape[1:])


def _outputs_of_tiles(win: Window, y: Array, batch: int) -> Array:
    """Convert ``(m·m, N·tiles, O)`` to ``(N, *out, O)``."""
    y = _join_tiles(win, y, OUTPUTS, _tile_counts(win), batch)
    return lax.slice(y, (0,) * y.ndim, (batch, *win.out, y.shape[-1]))


def _add_overlapping_tiles(win: Window, x: Array, batch: int) -> Array:
    """Add overlapping tiles ``(n·n, N·tiles, I)`` to ``(N, *shape, I)``.

    In each dim, the first m elements of a tile stay in place; the others are added to the next tile.
    """
    tiles, m = _tile_counts(win), OUTPUTS
    x = x.reshape(*(m + size - 1 for size in win.size), batch, *tiles, x.shape[-1])
    for dim, size in enumerate(win.size):
        tile = win.ndim + 1 + dim
        first, rest = jnp.split(x, [m], dim)
        # (elements, tiles), with one more tile
        first = _pad_axes(first, {tile: (0, 1)})
        x = first + _pad_axes(rest, {tile: (1, 0), dim: (0, m - size + 1)})
    x = _join_tiles(win, x, m, tuple(t + 1 for t in tiles), batch)
    starts = [lo for lo, _ in win.padding]
    ends = [lo + n for lo, n in zip(starts, win.shape, strict=True)]
    return lax.slice(x, (0, *starts, 0), (batch, *ends, x.shape[-1]))


def _join_tiles(win: Window, x: Array, m: int, tiles: tuple[int, ...], batch: int) -> Array:
    """Convert ``(m, m, N, *tiles, C)`` to ``(N, tiles·m, tiles·m, C)``."""
    x = x.reshape(*(m,) * win.ndim, batch, *tiles, x.shape[-1])
    pairs = [axis for dim in range(win.ndim) for axis in (win.ndim + 1 + dim, dim)]
    x = x.transpose(win.ndim, *pairs, x.ndim - 1)
    return x.reshape(batch, *(t * m for t in tiles), x.shape[-1])


def _pad_axes(x: Array, pads: dict[int, tuple[int, int]]) -> Array:
    return lax.pad(x, np.zeros((), x.dtype), [(*pads.get(axis, (0, 0)), 0) for axis in range(x.ndim)])


def _tile_counts(win: Window) -> tuple[int, ...]:
    """Return the number of tiles in each dim."""
    return tuple(-(-o // OUTPUTS) for o in win.out)


def _tile_elements(win: Window) -> int:
    """Return the number of elements of a tile, n·n."""
    return math.prod(OUTPUTS + size - 1 for size in win.size)


# ---------------------------------------------------------------------------------------------------------------------
# The matrices


def _matrix(win: Window, name: str) -> np.ndarray:
    """Return Aᵀ, G or Bᵀ for all dims."""
    return functools.reduce(np.kron, [matrices(size)["AGB".index(name)] for size in win.size])


@functools.cache
def matrices(r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``Aᵀ (m, n), G (n, r), Bᵀ (n, n)`` for a kernel of r taps, in one dim.

    A linear convolution of r and m numbers is a product of polynomials: evaluate both at n points (G, A), multiply,
    interpolate (the inverse of n powers of the points). Correlation is its transpose in one argument. The denominators
    of each row of Bᵀ are moved to G.
    """
    points = [Fraction(p) for p in POINTS[r]]
    n = len(points) + 1

    def powers(k: int) -> list[list[Fraction]]:
        return [[p**j for j in range(k)] for p in points] + [[Fraction(int(j == k - 1)) for j in range(k)]]

    a, g = np.array(powers(OUTPUTS), object), np.array(powers(r), object)
    b = np.array(_exact_inverse(powers(n)), object).T
    for i in range(n):
        common = math.lcm(*(entry.denominator for entry in b[i]))
        b[i], g[i] = b[i] * common, g[i] / common
    return a.T.astype(float), g.astype(float), b.astype(float)


def _exact_inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    """Invert a matrix of fractions exactly, by Gauss–Jordan elimination."""
    n = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(n))] for i, row in enumerate(matrix)]
    for i in range(n):
        pivot = next(j for j in range(i, n) if rows[j][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [entry / rows[i][i] for entry in rows[i]]
        for j in range(n):
            if j != i:
                rows[j] = [
                    entry - rows[j][i] * pivot_entry for entry, pivot_entry in zip(rows[j], rows[i], strict=True)
                ]
    return [row[n:] for row in rows]
