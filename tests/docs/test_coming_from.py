"""Evaluation of both cells of each row of docs/coming-from.md, compared forward and backward."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from jax import lax

import jaxcnn

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text(encoding="utf-8")
HERE = {name: getattr(jaxcnn, name) for name in dir(jaxcnn) if not name.startswith("_")}
JAX = {"jax": jax, "jnp": jnp, "lax": lax, "optax": optax}
LAYERS = re.compile(r"(nn|nnx|eqx\.nn)\.[A-Z]")


def table(section: str) -> list[tuple[str, str]]:
    """Return the rows of a section's tables whose cells contain code."""
    (text,) = re.findall(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", text, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", text, re.MULTILINE)), "a row whose cells are not both code"
    return rows


TORCH, FLAX, EQUINOX, LAX = map(table, ("torch.nn.functional", "flax", "equinox", "jax.lax, jax.nn, optax"))


def test_no_table_is_empty_and_no_section_is_missing():
    assert min(map(len, (TORCH, FLAX, EQUINOX, LAX))) >= 9
    assert len(re.findall(r"^\| `\w+[.(]", PAGE, re.MULTILINE)) == len(TORCH + FLAX + EQUINOX + LAX)


def inputs() -> dict[str, np.ndarray]:
    """Return inputs in torch's layout, with four channels and without equal elements."""
    draw = np.random.default_rng(0)
    shapes = {"x": (2, 4, 8, 10), "w": (6, 4, 3, 3), "b": (6,), "line": (2, 4, 9), "w1": (6, 4, 3), "m": (6, 5)}
    shapes |= {"v": (2, 5), "u": (2, 5), "z": (4, 7)}
    return {name: draw.normal(size=shape) for name, shape in shapes.items()} | {"labels": np.array([0, 6, 3, 3])}


def here(name: str, array: np.ndarray) -> np.ndarray:
    """Convert from torch's layout."""
    if name in ("x", "line", "out"):
        return np.moveaxis(array, 1, -1)
    return np.moveaxis(np.moveaxis(array, 0, -1), 0, -2) if name in ("w", "w1") else array


def value_and_gradients(cell: str, names: dict, arrays: dict):
    """Evaluate a cell of JAX code, and return its value and its gradients for a random δ."""
    floats = {n: jnp.asarray(a) for n, a in arrays.items() if a.dtype.kind == "f"}
    others = {n: jnp.asarray(a) for n, a in arrays.items() if a.dtype.kind != "f"}
    y, rule = jax.vjp(lambda floats: eval(cell, names | others | floats), floats)
    return y, rule(delta_of(y))[0]


def delta_of(y):
    return jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)


def same(one, two):
    np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("there", "cell"), TORCH)
def test_torch(there, cell):
    arrays = inputs()
    y, found = value_and_gradients(cell, HERE | JAX, {n: here(n, a) for n, a in arrays.items()})

    tensors = {n: torch.tensor(a, requires_grad=a.dtype.kind == "f") for n, a in arrays.items()}
    expected = eval(there, {"torch": torch, "F": F} | tensors)
    spatial = expected.ndim > 2
    same(y, here("out" if spatial else "", expected.detach().numpy()))

    delta = torch.tensor(np.asarray(delta_of(y)))
    expected.backward(delta.movedim(-1, 1) if spatial else delta)
    for n, gradient in found.items():
        grad = tensors[n].grad
        same(gradient, 0 * gradient if grad is None else here(n, grad.numpy()))


@pytest.mark.parametrize(("there", "cell"), LAX)
def test_jax(there, cell):
    arrays = {n: here(n, a) for n, a in inputs().items()}
    compare(value_and_gradients(there, JAX, arrays), value_and_gradients(cell, HERE | JAX, arrays))


def compare(one, two):
    assert one[0].shape == two[0].shape
    jax.tree.map(same, one, two)


