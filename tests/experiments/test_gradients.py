import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcnn
from experiments import gradients, models
from experiments.models import MODELS

LOSS = jaxcnn.softmax_cross_entropy_with_integer_labels
BATCH = (
    np.random.default_rng(0).uniform(size=(4, 28, 28, 1)).astype(np.float32),
    np.array([0, 3, 9, 1], np.int32),
)


@pytest.mark.slow("compiles whole nets")
@pytest.mark.parametrize(
    "name", sorted({*MODELS} - {"resnet-gn", "small-resnet", "vgg"})
)  # their layers are in the others
def test_the_rules_of_every_model_agree_with_autodiff(name):
    large = name in ("lecture", "mlp", "lenet5")
    net = {"resnet": models.resnet(10, width=8), "unet": models.unet(10, depth=2, width=8)}.get(name) or MODELS[name](
        10
    )
    batch = BATCH if large else (BATCH[0][:, ::3, ::3], BATCH[1])
    if name == "unet":
        batch = (BATCH[0][:, :8, :8], np.arange(4 * 8 * 8, dtype=np.int32).reshape(4, 8, 8) % 10)
    params = net.init(jax.random.key(0), batch[0].shape[1:])
    differences = gradients.compare(net, LOSS, params, batch, jax.random.key(1))
    assert set(differences) == set(gradients.flatten(params))
    assert max(differences.values()) <= gradients.TOLERANCE


class WithError:
    """A net whose gradient for one parameter is too large by `error`."""

    def __init__(self, error: float) -> None:
        self.error = error

    def apply(self, params, x, *, key, rules):
        w, error = params["weight"], 0.0 if rules is jaxcnn.rules.autodiff else self.error
        # The value is w in any case; the gradient is 1 + error.
        return x @ (w + error * (w - jax.lax.stop_gradient(w))) + params["bias"]


@pytest.mark.parametrize("error", [1e-3, 0.5, -2.0])
def test_a_wrong_rule_is_detected_by_name(error):
    params = {"weight": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    batch = (np.eye(3, dtype=np.float32), np.array([0, 1, 0]))
    differences = gradients.compare(WithError(error), LOSS, params, batch, jax.random.key(0))
    assert differences["weight"] == pytest.approx(abs(error), rel=1e-2)
    assert differences["bias"] == 0


def test_a_nan_gradient_is_not_small():
    params = {"weight": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    batch = (np.eye(3, dtype=np.float32), np.array([0, 1, 0]))
    difference = gradients.compare(WithError(np.nan), LOSS, params, batch, jax.random.key(0))["weight"]
    assert not difference <= gradients.TOLERANCE


def test_gradients_that_vanish():
    zero, one = np.zeros(2, np.float32), np.ones(2, np.float32)
    assert gradients._relative(zero, zero, 0) == 0
    assert gradients._relative(one, zero, 0) == 1
    assert gradients._relative(one, zero, 4) == 0.25
    assert gradients._relative(3 * one, 2 * one, 1) == 0.5
