"""A training step (forward, backward, Adam) of a net in each library, as its users would write it.

Each function builds a net of `nets` in its library and returns a `Step`.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from experiments.benchmarks.nets import Timed, parts
from jaxcnn import AvgPool, Conv, Dense, Dropout, Flatten, Layer, MaxPool, Relu, Tanh
from jaxcnn.net import Residual

LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step; `run` returns when the step is finished."""

    run: Callable[[], Any]
    #: Seconds of tracing and compiling, if measured separately.
    compile_seconds: float | None = None
    #: Temporary bytes of the step as reported by XLA, excluding arguments and results.
    temporary_bytes: int | None = None


def images(timed: Timed) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch of noise, and labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((timed.batch, *timed.shape), np.float32)
    return x, rng.integers(0, 10, (timed.batch, *timed.labels)).astype(np.int32)


def _pairs(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _compiled(jitted: Any, *arguments: Any) -> tuple[Any, float, int | None]:
    """Compile a jitted function; return the result, the seconds, and XLA's temporary bytes."""
    began = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - began
    analysis = compiled.memory_analysis()
    return compiled, seconds, None if analysis is None else int(analysis.temp_size_in_bytes)


# ---------------------------------------------------------------------------------------------------------------------
# JAX libraries


def _jitted(timed: Timed, training_step: Callable[[Any, Any], tuple[Any, Any]], state: Any, batch: Any) -> Step:
    """Compile a step that donates its state, or with `timed.scan` a loop of that number of steps."""
    import jax
    import jax.numpy as jnp

    program: Callable[..., Any] = training_step
    if (count := timed.scan) is not None:
        batch = jax.tree.map(lambda a: jnp.stack([a] * count), batch)
        program = functools.partial(jax.lax.scan, training_step)
    batch = jax.device_put(batch)
    step, seconds, temporary = _compiled(jax.jit(program, donate_argnums=0), state, batch)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return Step(run, seconds, temporary)


def jaxcnn_step(timed: Timed) -> Step:
    """Return the step with explicit rules."""
    import jax
    import optax

    from jaxcnn import TrainState, make_train_step, softmax_cross_entropy_with_integer_labels

    optimizer = optax.adam(LEARNING_RATE)
    state = TrainState.create(timed.net, optimizer, jax.random.key(0), timed.shape)
    loss = softmax_cross_entropy_with_integer_labels
    step = make_train_step(timed.net, loss, optimizer, microbatch=timed.microbatch)
    return _jitted(timed, step, state, images(timed))


def flax_net(timed: Timed, seed: int = 0) -> Any:
    """Return the net as an `nnx.Sequential`."""
    from flax import nnx

    rngs = nnx.Rngs(seed)

    def module(layer: Layer, shape: tuple[int, ...]) -> Any:
        match layer:
            case Conv():
                return nnx.Conv(
                    shape[-1],
                    layer.features,
                    _pairs(layer.kernel_size),
                    strides=_pairs(layer.stride),
                    padding=_named(layer.padding),
                    feature_group_count=layer.groups,
                    rngs=rngs,
                )
            case Dense():
                return nnx.Linear(shape[-1], layer.features, rngs=rngs)
            case Dropout():
                return nnx.Dropout(layer.rate, rngs=rngs)
            case Relu():
                return nnx.relu
            case Tanh():
                return nnx.tanh
            case MaxPool():
                size = _pairs(layer.window)
                return lambda x: nnx.max_pool(x, size, size)
            case AvgPool():
                size = _pairs(layer.window)
                return lambda x: nnx.avg_pool(x, size, size)
            case Flatten():
                return lambda x: x.reshape(x.shape[0], -1)
            case Residual():
                inner = nnx.Sequential(*(module(*part) for part in parts(layer, shape)))
                return Sum(inner)
        raise NotImplementedError(type(layer).__name__)

    class Sum(nnx.Module):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, x: Any) -> Any:
            return x + self.inner(x)

    return nnx.Sequential(*(module(*part) for part in parts(timed.net, timed.shape)))


