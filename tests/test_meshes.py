"""Every op with each dim of each array split over devices, and the analysis functions under explicit axes.

The unsplit result is the oracle. `tests/test_rules.py` compares it with PyTorch.
"""

import dataclasses

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn.kernels import correlate, input_grad, kernel_grad
from tests.cases import Case, compiled, row
from tests.checks import assert_close, drawn, flat

AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])

#: Rows with dims divisible by eight devices, most with one window along a dim, a stride larger than 1, or both.
ROWS = [
    row("conv", (1, 8, 8), (3, 8, 8), (8,)),
    row("conv", (1, 8, 2), (5, 2, 8), stride=4),  # one position
    row("conv", (1, 8, 8), (5, 4, 8), groups=2, stride=4),
    row("conv", (1, 8, 8, 1), (3, 3, 1, 1), stride=2, padding=1),
    row("conv", (1, 8, 2), (3, 2, 2), padding="REFLECT"),
    row("depthwise_conv", (1, 8, 8), (8, 1, 8)),
    row("conv_transpose", (1, 8, 2), (3, 2, 2), stride=2, padding=1),
    row("conv_transpose", (1, 8, 2), (2, 1, 2), dilation=3, output_padding=2),
    row("hidden_layer", (1, 8, 2), (2, 2, 8), (8,), window=7),
    row("max_pool", (1, 8, 8, 1), window=(4, 8)),
    row("max_pool", (1, 8, 8, 1), window=3, stride=2, padding=1),
    row("max_pool", (1, 16, 1), window=9, stride=16),
    row("max_pool_with_indices", (1, 8, 1), window=7, stride=3),
    row("max_unpool", (1, 8, 1), spatial_shape=(16,)),
    row("avg_pool", (1, 8, 8, 8), window=(8, 3)),
    row("avg_pool", (1, 72, 1), window=66, stride=3),
    row("lp_pool", (1, 8, 8, 1), window=(8, 7), stride=3),
    row("global_max_pool", (1, 8, 8, 1)),
    row("global_avg_pool", (1, 8, 8, 1)),
    row("adaptive_max_pool", (1, 8, 1), output_size=3),
    row("adaptive_avg_pool", (1, 8, 8, 1), output_size=(1, 3)),
    row("kron", (8, 1), (1, 8)),
    row("kron_up", (1, 8, 8), factor=2),
    row("block_sum", (1, 8, 8, 1), factor=(8, 2)),
    row("convolve", (16,), (8,)),
    row("correlate", (8, 8), (8, 8), mode="valid"),
    row("autocorrelate", (16,), method="fft"),
    row("match_template", (16,), (8,)),
    row("batch_norm", (8, 8), (8,), (8,)),
    row("layer_norm", (2, 8, 8), (8,), (8,)),
    row("group_norm", (1, 8, 8), (8,), (8,), groups=2),
    row("dense", (8, 8), (8, 8), (8,)),
    row("relu", (8, 8)),
    row("dropout", (8, 8), rate=0.3),
    row("squared_error", (8, 8), (8, 8)),
    row("softmax_cross_entropy", (8, 8), (8, 8)),
    row("softmax_cross_entropy_with_integer_labels", (8, 8)),
]

#: Ops that need no extra test under explicit axes, because all ops use `on_any_mesh`.
ALIKE = {
    "depthwise_conv", "lp_pool", "global_max_pool", "adaptive_avg_pool", "block_sum", "correlate", "autocorrelate",
    "match_template", "batch_norm", "layer_norm", "relu", "squared_error", "softmax_cross_entropy",
}  # fmt: skip

#: Rows with dims that four or eight devices do not divide, which automatic axes allow.
UNEVEN = [
    row("conv", (3, 6, 3), (3, 3, 5), stride=2),
    row("conv_transpose", (2, 6, 2), (3, 3, 2), stride=2),
    row("global_max_pool", (2, 3, 5, 3)),
    row("avg_pool", (3, 7, 5), window=3, stride=2),
]


