"""Nets of other libraries compute what their libraries compute, and train, resume and predict as ours do."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from safetensors.numpy import load_file

import jaxcnn
from experiments import attributions, checkpoints, deltas, export, own_nets, predict, recipe, train, watch
from tests import other_nets
from tests.experiments.test_resume import interrupting, write_images

LOSS = jaxcnn.softmax_cross_entropy_with_integer_labels
SHAPE = (8, 8, 1)
X = jax.random.normal(jax.random.key(2), (6, *SHAPE))
LABELS = jnp.arange(6) % 4
MODULE = "tests.other_nets"


def net_of(name: str):
    net = own_nets.build(f"{MODULE}:{name}", 4, SHAPE)
    return net, net.init(jax.random.key(1), SHAPE)


def direct(name: str, variables, key=None):
    """Return the outputs and the new state of a net, by its own library."""
    if name == "Linen":
        module = other_nets.Linen(4)
        if key is None:
            return module.apply(variables, X, train=False), None
        return module.apply(variables, X, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    if name == "stateful":
        module, state = other_nets.stateful(4, SHAPE, jax.random.key(1))
        module = eqx.nn.inference_mode(module) if key is None else module
        batched = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return batched(jnp.moveaxis(X, -1, 1), state)
    if name == "Equinox":
        module = eqx.nn.inference_mode(other_nets.Equinox(4, SHAPE, jax.random.key(1)))
        return jax.vmap(module)(jnp.moveaxis(X, -1, 1)), None
    init, apply = other_nets.pair(4)
    return apply(init(jax.random.key(1), X), X), None


@pytest.mark.parametrize(("name", "count"), [("Linen", 8), ("stateful", 9), ("Equinox", 4), ("pair", 3), ("Nnx", 8)])
def test_outputs_state_and_names_are_those_of_the_library(name, count):
    net, params = net_of(name)
    leaves = checkpoints.flatten(params)
    assert len(leaves) == count
    assert not any("value" in path for path in leaves)
    key = jax.random.key(3)
    result = jaxcnn.backprop(net, LOSS, params, X, LABELS, key=key)
    layers = [layer for layer, _ in net.walk()]
    assert set(result.deltas) == set(layers)
    assert layers[-1] == own_nets.OUTPUTS
    assert sum(row.parameters for row in net.rows) == sum(a.size for a in jax.tree.leaves(params["params"]))
    if name != "Nnx":
        np.testing.assert_allclose(net.apply(params, X), direct(name, params)[0], rtol=1e-5, atol=1e-6)
    if name in ("Linen", "stateful"):
        y, new = direct(name, params, key)
        np.testing.assert_allclose(result.activations[own_nets.OUTPUTS], y, rtol=1e-5, atol=1e-6)
        (state,) = (name for name in params if name != "params")
        old, differences = jax.tree.leaves(params[state]), jax.tree.leaves(result.gradients[state])
        for a, difference, b in zip(old, differences, jax.tree.leaves(new), strict=True):
            np.testing.assert_allclose(a - difference, b.astype(jnp.float32), rtol=1e-5, atol=1e-6)
    again = net.apply(params, X, key=key)
    np.testing.assert_array_equal(net.apply(params, X, key=key), again)
    dropping = name in ("Linen", "Nnx", "Equinox")
    assert bool((net.apply(params, X, key=jax.random.key(4)) != again).any()) is dropping


@pytest.mark.slow("compiles nets of other libraries")
def test_a_step_trains_parameters_and_replaces_state():
    net, _ = net_of("Linen")
    options = recipe.RecipeOptions(optimizer="adamw", clip_norm=0.5, ema=0.5)
    optimizer = recipe.make_optimizer(options, 10, 10, net)
    state = jaxcnn.TrainState.create(net, optimizer, jax.random.key(0), SHAPE)
    step = watch.make_step(net, LOSS, optimizer, by_layer=True)
    after, metrics = step(jax.tree.map(jnp.copy, state), (X, LABELS))
    expected = direct("Linen", state.params, jax.random.fold_in(state.key, 0))[1]["batch_stats"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after.params["batch_stats"], expected
    )
    gradients = jaxcnn.backprop(net, LOSS, state.params, X, LABELS, key=jax.random.fold_in(state.key, 0)).gradients
    assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.tree.norm(gradients["params"])), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), recipe.averaged_params(options, after), after.params
    )
    bad = {**metrics, "delta_norms": {**metrics["delta_norms"], "Linen/relu1": np.nan}}
    text = watch.first_not_finite([name for name, _ in net.walk()], bad, {})
    assert text == "the first δ is that of Linen/relu1 (norm nan)"


def main(*argv: object) -> int:
    return train.main([str(arg) for arg in argv])


@pytest.mark.slow("trains")
@pytest.mark.parametrize(
    ("name", "more"), [("Linen", ("--ema", 0.9)), ("Equinox", ("--augment", "mixup", "crop", "--optimizer", "lion"))]
)
def test_a_net_of_another_library_trains_resumes_and_predicts(tmp_path, capsys, name, more):
    images = write_images(tmp_path / "images")
    argv = ("--data", "idx", "--data-dir", images, "--model", f"{MODULE}:{name}", "--batch-size", 8, "--epochs", 2)
    argv = (*argv, "--norms-every", 0, "--check-grads", *more)
    assert main(*argv, "--out", tmp_path / "whole") == 0
    with interrupting() as at:
        at(4)
        assert main(*argv, "--out", tmp_path / "cut") == 130
    assert main("--resume", tmp_path / "cut") == 0
    whole, cut = (load_file(tmp_path / folder / "weights.safetensors") for folder in ("whole", "cut"))
    assert {path: a.tobytes() for path, a in whole.items()} == {path: a.tobytes() for path, a in cut.items()}
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "cut" / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["model"] == f"{MODULE}:{name}"
    capsys.readouterr()
    assert predict.main(["--run", str(tmp_path / "cut"), "--images", "0", "1"]) == 0
    assert f"{MODULE}:{name} from {tmp_path / 'cut'}" in capsys.readouterr().out

    run = ("--run", str(tmp_path / "cut"))
    assert deltas.main([*run, "--images", "0", "--out", str(tmp_path / "deltas")]) == 0  # without dropout's operations
    assert "outputs" in capsys.readouterr().out
    image = tmp_path / "image.png"
    Image.new("L", (20, 20), 255).save(image)
    out = ("--out", str(tmp_path / "no"))
    for script, given, message in (
        (predict, [str(image), *run, "--explain", *out], "--explain: must be omitted unless the net is one of jaxcnn"),
        (attributions, [*run, "--images", "0", *out], "--run: must be the run of a net of jaxcnn"),
        (export, [run[1], "--format", "pytorch", *out], f"{run[1]}: must be the run of a net of jaxcnn for PyTorch"),
    ):
        assert script.main(given) == 2
        assert f"{message}" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


RETURNS = "a function that returns a net of jaxcnn, a Flax or Equinox module, or a pair (init, apply)"
ARGUMENTS = "a function of arguments among classes, shape, key, rngs"


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("no_such_module:make", "module:function, where the module can be imported, got no module no_such_module"),
        (f"{MODULE}.sub:make", f"module:function, where the module can be imported, got no module {MODULE}.sub"),
        (".other:make", "module:function, where the module can be imported, got the module '.other'"),
        (f"{MODULE}:Linnen", f"the name of a function in {MODULE}, got Linnen; did you mean Linen?"),
        (f"{MODULE}:NUMBER", f"{RETURNS}, got int"),
        (f"{MODULE}:no_net", f"{RETURNS}, got int"),
        (f"{MODULE}:other_arguments", f"{ARGUMENTS}, got one of width, classes"),
        (f"{MODULE}:seven", "a net whose outputs are (N, 4) for images 8×8×1, got (N, 7)"),
        (f"{MODULE}:image_to_image", "a net whose outputs are (N, 4) for images 8×8×1, got (N, 8, 8, 4)"),
        (f"{MODULE}:too_large", "a net for images (N, 8, 8, 1), got ValueError: conv1: conv: kernel size must be "),
        (f"{MODULE}:without_parameters", "a net with parameters, got one without"),
        (f"{MODULE}:of_integers", "a net whose parameters are floating-point, got "),
    ],
)
def test_a_reference_that_is_not_one_to_a_net(reference, expected):
    with pytest.raises(own_nets.UsageError) as error:
        own_nets.build(reference, 4, SHAPE)
    assert str(error.value).startswith(f"--model {reference}: must be {expected}")
    assert "\n" not in str(error.value)


def test_our_nets_and_references_to_them():
    assert isinstance(own_nets.build("mlp", 4, SHAPE), jaxcnn.Serial)
    net = own_nets.build(f"{MODULE}:ours", 4, SHAPE)
    assert net == other_nets.ours(4)
    with pytest.raises(own_nets.UsageError, match=r"^--model: must be module:function, got x:$"):
        own_nets.check_reference("x:")


def test_shapes_for_evaluation_include_the_statistics_of_batch_norms():
    net = jaxcnn.serial(
        jaxcnn.residual(jaxcnn.BatchNorm(), jaxcnn.Relu()), jaxcnn.BatchNorm(scale=False, bias=False), jaxcnn.Flatten()
    )
    params = jaxcnn.calibrate(net, net.init(jax.random.key(0), (2, 2, 3)), [(jnp.ones((4, 2, 2, 3)), None)])
    like = own_nets.evaluated_shapes(net, (2, 2, 3))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), like) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
