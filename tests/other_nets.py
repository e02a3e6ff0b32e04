"""Nets of other libraries for tests of `--model module:function`."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxcnn

NUMBER = 3


def ours(classes):
    return jaxcnn.serial(jaxcnn.Flatten(), jaxcnn.Dense(classes))


def normalized(classes):
    layers = (jaxcnn.Conv(4, 3, stride=2), jaxcnn.BatchNorm(), jaxcnn.Relu(), jaxcnn.GlobalAvgPool())
    return jaxcnn.serial(*layers, jaxcnn.Dense(classes))


class Linen(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Conv(4, (3, 3), strides=2)(x)))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, classes, shape, rngs):
        self.conv = nnx.Conv(shape[-1], 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.dense = nnx.Linear(4, classes, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.drop(nnx.relu(self.norm(self.conv(x)))).mean((1, 2)))


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    drop: eqx.nn.Dropout
    dense: eqx.nn.Linear

    def __init__(self, classes, shape, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(shape[-1], 4, 3, stride=2, key=first)
        self.drop = eqx.nn.Dropout(0.2)
        self.dense = eqx.nn.Linear(4, classes, key=second)

    def __call__(self, x, *, key=None):
        return self.dense(self.drop(jax.nn.relu(self.conv(x)).mean((1, 2)), key=key))


class Normalized(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    dense: eqx.nn.Linear

    def __init__(self, classes, shape, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(shape[-1], 4, 3, stride=2, key=first)
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
        self.dense = eqx.nn.Linear(4, classes, key=second)

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state)
        return self.dense(jax.nn.relu(x).mean((1, 2))), state


def stateful(classes, shape, key):
    return eqx.nn.make_with_state(Normalized)(classes, shape, key)


def pair(classes):
    def init(key, x):
        first, second = jax.random.split(key)
        kernel = 0.3 * jax.random.normal(first, (3, 3, x.shape[-1], 4))
        return {"conv": {"w": kernel}, "out": [0.3 * jax.random.normal(second, (4, classes)), jnp.zeros(classes)]}

    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, params["conv"]["w"], (2, 2), "SAME", dimension_numbers=numbers)
        return jax.nn.relu(y).mean((1, 2)) @ params["out"][0] + params["out"][1]

    return init, apply


def seven():
    return jaxcnn.serial(jaxcnn.Flatten(), jaxcnn.Dense(7))


def image_to_image(classes):
    return nn.Conv(classes, (3, 3))


def too_large():
    return jaxcnn.serial(jaxcnn.Conv(4, 99))


def without_parameters():
    return (lambda key, x: {}), (lambda params, x: x.mean((1, 2)))


def of_integers():
    return (lambda key, x: {"w": jnp.ones((64, 4), int)}), (lambda params, x: x.reshape(len(x), -1) @ params["w"])


def no_net():
    return NUMBER


def other_arguments(width, classes):
    return ours(classes)