def flax_step(timed: Timed) -> Step:
    """Return the step in Flax NNX, split and merged inside `jax.jit`, which costs less per call than `nnx.jit`."""
    return _jitted(timed, *flax_training_step(timed), images(timed))


def flax_training_step(timed: Timed) -> tuple[Callable[[Any, Any], tuple[Any, Any]], Any]:
    """Return Flax NNX's step as a function of state and batch, and its first state."""
    import optax
    from flax import nnx

    net = flax_net(timed)
    graph, state = nnx.split((net, nnx.Optimizer(net, optax.adam(LEARNING_RATE), wrt=nnx.Param)))

    def training_step(state: Any, batch: Any) -> Any:
        net, optimizer = nnx.merge(graph, state)
        x, labels = batch

        def mean_loss(net: Any) -> Any:
            logits = net(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

        (loss, logits), gradients = nnx.value_and_grad(mean_loss, has_aux=True)(net)
        optimizer.update(net, gradients)
        return nnx.state((net, optimizer)), {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}

    return training_step, state


def equinox_net(timed: Timed) -> Any:
    """Return the net as an `eqx.nn.Sequential`, for one example, channels first."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    keys = iter(jax.random.split(jax.random.key(0), 64))

    def module(layer: Layer, shape: tuple[int, ...]) -> Any:
        match layer:
            case Conv():
                return eqx.nn.Conv2d(
                    shape[-1],
                    layer.features,
                    _pairs(layer.kernel_size),
                    _pairs(layer.stride),
                    _named(layer.padding),
                    groups=layer.groups,
                    key=next(keys),
                )
            case Dense():
                return eqx.nn.Linear(shape[-1], layer.features, key=next(keys))
            case Dropout():
                return eqx.nn.Dropout(layer.rate)
            case Relu():
                return eqx.nn.Lambda(jax.nn.relu)
            case Tanh():
                return eqx.nn.Lambda(jnp.tanh)
            case MaxPool():
                return eqx.nn.MaxPool2d(_pairs(layer.window), _pairs(layer.window))
            case AvgPool():
                return eqx.nn.AvgPool2d(_pairs(layer.window), _pairs(layer.window))
            case Flatten():
                return eqx.nn.Lambda(jnp.ravel)
            case Residual():
                inner = eqx.nn.Sequential([module(*part) for part in parts(layer, shape)])
                return Sum(inner)
        raise NotImplementedError(type(layer).__name__)

    class Sum(eqx.Module):
        inner: Any

        def __call__(self, x: Any, *, key: Any = None) -> Any:
            return x + self.inner(x, key=key)

    return eqx.nn.Sequential([module(*part) for part in parts(timed.net, timed.shape)])


def equinox_step(timed: Timed) -> Step:
    """Return the step in Equinox, whose layers take one example, channels first; `jax.vmap` adds the batch."""
    import equinox as eqx
    import jax
    import optax

    net = equinox_net(timed)
    optimizer = optax.adam(LEARNING_RATE)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    state = (params, optimizer.init(params), jax.random.key(0))
    x, labels = images(timed)

    def training_step(state: Any, batch: Any) -> Any:
        params, opt_state, key = state
        x, labels = batch
        key, now = jax.random.split(key)

        def mean_loss(params: Any) -> Any:
            logits = jax.vmap(eqx.combine(params, static))(x, key=jax.random.split(now, x.shape[0]))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

        (loss, logits), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        metrics = {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}
        return (eqx.apply_updates(params, updates), opt_state, key), metrics

    return _jitted(timed, training_step, state, (np.moveaxis(x, -1, 1).copy(), labels))


def keras_step(timed: Timed) -> Step:
    """Return the step in Keras on JAX, by `train_on_batch`."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras

    def apply(layer: Layer, x: Any, shape: tuple[int, ...]) -> Any:
        match layer:
            case Conv():
                padding = "same" if layer.padding in ("SAME", 2) else "valid"
                conv = keras.layers.Conv2D(
                    layer.features, _pairs(layer.kernel_size), _pairs(layer.stride), padding, groups=layer.groups
                )
                return conv(x)
            case Dense():
                return keras.layers.Dense(layer.features)(x)
            case Dropout():
                return keras.layers.Dropout(layer.rate)(x)
            case Relu():
                return keras.layers.ReLU()(x)
            case Tanh():
                return keras.layers.Activation("tanh")(x)
            case MaxPool():
                return keras.layers.MaxPooling2D(_pairs(layer.window))(x)
            case AvgPool():
                return keras.layers.AveragePooling2D(_pairs(layer.window))(x)
            case Flatten():
                return keras.layers.Flatten()(x)
            case Residual():
                y = x
                for part, inner in parts(layer, shape):
                    y = apply(part, y, inner)
                return keras.layers.Add()([x, y])
        raise NotImplementedError(type(layer).__name__)

    start = y = keras.Input(timed.shape)
    for part, shape in parts(timed.net, timed.shape):
        y = apply(part, y, shape)
    model = keras.Model(start, y)
    model.compile(
        keras.optimizers.Adam(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
    )
    x, labels = jax.device_put(images(timed))
    began = time.perf_counter()
    model.train_on_batch(x, labels)  # returns numbers, so the step is finished
    return Step(lambda: model.train_on_batch(x, labels), time.perf_counter() - began)


def _named(padding: Any) -> Any:
    """Return the name of a padding; lenet5 has the only padding that is a number."""
    return "SAME" if padding == 2 else padding


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch


def torch_net(timed: Timed) -> Any:
    """Return the net as an `nn.Sequential`."""
    from torch import nn

    class Sum(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return x + self.inner(x)

    def module(layer: Layer, shape: tuple[int, ...]) -> nn.Module:
        match layer:
            case Conv():
                return _torch_conv(nn, layer, shape)
            case Dense():
                return nn.Linear(shape[-1], layer.features)
            case Dropout():
                return nn.Dropout(layer.rate)
            case Relu():
                return nn.ReLU()
            case Tanh():
                return nn.Tanh()
            case MaxPool():
                return nn.MaxPool2d(_pairs(layer.window))
            case AvgPool():
                return nn.AvgPool2d(_pairs(layer.window))
            case Flatten():
                return nn.Flatten()
            case Residual():
                return Sum(nn.Sequential(*(module(*part) for part in parts(layer, shape))))
        raise NotImplementedError(type(layer).__name__)

    return nn.Sequential(*(module(*part) for part in parts(timed.net, timed.shape)))


def torch_step(timed: Timed, *, channels_last: bool, compiled: bool) -> Step:
    """Return the step in PyTorch, with one thread per core."""
    import os

    import torch
    from torch import nn

    device = "cuda" if os.environ.get("JAXCNN_BENCHMARK_DEVICE") == "gpu" else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    net = torch_net(timed).to(device).to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE, fused=True)
    x_last, labels = images(timed)
    x = torch.from_numpy(np.moveaxis(x_last, -1, 1).copy()).to(device).to(memory_format=layout)
    classes = torch.from_numpy(labels.astype(np.int64)).to(device)

    def forward(x: Any, classes: Any) -> Any:
        logits = net(x)
        loss = nn.functional.cross_entropy(logits, classes)
        return loss, (logits.argmax(-1) == classes).float().mean()

    forward = torch.compile(forward) if compiled else forward

    def run() -> None:
        optimizer.zero_grad()
        loss, accuracy = forward(x, classes)
        loss.backward()
        optimizer.step()
        loss.item(), accuracy.item()

    began = time.perf_counter()
    run()
    return Step(run, time.perf_counter() - began if compiled else None)


def _torch_conv(nn: Any, layer: Conv, shape: tuple[int, ...]) -> Any:
    size, stride = _pairs(layer.kernel_size), _pairs(layer.stride)
    conv = functools.partial(nn.Conv2d, shape[-1], layer.features, size, stride=stride, groups=layer.groups)
    if layer.padding == "VALID":
        return conv(padding=0)
    if isinstance(layer.padding, int):
        return conv(padding=layer.padding)
    # SAME puts an odd element at the end; PyTorch's own padding is symmetric.
    pads = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, k, s in zip(shape[:2], size, stride, strict=True)]
    if all(pad % 2 == 0 for pad in pads):
        return conv(padding=(pads[0] // 2, pads[1] // 2))
    (top, bottom), (left, right) = ((pad // 2, pad - pad // 2) for pad in pads)
    return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv(padding=0))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters of jaxcnn in the other libraries, for sequential nets


def weights(
    timed: Timed, params: Mapping[str, Any], *, channels_first: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield weight and bias of each convolution and dense layer.

    With channels first, a weight is (O, I, …), and the rows of the first dense layer are in that layout's order.
    """
    flattened = None
    layers = iter([params[name] for name, _ in timed.net.walk() if name in params])
    for layer, shape in parts(timed.net, timed.shape):
        if isinstance(layer, Flatten):
            flattened = shape
        if not isinstance(layer, Conv | Dense):
            continue
        w, b = (np.asarray(a) for a in map(next(layers).__getitem__, ("weight", "bias")))
        if channels_first:
            if flattened is not None:
                w = np.moveaxis(w.reshape(*flattened, -1), -2, 0).reshape(w.shape)
                flattened = None
            w = np.moveaxis(w, (-1, -2), (0, 1))
        yield w, b


def load_flax(net: Any, timed: Timed, params: Mapping[str, Any]) -> Any:
    """Return the net of `flax_net` with these parameters of jaxcnn."""
    from flax import nnx

    layers: Any = (layer for layer in net.layers if isinstance(layer, nnx.Conv | nnx.Linear))
    for layer, (w, b) in zip(layers, weights(timed, params, channels_first=False), strict=True):
        layer.kernel[...], layer.bias[...] = w, b
    return net


def load_equinox(net: Any, timed: Timed, params: Mapping[str, Any]) -> Any:
    """Return the net of `equinox_net` with these parameters of jaxcnn."""
    import equinox as eqx
    import jax.numpy as jnp

    pairs = iter(weights(timed, params, channels_first=True))
    layers: list[Any] = []
    for layer in net.layers:
        if isinstance(layer, eqx.nn.Conv | eqx.nn.Linear) and layer.bias is not None:
            w, b = next(pairs)
            new = (jnp.asarray(w), jnp.asarray(b).reshape(layer.bias.shape))
            layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, new)
        layers.append(layer)
    return eqx.nn.Sequential(layers)


def load_torch(net: Any, timed: Timed, params: Mapping[str, Any]) -> Any:
    """Return the net of `torch_net` with these parameters of jaxcnn."""
    import torch

    layers: Any = (layer for layer in net if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear))
    with torch.no_grad():
        for layer, (w, b) in zip(layers, weights(timed, params, channels_first=True), strict=True):
            layer.weight.copy_(torch.from_numpy(w.copy()))
            layer.bias.copy_(torch.from_numpy(b.copy()))
    return net


CONTENDERS: Mapping[str, Callable[[Timed], Step]] = {
    "jaxcnn": jaxcnn_step,
    "flax nnx": flax_step,
    "equinox": equinox_step,
    "keras on jax": keras_step,
    "torch": functools.partial(torch_step, channels_last=False, compiled=False),
    "torch channels-last": functools.partial(torch_step, channels_last=True, compiled=False),
    "torch.compile": functools.partial(torch_step, channels_last=False, compiled=True),
    "torch.compile channels-last": functools.partial(torch_step, channels_last=True, compiled=True),
}
"""Functions that build a training step, by name."""

IN_LOOPS = ("jaxcnn", "flax nnx", "equinox")
"""Contenders whose steps run in `jax.lax.scan`."""
