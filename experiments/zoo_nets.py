"""Nets of other libraries with random weights, each as a loss function of parameters, state and a batch."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Net:
    """A net with its weights: ``loss(training, params, state, x, labels)`` returns the loss and the new state."""

    loss: Callable[[bool, Any, Any, Any, Any], tuple[Any, Any]]
    params: Any
    state: Any
    #: Shape of one image.
    shape: tuple[int, ...]

    def batch(self, size: int, dtype: Any, seed: int = 0) -> tuple[Any, Any]:
        """Return random images and labels."""
        generator = np.random.default_rng(seed)
        x = generator.standard_normal((size, *self.shape)).astype(dtype)
        return jax.device_put(x), jax.device_put(generator.integers(0, 10, size))


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Return the mean of −log p[label], in JAX's own functions."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Keras


def keras_net(name: str, dtype: str, side: int = 64) -> Net:
    """Return a model of `keras.applications`."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    from keras.src.backend.common import dtypes

    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    # Keras on JAX computes batch norm in float32 where arrays are float64, which hides differences.
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.utils.set_random_seed(0)
    shape = (side, side, 3)
    build = getattr(keras.applications, name)
    model = build(weights=None, input_shape=shape, classes=CLASSES, classifier_activation=None)

    def loss(training: bool, params: Any, state: Any, x: Any, labels: Any) -> tuple[Any, Any]:
        logits, state = model.stateless_call(params, state, x, training=training)
        return cross_entropy(logits, labels), state

    params = [variable.value for variable in model.trainable_variables]
    return Net(loss, params, [variable.value for variable in model.non_trainable_variables], shape)


# ---------------------------------------------------------------------------------------------------------------------
# Haiku


def haiku_net(name: str, dtype: str) -> Net:
    """Return a net of `haiku.nets`."""
    import haiku as hk

    def forward(x: Any, training: bool) -> Any:
        return getattr(hk.nets, name)(num_classes=CLASSES)(x, is_training=training)

    net: Any = hk.without_apply_rng(hk.transform_with_state(forward))
    shape = (64, 64, 3)
    params, state = jax.jit(net.init, static_argnums=2)(jax.random.key(0), jnp.ones((1, *shape), dtype), True)
    params = _without_zeros(params)

    def loss(training: bool, params: Any, state: Any, x: Any, labels: Any) -> tuple[Any, Any]:
        logits, state = net.apply(params, state, x, training)
        return cross_entropy(logits, labels), state

    return Net(loss, params, state, shape)


def _without_zeros(params: Any) -> Any:
    """Return parameters with random numbers instead of zeros, which would make the gradients of earlier layers 0."""
    generator = np.random.default_rng(1)

    def replaced(a: Any) -> Any:
        return a if a.any() else jnp.asarray(generator.normal(0, 0.1, a.shape), a.dtype)

    return jax.tree.map(replaced, params)


# ---------------------------------------------------------------------------------------------------------------------
# Small residual nets with 3 blocks of 64 channels, without or with groups


def linen_net(groups: int, dtype: str) -> Net:
    """Return a residual net in Flax linen, with batch norm."""
    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, training: bool) -> Any:
            norm = functools.partial(nn.BatchNorm, use_running_average=not training)
            y = nn.relu(norm()(nn.Conv(64, (3, 3), feature_group_count=groups, use_bias=False)(x)))
            y = norm()(nn.Conv(64, (3, 3), feature_group_count=groups, use_bias=False)(y))
            return nn.relu(x + y)

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any, training: bool) -> Any:
            x = nn.max_pool(nn.relu(nn.Conv(64, (3, 3))(x)), (2, 2), (2, 2))
            for _ in range(3):
                x = Block()(x, training)
            return nn.Dense(CLASSES)(x.mean((1, 2)))

    model, shape = ResNet(), (64, 64, 3)
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), jnp.ones((1, *shape), dtype), True)
    variables = jax.tree.map(lambda a: a.astype(dtype), variables)

    def loss(training: bool, params: Any, state: Any, x: Any, labels: Any) -> tuple[Any, Any]:
        variables = {"params": params, "batch_stats": state}
        logits, updates = model.apply(variables, x, training, mutable=["batch_stats"] if training else [])
        return cross_entropy(logits, labels), updates.get("batch_stats", state)

    return Net(loss, variables["params"], variables["batch_stats"], shape)


