"""The lecture in NumPy for-loops: a slow oracle that is easy to follow.

Every function states which paragraph of the lecture it implements (§, counted from the title) and uses the lecture's
letters: x the input, w the kernel (the lecture's "patch"), a the input of a layer, g the ReLU, δ_l the δ of layer l.
Images are single, ``(height, width, channels)``; kernels are ``(height, width, input channels, output channels)``.
"""

import numpy as np


def convolution(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """§11: the kernel slides over the image; products are added to one value; the result is a little smaller.

    It is correlation in the standard sense: the kernel is not flipped (erratum 4).
    """
    height, width, channels = x.shape
    patch_height, patch_width, _, features = w.shape
    y = np.zeros((height - patch_height + 1, width - patch_width + 1, features))
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            for f in range(features):
                for p in range(patch_height):
                    for q in range(patch_width):
                        for c in range(channels):
                            y[i, j, f] += x[i + p, j + q, c] * w[p, q, c, f]
    return y


def relu(x: np.ndarray) -> np.ndarray:
    """§6: g(x) = x where x > 0, else 0."""
    y = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        if x[i] > 0:
            y[i] = x[i]
    return y


def relu_slope(x: np.ndarray) -> np.ndarray:
    """§6: g'(x) = 1 where x > 0, else 0, including x = 0 (erratum 7)."""
    slope = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        if x[i] > 0:
            slope[i] = 1
    return slope


def sigmoid(x: np.ndarray) -> np.ndarray:
    """§3: g(x) = 1 / (1 + e⁻ˣ)."""
    y = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        y[i] = 1 / (1 + np.exp(-x[i]))
    return y


def sigmoid_slope(x: np.ndarray) -> np.ndarray:
    """§3: g'(x) = g(x)(1 − g(x))."""
    g = sigmoid(x)
    return g * (1 - g)


def max_pooling(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """§7: 24×24 becomes 12×12. Also return the position of each winner, the first maximum in row-major order."""
    height, width, channels = x.shape
    y = np.full((height // size, width // size, channels), -np.inf)
    winner = np.zeros((*y.shape, 2), int)
    for i, j, c in np.ndindex(y.shape):
        for p in range(size):
            for q in range(size):
                if x[i * size + p, j * size + q, c] > y[i, j, c]:
                    y[i, j, c] = x[i * size + p, j * size + q, c]
                    winner[i, j, c] = i * size + p, j * size + q
    return y, winner


def sum_pooling(x: np.ndarray, size: int) -> np.ndarray:
    """The pooling whose δ is exactly `up` (erratum 3)."""
    height, width, channels = x.shape
    y = np.zeros((height // size, width // size, channels))
    for i, j, c in np.ndindex(y.shape):
        for p in range(size):
            for q in range(size):
                y[i, j, c] += x[i * size + p, j * size + q, c]
    return y


def kron(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """§7, in the order of §8: block (i, j) of the result is a[i, j]·b (erratum 1).

    The numbers of §7 are ``kron(b, a)``:

    >>> kron(np.array([[4, 5], [6, 7]]), np.array([[1, 2], [3, 4]])).astype(int)
    array([[ 4,  8,  5, 10],
           [12, 16, 15, 20],
           [ 6, 12,  7, 14],
           [18, 24, 21, 28]])
    """
    rows, columns = b.shape
    result = np.zeros((a.shape[0] * rows, a.shape[1] * columns))
    for i, j in np.ndindex(a.shape):
        for p, q in np.ndindex(b.shape):
            result[i * rows + p, j * columns + q] = a[i, j] * b[p, q]
    return result


def up(delta: np.ndarray, size: int) -> np.ndarray:
    """§8: each channel ⊗ a matrix of ones, so every element is repeated in a block."""
    channels = [kron(delta[:, :, c], np.ones((size, size))) for c in range(delta.shape[-1])]
    return np.stack(channels, axis=-1)


def up_to_winner(delta: np.ndarray, winner: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """§8 for max pooling: in each block, only the winner gets δ (erratum 3)."""
    result = np.zeros(shape)
    for i, j, c in np.ndindex(delta.shape):
        row, column = winner[i, j, c]
        result[row, column, c] += delta[i, j, c]
    return result


def flip(w: np.ndarray) -> np.ndarray:
    """§11: the kernel flipped by 180°; 1 2 3 4 becomes 4 3 2 1."""
    turned = np.zeros(w.shape)
    height, width = w.shape[:2]
    for p in range(height):
        for q in range(width):
            turned[p, q] = w[height - 1 - p, width - 1 - q]
    return turned


def patch_times_delta(w: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """§6 and §15, w ∗ δ: the flipped kernel slides over δ, padded so that it can start and end outside.

    Output channels become input channels.
    """
    patch_height, patch_width, channels, features = w.shape
    height, width, _ = delta.shape
    padded = np.zeros((height + 2 * (patch_height - 1), width + 2 * (patch_width - 1), features))
    padded[patch_height - 1 : patch_height - 1 + height, patch_width - 1 : patch_width - 1 + width] = delta
    swapped = np.zeros((patch_height, patch_width, features, channels))
    for c in range(channels):
        for f in range(features):
            swapped[:, :, f, c] = flip(w)[:, :, c, f]
    return convolution(padded, swapped)


def delta_times_input(delta: np.ndarray, a: np.ndarray) -> np.ndarray:
    """§9, ∂E/∂w = δ ∗ a: δ slides over the layer's input, not flipped (erratum 5)."""
    height, width, features = delta.shape
    channels = a.shape[-1]
    grad_w = np.zeros((a.shape[0] - height + 1, a.shape[1] - width + 1, channels, features))
    for p, q, c, f in np.ndindex(grad_w.shape):
        for i in range(height):
            for j in range(width):
                grad_w[p, q, c, f] += delta[i, j, f] * a[i + p, j + q, c]
    return grad_w


def hidden_layer(a: np.ndarray, w: np.ndarray, b: np.ndarray, size: int) -> np.ndarray:
    """§2: a convolution, then ReLU and pooling, "one hidden layer"."""
    return max_pooling(relu(convolution(a, w) + b), size)[0]


def hidden_layer_delta(
    a: np.ndarray, w: np.ndarray, b: np.ndarray, size: int, delta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """§9: δ_l = up(δ) ∘ g'(x), where δ = w ∗ δ_{l+1} comes from the next layer (erratum 2).

    From δ_l follow w ∗ δ_l for the layer before, ∂E/∂w = δ_l ∗ a, and ∂E/∂b, the sum of δ_l.
    """
    x = convolution(a, w) + b
    _, winner = max_pooling(relu(x), size)
    delta_l = up_to_winner(delta, winner, x.shape) * relu_slope(x)
    return patch_times_delta(w, delta_l), delta_times_input(delta_l, a), delta_l.sum((0, 1))
