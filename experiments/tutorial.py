# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # From a sliding kernel to a trained net
#
# This tutorial assumes that you have read the lecture. Run it with `python -m experiments.tutorial`, or cell by cell in
# Jupyter. It takes less than a minute on two cores and writes its figures to `runs/tutorial/`.
#
# 1. A kernel (the lecture's *patch*) slides over an image, in loops.
# 2. Pooling reduces the size, *up* restores it.
# 3. δ of one hidden layer is computed by hand and compared with `jax.grad`.
# 4. A net is trained.
# 5. δ in the trained net.
# 6. A rule is replaced.

# %%
"""Tutorial, from a sliding kernel to a trained net, its δ, and a replaced rule; a py:percent notebook."""

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

if "ipykernel" not in sys.modules:
    matplotlib.use("Agg")  # the script writes figures to files and needs no display
import matplotlib.pyplot as plt

import jaxcnn
from experiments.data import load, shuffled_batches
from experiments.files import replacing
from jaxcnn import Conv, Dense, Flatten, MaxPool, Relu, Serial, TrainState, evaluate, make_train_step, serial
from jaxcnn import softmax_cross_entropy_with_integer_labels as cross_entropy

STEPS = int(os.environ.get("JAXCNN_TUTORIAL_STEPS", "300"))  # training steps; use fewer for a short run
OUT = Path("runs/tutorial")

started = time.perf_counter()
OUT.mkdir(parents=True, exist_ok=True)
data = load("fashion-mnist-sample")


def difference(a: Any, b: Any) -> float:
    """Return the distance between a and b, relative to the norm of a."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def cosine(a: Any, b: Any) -> float:
    """Return the cosine of the angle between a and b: 1 if parallel, 0 if orthogonal."""
    a, b = np.ravel(a), np.ravel(b)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def key(figure: Any, axes: Any) -> None:
    """Draw a color bar at the right of `axes`; each map has its own scale."""
    colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-1, 1), "RdBu_r")
    bar = figure.colorbar(colors, ax=axes, ticks=[-1, 0, 1], shrink=0.8, aspect=30)
    bar.ax.set_yticklabels(["−max", "0", "+max"])


def save(figure: Any, name: str) -> None:
    """Write a figure into `OUT` atomically."""
    with replacing(OUT / name) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


# %% [markdown]
# ## 1. A kernel slides over an image
#
# The lecture's §11: place the kernel on the image, multiply elementwise, and add up the products to one number. Then
# move the kernel by one pixel. A 5×5 kernel fits into 28×28 at 24×24 positions, so the output is a little smaller.
#
# Our kernel is dark on the left and light on the right: it responds to edges of that kind.

# %%
x = data.test_images[0, :, :, 0].astype(np.float64)  # 28×28
w = np.tile([-1.0, -1.0, 0.0, 1.0, 1.0], (5, 1)) / 10


def slide(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return y[o] = Σ_k x[o + k]·w[k]."""
    rows, columns = (n - k + 1 for n, k in zip(image.shape, kernel.shape, strict=True))
    y = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            y[i, j] = (image[i : i + kernel.shape[0], j : j + kernel.shape[1]] * kernel).sum()
    return y


z = slide(x, w)
print(f"1  {x.shape} image, {w.shape} kernel: {z.shape} result")


# %% [markdown]
# jaxcnn does the same for a batch of images with channels, `(N, H, W, C)`, and a kernel with many output channels,
# `(H, W, C, O)`.


# %%
def batch(image: np.ndarray) -> jax.Array:
    """Return the image as a batch of one, (1, H, W, 1)."""
    return jnp.asarray(image[None, :, :, None], jnp.float32)


def channels(kernel: np.ndarray) -> jax.Array:
    """Return the kernel with one input and one output channel, (H, W, 1, 1)."""
    return jnp.asarray(kernel[:, :, None, None], jnp.float32)


conv_z = jaxcnn.conv(batch(x), channels(w))
print(f"   jaxcnn.conv {conv_z.shape} differs from the loops by {difference(z, conv_z[0, :, :, 0]):.0e}")
assert difference(z, conv_z[0, :, :, 0]) < 1e-5

