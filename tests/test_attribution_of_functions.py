"""Attribution of functions: a linen ResNet and a Keras net against zennit and captum, any spelling, refused steps."""

import functools
import os
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import zennit.attribution
import zennit.canonizers
import zennit.composites
import zennit.layer
from jax import lax

import jaxcnn
from jaxcnn import attribute, attribution, rules
from jaxcnn.rules import Epsilon, Gamma, ZPlus, pass_through
from tests.cases import compiled
from tests.compare_torch import CLOSE

with warnings.catch_warnings():  # from its dependencies
    warnings.simplefilter("ignore")
    import captum.attr

SHAPE = (12, 12, 3)
TARGET = np.array([3, 0, 4])
#: After folding, zennit's batch norms still divide by √(1 + ε); with this ε that is 1.
EPS = 1e-14


# ---------------------------------------------------------------------------------------------------------------------
# Nets of others, and the same in PyTorch


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=EPS, param_dtype=jnp.float64)
        conv = functools.partial(nn.Conv, param_dtype=jnp.float64)
        y = nn.relu(norm()(conv(self.features, (3, 3), use_bias=False)(x)))
        y = norm()(conv(self.features, (3, 3))(y))
        if x.shape != y.shape:
            x = norm(name="shortcut_norm")(conv(self.features, (1, 1), use_bias=False, name="shortcut")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    pool: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), strides=2, padding=((1, 1), (1, 1)), param_dtype=jnp.float64)(x)
        x = nn.BatchNorm(use_running_average=True, epsilon=EPS, param_dtype=jnp.float64)(x)
        x = nn.relu(x)
        if self.pool:
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = Block(6)(x)
        x = Block(8)(x)
        return nn.Dense(5, param_dtype=jnp.float64)(x.mean((1, 2)))


class Sum(torch.nn.Module):
    """Two branches and their sum, which is a module, as zennit expects it."""

    def __init__(self, branch, shortcut):
        super().__init__()
        self.branch, self.shortcut, self.total = branch, shortcut, zennit.layer.Sum()

    def forward(self, x):
        return self.total(torch.stack([self.shortcut(x), self.branch(x)], -1))


def with_weights(module, *arrays):
    """Return the module with weight and bias, or with scale, bias, mean and var of a batch norm."""
    names = ("weight", "bias", "running_mean", "running_var")
    state = {name: torch.tensor(np.asarray(a)) for name, a in zip(names, arrays, strict=False) if a is not None}
    module.double().load_state_dict(state, strict=False)
    return module


def torch_conv(w, b=None, **options):
    w = np.moveaxis(np.asarray(w), (-1, -2), (0, 1))
    conv = torch.nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], bias=b is not None, **options)
    return with_weights(conv, w, b)


def torch_norm(scale, bias, mean, var):
    return with_weights(torch.nn.BatchNorm2d(len(scale), eps=EPS), scale, bias, mean, var)


def torch_dense(w, b):
    return with_weights(torch.nn.Linear(*np.shape(w)), np.asarray(w).T, b)


def in_torch(stem, blocks, dense, pool):
    """Return stem, blocks of branch and shortcut, global average and dense layer as one module."""
    parts = [*stem, torch.nn.ReLU(), *([torch.nn.MaxPool2d(2)] if pool else [])]
    for branch, shortcut in blocks:
        parts += [Sum(torch.nn.Sequential(*branch), torch.nn.Sequential(*shortcut)), torch.nn.ReLU()]
    return torch.nn.Sequential(*parts, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), dense).double().eval()