def nnx_net(groups: int, dtype: str) -> Net:
    """Return a residual net in Flax NNX, with group norm."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            conv = functools.partial(nnx.Conv, 64, 64, (3, 3), feature_group_count=groups, param_dtype=dtype, rngs=rngs)
            norm = functools.partial(nnx.GroupNorm, 64, num_groups=8, param_dtype=dtype, rngs=rngs)
            self.conv1, self.conv2, self.norm1, self.norm2 = conv(), conv(), norm(), norm()

        def __call__(self, x: Any) -> Any:
            y = nnx.relu(self.norm1(self.conv1(x)))
            return nnx.relu(x + self.norm2(self.conv2(y)))

    class ResNet(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.stem = nnx.Conv(3, 64, (3, 3), param_dtype=dtype, rngs=rngs)
            self.block1, self.block2, self.block3 = Block(rngs), Block(rngs), Block(rngs)
            self.dense = nnx.Linear(64, CLASSES, param_dtype=dtype, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.max_pool(nnx.relu(self.stem(x)), (2, 2), (2, 2))
            x = self.block3(self.block2(self.block1(x)))
            return self.dense(x.mean((1, 2)))

    graph, params = nnx.split(ResNet(nnx.Rngs(0)))

    def loss(training: bool, params: Any, state: Any, x: Any, labels: Any) -> tuple[Any, Any]:
        return cross_entropy(nnx.merge(graph, params)(x), labels), state

    return Net(loss, params, (), (64, 64, 3))


def equinox_net(groups: int, dtype: str) -> Net:
    """Return a residual net in Equinox, with group norm, under `jax.vmap`."""
    import equinox as eqx

    keys = iter(jax.random.split(jax.random.key(0), 8))

    class Block(eqx.Module):
        convs: list[Any]
        norms: list[Any]

        def __init__(self) -> None:
            conv = functools.partial(eqx.nn.Conv2d, 64, 64, 3, padding=1, groups=groups, dtype=dtype)
            self.convs = [conv(key=next(keys)) for _ in range(2)]
            self.norms = [eqx.nn.GroupNorm(8, 64, dtype=dtype) for _ in range(2)]

        def __call__(self, x: Any) -> Any:
            y = jax.nn.relu(self.norms[0](self.convs[0](x)))
            return jax.nn.relu(x + self.norms[1](self.convs[1](y)))

    class ResNet(eqx.Module):
        stem: Any
        pool: Any
        blocks: list[Any]
        dense: Any

        def __init__(self) -> None:
            self.stem = eqx.nn.Conv2d(3, 64, 3, padding=1, dtype=dtype, key=next(keys))
            self.pool = eqx.nn.MaxPool2d(2, 2)
            self.blocks = [Block() for _ in range(3)]
            self.dense = eqx.nn.Linear(64, CLASSES, dtype=dtype, key=next(keys))

        def __call__(self, x: Any) -> Any:
            x = self.pool(jax.nn.relu(self.stem(x)))
            for block in self.blocks:
                x = block(x)
            return self.dense(x.mean((1, 2)))

    params, static = eqx.partition(ResNet(), eqx.is_array)

    def loss(training: bool, params: Any, state: Any, x: Any, labels: Any) -> tuple[Any, Any]:
        return cross_entropy(jax.vmap(eqx.combine(params, static))(x), labels), state

    return Net(loss, params, (), (3, 64, 64))


def _keras(name: str, side: int = 64) -> Callable[[str], Net]:
    return lambda dtype: keras_net(name, dtype, side)


#: Net by name, for a dtype. The sides of the images are 64, or the smallest that the net accepts.
NETS: Mapping[str, Callable[[str], Net]] = {
    "MobileNetV2": _keras("MobileNetV2"),
    "MobileNetV3Small": _keras("MobileNetV3Small"),
    "EfficientNetV2B0": _keras("EfficientNetV2B0"),
    "ConvNeXtTiny": _keras("ConvNeXtTiny"),
    "DenseNet121": _keras("DenseNet121"),
    "ResNet50": _keras("ResNet50"),
    "ResNet50V2": _keras("ResNet50V2"),
    "Xception": _keras("Xception", 71),
    "InceptionV3": _keras("InceptionV3", 75),
    "NASNetMobile": _keras("NASNetMobile"),
    "VGG16": _keras("VGG16"),
    "haiku-ResNet18": functools.partial(haiku_net, "ResNet18"),
    "haiku-MobileNetV1": functools.partial(haiku_net, "MobileNetV1"),
    "linen": functools.partial(linen_net, 1),
    "linen-groups": functools.partial(linen_net, 8),
    "nnx": functools.partial(nnx_net, 1),
    "nnx-groups": functools.partial(nnx_net, 8),
    "equinox": functools.partial(equinox_net, 1),
    "equinox-groups": functools.partial(equinox_net, 8),
}