# %% [markdown]
# ## 2. ReLU, pooling, and up
#
# ReLU keeps positive values; max pooling keeps the largest element of every 2×2 window. Together they are the lecture's
# hidden layer (§2). The sizes are those of §7: 24×24 becomes 12×12.

# %%
a = jaxcnn.max_pool(jaxcnn.relu(conv_z), 2)
print(f"2  pooling: {conv_z.shape[1:3]} → {a.shape[1:3]}")

# %% [markdown]
# In the backward pass δ is 12×12 and must become 24×24. §8 uses the Kronecker product with ones, *up*:

# %%
small = jnp.array([[1.0, 2.0], [3.0, 4.0]])
print("   up:", jaxcnn.kron_up(small[None, :, :, None], 2)[0, :, :, 0].astype(int).tolist())

# %% [markdown]
# Up is the backward rule of *sum* pooling. The output of max pooling depends only on one element of each window, the
# winner, so only the winner gets the δ (erratum 3 in `docs/from-the-lecture.md`):

# %%
numbers = np.array([[1, 5, 2, 0], [3, 4, 8, 1], [7, 2, 1, 1], [0, 6, 3, 9]], float)
pooled, back = jax.vjp(lambda image: jaxcnn.max_pool(image, 2), batch(numbers))
print("   max: ", back(small[None, :, :, None])[0][0, :, :, 0].astype(int).tolist())

# %% [markdown]
# ## 3. δ of one hidden layer, by hand
#
# Now a complete backward pass. Our hidden layer is followed by a second kernel w₂, and a loss that compares the output
# with a target t:
#
#     x ──w──▸ z ──ReLU, pooling──▸ a ──w₂──▸ y         E = ½ Σ (y − t)²
#     28      24                   12        8
#
# The backward pass starts with δ_{l+1} = y − t. Then, from right to left:
#
# - *Through w₂.* y[o] is a sum of the 5×5 elements a[o + k], each weighted by w₂[k]. So δ_{l+1}[o] goes back to these
#   elements, weighted by w₂[k]: every δ adds a scaled copy of the kernel.
# - *Through pooling.* Up, and only to the winner.
# - *Through ReLU.* ∘ g′(z): zero where z was not positive.

# %%
draw = np.random.default_rng(0)
w2, t = draw.normal(size=(5, 5)) / 5, draw.normal(size=(8, 8))


