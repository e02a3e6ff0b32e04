"""Attribution: agreement with zennit, captum and NumPy loops; transformations; refused arguments."""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import zennit.attribution
import zennit.canonizers
import zennit.composites
from jax.sharding import NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn import (
    AdaptiveAvgPool,
    AvgPool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DepthwiseConv,
    Dropout,
    Flatten,
    GroupNorm,
    HiddenLayer,
    LayerNorm,
    MaxPool,
    Relu,
    Residual,
    Tanh,
    attribute,
    attribution,
    residual,
    rules,
    serial,
)
from jaxcnn.rules import Epsilon, ZBox, ZPlus, pass_through
from tests import as_torch
from tests.cases import compiled
from tests.checks import SPLIT_BY
from tests.compare_torch import CLOSE

with warnings.catch_warnings():  # from its dependencies
    warnings.simplefilter("ignore")
    import captum.attr

NETS = {
    "plain": serial(
        Conv(6, 3, padding=1), Relu(), MaxPool(3, 2), Conv(8, 3, stride=2, padding=1, groups=2), Tanh(), AvgPool(2),
        Flatten(), Dropout(0.5), Dense(7), Relu(), Dense(5),
    ),
    "hidden": serial(HiddenLayer(6, 3), HiddenLayer(8, 2, pool_stride=1), Flatten(), Dense(5)),
    "nested": serial(serial(Conv(6, 3), Relu(), MaxPool(2)), Conv(4, 2), Relu(), Flatten(), Dense(5)),
}  # fmt: skip
RESIDUAL = serial(Conv(4, 3), Relu(), residual(Conv(4, 3, padding=1), Relu()), MaxPool(2), Flatten(), Dense(5))
SHAPE = (12, 13, 3)
TARGET = np.array([3, 0, 4])


def drawn(net):
    """Draw parameters in float64 with nonzero biases, and inputs of both signs."""
    rng = np.random.default_rng(0)
    params = net.init(jax.random.key(1), SHAPE, jnp.float64)
    params = jax.tree.map(lambda a: a if a.ndim > 1 else 0.3 * rng.standard_normal(a.shape), params)
    return params, rng.uniform(-1, 1, (3, *SHAPE))


def heatmap(net, *, target=TARGET, **options):
    params, x = drawn(net)
    return np.asarray(compiled(functools.partial(attribute, net, **options))(params, x, target))


def in_torch(net):
    params, x = drawn(net)
    return as_torch.sequential(net, params), as_torch.channels_first(x), torch.tensor(TARGET)


# ---------------------------------------------------------------------------------------------------------------------
# zennit

COMPOSITES = {
    "epsilon_plus": (lambda net: attribution.epsilon_plus(), zennit.composites.EpsilonPlus),
    "epsilon_plus 0.1": (
        lambda net: attribution.epsilon_plus(epsilon=0.1, stabilizer=0.2),
        lambda: zennit.composites.EpsilonPlus(epsilon=0.1, stabilizer=0.2),
    ),
    "epsilon_alpha2_beta1": (lambda net: attribution.epsilon_alpha2_beta1(), zennit.composites.EpsilonAlpha2Beta1),
    "epsilon_gamma_box": (
        lambda net: attribution.epsilon_gamma_box(net, -1.0, 1.0, gamma=0.5),
        lambda: zennit.composites.EpsilonGammaBox(-1.0, 1.0, gamma=0.5),
    ),
    "epsilon_plus_flat": (attribution.epsilon_plus_flat, zennit.composites.EpsilonPlusFlat),
    "epsilon_alpha2_beta1_flat": (
        functools.partial(attribution.epsilon_alpha2_beta1_flat, epsilon=0.1, stabilizer=0.2),
        lambda: zennit.composites.EpsilonAlpha2Beta1Flat(epsilon=0.1, stabilizer=0.2),
    ),
    "excitation_backprop": (lambda net: attribution.excitation_backprop(), zennit.composites.ExcitationBackprop),
}
#: The same composites without biases.
WITHOUT_BIAS = {
    "epsilon_plus": (
        lambda net: attribution.epsilon_plus(zero_params="bias"),
        lambda: zennit.composites.EpsilonPlus(zero_params=["bias"]),
    ),
    "epsilon_gamma_box": (
        lambda net: attribution.epsilon_gamma_box(net, -1.0, 1.0, zero_params=("bias",)),
        lambda: zennit.composites.EpsilonGammaBox(-1.0, 1.0, zero_params=["bias"]),
    ),
    "epsilon_alpha2_beta1_flat": (
        functools.partial(attribution.epsilon_alpha2_beta1_flat, zero_params=["bias"]),
        lambda: zennit.composites.EpsilonAlpha2Beta1Flat(zero_params=["bias"]),
    ),
    "excitation_backprop": (
        lambda net: attribution.excitation_backprop(zero_params="bias"),
        lambda: zennit.composites.ExcitationBackprop(zero_params=["bias"]),
    ),
}


#: After folding, zennit's batch norms still divide by √(1 + ε); with this ε that is 1.
NORM = BatchNorm(eps=1e-14)
NORMED = serial(
    Conv(6, 3, padding=1, bias=False), NORM, Relu(),
    residual(Conv(6, 3, padding=1), NORM, Relu(), Conv(6, 1), NORM), Relu(), MaxPool(2),
    DepthwiseConv(3, 2), NORM, Relu(), ConvTranspose(4, 2), NORM, Relu(),
    AdaptiveAvgPool(3), Flatten(), Dense(5),
)  # fmt: skip


@pytest.mark.slow("compiles whole nets")
@pytest.mark.parametrize("composite", COMPOSITES)
def test_composites_with_batch_norm_and_sums_are_zennits(composite):
    """zennit's canonizer folds batch norm into the convolution before it, and the sum of a residual net is a module."""
    ours, theirs = COMPOSITES[composite]
    params, x = normed()
    heat = np.asarray(compiled(functools.partial(attribute, NORMED, rules=ours(NORMED)))(params, x, TARGET))
    model = as_torch.sequential(NORMED, params)
    np.testing.assert_allclose(
        as_torch.channels_last(model(as_torch.channels_first(x))), compiled(NORMED.apply)(params, x), rtol=1e-10
    )
    composite = theirs()
    composite.canonizers = [zennit.canonizers.SequentialMergeBatchNorm()]
    one_hot = torch.nn.functional.one_hot(torch.tensor(TARGET), 5)
    with zennit.attribution.Gradient(model, composite) as attributor:
        _, expected = attributor(as_torch.channels_first(x), lambda y: y * one_hot)
    expected = as_torch.channels_last(expected)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(heat, expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())


