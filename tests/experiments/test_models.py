import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import MODELS

SHAPES = {
    "lecture": {"hidden_layer1": (5, 5, 1, 32), "hidden_layer2": (5, 5, 32, 64), "dense1": (1024, 10)},
    "mlp": {"dense1": (784, 300), "dense2": (300, 100), "dense3": (100, 10)},
    "lenet5": {
        "conv1": (5, 5, 1, 6),
        "conv2": (5, 5, 6, 16),
        "dense1": (400, 120),
        "dense2": (120, 84),
        "dense3": (84, 10),
    },
}


def test_every_model_has_its_shapes_here():
    assert set(SHAPES) == set(MODELS)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_have_the_shapes_of_the_literature(name):
    params = jax.eval_shape(lambda: MODELS[name](10).init(jax.random.key(0), (28, 28, 1)))
    assert {layer: arrays["weight"].shape for layer, arrays in params.items()} == SHAPES[name]
    assert {layer: arrays["bias"].shape for layer, arrays in params.items()} == {
        layer: shape[-1:] for layer, shape in SHAPES[name].items()
    }


@pytest.mark.slow("compiles whole nets")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("classes", [2, 10])
def test_one_logit_for_each_class(name, classes):
    net = MODELS[name](classes)
    params = net.init(jax.random.key(0), (28, 28, 1))
    images = jax.random.uniform(jax.random.key(1), (3, 28, 28, 1), jnp.float32)
    logits = net.apply(params, images)
    assert logits.shape == (3, classes)
    assert jnp.isfinite(logits).all()
    # Images are independent: a batch of one gives the same logits.
    np.testing.assert_allclose(net.apply(params, images[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


def test_only_the_lecture_net_drops_out():
    images = jnp.ones((2, 28, 28, 1), jnp.float32)
    for name, make in MODELS.items():
        net = make(10)
        params = net.init(jax.random.key(0), (28, 28, 1))
        one, other = (net.apply(params, images, key=jax.random.key(n)) for n in (1, 2))
        assert bool((one != other).any()) is (name == "lecture")
        np.testing.assert_array_equal(net.apply(params, images), net.apply(params, images))
