"""Costs of lowerings: what is counted, and that lowerings chosen by cost are close to the fastest that were timed."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import lowerings
from experiments.benchmarks.drawn_rows import POOLS, drawn
from experiments.benchmarks.results import geometric_mean
from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import cost, measured, onednn
from jaxcnn.kernels.cost import Product

TABLES = lowerings.tables()
DRAWN = [lowerings.product_of(one, name) for one in drawn(7, 80) if one.kind not in POOLS for name in TABLES]
#: Products that the costs were not fitted to, and the times of their lowerings.
TIMED = list(lowerings.read(Path(__file__).with_name("timed.json")))


@pytest.fixture(params=measured.TABLES)
def processor(request):
    """The name of each table of costs; lowerings are chosen by its costs."""
    before = measured.COSTS
    lowerings.use_costs(measured.TABLES[request.param])
    yield request.param
    lowerings.use_costs(before)


def of_shape(shape, size, inputs, outputs, *, name="correlate", batch=2, stride=1, padding=0, groups=1):
    n = len(shape)
    win = Window(shape, (size,) * n, (stride,) * n, ((padding, padding),) * n, (1,) * n)
    return Product(name, Correlation(win, groups, np.dtype(np.float32)), batch, inputs, outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Choice


@pytest.mark.usefixtures("processor")
def test_every_candidate_is_a_lowering_with_a_cost():
    for p in DRAWN:
        names = cost.candidates(p)
        assert cost.cheapest(p) in names, p
        for name in names:
            assert name in TABLES[p.name], p
            assert 0 < cost.cost(p, name) < math.inf, (p, name)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("name", TABLES)
def test_every_geometry_has_candidates_with_a_cost(name):
    """Also geometries that are not drawn, such as 1 × 1 kernels of groups, and kernels of oneDNN for other CPUs."""
    kernels = [f"{kind}:{isa}" for kind in ("jit", "jit_1x1", "brgconv", "jit_dw") for isa in ("avx2", "avx512_core")]
    sizes, strides, paddings = (1, 2, 11), (1, 2), (0, 4)
    channels = [(1, 1, 1), (1, 1, 9), (1, 9, 1), (1, 64, 64), (2, 2, 2), (2, 64, 64), (8, 64, 64), (32, 32, 512)]
    for ndim, size, stride, padding in itertools.product((1, 2, 3), sizes, strides, paddings):
        for (groups, inputs, outputs), batch in itertools.product(channels, (1, 64)):
            p = of_shape(
                (24,) * ndim, size, inputs, outputs,
                name=name, batch=batch, stride=stride, padding=padding, groups=groups,
            )  # fmt: skip
            costs = [cost.cost(p, lowering) for lowering in cost.candidates(p)]
            costs += [cost.cost(p, "onednn", kernel) for kernel in kernels]
            assert len(costs) > len(kernels), p
            assert min(costs) > 0, p
            assert max(costs) < math.inf, p


@pytest.mark.usefixtures("processor")
def test_more_images_cost_more():
    for p in DRAWN:
        p, more = (dataclasses.replace(p, batch=n * p.batch) for n in (4, 8))  # XLA is slower for other batches
        for name in set(cost.candidates(p)) & set(cost.candidates(more)):
            assert cost.cost(p, name) < cost.cost(more, name) <= 2.01 * cost.cost(p, name), (p, name)


def geometric_means(processor):
    """Return the time of the chosen lowering, in times of the fastest, with oneDNN and without."""
    ratios = [lowerings.chosen(one) for one in TIMED if one.processor == processor]
    return [
        geometric_mean([ratio for of in ratios for what, ratio in of.items() if how in what])
        for how in ("with oneDNN", "without oneDNN")
    ]


def test_chosen_lowerings_are_close_to_the_fastest(processor):
    """These products were not fitted; a lowering at random takes at least 1.7 times as long as the fastest."""
    with_onednn, without = geometric_means(processor)
    assert with_onednn < 1.2
    assert without < 1.4
    ratios = [seconds / one.least for one in TIMED for seconds in one.seconds.values() if one.processor == processor]
    assert geometric_mean(ratios) > 1.7


@pytest.mark.parametrize("kind", ["multiply", "channels", "patches", "parts"])
def test_wrong_costs_choose_slow_lowerings(kind, processor):
    """Every kind of work matters: without its costs, the chosen lowerings are slower."""
    right = geometric_means(processor)
    table = measured.TABLES[processor]
    lowerings.use_costs({key: {k: n for k, n in of.items() if k != kind} for key, of in table.items()})
    assert sum(geometric_means(processor)) > sum(right) + 0.02


@pytest.mark.parametrize(("flags", "name"), [("fma avx2", "avx2"), ("avx2 avx512f avx512dq", "avx512"), (None, "avx2")])
def test_table_of_the_processor(monkeypatch, flags, name):
    def read_text(path):
        assert str(path) == "/proc/cpuinfo"
        if flags is None:
            raise FileNotFoundError(path)
        return f"processor : 0\nflags\t\t: fpu {flags}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    assert measured.processor() == name


def test_symbolic_batches_count_as_a_number():
    p = of_shape((8, 8), 3, 16, 32)
    assert cost.product(p.name, p.c, object(), 16, 32) == dataclasses.replace(p, batch=cost.SYMBOLIC_BATCH)
    assert cost.product(p.name, p.c, 2, 16, 32) == p


@pytest.mark.parametrize(
    ("kernel", "name", "stride", "groups", "form"),
    [
        ("", "correlate", 1, 1, "onednn none"),
        ("ref:any", "correlate", 1, 1, "onednn none"),
        ("jit:avx512_core", "correlate", 2, 1, "onednn jit"),
        ("jit:avx512_core", "input_grad", 2, 1, "onednn jit, strided"),
        ("jit:avx512_core", "input_grad", 1, 4, "onednn jit of groups"),
        ("jit_1x1:avx512_core", "kernel_grad", 1, 1, "onednn 1x1"),
        ("jit_1x1:avx2", "correlate", 1, 1, "onednn brgemm"),
        ("jit_1x1:avx2", "kernel_grad", 1, 2, "onednn jit of groups"),
        ("brgconv:avx10_1_512_amx", "kernel_grad", 1, 1, "onednn jit"),
        ("jit_dw:avx512_core", "input_grad", 2, 8, "onednn depthwise"),
        ("brdgmm_dw:avx512_core", "correlate", 1, 8, "onednn depthwise"),
        ("depthwise:avx512", "kernel_grad", 1, 8, "onednn depthwise"),
        ("dense:avx512", "kernel_grad", 1, 1, "onednn own"),
        ("x64:gemm:jit", "kernel_grad", 1, 1, "onednn gemm"),
        ("x64:gemm:jit", "kernel_grad", 1, 2, "onednn gemm of groups"),
        ("jit:avx512_core", "kernel_grad", 1, 8, "onednn jit of groups"),
        ("brg_fwd:avx512_core+brgconv_1x1:avx512_core", "input_grad", 1, 1, "onednn brgemm"),
        ("brgconv_strided:avx512_core", "input_grad", 2, 1, "onednn brgemm, strided"),
    ],
)
def test_kernels_of_onednn(processor, kernel, name, stride, groups, form):
    """A kernel without costs is not chosen: loops without vectors, and, with AVX-512, a GEMM for each group."""
    p = of_shape((9, 9), 3, 8, 8, name=name, stride=stride, groups=groups)
    assert cost.form(p, "onednn", kernel) == form
    without = {"onednn none"} | ({"onednn gemm of groups"} if processor == "avx512" else set())
    assert (cost.cost(p, "onednn", kernel) < math.inf) == (form not in without)


@pytest.mark.parametrize(
    ("name", "size", "inputs", "outputs", "stride", "padding", "lowering", "form"),
    [
        ("correlate", 1, 8, 8, 1, 0, "xla", "xla, 1x1"),
        ("correlate", 3, 8, 8, 1, 0, "xla", "xla"),
        ("correlate", 3, 8, 8, 1, 1, "xla", "xla, padded"),
        ("correlate", 3, 8, 3, 1, 1, "xla", "xla, padded, few outputs"),
        ("input_grad", 3, 8, 3, 1, 1, "xla", "xla, few outputs"),
        ("input_grad", 3, 8, 8, 1, 1, "all_threads", "all_threads"),
        ("input_grad", 3, 8, 8, 2, 1, "xla", "xla, strided"),
        ("input_grad", 1, 8, 8, 1, 0, "products", "pointwise, 1x1"),
        ("kernel_grad", 3, 8, 8, 1, 0, "patches", "patches"),
        ("correlate", 3, 8, 1, 1, 0, "unrolled", "unrolled, columns"),
        ("correlate", 3, 1, 8, 1, 0, "unrolled", "unrolled, channels"),
        ("correlate", 1, 1, 8, 1, 0, "unrolled", "unrolled, channels, 1x1"),
        ("input_grad", 3, 1, 8, 1, 0, "unrolled", "unrolled, columns"),
        ("kernel_grad", 3, 1, 8, 1, 0, "unrolled", "unrolled, channels"),
        ("kernel_grad", 3, 1, 1, 1, 0, "by_position", "by_position, columns"),
    ],
)
def test_forms_of_lowerings_in_xla(name, size, inputs, outputs, stride, padding, lowering, form):
    p = of_shape((9, 9), size, inputs, outputs, name=name, stride=stride, padding=padding)
    assert cost.form(p, lowering) == form
    assert all((name, form) in costs for costs in measured.TABLES.values())


@pytest.mark.parametrize(
    ("product", "kernels", "factor"),
    [
        ("input_grad", {"correlate": "jit:avx512_core", "input_grad": "jit:avx2"}, 2),
        ("input_grad", {"correlate": "jit:avx512_core", "input_grad": "jit:avx512_core"}, 1),
        ("input_grad", {"correlate": "jit:avx2", "input_grad": "jit:avx2"}, 1),
        ("correlate", {"correlate": "jit:avx512_core", "input_grad": "jit:avx2"}, 1),
    ],
)
def test_vectors_of_half_the_length_in_onednn(monkeypatch, product, kernels, factor):
    monkeypatch.setattr(onednn, "implementation", lambda product, *_: kernels[product])
    p = of_shape((30, 30), 3, 32, 64, name=product, stride=3)
    found = onednn.native_cost(p)
    assert found == factor * cost.cost(p, "onednn", kernels[product])


# ---------------------------------------------------------------------------------------------------------------------
# Work


def test_work_is_counted_as_in_loops():
    """Multiplications, patches and arrays are those of the definition, in millions."""
    p = of_shape((5, 4), 3, 4, 6, stride=2, padding=1, groups=2)
    multiplied = patches = 0
    for _ in itertools.product(range(2), *map(range, p.c.window.out), p.c.window.taps()):
        patches += 4
        multiplied += 2 * 2 * 3  # groups, inputs and outputs of a group
    work = {kind: n * 1e6 for kind, n in cost.work(p).items()}
    counted = {
        "multiply": multiplied, "patches": patches, "image": 2 * 5 * 4 * 4, "result": 2 * 3 * 2 * 6,
        "kernel": 3 * 3 * 2 * 6, "partial": 2 * 3 * 3 * 6,
    }  # fmt: skip
    np.testing.assert_allclose([work[kind] for kind in counted], list(counted.values()))
    # 3 outputs of a group use 3 of the 16 elements of a vector, 6 outputs of both groups 6, and 2 columns 2.
    filled = {"channels": 16 / 3, "groups": 16 / 6, "columns": 16 / 2}
    np.testing.assert_allclose([work[kind] for kind in filled], [multiplied * n for n in filled.values()])
    np.testing.assert_allclose(work["row"], multiplied * 16 / 3 / 2)
    np.testing.assert_allclose(work["sums"], 2 * 3 * 2 * 9 * 2 * 16)  # images, positions, taps, groups, a vector
    np.testing.assert_allclose(work["fours"], multiplied * 4 / 3)
    assert work["odd"] == 0
    assert cost.work(dataclasses.replace(p, inputs=6))["odd"] == cost.work(dataclasses.replace(p, inputs=6))["patches"]
    assert cost.work(p)["call"] == 1
    assert cost.work(p)["term"] == 9 * 2
    assert work["depth"] == work["looped"] == 0


def test_vectors_of_the_gradient_of_an_image_hold_its_channels():
    p = of_shape((8, 8), 3, 17, 64, name="input_grad")
    assert (p.vector, p.terms) == (17, 9 * 64)
    work = cost.work(p)
    np.testing.assert_allclose(work["channels"], work["multiply"] * 32 / 17)
    np.testing.assert_allclose(work["row"], work["channels"] / 8)
    assert work["looped"] == work["multiply"]


def test_parts_of_a_strided_gradient():
    """With stride 2, positions have 1, 2 or 4 of 3 × 3 taps, and one convolution for each remainder."""
    p = of_shape((8, 8), 3, 5, 7, name="input_grad", stride=2, padding=1)
    sizes = sorted(part.c.window.size for part in cost.parts(p, "phases"))
    assert sizes == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for part, n in cost.parts(p, "phases").items():
        assert (n, part.name, part.batch, part.inputs, part.outputs) == (1, "correlate", 2, 7, 5)
        assert part.c.window.out == (4, 4)


def test_parts_of_other_lowerings():
    p = of_shape((6, 5, 4), 3, 8, 4, groups=4)
    ((flat, n),) = cost.parts(p, "by_depth").items()
    assert (n, flat.batch, flat.c.window.shape) == (3, 2 * 4, (5, 4))
    ((one, n),) = cost.parts(p, "by_group").items()
    assert (n, one.c.groups, one.inputs, one.outputs) == (4, 1, 2, 1)
    ((fewer, n),) = cost.parts(of_shape((6, 5), 3, 32, 32, name="kernel_grad", groups=8), "joined").items()
    assert (n, fewer.c.groups, fewer.inputs, fewer.outputs) == (1, 2, 32, 32)
    assert cost.parts(p, "unrolled") == {}


def test_costs_of_parts_have_no_calls():
    p = of_shape((6, 9, 9), 3, 8, 4, name="correlate")
    ((flat, n),) = cost.parts(p, "by_depth").items()
    name = cost.cheapest(flat)
    call = measured.COSTS["correlate", cost.form(flat, name)].get("call", 0)
    work = cost.work(p, "by_depth")
    assert work["part"] == n == 3
    np.testing.assert_allclose(work["parts"], 3 * (cost.cost(flat, name) - call))


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (of_shape((8, 8), 1, 64, 64), {"pointwise", "xla"}),
        (of_shape((8, 8), 1, 64, 64, padding=1), {"patches", "xla"}),
        (of_shape((8, 8), 1, 64, 3, name="input_grad"), {"xla", "unrolled"}),
        (of_shape((8, 8, 8), 1, 64, 3, name="input_grad", stride=2), {"pointwise", "unrolled"}),
        (of_shape((8, 8, 8), 1, 64, 64), {"pointwise", "xla"}),
        (of_shape((8, 8, 8), 1, 64, 64, name="input_grad"), {"pointwise", "xla"}),
        (of_shape((8, 8, 8), 1, 64, 64, name="kernel_grad"), {"pointwise"}),
        (of_shape((8, 8, 8), 3, 64, 64), {"patches", "by_depth"}),
        (of_shape((64, 64), 3, 64, 64, batch=16), {"xla"}),  # patches of the whole batch would be too large
        (of_shape((64, 64), 3, 8, 8, name="input_grad"), {"products", "xla", "unrolled"}),
        (of_shape((64, 64), 3, 64, 64, name="input_grad", stride=2), {"products", "phases", "xla"}),
        (of_shape((512, 512), 3, 8, 64, name="input_grad"), {"xla"}),  # so would products of one image
        (of_shape((64, 64), 3, 1, 8, name="kernel_grad"), {"patches", "rows", "transposed", "unrolled", "by_position"}),
        (of_shape((8, 8), 3, 64, 64, groups=4), {"by_group"}),
        (of_shape((8, 8), 3, 64, 64, groups=8), {"unrolled", "by_group"}),
        (of_shape((8, 8), 3, 64, 64, groups=16), {"unrolled"}),
        (of_shape((8, 8), 3, 64, 64, name="kernel_grad", groups=64), {"unrolled", "by_position", "joined"}),
        (of_shape((8, 8), 3, 8, 40, name="kernel_grad", groups=8), {"by_group"}),
        (of_shape((8, 8), 3, 64, 64, name="kernel_grad", groups=16), {"joined"}),
        (of_shape((8, 8), 3, 64, 64, name="kernel_grad", groups=4), {"by_group"}),
    ],
)
def test_candidates(p, expected):
    assert set(cost.candidates(p)) - {"all_threads", "spare_channel"} == expected
