"""Windows: sizes compared with jax.lax and PyTorch over many geometries, elements compared with plain loops."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jax import lax

import jaxcnn
from jaxcnn import geometry
from jaxcnn.geometry import Window
from jaxcnn.kernels import windows as kernels

many = settings(max_examples=300)


@st.composite
def dims(draw, *, most=3):
    """Draw the arguments of a window, one element per dim."""
    ndim = draw(st.integers(1, most))

    def each(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=ndim, max_size=ndim)))

    return {"shape": each(1, 12), "size": each(1, 5), "stride": each(1, 4), "dilation": each(1, 3)}


def pads(ndim, high=4):
    return st.lists(st.tuples(st.integers(0, high), st.integers(0, high)), min_size=ndim, max_size=ndim)


def extent(d):
    return [(k - 1) * i + 1 for k, i in zip(d["size"], d["dilation"], strict=True)]


def fits(d, padding):
    return all(e <= n + lo + hi for n, e, (lo, hi) in zip(d["shape"], extent(d), padding, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@many
@given(dims(), st.data())
def test_output_sizes_are_those_of_pytorch(d, data):
    padding = data.draw(pads(len(d["shape"])))
    assume(fits(d, padding))
    win = geometry.window("op", **d, padding=padding)
    x = F.pad(torch.zeros(1, 1, *d["shape"]), [p for pair in reversed(padding) for p in pair])
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[win.ndim]
    w = torch.zeros(1, 1, *d["size"])
    assert win.out == tuple(conv(x, w, stride=d["stride"], dilation=d["dilation"]).shape[2:])
    assert win.padding == tuple(padding)


@many
@given(dims(), st.sampled_from(["SAME", "SAME_LOWER", "VALID"]), st.sampled_from([str.upper, str.lower]))
def test_named_padding_is_that_of_jax(d, name, spelled):
    # With SAME, padding is insufficient only for empty inputs; VALID must fit.
    assume(name != "VALID" or fits(d, [(0, 0)] * len(d["shape"])))
    win = geometry.window("op", **d, padding=spelled(name))
    assert list(win.padding) == [tuple(p) for p in lax.padtype_to_pads(d["shape"], extent(d), d["stride"], name)]
    if name != "VALID":
        assert win.out == tuple(-(-n // s) for n, s in zip(d["shape"], d["stride"], strict=True))


@many
@given(dims(most=1))
def test_causal_padding_sees_no_later_entry(d):
    (n,), (k,), (s,), (i,) = d["shape"], d["size"], d["stride"], d["dilation"]
    win = geometry.window("op", **d, padding="CAUSAL")
    assert win.padding == (((k - 1) * i, 0),)
    assert win.out == (-(-n // s),)
    for o in range(win.out[0]):
        met = [o * s + tap * i - win.padding[0][0] for tap in range(k)]
        assert max(met) == o * s  # the kernel's last tap is at the current step


@many
@given(dims(), st.data())
@example({"shape": (1,), "size": (2,), "stride": (2,), "dilation": (1,)}, None)
@example({"shape": (2,), "size": (3,), "stride": (3,), "dilation": (1,)}, None)
def test_ceil_mode_is_that_of_pytorch(d, data):
    """Partial windows at the end count unless they start in the padding there."""
    ndim = len(d["shape"])
    symmetric = [0] * ndim if data is None else [data.draw(st.integers(0, k // 2)) for k in d["size"]]
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[ndim]
    x = torch.zeros(1, 1, *d["shape"])
    try:
        expected = pool(x, d["size"], d["stride"], symmetric, dilation=d["dilation"], ceil_mode=True).shape[2:]
    except RuntimeError:  # no window fits
        with pytest.raises(ValueError, match="must be at most the padded spatial dims"):
            geometry.window("op", **d, padding=symmetric, ceil_mode=True)
        return
    win = geometry.window("op", **d, padding=symmetric, ceil_mode=True)
    assert win.out == tuple(expected)
    floor = dataclasses.replace(win, padding=tuple((p, p) for p in symmetric))
    assert all(c - f in (0, 1) for c, f in zip(win.out, floor.out, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Elements


@many
@given(dims(most=2), st.data())
def test_entries_are_where_the_loops_find_them(d, data):
    padding = data.draw(pads(len(d["shape"]), 2))
    assume(fits(d, padding))
    win = geometry.window("op", **d, padding=padding)
    assert win.entries == len(list(win.taps())) == np.prod(d["size"])
    assert list(win.taps()) == list(itertools.product(*map(range, d["size"])))
    margin = (1, 2)
    for dim in range(win.ndim):
        n, s, i, lo = d["shape"][dim], d["stride"][dim], d["dilation"][dim], padding[dim][0]
        met = [[o * s + k * i - lo for k in range(d["size"][dim])] for o in range(win.out[dim])]
        assert win.inside(dim).tolist() == [[0 <= at < n for at in row] for row in met]
        assert win.inside(dim, margin).tolist() == [[-1 <= at < n + 2 for at in row] for row in met]
        assert win.span[dim] == met[-1][-1] - met[0][0] + 1
        assert win.extent[dim] == met[0][-1] - met[0][0] + 1
        # One more window would not fit into the padded input.
        assert met[-1][-1] < n + padding[dim][1] <= met[-1][-1] + s
    for tap in win.taps():
        assert win.offset(tap) == tuple(k * i for k, i in zip(tap, d["dilation"], strict=True))
    assert win.padded == any(p for pair in padding for p in pair)
    side_by_side = d["stride"] == d["size"] and set(d["dilation"]) == {1} and not win.padded
    assert win.tiles == side_by_side


def test_dilation_of_a_window_of_one_entry_does_not_matter():
    win = geometry.window("op", (4, 4), 1, dilation=7)
    assert (win.extent, win.out) == ((1, 1), (4, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Static, hashable, and comparable by value

SPELLINGS = {
    "one int": (3, {"stride": 2, "padding": 1}),
    "tuples": ((3, 3), {"stride": (2, 2), "padding": ((1, 1), (1, 1))}),
    "lists": ([3, 3], {"stride": [2, 2], "padding": [[1, 1], [1, 1]]}),
    "an int a dim": ([3, 3], {"stride": (2, 2), "padding": (1, 1)}),
    "int and pair": (3, {"stride": 2, "padding": [1, (1, 1)]}),
    "numpy ints": (np.int64(3), {"stride": np.uint8(2), "padding": np.int32(1), "dilation": np.int16(1)}),
    "numpy arrays": (np.array([3, 3]), {"stride": np.array([2, 2]), "padding": np.array([[1, 1], [1, 1]])}),
    "numpy array of an int a dim": (3, {"stride": 2, "padding": np.array([1, 1])}),
    "a name": (3, {"stride": 2, "padding": "SAME_LOWER"}),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_equal_geometry_is_one_value_however_it_is_written(name):
    size, options = SPELLINGS[name]
    win = geometry.window("op", (7, 7), size, **options)
    expected = Window((7, 7), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))
    assert win == expected
    assert hash(win) == hash(expected)
    fields = jax.tree.leaves([getattr(win, field.name) for field in dataclasses.fields(win)])
    assert {type(n) for n in fields} == {int}


def test_equal_geometry_compiles_once():
    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def pooled(win, x):
        return kernels.max_and_winner(win, x)[0]

    x = np.random.default_rng(0).standard_normal((1, 7, 7, 1))
    wins = [geometry.window("op", (7, 7), size, **options) for size, options in SPELLINGS.values()]
    found = [pooled(win, x) for win in wins]
    assert len(found) == len(SPELLINGS)
    np.testing.assert_array_equal(found[0], jaxcnn.max_pool(x, 3, stride=2, padding=1))
    with pytest.raises(AssertionError, match="traced"):  # a different geometry is a different program
        pooled(geometry.window("op", (7, 7), 2), x)


@pytest.mark.parametrize("name", SPELLINGS)
def test_ops_take_every_spelling(name):
    size, options = SPELLINGS[name]
    x = np.random.default_rng(0).standard_normal((1, 7, 7, 2))
    w = np.random.default_rng(1).standard_normal((3, 3, 2, 3))
    np.testing.assert_array_equal(
        jaxcnn.max_pool(x, size, **options), jaxcnn.max_pool(x, 3, stride=2, padding=1)
    )  # fmt: skip
    np.testing.assert_array_equal(jaxcnn.conv(x, w, **options), jaxcnn.conv(x, w, stride=2, padding=1))


def test_static_options_from_static_arguments_of_jit():
    """Traced options are refused (see test_errors); static ones are accepted."""
    x = np.random.default_rng(0).standard_normal((1, 7, 7, 1))
    run = jax.jit(lambda x, stride: jaxcnn.max_pool(x, 3, stride=stride), static_argnums=1)
    np.testing.assert_array_equal(run(x, (2, 1)), jaxcnn.max_pool(x, 3, stride=(2, 1)))
    np.testing.assert_array_equal(jaxcnn.max_pool(x, 3, stride=jnp.asarray(2)), jaxcnn.max_pool(x, 3, stride=2))
