import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import CLASSIFIERS, MODELS
from jaxcnn import Dropout

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


PARAMETERS = {
    "small": 79_426,
    "small-resnet": 464_130,
    "resnet": 11_172_810,
    "resnet-gn": 11_172_810,
    "vgg": 1_736_906,
    "mobile": 40_282,
}
UNET = 482_602


def test_every_model_has_its_shapes_or_its_size_here():
    assert {*SHAPES, *PARAMETERS} == set(CLASSIFIERS)
    assert {*CLASSIFIERS, "unet"} == set(MODELS)
    assert MODELS["unet"](10).summary((32, 32, 1)).parameters == UNET


@pytest.mark.parametrize("name", PARAMETERS)
def test_nets_for_images_of_any_size(name):
    """ResNet-18 has 11.2 million parameters with 10 classes (He et al. 2015, with the 3×3 stem of small images)."""
    rows = MODELS[name](10).summary((28, 28, 1)).rows
    assert sum(row.parameters for row in rows) == PARAMETERS[name]
    assert rows[-1].output_shape == (10,)
    others = {"small": (7, 7, 96), "small-resnet": (7, 7, 128), "vgg": (4, 4, 256), "mobile": (7, 7, 160)}
    before = others.get(name, (4, 4, 512))
    pooled = next(n for n, row in enumerate(rows) if row.op == "GlobalAvgPool")
    assert rows[pooled - 1].output_shape == before


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


@pytest.mark.slow("runs all nets")
def test_the_nets_that_drop_out():
    images = jnp.ones((2, 28, 28, 1), jnp.float32)
    dropping = {name for name, make in MODELS.items() for _, layer in make(10).walk() if isinstance(layer, Dropout)}
    assert dropping == {"lecture", "small", "small-resnet", "vgg"}
    for name in SHAPES:
        net = MODELS[name](10)
        params = net.init(jax.random.key(0), (28, 28, 1))
        one, other = (net.apply(params, images, key=jax.random.key(n)) for n in (1, 2))
        assert bool((one != other).any()) is (name == "lecture")
        np.testing.assert_array_equal(net.apply(params, images), net.apply(params, images))