def split_in_turn(case: Case, axis_type: AxisType):
    """Compare ``case`` with each dim split in turn, in one program.

    The dims are split over four devices or over both mesh axes, which have eight.
    """
    mesh = jax.make_mesh((2, 4), ("two", "four"), axis_types=(axis_type,) * 2)
    args, delta = drawn(case)
    expected = flat(case.run(args, delta))
    arrays = (*args, delta)
    turns = [(i, dim) for i, a in enumerate(arrays) for dim in range(a.ndim) if a.shape[dim] > 1]
    if axis_type is AxisType.Explicit:  # δ is split like y
        turns = [(i, dim) for i, dim in turns if i < len(args) and arrays[i].shape[dim] % 8 == 0]

    def split(a, dim, over):
        spec = PartitionSpec(*[None] * dim, over)
        if axis_type is AxisType.Explicit:
            return jax.sharding.reshard(a, spec)
        return lax.with_sharding_constraint(a, NamedSharding(mesh, spec))

    def run(arrays):
        found = []
        for turn, (i, dim) in enumerate(turns):
            over = (("two", "four"), "four")[turn % 2]
            *args, delta = (split(a, dim, over) if i == j else a for j, a in enumerate(arrays))
            y, back = jax.vjp(case.function, *args)
            if axis_type is AxisType.Explicit:
                delta = jax.sharding.reshard(delta, jax.typeof(y).sharding)
            found.append(flat((y, back(delta))))
        return found

    with jax.set_mesh(mesh):
        found = compiled(run)(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())))
    for (i, dim), one in zip(turns, found, strict=True):
        try:
            assert_close(one, expected, 1e-10)
        except AssertionError as error:
            raise AssertionError(f"array {i} split along dim {dim}: {error}") from None


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_each_dim_split(case):
    split_in_turn(case, AxisType.Auto)


@pytest.mark.parametrize("case", [row for row in ROWS if row.op not in ALIKE], ids=str)
def test_each_dim_split_by_explicit_axes(case):
    split_in_turn(case, AxisType.Explicit)


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_each_dim_split_unevenly(case):
    split_in_turn(case, AxisType.Auto)


OF_XLA = [
    row("conv", (8, 8, 8, 4), (3, 3, 1, 4), groups=4),  # XLA aborts if channels of groups are split
    row("conv", (2, 7, 3), (3, 3, 5), stride=2),
    row("conv_transpose", (2, 6, 2), (3, 3, 2), stride=2, padding=1),
]


@pytest.fixture
def only_xla(monkeypatch):
    """Use one `lax.conv_general_dilated` per product, as on other platforms."""
    monkeypatch.setattr(correlate, "choose_correlate", lambda *_: "xla")
    monkeypatch.setattr(input_grad, "choose_input_grad", lambda *_: "xla")
    monkeypatch.setattr(kernel_grad, "choose_kernel_grad", lambda *_: "xla")
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("case", OF_XLA, ids=str)
def test_convolutions_of_xla(case, only_xla):
    split_in_turn(case, AxisType.Auto)


@pytest.mark.parametrize("case", OF_XLA[1:], ids=str)
def test_convolutions_of_autodiff(case):
    split_in_turn(dataclasses.replace(case, function=case.plain), AxisType.Auto)