def add_copies(delta: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return w ∗ δ: every δ[o] adds δ[o]·w to the elements that y[o] depends on."""
    rows, columns = kernel.shape
    result = np.zeros((delta.shape[0] + rows - 1, delta.shape[1] + columns - 1))
    for i in range(delta.shape[0]):
        for j in range(delta.shape[1]):
            result[i : i + rows, j : j + columns] += delta[i, j] * kernel
    return result


def winners(image: np.ndarray) -> np.ndarray:
    """Return 1 for the first largest element of each 2×2 window, else 0."""
    mask = np.zeros(image.shape)
    for i in range(0, image.shape[0], 2):
        for j in range(0, image.shape[1], 2):
            row, column = divmod(int(image[i : i + 2, j : j + 2].argmax()), 2)
            mask[i + row, j + column] = 1
    return mask


g, slope = np.maximum(z, 0), (z > 0).astype(float)
a_by_hand = g.reshape(12, 2, 12, 2).max((1, 3))
delta_next = slide(a_by_hand, w2) - t  # δ_{l+1}, 8×8
returned = add_copies(delta_next, w2)  # w₂ ∗ δ_{l+1}, 12×12
up = np.kron(returned, np.ones((2, 2)))  # 24×24
delta_l = up * winners(g) * slope  # δ_l, 24×24
grad_w = slide(x, delta_l)  # ∂E/∂w, 5×5: correlation of the image with δ

# %% [markdown]
# The same with jaxcnn and `jax.grad`, which applies the rules of the ops:


# %%
def loss_from_z(z: jax.Array) -> jax.Array:
    """Return E as a function of the input of the ReLU."""
    y = jaxcnn.conv(jaxcnn.max_pool(jaxcnn.relu(z), 2), channels(w2))
    return jnp.sum((y - batch(t)) ** 2) / 2


true_delta = jax.grad(loss_from_z)(conv_z)[0, :, :, 0]
true_grad = jax.grad(lambda w: loss_from_z(jaxcnn.conv(batch(x), w)))(channels(w))[:, :, 0, 0]
print(f"3  δ_l by hand {delta_l.shape} differs from jax.grad by {difference(true_delta, delta_l):.0e}")
print(f"   ∂E/∂w by hand {grad_w.shape} differs from jax.grad by {difference(true_grad, grad_w):.0e}")
assert difference(true_delta, delta_l) < 1e-4
assert difference(true_grad, grad_w) < 1e-4

# %% [markdown]
# Adding copies of the kernel is the same as sliding it over δ (with 4 zeros all around), *if it is rotated by 180°*: an
# element is weighted by w₂[0, 0] in the window that begins at it, and by w₂[4, 4] in the window that ends at it. This
# is §15. The next cell omits the flip, and then uses *up* without the winner:

# %%
padded = np.pad(delta_next, 4)
flipped, unflipped = slide(padded, w2[::-1, ::-1]), slide(padded, w2)
assert difference(returned, flipped) < 1e-12
mistakes = {
    "kernel not flipped": np.kron(unflipped, np.ones((2, 2))) * winners(g) * slope,
    "up without the winner": up * slope,
}
for name, wrong_delta in mistakes.items():
    print(
        f"   {name}: cosine with the true δ_l {cosine(true_delta, wrong_delta):.2f}, "
        f"with the true ∂E/∂w {cosine(true_grad, slide(x, wrong_delta)):.2f}"
    )

# %%
panels: dict[str, np.ndarray] = {
    "x": x,
    "z": z,
    "g(z)": g,
    "a": a_by_hand,
    "y": slide(a_by_hand, w2),
    "δ next": delta_next,
    "w₂ ∗ δ next": returned,
    "up": up,
    "δ of the layer": delta_l,
    "∂E/∂w": grad_w,
}
figure, axes = plt.subplots(2, 5, figsize=(11, 5), layout="constrained")
for axis, (title, values) in zip(axes.flat, panels.items(), strict=True):
    limit = np.abs(values).max()
    axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set_title(f"{title}  {values.shape[0]}×{values.shape[1]}", fontsize=10)
    axis.set_axis_off()
figure.suptitle("One hidden layer: forward pass (top) and backward pass (bottom)")
key(figure, axes)
save(figure, "hidden-layer.png")

# %% [markdown]
# ## 4. Training a net
#
# The net has two such hidden layers and a dense one. `make_train_step` does what the lecture's §9 does by hand: the
# loss in the forward pass, δ and ∂E/∂w in the backward pass through every rule, then an update, here by Adam.

# %%
net = serial(Conv(16, 5), Relu(), MaxPool(2), Conv(32, 5), Relu(), MaxPool(2), Flatten(), Dense(10))
print(f"4\n{net.summary((28, 28, 1))}")
optimizer = optax.adam(2e-3)
state = TrainState.create(net, optimizer, jax.random.key(0), (28, 28, 1))
step = make_train_step(net, cross_entropy, optimizer)


def many_batches() -> Any:
    """Yield batches of 64, epoch after epoch."""
    for epoch in itertools.count():
        yield from shuffled_batches(data.train_images, data.train_labels, 64, seed=0, epoch=epoch)


for number, (images, labels) in zip(range(1, STEPS + 1), many_batches(), strict=False):
    state, metrics = step(state, (images, labels))
    if number % 100 == 0 or number == STEPS:
        print(f"   step {number}: loss {float(metrics['loss']):.3f} accuracy {float(metrics['accuracy']):.2f}")
tested = evaluate(net, cross_entropy, state.params, [(data.test_images, data.test_labels)])
print(f"   after {STEPS} steps: accuracy {tested['accuracy']:.1%} on {len(data.test_labels):,} test images")

# %% [markdown]
# ## 5. δ in the trained net
#
# To get δ inside the net, split it in two: the first layers give the activations, and the gradient of the loss through
# the remaining layers is δ at that point.
#
# At the output δ is p − onehot(label). So δ is almost zero for an image that is classified correctly with high
# confidence, and large for a mistake. The net learns from its mistakes.

# %%
params = state.params
probabilities = np.asarray(jax.nn.softmax(net.apply(params, data.test_images[:500])))
true_class = probabilities[np.arange(500), data.test_labels[:500]]
chosen = {"correct": int(true_class.argmax()), "wrong": int(true_class.argmin())}


def deltas(image: np.ndarray, label: int) -> dict[str, np.ndarray]:
    """Return δ at the output of every layer, by its name."""
    result = {}
    for cut, (name, _) in enumerate(net.layers, start=1):
        before, after = Serial(layers=net.layers[:cut]), Serial(layers=net.layers[cut:])

        def loss(h: jax.Array, after: Serial = after) -> jax.Array:
            return cross_entropy(after.apply(params, h), jnp.array([label]))[0]

        result[name] = np.asarray(jax.grad(loss)(before.apply(params, image[None])))[0]
    return result


print("5  ‖δ‖ for a correct and a wrong prediction, from the last layer to the first")
print(f"   {'layer':<10}" + "".join(f"{name:>14}" for name in chosen))
by_image = {name: deltas(data.test_images[n], data.test_labels[n]) for name, n in chosen.items()}
for layer, _ in reversed(net.layers):
    print(f"   {layer:<10}" + "".join(f"{np.linalg.norm(result[layer]):>14.2e}" for result in by_image.values()))

# %% [markdown]
# ## 6. Replacing a rule
#
# A rule is a value. The gradient of a class's score shows which pixels are evidence for the class, but it is noisy.
# Guided backprop (Springenberg et al. 2015) replaces the rule of ReLU: δ passes only where it is positive itself. The
# forward pass does not change.


# %%
def guided(call: jaxcnn.rules.Call, delta: jax.Array) -> tuple[jax.Array]:
    """δ_x = δ ∘ g'(x) ∘ [δ > 0]."""
    (delta_x,) = call.exact(delta)
    return (jnp.where(delta > 0, delta_x, 0),)


def score(images: jax.Array, rules: Any) -> jax.Array:
    """Return the sum over images of the most likely class's score; gradients of different images are independent."""
    return net.apply(params, images, rules=rules).max(1).sum()


images = jnp.asarray(data.test_images[:6])
maps = {name: np.asarray(jax.grad(score)(images, rules)) for name, rules in (("exact", {}), ("guided", {Relu: guided}))}
garment = np.asarray(images) > 0
print(f"6  share of |∂score/∂x| on the garment, which covers {garment.mean():.0%} of the pixels")
for name, gradients in maps.items():
    print(f"   {name:<7} {np.abs(gradients)[garment].sum() / np.abs(gradients).sum():.0%}")
assert float(score(images, {})) == float(score(images, {Relu: guided}))

# %%
figure, axes = plt.subplots(3, 6, figsize=(10, 5.4), layout="constrained")
rows = {"image": np.asarray(images), "exact rule": maps["exact"], "guided": maps["guided"]}
for row, (title, arrays) in zip(axes, rows.items(), strict=True):
    for axis, values in zip(row, arrays[..., 0], strict=True):
        limit = np.abs(values).max()
        gray = title == "image"
        axis.imshow(values, cmap="gray" if gray else "RdBu_r", vmin=0 if gray else -limit, vmax=limit)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(title)
figure.suptitle("∂(score of the predicted class)/∂x by two backward rules of the same net")
key(figure, axes[1:])
save(figure, "maps.png")
print(f"figures in {OUT.absolute()}; {time.perf_counter() - started:.0f} s")

# %% [markdown]
# Next steps: the formulas in `docs/mathematics.md`, rules in `docs/rules.md`, every statement of the lecture with
# `python -m experiments.lecture`, and a full training run with `python -m experiments.train`.