@functools.cache
def linen(pool):
    """Return a function of parameters and x, its parameters, and the module."""
    rng = np.random.default_rng(0)
    net = ResNet(pool)
    variables = net.init(jax.random.key(0), jnp.ones((1, *SHAPE)))
    variables = jax.tree.map(lambda a: a if a.ndim > 1 else jnp.asarray(rng.uniform(0.5, 1.5, a.shape)), variables)
    p, stats = variables["params"], variables["batch_stats"]

    def conv(at, **options):
        return torch_conv(at["kernel"], at.get("bias"), **options)

    def norm(at, stats):
        return torch_norm(at["scale"], at["bias"], stats["mean"], stats["var"])

    def block(name):
        at, stat = p[name], stats[name]
        branch = (
            conv(at["Conv_0"], padding=1), norm(at["BatchNorm_0"], stat["BatchNorm_0"]), torch.nn.ReLU(),
            conv(at["Conv_1"], padding=1), norm(at["BatchNorm_1"], stat["BatchNorm_1"]),
        )  # fmt: skip
        if "shortcut" not in at:
            return branch, ()
        return branch, (conv(at["shortcut"]), norm(at["shortcut_norm"], stat["shortcut_norm"]))

    stem = conv(p["Conv_0"], stride=2, padding=1), norm(p["BatchNorm_0"], stats["BatchNorm_0"])
    dense = torch_dense(p["Dense_0"]["kernel"], p["Dense_0"]["bias"])
    return net.apply, variables, in_torch(stem, [block("Block_0"), block("Block_1")], dense, pool)


@functools.cache
def keras(pool):
    """Return a function of parameters and x, its parameters, and the module."""
    os.environ.setdefault("KERAS_BACKEND", "jax")  # before the import
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)  # otherwise the kernels differ in each process
    layers, rng, made = keras.layers, np.random.default_rng(0), {}

    def layer(kind, name, *args, **options):
        made[name] = getattr(layers, kind)(*args, dtype="float64", name=name, **options)
        return made[name]

    def normed(name, x, *args, **options):
        x = layer("Conv2D", name, *args, padding="same", **options)(x)
        return layer("BatchNormalization", f"{name}_norm", epsilon=EPS)(x)

    def built():
        start = keras.Input(SHAPE, dtype="float64")
        x = layer("ReLU", "stem_relu")(normed("stem", start, 6, 3))
        x = layer("MaxPooling2D", "pool", 2)(x) if pool else x
        y = layer("Activation", "relu", "relu")(normed("first", x, 8, 3, use_bias=False))
        y = layer("Dropout", "dropout", 0.5)(normed("second", y, 8, 3))
        x = layer("Activation", "last", "relu")(layer("Add", "sum")([normed("shortcut", x, 8, 1), y]))
        return keras.Model(start, layer("Dense", "dense", 5)(layer("GlobalAveragePooling2D", "mean")(x)))

    with jax.legacy_prng_key("allow"):
        model = built()
    for variable in model.variables:
        if len(variable.shape) == 1 and "seed" not in variable.path:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))

    def weights(name):
        return [np.asarray(variable.value) for variable in made[name].weights]

    def modules(name):
        return torch_conv(*weights(name), padding="same"), torch_norm(*weights(f"{name}_norm"))

    block = (*modules("first"), torch.nn.ReLU(), *modules("second")), modules("shortcut")
    module = in_torch(modules("stem"), [block], torch_dense(*weights("dense")), pool)
    params = [[v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)]

    def fun(params, x):
        with jax.legacy_prng_key("allow"):  # the dropout makes one
            return model.stateless_call(*params, x, training=False)[0]

    return fun, params, module


NETS = {"linen": linen, "keras": keras}
#: Keras computes its batch norms in float32.
DIGITS = {"linen": 1e-7, "keras": 1e-5}


def images():
    return np.random.default_rng(1).uniform(-1, 1, (3, *SHAPE))


def channels_first(x):
    return torch.tensor(np.moveaxis(x, -1, 1))


def heatmap(net, pool=True, target=TARGET, **options):
    fun, params, _ = NETS[net](pool)
    return np.asarray(compiled(functools.partial(attribute, fun, **options))(params, images(), target))


def near(net, ours, theirs, rounding=0.0):
    rtol = DIGITS[net]
    theirs = np.moveaxis(theirs.detach().numpy(), 1, -1)
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max() + rounding)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_both_are_the_same_net(net, pool):
    fun, params, module = NETS[net](pool)
    with torch.no_grad():
        expected = module(channels_first(images())).numpy()
    result = jax.jit(fun)(params, images())
    np.testing.assert_allclose(result, expected, rtol=DIGITS[net], atol=1e-6 * np.abs(expected).max())