@pytest.mark.parametrize(("there", "cell"), FLAX)
def test_flax(there, cell):
    flax = pytest.importorskip("flax")
    from flax import linen, nnx

    assert flax
    arrays = {n: here(n, a) for n, a in inputs().items()}
    names = JAX | {"nn": linen, "nnx": nnx, "rngs": nnx.Rngs(0)}
    if not LAYERS.match(there):
        compare(value_and_gradients(there, names, arrays), value_and_gradients(cell, HERE | JAX, arrays))
        return
    layer, ours = eval(there, names), eval(cell, HERE)
    x = jnp.asarray(arrays["x"])
    if isinstance(layer, nnx.Module):
        weights = nnx.to_pure_dict(nnx.state(layer))

        def apply(weights, x):
            graph, state = nnx.split(layer)
            nnx.replace_by_pure_dict(state, weights)
            return nnx.merge(graph, state)(x)

    else:
        weights = layer.init(jax.random.key(0), x)["params"]

        def apply(weights, x):
            return layer.apply({"params": weights}, x)

    weights = {kind: jnp.asarray(random_like(weight)) for kind, weight in weights.items()}
    y, rule = jax.vjp(apply, weights, x)
    names = {"scale": "scale", "bias": "bias"} if "scale" in weights else {"kernel": "weight", "bias": "bias"}
    params = {names[name]: weight for name, weight in weights.items()}
    our_y, our_rule = jax.vjp(lambda params, x: ours.apply(params, x), params, x)
    same(our_y, y)
    (gradients, delta_x), (our_gradients, our_delta_x) = rule(delta_of(y)), our_rule(delta_of(y))
    same(our_delta_x, delta_x)
    assert set(our_gradients) == {names[name] for name in gradients}
    for name, gradient in gradients.items():
        same(our_gradients[names[name]], gradient)


def random_like(array):
    return np.random.default_rng(1).normal(size=array.shape)


@pytest.mark.parametrize(("there", "cell"), EQUINOX)
def test_equinox(there, cell):
    eqx = pytest.importorskip("equinox")
    layer, ours = eval(there, {"eqx": eqx, "key": jax.random.key(0)}), eval(cell, HERE)
    arrays = inputs()
    array = arrays["v"].repeat(2, 1) if "Linear" in there else arrays["x"]
    x, our_x = jnp.asarray(array), jnp.asarray(array if array.ndim == 2 else here("x", array))

    weights = {n: getattr(layer, n) for n in ("weight", "bias") if getattr(layer, n, None) is not None}
    weights = {n: jnp.asarray(random_like(weight)) for n, weight in weights.items()}

    def apply(weights, x):
        module = eqx.tree_at(lambda m: [getattr(m, n) for n in weights], layer, list(weights.values()))
        return jax.vmap(module if weights else layer)(x)

    def converted(weights):
        params = {}
        if "weight" in weights:
            weight = weights["weight"]
            params["weight"] = weight.T if weight.ndim == 2 else here("w", weight)
        if "bias" in weights:
            params["bias"] = weights["bias"].reshape(-1)
        return params

    y, rule = jax.vjp(apply, weights, x)
    our_y, our_rule = jax.vjp(lambda params, x: ours.apply(params, x), converted(weights), our_x)
    same(our_y, here("out" if y.ndim > 2 else "", y))
    our_gradients, our_delta_x = our_rule(delta_of(our_y))
    delta = delta_of(our_y)
    gradients, delta_x = rule(jnp.moveaxis(delta, -1, 1) if delta.ndim > 2 else delta)
    same(our_delta_x, here("out" if delta_x.ndim > 2 else "", delta_x))
    expected = converted(gradients)
    assert set(our_gradients) == set(expected)
    for kind, gradient in our_gradients.items():
        same(gradient, expected[kind])