@pytest.mark.parametrize("groups", [1, 2])
def test_vmap_of_grad_over_split_images(groups, only_xla):
    """The results are the per-image gradients of `jax.vmap` of `jax.grad`."""
    rng = np.random.default_rng(0)
    x, w, delta = (rng.standard_normal(shape) for shape in ((8, 6, 2), (3, 2 // groups, 4), (8, 4, 4)))

    def one(w, x, delta):
        return (jaxcnn.conv(x[None], w, groups=groups)[0] * delta).sum()

    run = jax.vmap(jax.grad(one), (None, 0, 0))
    mesh = jax.make_mesh((4,), ("four",), axis_types=(AxisType.Auto,))
    found = compiled(run)(w, *jax.device_put((x, delta), NamedSharding(mesh, PartitionSpec("four"))))
    assert_close([found], [compiled(run)(w, x, delta)], 1e-10)


def test_split_batches_are_not_gathered():
    """The gradient of a split batch communicates only its sum."""
    net = jaxcnn.serial(
        jaxcnn.Conv(4, 3, stride=2), jaxcnn.Relu(), jaxcnn.MaxPool(2), jaxcnn.HiddenLayer(4, 2), jaxcnn.GlobalAvgPool()
    )
    params = net.init(jax.random.key(0), (14, 14, 2))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    x = jax.device_put(np.ones((8, 14, 14, 2), np.float32), NamedSharding(mesh, PartitionSpec("batch")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    run = compiled(jax.grad(lambda params, x: (net.apply(params, x) ** 2).sum(), argnums=(0, 1)))
    text = run.lower(params, x).compile().as_text()
    assert "all-reduce" in text
    assert not [name for name in ("all-gather", "all-to-all", "collective-permute") if name in text]


def test_scatters_of_a_split_batch_do_not_communicate():
    """XLA sums a scatter over all devices if its indices contain the batch."""
    ops = {
        "adaptive_max_pool": lambda x: jaxcnn.adaptive_max_pool(x, 3),
        "long windows": lambda x: jaxcnn.max_pool(x, 9, stride=2),
        "max_unpool": lambda x: jaxcnn.max_unpool(*jaxcnn.max_pool_with_indices(x, 2, stride=1), (13, 13)),
    }
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    x = jax.device_put(np.ones((8, 13, 13, 2), np.float32), NamedSharding(mesh, PartitionSpec("batch")))
    for name, op in ops.items():
        text = compiled(jax.grad(lambda x, op=op: (op(x) ** 2).sum())).lower(x).compile().as_text()
        found = [kind for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if kind in text]
        assert not found, (name, found)


# The smallest cases that are wrong in stock JAX (jaxlib 0.10), in all elements


def split_over_four(a, *, axes=(4,)):
    mesh = jax.make_mesh(axes, ("four", "two")[: len(axes)], axis_types=(AxisType.Auto,) * len(axes))
    return jax.device_put(a, NamedSharding(mesh, PartitionSpec("four")))


def stock_conv(x, w, groups=1):
    layouts = ("NHC", "HIO", "NHC")
    return lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=layouts, feature_group_count=groups)


@pytest.mark.xfail(reason="XLA's partitioner: a slice of one entry with a step", strict=False)
def test_stock_slice_of_one_entry():
    """Stock JAX gives 0 instead of 5; `Window.steps` avoids it."""
    assert jax.jit(lambda x: lax.slice(x, (5,), (6,), (8,)))(split_over_four(np.arange(8.0))) == 5


@pytest.mark.xfail(reason="XLA's partitioner: a batch group for each image", strict=False)
def test_stock_vmap_of_grad():
    """∂E/∂w of each image should be Σ x from each tap on."""
    run = jax.vmap(jax.grad(lambda w, x, delta: (stock_conv(x[None], w)[0] * delta).sum()), (None, 0, 0))
    x, delta = split_over_four((np.arange(12.0).reshape(4, 3, 1), np.ones((4, 2, 1))))
    found = jax.jit(run)(np.ones((2, 1, 1)), x, delta)
    np.testing.assert_allclose(found[..., 0], np.stack([x[:, :2].sum(1), x[:, 1:].sum(1)], 1))


@pytest.mark.xfail(reason="XLA's partitioner: batch groups over one axis of a mesh of two", strict=False)
def test_stock_gradient_of_groups():
    """∂E/∂w of a depthwise convolution should be Σ x of each channel."""
    run = jax.grad(lambda w, x: stock_conv(x, w, groups=2).sum())
    x = np.arange(24.0).reshape(4, 3, 2)
    found = jax.jit(run)(np.ones((1, 1, 2)), split_over_four(x, axes=(4, 2)))
    np.testing.assert_allclose(np.ravel(found), x.sum((0, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Analysis functions: a batch split over two devices


LOSS = jaxcnn.softmax_cross_entropy_with_integer_labels
NETS = {
    "hidden": jaxcnn.serial(jaxcnn.HiddenLayer(2, 3), jaxcnn.Flatten(), jaxcnn.Dense(3)),
    "norms": jaxcnn.serial(
        jaxcnn.ConvTranspose(4, 2), jaxcnn.LayerNorm(), jaxcnn.GroupNorm(2), jaxcnn.BatchNorm(), jaxcnn.Relu(),
        jaxcnn.GlobalAvgPool(), jaxcnn.Dense(3),
    ),
}  # fmt: skip
X, Y = np.random.default_rng(0).standard_normal((4, 4, 4, 2)), np.array([0, 2, 1, 1])


def attributed(method, **options):
    return lambda net, params, x, y: jaxcnn.attribute(net, params, x, 1, method=method, **options)


FUNCTIONS = {
    "per_example_gradients": lambda net, *args: jaxcnn.per_example_gradients(net, LOSS, *args),
    "per_example_norms": lambda net, *args: jaxcnn.per_example_norms(net, LOSS, *args),
    "clipped_gradient": lambda net, *args: jaxcnn.clipped_gradient(net, LOSS, *args, 0.5),
    "value_grad_and_deltas": lambda net, params, x, y: jaxcnn.value_grad_and_deltas(
        lambda params: LOSS(net.apply(params, x), y).mean()
    )(params),
}
OF_HIDDEN = {
    "gradient": attributed("gradient"),
    "deep_lift": attributed("deep_lift"),
    "integrated_gradients": attributed("integrated_gradients", steps=2),
    "occlusion": attributed("occlusion", window=2),
    "grad_cam": attributed("grad_cam", layer="hidden_layer1"),
    "targets": lambda net, params, x, y: jaxcnn.attribute(net, params, x, y, method="gradient"),
}


@pytest.mark.slow("compiles whole nets for eight devices")
@pytest.mark.parametrize(
    ("name", "functions", "axis_type"),
    [
        ("hidden", FUNCTIONS | OF_HIDDEN, AxisType.Explicit),
        ("norms", FUNCTIONS, AxisType.Explicit),
        ("norms", FUNCTIONS, AxisType.Auto),
    ],
    ids=["hidden-explicit", "norms-explicit", "norms-auto"],
)
def test_analysis_of_a_split_batch(name, functions, axis_type):
    net = NETS[name]
    params = jax.tree.map(lambda a: a.astype(float), net.init(jax.random.key(0), X.shape[1:]))
    if name == "norms":
        params = jaxcnn.calibrate(net, params, [(X, Y)])

    def run(params, x, y):
        return {key: f(net, params, x, y) for key, f in functions.items()}

    expected = compiled(run)(params, X, Y)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    with jax.set_mesh(mesh):
        found = compiled(run)(jax.device_put(params, whole), jax.device_put(X, rows), jax.device_put(Y, rows))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-9)
    if axis_type is AxisType.Explicit:
        assert jax.typeof(found["per_example_norms"]).sharding.spec == PartitionSpec("batch")
        for a, like in zip(jax.tree.leaves(found["clipped_gradient"]), jax.tree.leaves(params), strict=True):
            assert jax.typeof(a).sharding.spec == PartitionSpec(*(None,) * like.ndim)


@AXIS_TYPES
def test_data_of_a_split_batch(axis_type):
    """`evaluate` and `calibrate` give the same results."""
    net = jaxcnn.serial(jaxcnn.Conv(2, 3), jaxcnn.BatchNorm(), jaxcnn.Flatten(), jaxcnn.Dense(3))
    params = jax.tree.map(lambda a: a.astype(float), net.init(jax.random.key(0), X.shape[1:]))
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
    split = [tuple(jax.device_put(a, NamedSharding(mesh, PartitionSpec("batch"))) for a in (X, Y))]
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        found = jaxcnn.calibrate(net, everywhere, split)
        metrics = jaxcnn.evaluate(net, LOSS, found, split)
    expected = jaxcnn.calibrate(net, params, [(X, Y)])
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-9)
    assert metrics == pytest.approx(jaxcnn.evaluate(net, LOSS, expected, [(X, Y)]), rel=1e-9)