# ---------------------------------------------------------------------------------------------------------------------
# zennit

COMPOSITES = {
    "epsilon_plus": (lambda fun: attribution.epsilon_plus(), zennit.composites.EpsilonPlus),
    "epsilon_plus 0.1": (
        lambda fun: attribution.epsilon_plus(epsilon=0.1, stabilizer=0.2),
        lambda: zennit.composites.EpsilonPlus(epsilon=0.1, stabilizer=0.2),
    ),
    "epsilon_plus_flat": (attribution.epsilon_plus_flat, zennit.composites.EpsilonPlusFlat),
    "epsilon_alpha2_beta1": (lambda fun: attribution.epsilon_alpha2_beta1(), zennit.composites.EpsilonAlpha2Beta1),
    "epsilon_alpha2_beta1_flat": (
        attribution.epsilon_alpha2_beta1_flat, zennit.composites.EpsilonAlpha2Beta1Flat,
    ),
    "epsilon_gamma_box": (
        lambda fun: attribution.epsilon_gamma_box(fun, -1.0, 1.0, gamma=0.5),
        lambda: zennit.composites.EpsilonGammaBox(-1.0, 1.0, gamma=0.5),
    ),
    "excitation_backprop": (lambda fun: attribution.excitation_backprop(), zennit.composites.ExcitationBackprop),
    "without biases": (
        lambda fun: attribution.epsilon_plus(zero_params="bias"),
        lambda: zennit.composites.EpsilonPlus(zero_params=["bias"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("net", NETS)
def test_composites_are_zennits(net, composite):
    """zennit's canonizer folds a batch norm into the convolution before it."""
    ours, theirs = COMPOSITES[composite]
    fun, _, module = NETS[net](True)
    heat = heatmap(net, rules=ours(fun))
    composite = theirs()
    composite.canonizers = [zennit.canonizers.SequentialMergeBatchNorm()]
    one_hot = torch.nn.functional.one_hot(torch.tensor(TARGET), 5)
    with zennit.attribution.Gradient(module, composite) as attributor:
        _, expected = attributor(channels_first(images()), lambda y: y * one_hot)
    near(net, heat, expected)


# ---------------------------------------------------------------------------------------------------------------------
# captum


def by_captum(method, net, *layer, pool=True, **options):
    *_, module = NETS[net](pool)
    with warnings.catch_warnings():  # captum warns that it sets hooks
        warnings.simplefilter("ignore")
        explained = method(module, *(module.get_submodule(name) for name in layer))
        return explained.attribute(channels_first(images()), target=torch.tensor(TARGET), **options)


@pytest.mark.parametrize("net", NETS)
def test_gradients_are_captums(net):
    near(net, heatmap(net), by_captum(captum.attr.Saliency, net, abs=False))
    near(net, heatmap(net, method="gradient_times_input"), by_captum(captum.attr.InputXGradient, net))
    integrated = heatmap(net, method="integrated_gradients", steps=9)
    near(net, integrated, by_captum(captum.attr.IntegratedGradients, net, n_steps=9))


@pytest.mark.parametrize(
    ("rule", "method"),
    [(rules.guided_relu, captum.attr.GuidedBackprop), (rules.deconv_relu, captum.attr.Deconvolution)],
)
@pytest.mark.parametrize("net", NETS)
def test_rectified_gradients_are_captums(net, rule, method):
    near(net, heatmap(net, method="gradient", rules={jaxcnn.relu: rule}), by_captum(method, net))


#: The last ReLU; in the module, those of the stem and the sums are numbered.
LAST = {"linen": ("ResNet/Block_1/relu2", "7"), "keras": ("last", "5")}
FIRST = {"linen": ("ResNet/relu1", "2"), "keras": ("stem_relu", "2")}


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layers", [FIRST, LAST])
@pytest.mark.parametrize("net", NETS)
def test_grad_cam_is_captums(net, layers, relu):
    ours, theirs = layers[net]
    heat = heatmap(net, method="grad_cam", layer=ours, relu=relu)
    near(net, heat[..., None], by_captum(captum.attr.LayerGradCam, net, theirs, relu_attributions=relu))


@pytest.mark.parametrize("net", NETS)
def test_occlusion_is_captums(net):
    theirs = by_captum(captum.attr.Occlusion, net, sliding_window_shapes=(3, 4, 4), strides=(3, 4, 4), baselines=0.25)
    # The map is a difference of two outputs, which have only the digits of float32 if Keras computes batch norms.
    fun, params, _ = NETS[net](True)
    rounding = {"linen": 0.0, "keras": 2 * np.finfo(np.float32).eps}[net] * np.abs(fun(params, images())).max()
    near(net, heatmap(net, method="occlusion", window=4, value=0.25), theirs, rounding)


@pytest.mark.parametrize("net", NETS)
def test_deep_lift_is_captums(net):
    """Nets without max pooling: there captum's maps do not sum to the difference, by its own convergence delta."""
    reference = np.random.default_rng(8).uniform(-1, 1, (1, *SHAPE))
    baselines = channels_first(reference).expand(3, -1, -1, -1)
    heat = heatmap(net, pool=False, method="deep_lift", reference=reference)
    near(net, heat, by_captum(captum.attr.DeepLift, net, pool=False, baselines=baselines))


@pytest.mark.parametrize("net", NETS)
def test_deep_lift_sums_to_the_difference(net):
    fun, params, _ = NETS[net](True)
    rise = np.asarray(jax.jit(lambda x: fun(params, x) - fun(params, 0 * x + 0.3))(images()))
    heat = heatmap(net, method="deep_lift", reference=0.3)
    # Keras computes batch norms in float32, and the difference of two outputs near 1 cancels digits.
    rtol, atol = {"linen": (1e-8, 0), "keras": (1e-5, 5e-7)}[net]
    np.testing.assert_allclose(heat.sum((1, 2, 3)), rise[range(3), TARGET], rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------------------------------------------
# Plain functions, in other spellings


def conv(x, w, layout="NHWC", **options):
    kernel = "HWIO" if layout == "NHWC" else "OIHW"
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=(layout, kernel, layout), **options)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


P = {
    "w": random(3, 3, 3, 6), "b": random(6, seed=1), "a": random(6, seed=2), "c": random(6, seed=3),
    "out": random(6, 5, seed=4),
}  # fmt: skip


def folded(p, x):
    """The function that the others below are in other words."""
    y = conv(x, p["w"] * p["a"]) + (p["b"] * p["a"] + p["c"])
    return jax.nn.relu(y).mean((1, 2)) @ p["out"]


def scaled(p, x):
    return jax.nn.relu((conv(x, p["w"]) + p["b"]) * p["a"] + p["c"]).mean((1, 2)) @ p["out"]


def divided(p, x):
    y = p["b"] - -conv(x, p["w"])
    return jax.nn.relu((y + p["c"] / p["a"]) / (1 / p["a"])).mean((1, 2)) @ p["out"]


def repeated(p, x):
    """The parameters have the shape of y, and a tap is inside the chain."""
    y = jaxcnn.tap("y", conv(x, p["w"]) + p["b"])
    a, c = (jnp.broadcast_to(p[name], y.shape) for name in "ac")
    return jnp.maximum(y * a + c, 0).mean((1, 2)) @ p["out"]


def channels_second(p, x):
    x, w = jnp.moveaxis(x, -1, 1), jnp.transpose(p["w"], (3, 2, 0, 1))
    y = conv(x, w, "NCHW") + p["b"][:, None, None]
    y = jax.nn.relu(y * p["a"][:, None, None] + p["c"][:, None, None])
    return jnp.einsum("nc,cd->nd", y.mean((2, 3)), p["out"])


def by_the_library(p, x):
    y = jaxcnn.conv(x, p["w"], p["b"], padding="SAME")
    y = jaxcnn.batch_norm(y, p["a"] * np.sqrt(2.0), p["c"] + p["a"] * 0.5, jnp.full(6, 0.5), jnp.full(6, 2.0), eps=0.0)
    return jaxcnn.dense(jaxcnn.global_avg_pool(jaxcnn.relu(y)), p["out"])


def checkpointed(p, x):
    return jax.checkpoint(lambda x: jax.jit(scaled)(p, x))(x)


def vmapped(p, x):
    def single(x):
        y = (conv(x[None], p["w"])[0] + p["b"]) * p["a"] + p["c"]
        return jax.nn.relu(y).mean((0, 1)) @ p["out"]

    return jax.vmap(single)(x)


SPELLINGS = [scaled, divided, repeated, channels_second, by_the_library, checkpointed, vmapped]


@pytest.mark.parametrize("fun", SPELLINGS)
def test_a_chain_of_affine_steps_is_one_affine_op(fun):
    x = images()[:, :6, :6]
    composite = {jaxcnn.conv: Gamma(0.3), jaxcnn.dense: ZPlus(), jaxcnn.global_avg_pool: Epsilon()}
    expected = attribute(folded, P, x, TARGET, rules=composite)
    np.testing.assert_allclose(attribute(fun, P, x, TARGET, rules=composite), expected, **CLOSE)


def test_a_batch_norm_over_another_dim_is_no_part_of_the_convolution():
    """The channels of the convolution are the second dim; those of the batch norm are the last one."""
    statistics = {"m": random(6, seed=6), "v": random(6, seed=7) ** 2}

    def fun(p, x):
        y = conv(jnp.moveaxis(x, -1, 1), jnp.transpose(p["w"], (3, 2, 0, 1)), "NCHW")
        return jaxcnn.batch_norm(y, p["a"], p["c"], p["m"], p["v"]).mean((2, 3)) @ p["out"]

    x, composite = images()[:, :6, :6], attribution.epsilon_plus()
    expected = attribute(fun, P | statistics, x, 2, rules={jaxcnn.batch_norm: Epsilon(), **composite})
    np.testing.assert_allclose(attribute(fun, P | statistics, x, 2, rules=composite), expected, **CLOSE)


def test_other_affine_steps_have_the_epsilon_rule():
    """Without a convolution before it, y = a ∘ x + c divides R by the shares of a ∘ x and c; a scale passes R on."""

    def fun(p, x):
        return (x * 2 - p["c"]) @ p["out"]

    x = random(2, 6)
    y = x * 2 - P["c"]
    r = y * P["out"].T[[2, 2]]
    heat = attribute(fun, P, x, 2, rules={jaxcnn.dense: Epsilon(1e-12)})
    np.testing.assert_allclose(heat, x * 2 * r / y, rtol=1e-4)
    only_scaled = attribute(lambda p, x: (x / 3) @ p["out"], P, x, 2, rules={jaxcnn.dense: Epsilon(1e-16)})
    np.testing.assert_allclose(only_scaled, x / 3 * P["out"].T[[2, 2]], **CLOSE)


def test_branches_moves_and_casts_conserve():
    """R of the input is y: sums, concatenation, slices, padding, transposes and casts keep Σ R."""

    def fun(p, x):
        y = conv(x, p["w"])
        y = jnp.concatenate([y[:, ::2], jnp.flip(y, 1)[:, 1::2]], 1)
        y = jnp.pad(y + conv(y[..., :3], p["w"]), ((0, 0), (0, 0), (1, 1), (0, 0)))
        y = y.astype(jnp.float32).astype(jnp.float64)
        y = jnp.squeeze(jnp.swapaxes(y, 1, 2)[:, :, :, None], 3)
        return jax.nn.relu(y).mean((1, 2)) @ p["out"]

    x = images()[:, :6, :6]
    heat = attribute(fun, P, x, 1, rules=attribution.epsilon_plus(epsilon=1e-12, stabilizer=1e-12))
    np.testing.assert_allclose(heat.sum((1, 2, 3)), fun(P, x)[:, 1], rtol=1e-5)


def test_the_other_branch_of_a_single_example_is_no_bias():
    """With one example, the addend of a dense product has the shape of a bias."""

    def fun(p, x):
        return x + x @ p["square"]

    params, x = {"square": random(5, 5)}, random(2, 5)
    run = functools.partial(attribute, fun, params, rules=attribution.epsilon_plus())
    np.testing.assert_allclose(run(x[:1], 2), run(x, 2)[:1], **CLOSE)


def test_grad_cam_knows_the_channels():
    x = images()[:, :6, :6]
    options = {"method": "grad_cam", "layer": "relu1", "relu": False}
    expected = attribute(scaled, P, x, TARGET, **options)
    np.testing.assert_allclose(attribute(channels_second, P, x, TARGET, **options), expected, **CLOSE)
    assert attribute(repeated, P, x, TARGET, method="grad_cam", layer="y").shape == (3, 6, 6)


def test_rules_inside_the_function_and_by_name():
    x = images()[:, :6, :6]

    def fun(p, x):
        y = jaxcnn.conv(x, p["w"], p["b"], rule=ZPlus())
        return jaxcnn.dense(jaxcnn.global_avg_pool(jaxcnn.tanh(y)), p["out"])

    others = {jaxcnn.dense: Epsilon(), "global_avg_pool1": Epsilon(), lambda name, op: op is jaxcnn.tanh: pass_through}
    expected = attribute(fun, P, x, 2, rules={"conv1": ZPlus(), **others})
    np.testing.assert_allclose(attribute(fun, P, x, 2, rules=others), expected, **CLOSE)


WAYS = {
    "gradient": {},
    "integrated_gradients": {"steps": 2},
    "smooth_grad": {"samples": 2, "key": jax.random.key(0)},
    "grad_cam": {"layer": "conv1"},
    "occlusion": {"window": 3},
    "relevance": {"rules": attribution.epsilon_gamma_box(scaled, -1.0, 1.0)},
    "deep_lift": {"reference": 0.1},
}


@pytest.mark.parametrize("method", WAYS)
def test_jit_and_traced_targets(method):
    x = images()[:, :6, :6]
    run = functools.partial(attribute, scaled, method=method, **WAYS[method])
    expected = run(P, x, TARGET)
    np.testing.assert_allclose(jax.jit(run)(P, x, TARGET), expected, **CLOSE)
    heat = jax.jit(run)(P, x, np.array([3, 5, -1]))
    assert np.isnan(heat).reshape(3, -1).all(1).tolist() == [False, True, True]


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def gated(p, x):
    y = conv(x, p["w"])
    return (y * y.mean((1, 2), keepdims=True)).mean((1, 2)) @ p["out"]


def named_scope(p, x):
    with jax.named_scope("Head"):
        return jnp.sin(conv(x, p["w"]).mean((1, 2))) @ p["out"]


@jax.custom_vjp
def own(x):
    return 2 * x


own.defvjp(lambda x: (own(x), None), lambda _, delta: (2 * delta,))

PLUS = attribution.epsilon_plus()
COMPOSED = "attribute: net must be a composition of ops with a rule for"
REFUSED = [
    (f"{COMPOSED} relevance, got mul, which depends on x", gated, {"rules": PLUS}),
    (f"{COMPOSED} DeepLIFT, got mul, which depends on x", gated, {"method": "deep_lift"}),
    (f"{COMPOSED} relevance, got sin at Head, which depends on x", named_scope, {"rules": PLUS}),
    (f"{COMPOSED} DeepLIFT, got sin at Head, which depends on x", named_scope, {"method": "deep_lift"}),
    (f"{COMPOSED} relevance, got custom_vjp_call", lambda p, x: own(scaled(p, x)), {"rules": PLUS}),
    (f"{COMPOSED} relevance, got scan, which depends on x",
     lambda p, x: lax.scan(lambda y, _: (y + 1, None), scaled(p, x), length=2)[0], {"rules": PLUS}),
    ("attribute: net must be products of x with weights that do not depend on it, got dense at dense2",
     lambda p, x: (y := scaled(p, x)) @ (y.T @ y), {"rules": PLUS}),
    ("attribute: rules must be given for each op whose gradient is not a relevance, got none for dense1, a dense",
     scaled, {"rules": {jaxcnn.conv: ZPlus(), jaxcnn.global_avg_pool: Epsilon()}}),
    ("attribute: a key of rules must be the name or op of an operation, got 'conv2'; the nearest names are 'conv1'",
     scaled, {"rules": {"conv2": ZPlus()}}),
    ("attribute: a key of rules must be the name or op of an operation, got tanh; the ops of the function are conv, ",
     scaled, {"method": "gradient", "rules": {jaxcnn.tanh: rules.guided_relu}}),
    ("attribute: a key of rules must be a name, an op such as jaxcnn.conv, or a predicate (name, op), got <class ",
     scaled, {"method": "gradient", "rules": {jaxcnn.Relu: rules.guided_relu}}),
    ("conv1: conv: rule must be one that fits conv, got guided_relu", scaled,
     {"method": "gradient", "rules": {"conv1": rules.guided_relu}}),
    ("attribute: layer must be the name of a layer, operation or tap, got 'conv2'; the nearest are conv1, ", scaled,
     {"method": "grad_cam", "layer": "conv2"}),
    ("attribute: layer must be one whose output is (N, *spatial, C), got 'dense1' with output (3, 5)", scaled,
     {"method": "grad_cam", "layer": "dense1"}),
    ("attribute: the result of net must be (3, classes), a row for each example, got shape (3, 6, 6, 6)",
     lambda p, x: conv(x, p["w"]), {}),
    ("attribute: the result of net must be one array (N, classes), got tuple", lambda p, x: (scaled(p, x), x), {}),
    ("attribute: target must be in 0 … 4, got 5 … 5", scaled, {"target": 5}),
    ("attribute: net must be a net from serial or a function (params, x), got Relu", jaxcnn.Relu(), {}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "fun", "options"), REFUSED)
def test_refused_functions(message, fun, options):
    x = jax.ShapeDtypeStruct((3, 6, 6, 3), jnp.float64)
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        jax.eval_shape(lambda x: attribute(fun, P, x, **{"target": 2, **options}), x)


def test_a_function_that_cannot_be_traced():
    with pytest.raises(jax.errors.TracerBoolConversionError) as raised:
        attribute(lambda p, x: x if x.sum() > 0 else -x, {}, np.ones((2, 3)), 0)
    assert any("attribute needs a function that jax.jit accepts" in note for note in raised.value.__notes__)


# ---------------------------------------------------------------------------------------------------------------------
# backprop and curvature


def test_backprop_of_a_function():
    x, targets = images()[:, :6, :6], np.array([1, 0, 4])
    loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    result = jaxcnn.backprop(scaled, loss, P, x, targets)
    value, gradients = jax.value_and_grad(lambda p: loss(scaled(p, x), targets).mean())(P)
    np.testing.assert_allclose(result.loss, value, **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), result.gradients, gradients)
    assert sorted(result.deltas) == ["conv1", "dense1", "global_avg_pool1", "relu1"]
    guided = jaxcnn.backprop(scaled, loss, P, x, targets, rules={jaxcnn.relu: rules.guided_relu})
    assert not np.allclose(guided.deltas["conv1"], result.deltas["conv1"])
    with pytest.raises(TypeError, match=r"^backprop: key must be None for a function, which reads keys from params "):
        jaxcnn.backprop(scaled, loss, P, x, targets, key=jax.random.key(0))


def test_curvature_of_a_function():
    """Curvature products of the explicit form equal those of JAX's own derivatives."""
    x, targets = images()[:, :6, :6], np.array([1, 0, 4])
    v = jax.tree.map(lambda a: random(*a.shape, seed=9), P)

    def loss(y):
        return jaxcnn.softmax_cross_entropy_with_integer_labels(y, targets).mean()

    def model(p):
        return scaled(p, x)

    expected = jax.jvp(jax.grad(lambda p: -jax.nn.log_softmax(model(p))[np.arange(3), targets].mean()), (P,), (v,))[1]
    found = jaxcnn.hvp(jaxcnn.explicit(lambda p: loss(model(p))), P, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), found, expected)
    plain = jaxcnn.gauss_newton_vp(model, loss, P, v)
    explicit = jaxcnn.gauss_newton_vp(jaxcnn.explicit(model), loss, P, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), explicit, plain)