@pytest.mark.slow("compiles a net")
def test_a_whole_network_from_torch():
    (code,) = re.findall(r"^```python\n(def from_torch.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code, names)

    torch.manual_seed(0)
    nn = torch.nn
    conv1, conv2, linear = nn.Conv2d(1, 32, 5).double(), nn.Conv2d(32, 64, 5).double(), nn.Linear(1024, 10).double()
    images = np.random.default_rng(0).uniform(size=(3, 28, 28))
    hidden = F.max_pool2d(F.relu(conv2(F.max_pool2d(F.relu(conv1(torch.tensor(images[:, None]))), 2))), 2)
    expected = linear(hidden.flatten(1))

    net = jaxcnn.serial(
        *(jaxcnn.Conv(32, 5), jaxcnn.Relu(), jaxcnn.MaxPool(2)),
        *(jaxcnn.Conv(64, 5), jaxcnn.Relu(), jaxcnn.MaxPool(2)),
        *(jaxcnn.Flatten(), jaxcnn.Dropout(0.5), jaxcnn.Dense(10)),
    )
    params = jax.tree.map(jnp.asarray, names["from_torch"](conv1, conv2, linear))
    labels = np.array([1, 0, 9])

    def loss(params):
        y = net.apply(params, images[..., None])
        return jaxcnn.softmax_cross_entropy_with_integer_labels(y, labels).mean(), y

    (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    same(y, expected.detach().numpy())
    F.cross_entropy(expected, torch.tensor(labels)).backward()
    for module, name in ((conv1, "conv1"), (conv2, "conv2"), (linear, "dense1")):
        same(gradients[name]["bias"], module.bias.grad.numpy())
    same(gradients["conv1"]["weight"], conv1.weight.grad.numpy().transpose(2, 3, 1, 0))
    same(gradients["conv2"]["weight"], conv2.weight.grad.numpy().transpose(2, 3, 1, 0))
    rows = linear.weight.grad.numpy().reshape(10, 64, 4, 4).transpose(2, 3, 1, 0).reshape(-1, 10)
    same(gradients["dense1"]["weight"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# The pitfalls: claims about the other libraries are true


def test_other_layouts_are_accepted():
    arrays = inputs()
    y = jaxcnn.conv(arrays["x"], arrays["w"], dimension_numbers=("NCHW", "OIHW", "NCHW"))
    same(y, F.conv2d(torch.tensor(arrays["x"]), torch.tensor(arrays["w"])).numpy())


def test_ties_go_to_the_first_in_torch_and_lax():
    tie = np.ones((1, 4, 1))
    t = torch.ones((1, 1, 4), requires_grad=True)
    F.max_pool1d(t, 2).sum().backward()
    stock = jax.grad(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID").sum())(tie)
    ours = jax.grad(lambda x: jaxcnn.max_pool(x, 2).sum())(tie)
    for found in (t.grad.numpy(), stock, ours):
        assert np.ravel(found).tolist() == [1, 0, 1, 0]


def test_minus_infinity_next_to_padding_in_torch():
    t = torch.full((1, 1, 3), -torch.inf, requires_grad=True)
    F.max_pool1d(t, 2, 2, 1).sum().backward()
    ours = jax.grad(lambda x: jaxcnn.max_pool(x, 2, padding=1).sum())(jnp.full((1, 3, 1), -jnp.inf))
    assert t.grad.ravel().tolist() == np.ravel(ours).tolist() == [1, 1, 0]


def test_errors_here_and_in_other_libraries():
    x, w = jnp.ones((1, 4, 1)), jnp.ones((3, 1, 1))
    with pytest.raises(ValueError, match="padding"):
        jaxcnn.conv(x, w, padding=((-1, 0),))
    with pytest.raises(RuntimeError, match="negative padding"):
        F.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 3), padding=-1)
    assert lax.conv_general_dilated(x, w, (1,), ((-1, 0),), dimension_numbers=("NHC", "HIO", "NHC")).shape == (1, 1, 1)
    with pytest.raises((RuntimeError, ValueError), match="padding='same' is not supported for strided"):
        F.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 3), padding="same", stride=2)
    with pytest.raises(ValueError, match="entirely in the padding"):
        jaxcnn.max_pool(x, 2, padding=2)
    with pytest.raises(RuntimeError, match="half"):
        F.max_pool1d(torch.ones(1, 1, 4), 2, padding=2)
    with pytest.raises(TypeError, match="floating"):
        jaxcnn.relu(jnp.ones(2, jnp.int32))
    with pytest.raises(TypeError, match="one dtype"):
        jaxcnn.conv(x, w.astype(jnp.float32))


@pytest.mark.parametrize(("k", "s", "d"), [(2, 3, 1), (1, 4, 1), (2, 4, 2), (3, 3, 1), (3, 2, 2)])
def test_the_output_padding_that_makes_valid_transposed_convolutions_flaxs(k, s, d):
    """With ``max(s − extent, 0)``, values and gradients are equal."""
    linen = pytest.importorskip("flax.linen")
    layer = linen.ConvTranspose(5, (k,), (s,), "VALID", kernel_dilation=(d,), param_dtype=np.float64)
    draw = np.random.default_rng(k)
    x, w, b = (draw.normal(size=shape) for shape in ((2, 4, 3), (k, 3, 5), (5,)))

    def ours(x, w, b):
        extra = max(s - ((k - 1) * d + 1), 0)
        w = w[::-1].swapaxes(1, 2)
        return jaxcnn.conv_transpose(x, w, b, stride=s, dilation=d, output_padding=extra)

    def theirs(x, w, b):
        return layer.apply({"params": {"kernel": w, "bias": b}}, x)

    (y, pull), (expected, their_pull) = jax.vjp(ours, x, w, b), jax.vjp(theirs, x, w, b)
    same(y, expected)
    jax.tree.map(same, pull(delta_of(y)), their_pull(delta_of(y)))


def test_gelu_is_exact_here_and_in_torch_and_approximate_in_jax():
    x = np.linspace(-3, 3, 7)
    same(jaxcnn.gelu(x), F.gelu(torch.tensor(x)).numpy())
    same(jax.nn.gelu(x), F.gelu(torch.tensor(x), approximate="tanh").numpy())
    assert np.abs(jaxcnn.gelu(x) - jax.nn.gelu(x)).max() > 1e-4