@functools.cache
def normed():
    """Return parameters with nontrivial statistics, and inputs."""
    rng = np.random.default_rng(3)
    _, x = drawn(NORMED)
    params = NORMED.init(jax.random.key(1), SHAPE, jnp.float64)
    params = jax.tree.map(lambda a: a if a.ndim > 1 else a + 0.3 * rng.standard_normal(a.shape), params)
    return jaxcnn.calibrate(NORMED, params, [(x, None)]), x


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("composite", COMPOSITES)
def test_composites_are_zennits(net, composite):
    agrees_with_zennit(NETS[net], *COMPOSITES[composite])


@pytest.mark.parametrize("composite", WITHOUT_BIAS)
def test_composites_without_biases_are_zennits(composite):
    agrees_with_zennit(NETS["plain"], *WITHOUT_BIAS[composite])


def agrees_with_zennit(net, ours, theirs):
    heat = heatmap(net, rules=ours(net))
    model, x, target = in_torch(net)
    one_hot = torch.nn.functional.one_hot(target, 5)
    with zennit.attribution.Gradient(model, theirs()) as attributor:
        _, expected = attributor(x, lambda y: y * one_hot)
    expected = as_torch.channels_last(expected)
    np.testing.assert_allclose(heat, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


def test_the_first_convolution_has_the_box():
    """The mapping starts with the box rule, under the name of the first convolution at any depth."""
    for net, first in (("plain", "conv1"), ("hidden", "hidden_layer1"), ("nested", "serial1/conv1")):
        rules = attribution.epsilon_gamma_box(NETS[net], 0.0, 1.0)
        assert next(iter(rules)) == first
        assert rules[first] == ZBox(0.0, 1.0)
    assert not any(isinstance(key, str) for key in attribution.epsilon_gamma_box(serial(Dense(3)), 0.0, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# captum


def guided_relu(call, delta):
    """δ_x = δ ∘ [x > 0] ∘ [δ > 0]."""
    return (jnp.where(delta > 0, call.exact(delta)[0], 0),)


def deconv_relu(call, delta):
    """δ_x = δ ∘ [δ > 0]."""
    return (jnp.maximum(delta, 0),)


def by_captum(method, net, *built, **options):
    model, x, target = in_torch(net)
    with warnings.catch_warnings():  # captum warns that it sets hooks
        warnings.simplefilter("ignore")
        return as_torch.channels_last(method(model, *(model.get_submodule(b) for b in built)).attribute(
            x, target=target, **options
        ))  # fmt: skip


def near(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7 * np.abs(theirs).max())


@pytest.mark.parametrize("net", ["plain", "nested"])
@pytest.mark.parametrize(
    ("rule", "method"), [(guided_relu, captum.attr.GuidedBackprop), (deconv_relu, captum.attr.Deconvolution)]
)
def test_rectified_gradients_are_captums(net, rule, method):
    near(heatmap(NETS[net], method="gradient", rules={Relu: rule}), by_captum(method, NETS[net]))


@pytest.mark.parametrize("net", [*NETS.values(), RESIDUAL], ids=[*NETS, "residual"])
def test_gradients_are_captums(net):
    near(heatmap(net), by_captum(captum.attr.Saliency, net, abs=False))
    near(heatmap(net, method="gradient_times_input"), by_captum(captum.attr.InputXGradient, net))


@pytest.mark.parametrize("net", ["plain", "hidden"])
def test_integrated_gradients_are_captums(net):
    near(heatmap(NETS[net], method="integrated_gradients"), by_captum(captum.attr.IntegratedGradients, NETS[net]))
    baseline = np.random.default_rng(8).uniform(-1, 1, (1, *SHAPE))
    ours = heatmap(NETS[net], method="integrated_gradients", baseline=baseline, steps=9)
    first = as_torch.channels_first(baseline)
    near(ours, by_captum(captum.attr.IntegratedGradients, NETS[net], baselines=first, n_steps=9))


@pytest.mark.parametrize(
    ("net", "layer"),
    [
        (NETS["plain"], "conv1"), (NETS["plain"], "max_pool1"), (NETS["plain"], "conv2"), (NETS["plain"], "avg_pool1"),
        (NETS["hidden"], "hidden_layer2"), (NETS["nested"], "serial1/relu1"), (NETS["nested"], "serial1"),
        (RESIDUAL, "residual1/conv1"), (RESIDUAL, "residual1"), (RESIDUAL, "relu1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam_is_captums(net, layer, relu):
    name = layer.replace("/", ".")
    theirs = by_captum(captum.attr.LayerGradCam, net, name, relu_attributions=relu)[..., 0]
    ours = heatmap(net, method="grad_cam", layer=layer, relu=relu)
    assert np.abs(theirs).max() > 0
    near(ours, theirs)


@pytest.mark.parametrize(("window", "stride"), [(4, None), (3, 2), ((5, 2), (3, 1))])
def test_occlusion_is_captums(window, stride):
    net = NETS["hidden"]
    k = (window, window) if isinstance(window, int) else window
    s = k if stride is None else (stride, stride) if isinstance(stride, int) else stride
    theirs = by_captum(
        captum.attr.Occlusion, net, sliding_window_shapes=(3, *k), strides=(3, *s), baselines=0.25
    )  # fmt: skip
    near(heatmap(net, method="occlusion", window=window, stride=stride, value=0.25), theirs)


UNPOOLED = {
    "relu": serial(Conv(4, 3), Relu(), Conv(4, 3, stride=2), Relu(), Flatten(), Dense(5)),
    "tanh, average": serial(Conv(4, 3), Tanh(), AvgPool(3, 2), Flatten(), Dense(6), Relu(), Dense(5)),
}


@pytest.mark.parametrize("net", UNPOOLED)
def test_deep_lift_is_captums(net):
    """Nets without max pooling only: there captum's maps do not sum to the difference, by its own convergence delta."""
    reference = np.random.default_rng(8).uniform(-1, 1, (1, *SHAPE))
    theirs = by_captum(
        captum.attr.DeepLift, UNPOOLED[net], baselines=as_torch.channels_first(reference).expand(3, -1, -1, -1)
    )
    near(heatmap(UNPOOLED[net], method="deep_lift", reference=reference), theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Oracles


@pytest.mark.parametrize("net", [*NETS.values(), RESIDUAL], ids=[*NETS, "residual"])
def test_deep_lift_sums_to_the_difference(net):
    params, x = drawn(net)
    reference = np.random.default_rng(8).uniform(-1, 1, x.shape)
    heat = heatmap(net, method="deep_lift", reference=reference)
    rise = np.asarray(net.apply(params, x) - net.apply(params, reference))
    np.testing.assert_allclose(heat.sum((1, 2, 3)), rise[range(3), TARGET], rtol=1e-9)


def test_integrated_gradients_sum_to_the_difference():
    net = serial(Conv(4, 3), Tanh(), AvgPool(2), Flatten(), Dense(5))
    params, x = drawn(net)
    rise = np.asarray(net.apply(params, x) - net.apply(params, 0 * x))
    heat = heatmap(net, method="integrated_gradients", steps=40)
    np.testing.assert_allclose(heat.sum((1, 2, 3)), rise[range(3), TARGET], rtol=1e-9)


def test_occlusion_is_a_loop():
    """Every window is covered in turn, and the last windows of a row or column extend beyond the border."""
    net = serial(Flatten(), Dense(5))
    params, x = drawn(net)
    y = np.asarray(net.apply(params, x))[range(3), TARGET]
    total, times = np.zeros(x.shape), np.zeros(x.shape)
    for i in range(0, 12, 3):
        for j in range(0, 13, 3):
            if i + 4 - 12 < 3 and j + 4 - 13 < 3:
                covered = x.copy()
                covered[:, i : i + 4, j : j + 4] = 0.5
                fall = y - np.asarray(net.apply(params, covered))[range(3), TARGET]
                total[:, i : i + 4, j : j + 4] += fall[:, None, None, None]
                times[:, i : i + 4, j : j + 4] += 1
    assert times.min() == 1
    assert times.max() == 4
    np.testing.assert_allclose(heatmap(net, method="occlusion", window=4, stride=3, value=0.5), total / times, **CLOSE)


def test_smooth_grad_is_a_mean_over_noise_of_the_promised_size():
    """The result is the mean in a loop with the documented keys, which for y = x²·w is 2 w (x + σ ξ̄)."""
    net = NETS["plain"]
    params, x = drawn(net)
    x[1] *= 3
    key = jax.random.key(5)
    sigma = 0.2 * (x.max((1, 2, 3)) - x.min((1, 2, 3)))[:, None, None, None]
    draws = [np.asarray(jax.random.normal(k, x.shape, x.dtype)) for k in jax.random.split(key, 6)]
    gradient = compiled(functools.partial(attribute, net))
    expected = np.mean([gradient(params, x + sigma * xi, TARGET) for xi in draws], 0)
    smooth = compiled(functools.partial(attribute, net, method="smooth_grad", samples=6, noise=0.2))
    np.testing.assert_allclose(smooth(params, x, TARGET, key=key), expected, **CLOSE)


@dataclasses.dataclass(frozen=True)
class Square(jaxcnn.Layer):
    def apply(self, params, x, *, key=None, rule=None):
        return x * x


def test_smooth_grads_statistics():
    """For y = x², the mean of 2(x + σξ) over n samples has mean 2x and deviation 2σ/√n."""
    net = serial(Square(), Flatten(), Dense(5))
    params, x = drawn(net)
    params["dense1"]["weight"] = np.ones_like(params["dense1"]["weight"])
    smooth = functools.partial(attribute, net, method="smooth_grad", samples=64, noise=0.1)
    heat = compiled(smooth)(params, x, TARGET, key=jax.random.key(0))
    sigma = 0.1 * (x.max((1, 2, 3)) - x.min((1, 2, 3)))[:, None, None, None]
    standard = (heat - 2 * x) / (2 * sigma / 8)
    assert abs(standard.mean()) < 4 / np.sqrt(standard.size)
    assert abs(standard.std() - 1) < 4 / np.sqrt(2 * standard.size)


def test_grad_cam_of_a_dense_layer_after_global_average_is_cam():
    """Zhou et al. 2016: with global average pooling and one dense layer, α is w / pixels."""
    net = serial(Conv(4, 3), Relu(), AvgPool((10, 11)), Flatten(), Dense(5))
    params, x = drawn(net)
    a = np.asarray(serial(Conv(4, 3), Relu()).apply(params, x))
    expected = np.einsum("nijc,cn->nij", a, params["dense1"]["weight"][:, TARGET]) / 110
    heat = heatmap(net, method="grad_cam", layer="relu1", relu=False)
    np.testing.assert_allclose(heat, expected, **CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# Transformations

WAYS = {
    "gradient": {},
    "gradient_times_input": {},
    "integrated_gradients": {"steps": 3},
    "smooth_grad": {"samples": 2, "key": jax.random.key(0)},
    "grad_cam": {"layer": "hidden_layer1"},
    "occlusion": {"window": 6},
    "relevance": {"rules": attribution.epsilon_gamma_box(NETS["hidden"], -1.0, 1.0)},
    "deep_lift": {"reference": 0.1},
}


def test_every_method_has_a_row():
    assert set(WAYS) == set(attribution.METHODS)


@pytest.mark.slow("compiles whole nets for two devices")
@pytest.mark.parametrize("method", WAYS)
def test_jit_vmap_and_a_split_batch(method):
    net = NETS["hidden"]
    params, x = drawn(net)
    x, target = np.concatenate([x, x[:1] / 2]), np.append(TARGET, 1)
    run = functools.partial(attribute, net, params, method=method, **WAYS[method])
    expected = compiled(run)(x, target)
    assert expected.shape == ((4, 5, 5) if method == "grad_cam" else x.shape)
    assert expected.dtype == np.float64
    if method != "smooth_grad":  # its noise is drawn for the whole batch
        mapped = compiled(jax.vmap(run))(x[:, None], target[:, None])
        np.testing.assert_allclose(mapped[:, 0], expected, **CLOSE)
    for axis_type in SPLIT_BY:
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
        split = NamedSharding(mesh, PartitionSpec("batch"))
        parted = compiled(run)(*jax.device_put((x, target), split))
        np.testing.assert_allclose(parted, expected, **CLOSE)


@pytest.mark.parametrize("method", WAYS)
def test_one_target_for_all_and_float32(method):
    net = NETS["hidden"]
    params, x = jax.tree.map(lambda a: a.astype(np.float32), drawn(net))
    run = compiled(functools.partial(attribute, net, method=method, **WAYS[method]))
    heat = run(params, x, 2)
    assert heat.dtype == np.float32
    np.testing.assert_array_equal(heat, run(params, x, np.array([2, 2, 2])))


def test_without_a_name_relevance_if_there_are_rules():
    net = NETS["hidden"]
    np.testing.assert_array_equal(heatmap(net), heatmap(net, method="gradient"))
    rules = attribution.epsilon_plus()
    np.testing.assert_array_equal(heatmap(net, rules=rules), heatmap(net, method="relevance", rules=rules))


def test_relevance_starts_as_the_output():
    """Gradients with rules start as 1."""
    net, rules = NETS["hidden"], attribution.epsilon_plus()
    params, x = drawn(net)
    y = np.asarray(net.apply(params, x))[range(3), TARGET]
    ones = heatmap(net, method="gradient", rules=rules)
    np.testing.assert_allclose(heatmap(net, rules=rules), y[:, None, None, None] * ones, **CLOSE)


def test_dropout_is_off():
    net = serial(Flatten(), Dropout(0.5), Dense(5))
    params, _ = drawn(net)
    np.testing.assert_allclose(heatmap(net).reshape(3, -1), params["dense1"]["weight"].T[TARGET], **CLOSE)


@pytest.mark.slow("compiles every method")
def test_a_traced_target_out_of_range_is_nan():
    """Targets that cannot be validated before the computation do not fail silently."""
    for method, options in WAYS.items():
        heat = heatmap(NETS["hidden"], target=np.array([3, 5, -1]), method=method, **options)
        assert np.isnan(heat).reshape(3, -1).all(1).tolist() == [False, True, True], method


SMALL = serial(Conv(2, 2), Relu(), MaxPool(2), Flatten(), Dense(3))
SMALL_WAYS = {
    "gradient": {},
    "gradient_times_input": {},
    "integrated_gradients": {"steps": 2},
    "smooth_grad": {"samples": 2, "key": jax.random.key(0)},
    "grad_cam": {"layer": "conv1"},
    "occlusion": {"window": 3, "stride": 2},
    "deep_lift": {"reference": 0.1},
    **{
        name: {"rules": make(SMALL)}
        for name, make in {
            "epsilon_plus": lambda net: attribution.epsilon_plus(),
            "epsilon_plus_flat": attribution.epsilon_plus_flat,
            "epsilon_alpha2_beta1": lambda net: attribution.epsilon_alpha2_beta1(),
            "epsilon_alpha2_beta1_flat": attribution.epsilon_alpha2_beta1_flat,
            "epsilon_gamma_box": lambda net: attribution.epsilon_gamma_box(net, -1.0, 1.0),
            "excitation_backprop": lambda net: attribution.excitation_backprop(),
        }.items()
    },
}


@functools.cache
def small():
    """One of the images is blank."""
    rng = np.random.default_rng(2)
    params = SMALL.init(jax.random.key(1), (5, 5, 1), jnp.float64)
    return params, rng.uniform(-1, 1, (3, 5, 5, 1)) * np.array([1, 0, 1])[:, None, None, None]


@pytest.mark.parametrize("method", SMALL_WAYS)
def test_known_targets_are_known_inside_jit_and_scan_and_no_nan_is_made(method):
    """Targets closed over, computed inside and passed in give the same finite map, even under `jax.debug_nans`."""
    params, x = small()
    target = jnp.array([2, 0, 1])
    options = {"method": method if method in attribution.METHODS else "relevance", **SMALL_WAYS[method]}
    run = functools.partial(attribute, SMALL, params, x, **options)
    with jax.debug_nans(True):
        of_argument = jax.jit(run)(target)
        eagerly = run(target)
        closed_over = jax.jit(lambda scale: run(target) * scale)(1.0)
        computed = jax.jit(lambda params: run((SMALL.apply(params, x) * 0 + jax.nn.one_hot(target, 3)).argmax(-1)))(
            params
        )
    assert np.isfinite(of_argument).all()
    assert np.abs(of_argument).max() > 0
    for heat in (eagerly, closed_over, computed):
        np.testing.assert_allclose(heat, of_argument, rtol=1e-9, atol=1e-12)


def test_gradients_for_targets_of_every_int_dtype():
    """There are 300 classes, more than a byte can count; the oracle is the weight of a dense layer."""
    net = serial(Dense(300))
    w = np.random.default_rng(0).standard_normal((4, 300))
    params, x = {"dense1": {"weight": w, "bias": np.zeros(300)}}, np.ones((3, 4))
    traced = jax.jit(functools.partial(attribute, net))
    for kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        target = np.array([3, 43, 99], kind)
        np.testing.assert_allclose(attribute(net, params, x, target), w.T[[3, 43, 99]])
        np.testing.assert_allclose(traced(params, x, target), w.T[[3, 43, 99]])
    for target in (np.int64(7), 7, [7, 7, 7], [jnp.int32(7), 7, np.int8(7)], jnp.uint8(7)):
        np.testing.assert_allclose(attribute(net, params, x, target), w.T[[7, 7, 7]])
    each = jax.vmap(lambda x, target: attribute(net, params, x[None], target)[0])(x, np.array([3, 43, 99], np.uint8))
    np.testing.assert_allclose(each, w.T[[3, 43, 99]])
    for target in (np.array([3, -1, -125], np.int8), np.array([3, 300, 2**40 + 3])):
        assert np.isnan(traced(params, x, target)).all(1).tolist() == [False, True, True]


def test_occlusion_holds_one_window_at_a_time():
    """The 841 windows of a 32×32 image fit into the memory of a few images."""
    net = serial(Flatten(), Dense(3))
    params, x = net.init(jax.random.key(0), (32, 32, 1)), jnp.ones((1, 32, 32, 1), jnp.float32)
    run = jax.jit(functools.partial(attribute, net, method="occlusion", window=4, stride=1))
    compiled = run.lower(params, x, 2).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * x.nbytes


def test_a_window_whose_output_is_not_finite_marks_its_own_pixels():
    net = serial(Flatten(), Dense(3))
    params = {"dense1": {"weight": np.ones((16, 3)), "bias": np.zeros(3)}}
    x = np.ones((1, 4, 4, 1))
    x[0, 0, 0] = np.inf
    heat = attribute(net, params, x, 2, method="occlusion", window=2)[0, :, :, 0]
    assert np.isinf(heat[:2, :2]).all()
    assert np.isnan(heat[:, 2:]).all()  # inf − inf


# ---------------------------------------------------------------------------------------------------------------------
# Refused arguments

LISTED = "gradient, gradient_times_input, integrated_gradients, smooth_grad, grad_cam, occlusion, relevance, deep_lift"
DTYPE = "attribute: target must be of an integer dtype"
RANGE = "attribute: target must be in 0 … 4"
REFUSED = [
    # error, message, options
    (ValueError, f"{RANGE}, got 5 … 5", {"target": 5}),
    (ValueError, f"{RANGE}, got -1 … 4", {"target": np.array([0, -1, 4])}),
    (TypeError, f"{DTYPE}, got float64", {"target": np.zeros(3)}),
    (ValueError, "attribute: target must be an int or 3 of them, one for each example, got shape (2,)",
     {"target": np.zeros(2, int)}),
    (ValueError, f"attribute: method must be one of {LISTED}, got 'saliency'", {"method": "saliency"}),
    (ValueError, "attribute: layer must be the name of a layer, operation or tap, got 'hidden_layer3'; the nearest are "
     "hidden_layer2, hidden_layer1, dense1", {"method": "grad_cam", "layer": "hidden_layer3"}),
    (ValueError, "attribute: layer must be one whose output is (N, *spatial, C), got 'dense1' with output (3, 5)",
     {"method": "grad_cam", "layer": "dense1"}),
    (ValueError, "attribute: steps must be an int >= 1, got 0", {"method": "integrated_gradients", "steps": 0}),
    (TypeError, "attribute: steps must be an int >= 1, got 2.0", {"method": "integrated_gradients", "steps": 2.0}),
    (ValueError, "attribute: samples must be an int >= 1, got -1",
     {"method": "smooth_grad", "key": jax.random.key(0), "samples": -1}),
    (ValueError, "attribute: baseline must be of a shape that broadcasts to (3, 12, 13, 3), got (2, 12, 13, 3)",
     {"method": "integrated_gradients", "baseline": np.zeros((2, *SHAPE))}),
    (TypeError, "attribute: key must be one typed key from jax.random.key(seed), got 0",
     {"method": "smooth_grad", "key": 0}),
    (ValueError, "attribute: stride must be at most the window (2, 2), so that no pixel is left out, got (3, 3)",
     {"method": "occlusion", "window": 2, "stride": 3}),
    (ValueError, "rules: a key must be the name of a layer, got 'conv1'; the nearest are dense1, flatten1, "
     "hidden_layer1",
     {"rules": {"conv1": ZPlus()}}),
    (TypeError, "attribute: rules must be given for method 'relevance', got none", {"method": "relevance"}),
    (TypeError, "attribute: layer must be given for method 'grad_cam', got none", {"method": "grad_cam"}),
    (TypeError, "attribute: key must be given for method 'smooth_grad', got none", {"method": "smooth_grad"}),
    (TypeError, "attribute: options of method 'gradient' must be among rules, got steps", {"steps": 3}),
    (TypeError, "attribute: options of method 'occlusion' must be among window, stride, value, got rules",
     {"method": "occlusion", "rules": {}}),
    (ValueError, f"attribute: method must be one of {LISTED}, got ['gradient']", {"method": ["gradient"]}),
    (TypeError, "attribute: rules must be a rule or a mapping from layers to rules, got 3",
     {"method": "gradient", "rules": 3}),
    (TypeError, "attribute: relu must be a bool, got 'no'", {"method": "grad_cam", "layer": "dense1", "relu": "no"}),
    (ValueError, "attribute: noise must be a finite number >= 0, got -0.1",
     {"method": "smooth_grad", "key": jax.random.key(0), "noise": -0.1}),
    (TypeError, "attribute: reference must be of a real dtype, got complex128",
     {"method": "deep_lift", "reference": np.ones(SHAPE, complex)}),
    (TypeError, f"{DTYPE}, got bool", {"target": True}),
    (TypeError, f"{DTYPE}, got bool", {"target": np.array([True, False, True])}),
    (TypeError, f"{DTYPE}, got float64", {"target": 2.0}),
    (TypeError, f"{DTYPE}, got float64", {"target": [0, 1.0, 2]}),
    (TypeError, "attribute: target must be an array, got None", {"target": None}),
    (TypeError, "attribute: target must be an array, got '2'", {"target": "2"}),
    (ValueError, f"{RANGE}, got {2**40} … {2**40}", {"target": 2**40}),
    (ValueError, f"{RANGE}, got -1 … -1", {"target": -1}),
    (ValueError, f"{RANGE}, got 0 … 255", {"target": np.array([0, 255, 2], np.uint8)}),
    (ValueError, "attribute: target must be an int or 3 of them, one for each example, got shape (3, 1)",
     {"target": np.zeros((3, 1), int)}),
    (ValueError, "attribute: target must be an int or 3 of them, one for each example, got shape (2,)",
     {"target": [1, 2], "method": "integrated_gradients"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "options"), REFUSED)
def test_refused_arguments(error, message, options):
    net = NETS["hidden"]
    params, x = drawn(net)
    with pytest.raises(error, match=f"^{re.escape(message)}(?=\n|$)"):
        attribute(net, params, x, **{"target": 2, **options})


NO_STATISTICS = (
    "batch_norm: mean and var must be given for rule {}, because statistics of the batch mix examples (see "
    "jaxcnn.calibrate), got neither"
)
NO_RULE = "attribute: rules must be given for each op whose gradient is not a relevance, got none for"
COMPOSED = "attribute: net must be a composition of ops with a rule for"
AFFINE = "conv, depthwise_conv, conv_transpose, dense"
UNFIT = [
    # message, layers before a Dense, rules, method
    (f"batch_norm1: {NO_STATISTICS.format(Epsilon())}", (Conv(2, 3), BatchNorm(), Flatten()),
     attribution.epsilon_plus(), "relevance"),
    (f"residual1/norm: {NO_STATISTICS.format(Epsilon())}", (residual(BatchNorm(name="norm")), Flatten()),
     attribution.epsilon_plus(), "relevance"),
    (f"batch_norm1: {NO_STATISTICS.format('rescale')}", (Conv(2, 3), BatchNorm(), Flatten()), None, "deep_lift"),
    (f"{NO_RULE} layer_norm1, a layer_norm", (LayerNorm(), Flatten()), attribution.epsilon_plus(), "relevance"),
    (f"{NO_RULE} inner/norm, a group_norm", (serial(GroupNorm(groups=1, name="norm"), name="inner"), Flatten()),
     attribution.epsilon_plus(), "relevance"),
    (f"{NO_RULE} residual1, an add", (residual(Conv(3, 1)), Flatten()),
     {Conv: ZPlus(), Dense: Epsilon()}, "relevance"),
    (f"{COMPOSED} relevance, got mul at square1, which depends on x", (Square(), Flatten()),
     attribution.epsilon_plus(), "relevance"),
    ("conv2: conv: rule must be one that fits conv, got guided_relu, which fits relu, hidden_layer",
     (Conv(2, 3), Conv(2, 3), Flatten()), {"conv2": rules.guided_relu}, "gradient"),
    (f"residual1: add: rule must be one that fits add, got ZPlus(stabilizer=1e-06), which fits {AFFINE}, hidden_layer; "
     "Epsilon and Flat fit add", (residual(Relu()), Flatten()), {Residual: ZPlus(), Dense: Epsilon()}, "relevance"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "layers", "given", "method"), UNFIT)
def test_errors_of_rules_name_the_layer(message, layers, given, method):
    net = serial(*layers, Dense(5))
    params, x = drawn(net)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}(?=\n|$)"):
        jax.eval_shape(lambda: attribute(net, params, x, 2, method=method, **({"rules": given} if given else {})))


def test_a_net_that_is_a_residual_needs_a_rule_for_its_sum():
    """Its gradient would give x to both branches, which doubles the relevance."""
    net = residual(Dense(3, bias=False))
    params = net.init(jax.random.key(0), (3,))
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    with pytest.raises(ValueError, match=f"^{re.escape(NO_RULE)} add1, an add$"):
        attribute(net, params, x, 1, rules={Dense: Epsilon(1e-14)})
    heat = attribute(net, params, x, 1, rules={Dense: Epsilon(1e-14), jaxcnn.Residual: Epsilon(1e-14)})
    np.testing.assert_allclose(heat.sum(1), net.apply(params, x)[:, 1], rtol=1e-4)


@pytest.mark.parametrize("key", [BatchNorm, "batch_norm1"])
def test_a_norm_passes_relevance_on(key):
    net = serial(Dense(4), BatchNorm(), Relu(), Dense(5))
    params = net.init(jax.random.key(0), (6,))
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    params = jaxcnn.calibrate(net, params, [(x, None)])
    # R of the last two layers' input is R of the first layer's output.
    z = serial(Dense(4), BatchNorm()).apply(params, x)
    r = attribute(serial(Relu(), Dense(5)), {"dense1": params["dense2"]}, z, 2, rules=attribution.epsilon_plus())
    dense = functools.partial(jaxcnn.dense, w=params["dense1"]["weight"], b=params["dense1"]["bias"], rule=Epsilon())
    (expected,) = jax.vjp(dense, x)[1](r)
    heat = attribute(net, params, x, 2, rules={key: pass_through, **attribution.epsilon_plus()})
    np.testing.assert_allclose(heat, expected, rtol=1e-4, atol=1e-6)
    # A batch norm without a rule is part of the layer before it.
    folded, of_folded = jaxcnn.fold_batch_norm(net, params)
    named = attribute(net, params, x, 2, rules={"batch_norm1": None, **attribution.epsilon_plus()})
    np.testing.assert_array_equal(named, attribute(net, params, x, 2, rules=attribution.epsilon_plus()))
    expected = attribute(folded, of_folded, x, 2, rules=attribution.epsilon_plus())
    np.testing.assert_allclose(named, expected, rtol=1e-5, atol=1e-7)


def test_a_batch_norm_that_has_a_rule_is_not_folded():
    """A batch norm with a rule for its type or name is not folded; one without a neighbor gets the ε rule."""
    net = serial(Relu(), BatchNorm(), Relu(), Flatten(), Dense(5))
    params, x = drawn(net)
    params = jaxcnn.calibrate(net, params, [(x, None)])

    def seeing(ops):
        def rule(call, delta):
            ops.add(call.name)
            return (delta, *(None,) * (len(call.inputs) - 1))

        return rule

    others = {Dense: Epsilon(), Relu: pass_through}
    run = functools.partial(attribute, net, params, x, 2)
    seen = {"batch_norm1": set(), BatchNorm: set()}
    by_name, by_type = (run(rules={key: seeing(ops), **others}) for key, ops in seen.items())
    assert not np.allclose(by_type, run(rules=others))
    np.testing.assert_array_equal(by_name, by_type)
    assert list(seen.values()) == [{"batch_norm"}] * 2
    np.testing.assert_array_equal(run(rules=others), run(rules={BatchNorm: Epsilon(), **others}))


def test_other_refused_arguments():
    net = NETS["hidden"]
    params, x = drawn(net)
    with pytest.raises(TypeError, match=r"^attribute: x must be of a floating dtype, got int64"):
        attribute(net, params, x.astype(int), 2)
    with pytest.raises(ValueError, match=r"^attribute: x must be \(N, …\), got shape \(3,\)"):
        attribute(net, params, x[:, 0, 0, 0], 2)
    headless = serial(*(layer for _, layer in net.layers[:2]))
    with pytest.raises(
        ValueError,
        match=r"^attribute: the result of net must be \(3, classes\), a row for each example, got shape \(3, ",
    ):
        attribute(headless, params, x, 2)
    with pytest.raises(TypeError, match=r"^ZBox: low must be given, as in ZBox\(0.0, 1.0\), got None$"):
        attribution.epsilon_gamma_box(net)
    with pytest.raises(TypeError, match=r"^attribute: rules must be given for method 'relevance', got None"):
        attribution.relevance(net, params, x, 2, rules=None)


@dataclasses.dataclass(frozen=True)
class Last(jaxcnn.Layer):
    """Ends a net with `change` applied to its outputs."""

    change: object = None

    def apply(self, params, x, *, key=None, rule=None):
        return self.change(x)


ROWS = "attribute: the result of net must be (3, classes), a row for each example, got shape"
ENDS = [
    (ValueError, f"{ROWS} (1, 5)", lambda y: y.mean(0, keepdims=True)),
    (ValueError, f"{ROWS} (6, 5)", lambda y: jnp.concatenate([y, y])),
    (ValueError, f"{ROWS} (3,)", lambda y: y[:, 0]),
    (TypeError, "attribute: the result of net must be of a floating dtype, got int64", lambda y: y.astype(int)),
    (TypeError, "attribute: the result of net must be one array (N, classes), got tuple", lambda y: (y, y)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), ENDS)
def test_refused_outputs(error, message, change):
    net = serial(Flatten(), Dense(5), Last(change))
    params, x = drawn(serial(Flatten(), Dense(5)))  # a net with a tuple of outputs has no shape
    for method in ("gradient", "occlusion", "deep_lift"):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            attribute(net, params, x, 2, method=method)


# ---------------------------------------------------------------------------------------------------------------------
# Layers and nets defined outside the library


class Projected(jaxcnn.Serial):
    """``layers(x) + x·w``: a residual shortcut that changes the number of channels."""

    def init(self, key, shape, dtype=jnp.float32):
        w = jax.random.normal(jax.random.fold_in(key, 7), (1, 1, shape[-1], 4), dtype)
        return {**super().init(key, shape, dtype), "shortcut": {"weight": w}}

    def apply(self, params, x, *, key=None, rules=None):
        y = super().apply(params, x, key=key, rules=rules)
        return self.ends(y + jaxcnn.conv(x, params["shortcut"]["weight"]))

    def ends(self, y):
        return y


class RectifiedProjected(Projected):
    """Adds a ReLU that gets no rule."""

    def ends(self, y):
        return jaxcnn.relu(y)


class RectifiedEnd(jaxcnn.Serial):
    """A net followed by a ReLU that gets no rule."""

    def apply(self, params, x, **options):
        return jaxcnn.relu(super().apply(params, x, **options))


class Twice(jaxcnn.Serial):
    """Calls its layers in a custom way."""

    def apply(self, params, x, *, key=None, rules=None):
        for name, layer in self.layers:
            x = x + layer.apply(params.get(name, {}), x)
        return x


@dataclasses.dataclass(frozen=True)
class Bottleneck(jaxcnn.Layer):
    """Two dense products with nested parameters; `ruled` selects those that get the rule."""

    ruled: tuple = (True, True)
    between: object = staticmethod(lambda x: x)

    def init(self, key, shape, dtype=jnp.float32):
        w = jax.random.normal(key, (shape[-1], 4), dtype)
        return {"down": {"weight": w}, "up": {"weight": w.T}}

    def apply(self, params, x, *, key=None, rule=None):
        down, up = (rule if ruled else None for ruled in self.ruled)
        return jaxcnn.dense(
            self.between(jaxcnn.dense(x, params["down"]["weight"], rule=down)), params["up"]["weight"], rule=up
        )


INNER = (("conv1", Conv(4, 3, padding=1)), ("relu1", Relu()))
ENDING = (("flatten1", Flatten()), ("dense1", Dense(5)))
PROJECTED = jaxcnn.Serial((("conv1", Conv(2, 3)), ("block1", Projected(INNER)), *ENDING))
RECTIFIED = jaxcnn.Serial((("conv1", Conv(2, 3)), ("block1", RectifiedProjected(INNER)), *ENDING))

#: Nets with layers of others, all of whose steps DeepLIFT has rules for.
SEEN_THROUGH = {
    "a linear shortcut": PROJECTED,
    "and a ReLU": RECTIFIED,
    "a ReLU at the end": RectifiedEnd(ENDING),
    "products without a rule": serial(Flatten(), Bottleneck(ruled=(False, False)), Relu(), Dense(5)),
    "tanh between them": serial(Flatten(), Bottleneck(between=jnp.tanh), Dense(5)),
}


def in_plain_jax(params, x, *, rectified=False, shift=0.0):
    """Compute `PROJECTED` in stock JAX, with a shift after the block's convolution."""

    def conv(x, w, padding):
        return jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = conv(x, params["conv1"]["weight"], "VALID") + params["conv1"]["bias"]
    block = params["block1"]
    y = conv(x, block["conv1"]["weight"], "SAME") + block["conv1"]["bias"] + shift
    x = jax.nn.relu(y) + conv(x, block["shortcut"]["weight"], "VALID")
    x = jax.nn.relu(x) if rectified else x
    return x.reshape(x.shape[0], -1) @ params["dense1"]["weight"] + params["dense1"]["bias"], y


@pytest.mark.slow("compiles whole nets")
@pytest.mark.parametrize("net", [PROJECTED, RECTIFIED], ids=["linear shortcut", "and a ReLU"])
def test_gradients_and_grad_cam_inside_a_net_with_its_own_apply(net):
    params, x = drawn(net)
    plain = functools.partial(in_plain_jax, rectified=net is RECTIFIED)
    chosen = np.eye(5)[TARGET]
    expected = jax.grad(lambda x: (chosen * plain(params, x)[0]).sum())(x)
    np.testing.assert_allclose(heatmap(net), expected, **CLOSE)
    a = plain(params, x)[1]
    delta = jax.grad(lambda shift: (chosen * plain(params, x, shift=shift)[0]).sum())(jnp.zeros_like(a))
    heat = heatmap(net, method="grad_cam", layer="block1/conv1", relu=False)
    np.testing.assert_allclose(heat, (a * delta.mean((1, 2), keepdims=True)).sum(-1), **CLOSE)


@pytest.mark.parametrize("net", SEEN_THROUGH)
def test_deep_lift_through_layers_of_others_sums_to_the_difference(net):
    net = SEEN_THROUGH[net]
    params, x = drawn(net)
    rise = np.asarray(compiled(net.apply)(params, x) - compiled(net.apply)(params, 0 * x + 0.3))
    heat = heatmap(net, method="deep_lift", reference=0.3)
    np.testing.assert_allclose(heat.sum((1, 2, 3)), rise[range(3), TARGET], rtol=1e-9)


@pytest.mark.parametrize("net", [PROJECTED, RECTIFIED], ids=["linear shortcut", "and a ReLU"])
def test_composites_see_the_ops_in_a_net_with_its_own_apply(net):
    """A composite has rules for its sum and for the convolution of its shortcut, as in any function."""
    params, x = drawn(net)
    plain = functools.partial(in_plain_jax, rectified=net is RECTIFIED)
    composite = attribution.epsilon_plus()
    expected = compiled(functools.partial(attribute, lambda p, x: plain(p, x)[0], rules=composite))(params, x, TARGET)
    np.testing.assert_allclose(heatmap(net, rules=composite), expected, rtol=1e-9, atol=1e-12)


def test_a_relu_without_a_rule_at_the_end_of_a_net_with_its_own_apply():
    params, x = drawn(RectifiedEnd(ENDING))
    plain = serial(Flatten(), Dense(5), Relu())
    expected = attribute(plain, params, x, TARGET, rules={Dense: Epsilon()})
    np.testing.assert_array_equal(attribute(RectifiedEnd(ENDING), params, x, TARGET, rules=EVERY), expected)


def test_grad_cam_of_a_layer_that_a_net_calls_itself():
    """Without the tap of `apply_layer`, its op has the name of the net, its kind and a count."""
    twice, plain = (jaxcnn.Serial((("block1", kind((("conv1", Conv(3, 1)),))), *ENDING)) for kind in (Twice, Residual))
    params, x = drawn(plain)
    run = functools.partial(attribute, method="grad_cam", layer="block1/conv1", relu=False)
    np.testing.assert_allclose(run(twice, params, x, TARGET), run(plain, params, x, TARGET), **CLOSE)


def test_relevance_through_a_layer_with_nested_parameters():
    """With a rule for its type, the layer's two products are equivalent to two dense layers in sequence."""
    net, plain = serial(Flatten(), Bottleneck(), Dense(5)), serial(Flatten(), Dense(4), Dense(468), Dense(5))
    params, x = drawn(net)
    zeros = {"bias": np.zeros(4)}, {"bias": np.zeros(468)}
    down, up = (params["bottleneck1"][name] | bias for name, bias in zip(("down", "up"), zeros, strict=True))
    plain_params = {"dense1": down, "dense2": up, "dense3": params["dense1"]}
    given = {Bottleneck: Epsilon(), Dense: Epsilon()}
    expected = attribute(plain, plain_params, x, TARGET, rules={Dense: Epsilon()})
    np.testing.assert_allclose(heatmap(net, rules=given), expected, rtol=1e-9)
    np.testing.assert_allclose(heatmap(net, rules=Epsilon()), expected, rtol=1e-9)


def replaced(layer, apply):
    """Return the layer with another ``apply`` on this instance only."""
    object.__setattr__(layer, "apply", functools.partial(apply, layer))
    return layer


EVERY = {jaxcnn.Layer: Epsilon()}
SQUARE = serial(Square(), Flatten(), Dense(5))
INNER_SQUARE = serial(serial(Square(), name="inner"), Flatten(), Dense(5))
UNRULED = serial(Flatten(), Bottleneck(ruled=(False, False)), Dense(5))
TWISTED = type("Twisted", (Relu,), {"apply": Square.apply})(name="relu1")
AT_RELU = "got mul at relu1, which depends on x"
REFUSED_CUSTOM = [
    (f"{COMPOSED} DeepLIFT, got mul at square1, which depends on x", SQUARE, {"method": "deep_lift"}),
    (f"{COMPOSED} DeepLIFT, got mul at inner/square1, which depends on x", INNER_SQUARE, {"method": "deep_lift"}),
    (f"{COMPOSED} relevance, got mul at square1, which depends on x", SQUARE, {"rules": EVERY}),
    # ops that receive no rule
    (f"{NO_RULE} block1/conv2, a conv", PROJECTED, {"rules": {Conv: ZPlus(), Dense: Epsilon()}}),
    (f"{NO_RULE} block1/conv1, a conv", PROJECTED, {"rules": {"block1": None, **attribution.epsilon_plus()}}),
    (f"{NO_RULE} bottleneck1/dense1, a dense", UNRULED, {"rules": EVERY}),
    (f"{NO_RULE} conv1, a conv", PROJECTED, {"rules": {"conv1": None, **attribution.epsilon_plus()}}),
    (f"{NO_RULE} conv1, a conv", PROJECTED,
     {"rules": {lambda name, layer: name == "conv1": None, **attribution.epsilon_plus()}}),
    (f"{NO_RULE} residual1, an add", serial(residual(Conv(3, 1)), Flatten(), Dense(5)), {"rules": Epsilon()}),
    (f"{NO_RULE} dense1, a dense", serial(Flatten(), Dense(5)), {"rules": rules.autodiff}),
    (f"{COMPOSED} relevance, {AT_RELU}", serial(TWISTED, Flatten(), Dense(5)), {"rules": {Dense: Epsilon()}}),
    # an apply of an instance
    (f"{COMPOSED} relevance, {AT_RELU}", serial(replaced(Relu(), Square.apply), Flatten(), Dense(5)), {"rules": EVERY}),
    (f"{COMPOSED} DeepLIFT, {AT_RELU}", serial(replaced(Relu(), Square.apply), Flatten(), Dense(5)),
     {"method": "deep_lift"}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "net", "options"), REFUSED_CUSTOM)
def test_refused_custom_layers(message, net, options):
    x = jnp.ones((3, *SHAPE))
    params = net.init(jax.random.key(0), SHAPE, jnp.float64)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}(?=\n|$)"):
        jax.eval_shape(lambda: attribute(net, params, x, 2, **options))


class Halved(jaxcnn.Residual):
    """A subclass of Residual with a separate rule."""


def test_a_rule_for_one_kind_of_residual_leaves_the_other_kind_alone():
    def doubled(call, delta):
        return tuple(2 * part for part in call.exact(delta))

    inner = jaxcnn.serial(jaxcnn.Dense(3)).layers
    net = jaxcnn.serial(jaxcnn.residual(jaxcnn.Dense(3)), Halved(inner), jaxcnn.Dense(2))
    params = net.init(jax.random.key(0), (3,), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, 3))
    result = jaxcnn.attribute(net, params, x, 1, method="gradient", rules={Halved: doubled})
    expected = jax.vjp(lambda x: net.apply(params, x, rules={Halved: doubled}), x)[1](
        jax.nn.one_hot(np.array([1, 1]), 2, dtype=x.dtype)
    )[0]
    plain = jaxcnn.attribute(net, params, x, 1, method="gradient")
    np.testing.assert_allclose(result, expected, rtol=1e-10)
    np.testing.assert_allclose(result, 2 * plain, rtol=1e-10)  # the δ of its sum is doubled once
