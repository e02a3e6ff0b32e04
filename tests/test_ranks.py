"""Under ``jax.numpy_rank_promotion("raise")``, which refuses what NumPy broadcasts, every function of nets runs."""

import functools

import jax
import numpy as np
import optax
import pytest

import jaxcnn
from jaxcnn import attribution

NET = jaxcnn.serial(
    jaxcnn.Conv(4, 3), jaxcnn.BatchNorm(), jaxcnn.Relu(), jaxcnn.MaxPool(2),
    jaxcnn.residual(jaxcnn.Conv(4, 3, padding="SAME")), jaxcnn.Relu(), jaxcnn.GlobalAvgPool(), jaxcnn.Dense(5),
)  # fmt: skip
#: Without batch norm, so that examples are independent.
ALONE = jaxcnn.serial(
    jaxcnn.Conv(4, 3), jaxcnn.LayerNorm(), jaxcnn.DepthwiseConv(3), jaxcnn.GroupNorm(2), jaxcnn.HiddenLayer(4, 3),
    jaxcnn.ConvTranspose(4, 2), jaxcnn.Flatten(), jaxcnn.Dense(5),
)  # fmt: skip
#: What every attribution method takes.
RELU = jaxcnn.serial(jaxcnn.Conv(4, 3), jaxcnn.Relu(), jaxcnn.MaxPool(2), jaxcnn.Flatten(), jaxcnn.Dense(5))
SHAPE = (12, 12, 2)
X = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
LABELS = np.array([0, 1, 2])
KEY = jax.random.key(0)
LOSS = jaxcnn.softmax_cross_entropy_with_integer_labels


def traced(f, net=NET):
    return jax.eval_shape(f, net.init(KEY, SHAPE))


def step():
    optimizer = optax.adam(1e-3)
    state = jaxcnn.TrainState.create(NET, optimizer, KEY, SHAPE)
    jax.eval_shape(jaxcnn.make_train_step(NET, LOSS, optimizer), state, (X, LABELS))


def of_statistics():
    params = jaxcnn.calibrate(NET, NET.init(KEY, SHAPE), [(X, LABELS)])
    jaxcnn.fold_batch_norm(NET, params)
    jax.eval_shape(lambda params: NET.apply(params, X), params)
    jaxcnn.evaluate(NET, LOSS, params, [(X, LABELS)])


def maps(method, **options):
    traced(lambda params: jaxcnn.attribute(RELU, params, X, LABELS, method=method, **options), RELU)


def curved():
    def error(params):
        return LOSS(NET.apply(params, X), LABELS).mean()

    traced(lambda params: jaxcnn.hvp(error, params, params))


CALLS = {
    "training step": step,
    "calibrate, fold_batch_norm, evaluate": of_statistics,
    "per_example_gradients": lambda: traced(lambda p: jaxcnn.per_example_gradients(ALONE, LOSS, p, X, LABELS), ALONE),
    "per_example_norms": lambda: traced(lambda p: jaxcnn.per_example_norms(ALONE, LOSS, p, X, LABELS), ALONE),
    "clipped_gradient": lambda: traced(lambda p: jaxcnn.clipped_gradient(ALONE, LOSS, p, X, LABELS, 1.0), ALONE),
    "hvp": curved,
    "gradient": functools.partial(maps, "gradient"),
    "integrated_gradients": functools.partial(maps, "integrated_gradients"),
    "smooth_grad": functools.partial(maps, "smooth_grad", key=KEY),
    "occlusion": functools.partial(maps, "occlusion", window=4),
    "grad_cam": functools.partial(maps, "grad_cam", layer="conv1"),
    "deep_lift": functools.partial(maps, "deep_lift"),
    "epsilon_plus": lambda: traced(
        lambda p: attribution.relevance(RELU, p, X, LABELS, rules=attribution.epsilon_plus()), RELU
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_rank_is_promoted(name):
    with jax.numpy_rank_promotion("raise"):
        CALLS[name]()
