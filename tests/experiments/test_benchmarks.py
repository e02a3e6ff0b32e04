"""Comparisons, counts and output of the benchmarks; durations are not tested."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import zoo
from experiments.benchmarks import (
    accuracy,
    backprop,
    compile,
    drawn,
    drawn_nets,
    drawn_rows,
    growth,
    lowerings,
    memory,
    ops,
    per_example,
    results,
    rows,
    step,
    timing,
)
from experiments.benchmarks.contenders import equinox_net, flax_net, load_equinox, load_flax, load_torch, torch_net
from experiments.benchmarks.nets import NETS, Timed
from experiments.benchmarks.timing import Times
from experiments.errors import RunError
from jaxcnn import Conv, Dense, Dropout, Flatten, MaxPool, Relu, serial
from jaxcnn.kernels import cost
from jaxcnn.kernels import measured as kernels_measured

SMALL = Timed(
    serial(Conv(4, 3), Relu(), MaxPool(2), Conv(6, 3), Relu(), Flatten(), Dropout(0.5), Dense(10)), (12, 12, 2), 3
)


@pytest.fixture
def others():
    """Import the libraries that jaxcnn is compared with, from the extra "bench"."""
    for name in ("flax", "equinox"):
        pytest.importorskip(name)


@pytest.fixture
def still(monkeypatch):
    """Skip the measurement of the machine."""
    monkeypatch.setattr(timing, "machine", lambda *args, **kwargs: {"machine": "none"})


# ---------------------------------------------------------------------------------------------------------------------
# Tables, JSON, charts


def test_columns_line_up(capsys):
    results.table(["", "n", "long name"], [["first", "1", "2"], ["x", "1000", ""]])
    assert capsys.readouterr().out.splitlines() == ["          n  long name", "first     1          2", "x      1000"]


def test_ratios_of_contenders(capsys):
    times = {"a": Times((1.0, 2.0, 3.0)), "b": Times((3.0, 4.0, 8.0))}
    results.contenders(times, "a", {"more": {"b": "yes"}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["median", "minimum", "IQR", "time", "/", "a", "more"]
    assert lines[1] == ["a", "2.00", "s", "1.00", "s", "100%", "1.00", "(1.00)"]
    assert lines[2] == ["b", "4.00", "s", "3.00", "s", "125%", "2.00", "(3.00)", "yes"]


@pytest.mark.parametrize(("s", "text"), [(2, "2.00 s"), (0.0123, "12.3 ms"), (45e-6, "45 µs")])
def test_seconds(s, text):
    assert results.seconds(s) == text


def test_geometric_mean():
    assert results.geometric_mean([0.5, 2, 8]) == pytest.approx(2)
    assert math.isnan(results.geometric_mean([]))


def test_json_is_read_back(tmp_path):
    path = tmp_path / "new" / "a.json"
    config = ops.Config(out=path)
    results.write(path, {"cores": 2}, config, times={"a": Times((0.5, 1.0))}, bytes={"n": memory.Bytes(1, 2)})
    found = json.loads(path.read_text())
    assert found["config"]["out"] == str(path)
    assert found["times"] == {"a": [0.5, 1.0]}
    assert found["bytes"] == {"n": {"temporary": 1, "residuals": 2}}


def test_results_of_another_run_are_not_overwritten(tmp_path, capsys):
    for name in ("a.json", "b.png"):
        (tmp_path / name).write_text("mine")
        out = (tmp_path / name).with_suffix(".json")
        assert ops.main(["--quick", "--out", str(out)]) == 2
        assert f"--out: must be a new file, got {tmp_path / name}, which exists" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"
    # A file that another process created in the meantime:
    results.write(tmp_path / "a.json", {}, ops.Config())
    assert (tmp_path / "a.json").read_text() == "mine"
    assert json.loads((tmp_path / "a-2.json").read_text())["machine"] == {}


def stop_after(number, error, monkeypatch):
    """Let `ops` raise an error after this number of rows; return the list of their names."""

    def measure(row, wanted, config):
        if len(seen) == number:
            raise error
        seen.append(row.name)
        yield measured(1.0, 2.0, name=row.name)

    seen = []
    monkeypatch.setattr(ops, "measure", measure)
    return seen


@pytest.mark.usefixtures("still")
def test_ctrl_c_reports_the_results_so_far(tmp_path, monkeypatch, capsys):
    seen = stop_after(2, KeyboardInterrupt, monkeypatch)
    assert ops.main(["--no-torch", "--out", str(tmp_path / "a.json")]) == 130
    assert "interrupted; the results so far:" in capsys.readouterr().out
    assert [row["row"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == seen
    assert len(seen) == 2
    assert ops.main(["--no-torch", "--out", str(tmp_path / "b.json")]) == 130  # nothing was measured
    assert capsys.readouterr().err.endswith("ops: interrupted\n")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(
    ("error", "text"), [(RunError("lost"), "lost\n"), (ValueError("wrong"), "ValueError: wrong\n")]
)
def test_an_error_reports_the_results_so_far(tmp_path, monkeypatch, capsys, error, text):
    seen = stop_after(1, error, monkeypatch)
    assert ops.main(["--no-torch", "--out", str(tmp_path / "a.json")]) == 1
    out, err = capsys.readouterr()
    assert "stopped by an error; the results so far:" in out
    assert text in err
    assert [row["row"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == seen


def test_turns(monkeypatch):
    """Each round starts with a different contender, and the first call of a turn is not counted."""
    seen = []
    calls = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    times = timing.in_turns(calls, 2, calls=2, most=10.0, pause=0)
    assert "".join(seen) == "aaabbb" + "bbbaaa"
    assert {name: len(t.seconds) for name, t in times.items()} == {"a": 4, "b": 4}


def test_a_long_call_is_timed_once(monkeypatch):
    monkeypatch.setattr(timing, "LONG", -1.0)
    times = timing.in_turns({"a": lambda: None, "b": lambda: None}, 3, pause=0)
    assert {name: len(t.seconds) for name, t in times.items()} == {"a": 1, "b": 1}


# ---------------------------------------------------------------------------------------------------------------------
# ops


@pytest.mark.parametrize(("stock", "rounds"), [(1.04, [2, 6]), (1.06, [2])])
def test_a_row_near_the_bar_gets_more_rounds(monkeypatch, stock, rounds):
    seen = []

    def in_turns(contenders, rounds, **_):
        seen.append(rounds)
        return {name: Times((stock if name == ops.STOCK else 1.0,) * rounds) for name in contenders}

    monkeypatch.setattr(timing, "in_turns", in_turns)
    row = next(drawn_rows.drawn_rows(1, 1))
    (one,) = ops.measure(row, ["forward"], ops.Config(torch=False, rounds=2))
    assert seen == rounds
    assert len(one.times[ops.STOCK].seconds) == sum(rounds)


def measured(ours, stock, *, torch=None, note="", name="row"):
    times = {ops.OURS: Times((ours, 2 * ours)), ops.STOCK: Times((stock, 3 * stock))}
    times |= {f"torch {i}": Times((t,)) for i, t in enumerate(torch or [])}
    return ops.Measured(name, "forward", times, note)


def test_ratios_are_of_minima_and_of_the_faster_format_of_torch():
    one = measured(2.0, 6.0, torch=[8.0, 5.0])
    assert one.ratio == 3
    assert one.torch_ratio == 2.5
    assert measured(1.0, 1.0).torch_ratio is None


def test_summary_counts_slow_rows_and_omits_wrong_ones():
    found = [
        measured(1.0, 4.0),
        measured(1.0, 0.25, name="slow"),
        measured(1.0, 100.0, name="bad", note="stock JAX differs by inf"),
    ]
    first, *rest = ops.summary(found)
    assert "geometric mean over 2 rows 1.00×; 0 rows are the same program, 0 of them are below 0.95; the" in first
    assert "0.25× (slow, forward), and 1 of them are below 0.95" in first
    assert rest == ["bad, forward: stock JAX differs by inf"]
    assert "below 0.95" in ops.line(found[1])
    assert "below" not in ops.line(found[0])
    assert ops.to_json(found[2])["stock_ratio"] is None


def test_the_second_ratio_of_rows_below_the_bar_counts(monkeypatch, capsys, tmp_path, still):
    """Two rows are below the bar, one of them only at first; the others are not timed again."""
    ratios = {"slow": [0.5, 0.6], "noise": [0.9, 1.5], "edge": [0.951], "good": [2.0], "wrong": [0.1]}
    left = {name: iter(of) for name, of in ratios.items()}

    def measure(row, products, config):
        note = "stock JAX differs by 1" if row.name == "wrong" else ""
        for product in products:
            yield dataclasses.replace(measured(1.0, next(left[row.name]), name=row.name, note=note), product=product)

    monkeypatch.setattr(ops, "measure", measure)
    table = [dataclasses.replace(row_called("kron_up"), name=name) for name in ratios]
    monkeypatch.setattr(rows, "rows", lambda: table)
    out = tmp_path / "ops.json"
    assert ops.main(["--only", "forward", "--no-torch", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "the minimum of the others is 0.60× (slow, forward), and 1 of them are below 0.95 (2 before" in printed
    found = {row["row"]: (row["stock_ratio"], row["first_stock_ratio"]) for row in json.loads(out.read_text())["rows"]}
    assert found == {
        "slow": (0.6, 0.5), "noise": (1.5, 0.9), "edge": (0.951, None), "good": (2.0, None), "wrong": (None, None)
    }  # fmt: skip
    assert [next(of, None) for of in left.values()] == [None] * 5


def test_the_same_program_is_reported_apart():
    """XLA compiles two ways to write a sum to the same program, and a sum and a product to different ones."""
    x = jnp.ones((4, 3))
    texts = [ops.program(jax.jit(f), x) for f in (lambda x: x + x * 3, lambda y: jnp.add(y, 3 * y), lambda x: x * x)]
    assert texts[0] == texts[1] != texts[2]
    first, *_ = ops.summary([measured(1.0, 2.0), dataclasses.replace(measured(1.0, 0.25), same=True)])
    assert "1 rows are the same program, 1 of them are below 0.95;" in first
    assert "the minimum of the others is 2.00× (row, forward), and 0 of them are below 0.95" in first
    (row,) = ops.measure(row_called("relu "), ["forward"], ops.Config(quick=True, torch=False))
    assert row.same
    (row,) = ops.measure(row_called("kron_up"), ["δ_x"], ops.Config(quick=True, torch=False))
    assert not row.same


@pytest.mark.parametrize(
    ("results", "notes"),
    [
        ({"jaxcnn": 1.0, "stock JAX": 1.0, "torch": 1.0}, []),
        ({"jaxcnn": 1.0, "stock JAX": 1.1, "torch": 1.0}, ["stock JAX differs by 0.1"]),
        ({"jaxcnn": 1.0, "stock JAX": np.nan, "torch": 1.0}, ["stock JAX differs by inf"]),
        ({"jaxcnn": 1.0, "stock JAX": 1.0, "torch": 1.1}, ["jaxcnn differs from torch by 0.1"]),
        ({"jaxcnn": 1.0, "stock JAX": 1.1}, ["jaxcnn differs from stock JAX by 0.1"]),
        (
            {"jaxcnn": 1.0, "stock JAX": 1.1, "torch": 1.1},
            ["jaxcnn differs from stock JAX by 0.1", "jaxcnn differs from torch by 0.1"],
        ),
    ],
)
def test_a_wrong_result_is_attributed(results, notes):
    results = {name: [np.full(3, value)] for name, value in results.items()}
    assert ops.differences(results, 1e-4) == notes


def test_distance_sees_shapes_and_every_array():
    assert ops.distance([np.ones((2, 1))], [np.ones(2)]) == math.inf
    assert ops.distance([np.ones(2), np.zeros(2)], [np.ones(2), np.ones(2)]) == pytest.approx(1)
    assert ops.distance([np.zeros(2)], [np.zeros(2)]) == 0


def row_called(name):
    (found,) = (row for row in rows.rows() if row.name.startswith(name))
    return found


def test_names_of_rows_are_unique():
    names = [row.name for row in rows.rows()]
    assert len(set(names)) == len(names)
    kinds = "conv , conv depthwise, conv 8 groups, conv_transpose, conv 1-D, conv 3-D, max_pool, avg_pool, lp_pool"
    for op in (*kinds.split(", "), "kron_up", "block_sum", "relu", "dense", "batch_norm", "hidden_layer"):
        assert any(name.startswith(op) for name in names), op


def test_products_of_a_row():
    assert ops.products(row_called("conv 5×5 1→32")) == ["forward", "δ_x", "δ_w"]
    assert ops.products(row_called("relu ")) == ["forward", "δ_x", "both passes"]
    assert ops.products(row_called("relu "), "δ_") == ["δ_x"]
    assert ops.products(row_called("softmax_cross_entropy 1024"), "softmax")[1:3] == ["δ_logits", "δ_targets"]


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("conv 8 groups 3×3 64→64 stride", ["forward", "δ_w"]),
        ("conv_transpose 1-D", ["forward", "δ_w"]),
        ("kron_up", ["forward", "δ_x"]),
        ("hidden_layer 5×5 32", ["both passes"]),
    ],
)
def test_contenders_compute_the_same(name, products):
    """Layouts are converted to PyTorch's and back, and each δ has its name."""
    for one in ops.measure(row_called(name), products, ops.Config(quick=True)):
        assert one.note == "", one.name
        assert {"jaxcnn", "stock JAX", "torch"} <= set(one.times)


def test_a_wrong_contender_is_caught():
    row = row_called("avg_pool 1-D")
    wrong = dataclasses.replace(row, stock=lambda x: 1.01 * row.stock(x))
    (one,) = ops.measure(wrong, ["δ_x"], ops.Config(quick=True))
    assert one.note == "stock JAX differs by 0.01"
    assert not one.compared
    wrong = dataclasses.replace(row, ours=lambda x: row.ours(x) + 0.1)
    (one,) = ops.measure(wrong, ["forward"], ops.Config(quick=True))
    assert one.note.startswith("jaxcnn differs from stock JAX")


def test_a_gradient_that_stock_jax_does_not_have_is_noted():
    (one,) = ops.measure(row_called("max_pool 2×2 dilation 2"), ["δ_x"], ops.Config(quick=True, torch=False))
    assert one.note == "stock JAX has no such gradient"
    assert not one.compared
    assert "–" in ops.line(one)


def test_a_run_of_ops(tmp_path, capsys, still):
    out = tmp_path / "ops.json"
    assert ops.main(["--quick", "--only", "kron_up", "--no-torch", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[2:4]] == ["kron_up 2"] * 2
    found = json.loads(out.read_text())["rows"]
    assert [row["product"] for row in found] == ["forward", "δ_x"]
    for row in found:
        assert row["stock_ratio"] == pytest.approx(min(row["seconds"]["stock JAX"]) / min(row["seconds"]["jaxcnn"]))
    assert out.with_suffix(".png").stat().st_size > 1000


def test_a_wrong_result_of_ours_is_status_1(monkeypatch, capsys, still):
    wrong = dataclasses.replace(row_called("kron_up"), ours=lambda x: jnp.repeat(jnp.repeat(2 * x, 2, 1), 2, 2))
    monkeypatch.setattr(rows, "rows", lambda: [wrong])
    assert ops.main(["--quick", "--only", "forward", "--no-torch"]) == 1
    assert "jaxcnn differs from stock JAX by 0.5" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Wrong options


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        (ops, "--only nothing-like-it", "--only: must be part of the name of a row, got 'nothing-like-it'"),
        (ops, "--rounds 0", "--rounds: must be at least 1, got 0"),
        (ops, "--device tpu", "--device: must be one of cpu, gpu, got 'tpu'"),
        (memory, "--nets lectur", "--nets: must be one of"),
        (memory, "--batch-size 0", "--batch-size: must be at least 1, got 0"),
        (compile, "--net vg", "did you mean vgg?"),
        (compile, "--libraries torch", "--libraries: must be one of flax nnx, equinox, got 'torch'"),
        (growth, "--what weight", "--what: must be one of batch, side, channels, got 'weight'"),
        (growth, "--allocator mine", "--allocator: must be one of tuned, stock, got 'mine'"),
        (growth, "--most 4", "--most: must be at least 16, got 4"),
        (per_example, "--net vgg", "--net: must be one of lecture, lenet5, linen, equinox, got 'vgg'"),
        (per_example, "--max-norm 0", "--max-norm: must be > 0, got 0.0"),
        (accuracy, "--target 90", "--target: must be between 0 and 1, got 90.0"),
        (accuracy, "--data digits", "--data: must be one of fashion-mnist"),
        (accuracy, "--turns 0", "--turns: must be at least 1, got 0"),
        (step, "--net vg", "did you mean vgg?"),
        (step, "--microbatch 0", "--microbatch: must be at least 1, got 0"),
        (growth, "--microbatch -1", "--microbatch: must be at least 1, got -1"),
        (drawn, "--nets 0", "--nets: must be at least 1, got 0"),
        (drawn, "--only 3 -1", "--only: must be at least 0, got -1"),
        (drawn, "--allocator mine", "--allocator: must be one of tuned, stock, got 'mine'"),
        (ops, "--drawn 0", "--drawn: must be at least 1, got 0"),
        (drawn, "--contenders flux", "--contenders: must be one of flax nnx, equinox"),
        (backprop, "--rounds 0", "--rounds: must be at least 1, got 0"),
        (zoo, "--nets MobileNet", "did you mean MobileNetV2?"),
        (zoo, "--modes train", "--modes: must be one of training, evaluation, got 'train'"),
        (zoo, "--batch-size 0", "--batch-size: must be at least 1, got 0"),
    ],
)
def test_wrong_options(script, argv, message, capsys):
    assert script.main(argv.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("script", [ops, memory, compile, drawn, growth, per_example, step, backprop, zoo])
def test_out_is_a_file(script, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path)]) == 2
    assert f"--out: must be a file, got the folder {tmp_path}" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The same parameters everywhere


@pytest.mark.slow("imports other libraries")
@pytest.mark.usefixtures("others")
def test_libraries_compute_the_same_net():
    import equinox as eqx
    import torch
    from flax import nnx

    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, *SMALL.shape)).astype(np.float32)
    first = np.moveaxis(x, -1, 1).copy()
    params = SMALL.net.init(jax.random.key(0), SMALL.shape)
    expected = jax.jit(SMALL.net.apply)(params, x)
    flax = load_flax(flax_net(SMALL), SMALL, params)
    flax.eval()
    graph, state = nnx.split(flax)
    equinox = eqx.nn.inference_mode(load_equinox(equinox_net(SMALL), SMALL, params))
    by_flax = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    net = load_torch(torch_net(SMALL), SMALL, params)
    net.eval()
    for found in (by_flax(state, x), jax.jit(jax.vmap(equinox))(first), net(torch.from_numpy(first)).detach()):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow("traces many nets")
def test_drawn_nets_are_the_same_for_a_seed_and_not_too_large():
    nets = [drawn_nets.drawn(0, number) for number in range(15)]
    assert list(map(drawn_nets.described, nets)) == [
        drawn_nets.described(drawn_nets.find(f"drawn 0 {number}")) for number in range(15)
    ]
    other = [drawn_nets.described(drawn_nets.drawn(1, number)) for number in range(15)]
    assert len({*map(drawn_nets.described, nets), *other}) > 28
    for timed in nets:
        assert timed.batch <= 8 or timed.batch * timed.net.flops(timed.shape, (10,)) <= drawn_nets.MOST_FLOPS
    words = " ".join(map(drawn_nets.described, nets))
    assert all(kind in words for kind in ("pool 2", "1×1", "/2", "7×7", "5×5", "groups"))


def test_drawn_rows_are_the_same_for_a_seed_and_not_too_large():
    few, other = (list(drawn_rows.drawn_rows(seed, 60)) for seed in (0, 1))
    names = [row.name for row in few]
    assert names == [row.name for row in drawn_rows.drawn_rows(0, 60)]
    assert len({*names, *(row.name for row in other)}) > 110
    assert all(math.prod(row.shapes["x"]) <= drawn_rows.ELEMENTS[1] for row in few)
    words = ("1×1", "3×3", "3×3×3", "stride", "padding", "dilation", "groups", "transpose", "max", "avg", "lp")
    assert [word for word in words if word not in " ".join(names)] == []


@pytest.mark.slow("compiles many ops")
def test_drawn_rows_compute_the_same_in_all_libraries():
    for row in drawn_rows.drawn_rows(2, 12):
        for measured in ops.measure(row, ops.products(row)[:2], ops.Config(quick=True)):
            assert "jaxcnn" not in measured.note, measured.note


def test_a_result_compares_with_the_fastest_of_a_library():
    seconds = {"jaxcnn": 2.0, "flax nnx": 3.0, "torch": 5.0, "torch channels-last": 4.0}
    times = {name: timing.Times((s, 9.0)) for name, s in seconds.items()}
    result = drawn.Result("a net", times, {"jaxcnn": [5.0, 3.0], "flax nnx": [2.0, 4.0]}, dict.fromkeys(seconds))
    assert (result.against("torch"), result.against("flax nnx"), result.against("keras")) == (2.0, 1.5, None)
    assert result.compile_ratio == 1.5


# ---------------------------------------------------------------------------------------------------------------------
# lowerings


@pytest.fixture
def costs():
    """Restore the costs of lowerings after a fit."""
    saved = kernels_measured.COSTS
    yield
    lowerings.use_costs(saved)


def drawn_products(seed, count):
    convolutions = (one for one in drawn_rows.drawn(seed, count) if one.kind not in drawn_rows.POOLS)
    return [
        lowerings.product_of(one, name) for one in convolutions for name in ("correlate", "input_grad", "kernel_grad")
    ]


def test_transposed_convolutions_have_the_image_of_their_result():
    one = drawn_rows.Drawn("transposed", (2, 5, 6, 3), 4, 7, 2, 9, 1, 1)  # padding of at most 3, as in `ops`
    p = lowerings.product_of(one, "input_grad")
    assert (p.c.window.shape, p.c.window.out, p.inputs, p.outputs) == ((6, 8), (5, 6), 7, 3)
    assert one.row.shapes["x"] == (2, 5, 6, 3)


def test_fitted_costs_predict_times(costs):
    """Costs are found from times that other costs give, with noise; the lowerings chosen are then the fastest."""
    rng = np.random.default_rng(0)
    table = []
    for p in drawn_products(0, 150):
        seconds = {name: cost.cost(p, name) * 1e-6 * rng.lognormal(sigma=0.02) for name in cost.candidates(p)}
        table.append(lowerings.Measured(p, "", seconds, {}, "avx2"))
    found = lowerings.fit(table)
    assert all(len(of) <= lowerings.NUMBERS and min(of.values()) > 0 for of in found.values())
    lowerings.use_costs(found)
    spreads = {}
    for one in table:
        for name, seconds in one.seconds.items():
            ratio = cost.cost(one.product, name) * 1e-6 / seconds
            spreads.setdefault((one.product.name, cost.form(one.product, name)), []).append(math.log(ratio))
    assert all(np.std(of) < 0.25 for of in spreads.values() if len(of) > 20), spreads
    ratios = [ratio for one in table for ratio in lowerings.chosen(one).values()]
    assert results.geometric_mean(ratios) < 1.03


@pytest.mark.usefixtures("costs")
def test_adapted_costs():
    """Few products show which lowerings are slower on another processor, and by how much."""
    before = kernels_measured.AVX512
    lowerings.use_costs(before)
    table = []
    for p in drawn_products(1, 40):
        seconds = {name: cost.cost(p, name) * (8e-6 if name == "xla" else 2e-6) for name in cost.candidates(p)}
        table.append(lowerings.Measured(p, "", seconds, {}, "avx2"))
    found = lowerings.fit(table, adapt=True)
    assert found.keys() == before.keys()
    assert all(found[key].keys() == before[key].keys() for key in found)
    factors = {key: np.median([found[key][kind] / before[key][kind] for kind in before[key]]) for key in found}
    timed = {(one.product.name, cost.form(one.product, name)) for one in table for name in one.seconds}
    for (name, form), factor in factors.items():
        if form in lowerings.SPLIT:
            continue
        expected = 8 if form.split(",")[0] == "xla" and (name, form) in timed else 2
        assert 0.9 * expected < factor / lowerings.XLA_COST < 1.1 * expected, (name, form)
    assert ("correlate", "onednn jit") not in timed


def test_times_of_lowerings_are_written_and_read_back(still, costs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(drawn_rows, "MOST_FLOPS", 1e7)
    path = tmp_path / "times.json"
    assert lowerings.main(["--drawn", "4", "--rounds", "1", "--seed", "3", "--out", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = list(lowerings.read(path))
    assert [lowerings.line(one) for one in table] == lines[-len(table) :]
    assert [one.product for one in table] == drawn_products(3, 4)
    assert all({*one.seconds} - {"onednn"} == {*cost.candidates(one.product)} for one in table)
    assert lowerings.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"# {len(table)} products")
    assert f"\n{kernels_measured.processor().upper()}: Costs = {{" in text


def test_files_from_different_processors(tmp_path, capsys):
    paths = [tmp_path / f"{processor}.json" for processor in kernels_measured.TABLES]
    p, *_ = drawn_products(3, 4)
    for path in paths:
        results.write(
            path,
            {},
            lowerings.Config(),
            rows=[lowerings.to_json(lowerings.Measured(p, "", {"xla": 1.0}, {}, path.stem))],
        )
    assert lowerings.main([str(path) for path in paths]) == 2
    assert "FIT: must be times from one kind of processor, got avx2 and avx512" in capsys.readouterr().err


def test_a_file_without_times(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert lowerings.main([str(path)]) == 2
    assert "FIT: must be files written with python -m experiments.benchmarks.lowerings --out" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# memory


def test_residuals_are_counted_once_and_without_arguments():
    def f(x):
        y = jnp.sin(x)  # saves cos x
        return (y * jax.jit(lambda y: y)(y) * x).sum()  # saves y, and y·y or the like; x is an argument

    x = jnp.ones((8, 4))
    assert memory.residual_bytes(lambda x: jnp.sin(x).sum(), x) == 8 * 4 * 4
    assert memory.residual_bytes(lambda x: (x * x).sum(), x) == 0
    assert memory.residual_bytes(f, x) in (2 * 128, 3 * 128)


def test_max_pool_saves_one_byte_per_window_and_stock_jax_its_input():
    import jaxcnn

    x = jnp.ones((2, 8, 8, 3))
    assert memory.residual_bytes(lambda x: jaxcnn.max_pool(2 * x, 2).sum(), x) == 2 * 4 * 4 * 3
    stock = row_called("max_pool 2×2, ").stock
    assert memory.residual_bytes(lambda x: stock(2 * x).sum(), x) == 4 * x.size


@pytest.mark.slow("runs a benchmark")
@pytest.mark.usefixtures("others")
def test_a_run_of_memory(tmp_path, monkeypatch, capsys, still):
    monkeypatch.setitem(NETS, "lenet5", lambda: SMALL)
    out = tmp_path / "memory.json"
    assert memory.main(["--nets", "lenet5", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["bytes"]["lenet5"]
    assert set(found) == {"jaxcnn", "flax nnx", "equinox"}
    assert found["jaxcnn"]["residuals"] < found["flax nnx"]["residuals"]
    assert all(of["temporary"] > 0 for of in found.values())
    assert "lenet5" in capsys.readouterr().out
    assert out.with_suffix(".png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# growth, per_example, accuracy


def test_cost_of_an_image():
    found = growth.per_image("batch", {16: {"jaxcnn": 0.16, "flax nnx": 0.32}, 64: {"jaxcnn": 0.32, "flax nnx": 6.4}})
    assert found == {"jaxcnn": {16: 0.01, 64: 0.005}, "flax nnx": {16: 0.02, 64: 0.1}}
    assert growth.per_image("side", {16: {"jaxcnn": 0.16}}) == {"jaxcnn": {16: 0.02}}
    assert growth.flatness({16: 9.0, 64: 2.0, 128: 2.5}) == 1.25
    assert growth.flatness({16: 9.0, 64: 2.0}) is None
    (line, _) = growth.table({"jaxcnn": {16: 1.0, 64: 1.0}, "flax nnx": {16: 2.5, 64: 1.0}})
    assert line == ["16", "1.00 s", "2.50 s", "2.50"]


def test_what_grows():
    assert growth.grown("batch", 32).batch == 32
    assert growth.grown("side", 112).shape == (112, 112, 3)
    assert growth.grown("channels", 8).shape == (16, 16, 8)


@pytest.mark.slow("runs a benchmark")
@pytest.mark.usefixtures("others")
def test_a_run_of_growth(tmp_path, monkeypatch, capsys, still):
    monkeypatch.setitem(growth.SIZES, "channels", (2, 4))
    out = tmp_path / "growth.json"
    argv = ["--what", "channels", "--most", "2", "--rounds", "1", "--microbatch", "2", "--out", str(out)]
    assert growth.main(argv) == 0
    assert "jaxcnn in microbatches of 2" in capsys.readouterr().out
    assert set(json.loads(out.read_text())["seconds"]["channels"]) == {"2"}
    assert out.with_suffix(".png").exists()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(NETS, "lecture", lambda: SMALL)


@pytest.mark.slow("runs a benchmark")
@pytest.mark.usefixtures("others", "small", "still")
def test_a_run_of_per_example(tmp_path, capsys):
    out = tmp_path / "per_example.json"
    assert per_example.main(["--batch-size", "3", "--rounds", "1", "--max-norm", "0.5", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["seconds"]
    assert set(found) == {"gradients", "norms", "clipped sums"}
    assert set(found["norms"]) == {"jaxcnn", "flax nnx", "equinox"}


@pytest.mark.usefixtures("others", "still")
def test_a_run_of_per_example_with_a_function(monkeypatch, capsys):
    def affine(batch_size):
        return lambda params, x: x @ params, np.ones((4, 10), np.float32), np.ones((batch_size, 4), np.float32)

    monkeypatch.setitem(per_example.FUNCTIONS, "linen", affine)
    assert per_example.main(["--net", "linen", "--batch-size", "3", "--rounds", "1"]) == 0
    assert capsys.readouterr().out.count("vmap(grad)") >= 3


@pytest.mark.usefixtures("others", "small", "still")
def test_different_per_example_gradients_are_an_error(monkeypatch, capsys):
    load = per_example.model

    def wrong(name, timed, params):
        logits, weights = load(name, timed, params)
        return (lambda weights, x: 1.1 * logits(weights, x)), weights

    monkeypatch.setattr(per_example, "model", wrong)
    assert per_example.main(["--batch-size", "3", "--rounds", "1", "--libraries", "flax nnx"]) == 1
    assert "gradients of flax nnx: must be within 0.0001 of jaxcnn's, got a distance of" in capsys.readouterr().err


def test_distance_of_per_example_results():
    a = {"weight": np.arange(6.0), "bias": np.ones(2)}
    assert per_example.distance(a, [np.ones(2), np.arange(6.0)[::-1]]) == 0
    assert per_example.distance(a, [np.ones(2), np.arange(6.0) + 1]) > 0.1
    assert per_example.distance(a, [np.ones(3), np.arange(6.0)]) == math.inf
    assert per_example.distance([np.array([np.nan])], [np.ones(1)]) == math.inf


def trained(accuracies):
    one = accuracy.Trained(lambda batches: None, lambda: 0.0)
    one.accuracies, one.seconds = list(accuracies), [2.0] * len(accuracies)
    one.epochs = [0.5 * (i + 1) for i in range(len(accuracies))]
    return one


def test_time_to_the_target():
    assert trained([0.8, 0.89, 0.91, 0.9]).reached(0.9) == (6.0, 1.5)
    assert trained([0.8, 0.89]).reached(0.9) is None
    found = {"jaxcnn": trained([0.95]), "torch": trained([0.8, 0.85])}
    assert accuracy.lines(found, 0.9) == [
        ["jaxcnn", "2.0 s", "0.50", "0.9500", "2.0 s"],
        ["torch", "not reached", "", "0.8500", "4.0 s"],
    ]
    assert accuracy.mean_seconds({0: found, 1: {"jaxcnn": trained([0.1, 0.9])}}, 0.9) == {"jaxcnn": 3.0}


@pytest.mark.slow("runs a benchmark")
@pytest.mark.usefixtures("others")
def test_a_run_of_accuracy(tmp_path, capsys, still, monkeypatch):
    """All contenders start with the same parameters and get the same batches."""
    tiny = Timed(serial(Conv(2, 5), Relu(), MaxPool(4), Flatten(), Dense(10)), (28, 28, 1), 32)
    monkeypatch.setitem(NETS, "lecture", lambda: tiny)
    out = tmp_path / "accuracy.json"
    argv = ["--data", "fashion-mnist-sample", "--batch-size", "32", "--max-steps", "2", "--turns", "100"]
    assert accuracy.main([*argv, "--target", "0.99", "--out", str(out)]) == 0
    assert "not reached" in capsys.readouterr().out
    found = json.loads(out.read_text())["seeds"]["0"]
    assert set(found) == {"jaxcnn", "flax nnx", "torch"}
    for of in found.values():
        assert len(of["seconds"]) == len(of["accuracies"]) == 1
        assert 0.02 < of["accuracies"][0] < 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Nets of other libraries


def test_report_of_the_zoo(capsys):
    seconds = {zoo.STOCK: timing.Times((0.4, 0.5)), zoo.OURS: timing.Times((0.1, 0.2))}
    built = {
        zoo.STOCK: zoo.Built(5.0, 4.0, 1.0, 3.0, 9_000_000),
        zoo.OURS: zoo.Built(6.0, 6.0, 2.0, 3.0, 4_000_000, (3, 2, 1)),
    }
    zoo.report(zoo.Config(), {}, [{"net": "linen", "mode": "training", "seconds": seconds, "built": built}])
    text = capsys.readouterr().out
    cells = ("400.0 ms", "100.0 ms", "4.00", "3.00", "9 → 4", "5.0 → 6.0", "4.0 → 6.0", "1.50", "3, 2, 1")
    assert all(cell in text for cell in cells)
    assert "training: geometric mean 4.00, least 4.00 (linen)" in text
    assert "later than 1.3 times stock JAX: linen, training (1.50)" in text


def test_a_net_of_the_zoo_that_fails_does_not_end_the_others(monkeypatch, capsys):
    def measure(name, mode, config):
        if name == "linen":
            raise RunError("linen stock JAX training: its process ended with status 1")
        times = {form: timing.Times((0.1, 0.1)) for form in (zoo.STOCK, zoo.OURS)}
        return {"net": name, "mode": mode, "seconds": times, "built": dict.fromkeys(times, zoo.Built(1, 1, 1, 1, 1))}

    monkeypatch.setattr(zoo, "measure", measure)
    monkeypatch.setattr(timing, "machine", lambda *_, **__: {})
    assert zoo.main(["--nets", "linen", "nnx", "--modes", "training"]) == 1
    out = capsys.readouterr().out
    assert "linen stock JAX training: its process ended with status 1\n" in out
    assert "training: geometric mean 1.00, least 1.00 (nnx)\n" in out
    assert out.endswith("without a result: linen, training\n")


@pytest.mark.parametrize(
    ("dtype", "loss", "median", "largest", "rounding", "right"),
    [
        ("float64", 1e-15, 1e-14, 1e-11, None, True),
        ("float64", 1e-15, 1e-14, 1e-9, None, False),  # the largest of all parameters counts
        ("float32", 1e-7, 1e-6, 1e-2, None, True),
        ("float32", 1e-4, 1e-6, 1e-6, None, False),
        ("float32", 1e-7, 1e-3, 1e-2, ((1e-6, 1e-3), (1e-6, 1.9e-3)), True),
        ("float32", 1e-7, 1e-3, 1e-2, ((1e-6, 1e-3), (1e-6, 2.1e-3)), False),
        ("float32", 1e-4, 1e-3, 1e-2, ((1e-5, 1e-3), (2.1e-5, 1e-3)), False),
        ("float32", 1e-7, 1e-3, 1e-2, ((1e-7, 1e-7), (9e-6, 9e-6)), True),  # a batch without an edge
    ],
)
def test_verdict_on_a_net_of_the_zoo(dtype, loss, median, largest, rounding, right):
    row = {"dtype": dtype, "loss": loss, "median": median, "largest": largest, "parameter": "['w']"}
    if rounding is not None:
        forms = zip((zoo.STOCK, zoo.OURS), rounding, strict=True)
        row["rounding"] = {form: dict(zip(("values", "gradients"), of_form, strict=True)) for form, of_form in forms}
    assert zoo.verdict(row)[1] is right


def test_distances_of_gradients_that_are_zero():
    assert zoo.distance(np.array([1.1, 0]), np.array([1.0, 0])) == pytest.approx(0.1)
    assert zoo.distance(np.array([3e-17]), np.array([1e-17])) == pytest.approx(2)
    least = zoo.ZERO * zoo.norm_of_all({"a": np.array([3.0]), "b": [np.array([[4.0]]), np.array([1e-17])]})
    assert least == pytest.approx(5e-6)
    assert zoo.distance(np.array([3e-17]), np.array([1e-17]), least) == pytest.approx(4e-12)
    assert zoo.distance(np.array([np.nan]), np.array([1.0]), least) == np.inf


def test_float32_is_compared_with_float64_where_it_differs(monkeypatch):
    medians = {"linen": 1e-6, "nnx": 1e-3}
    kinds = []

    class Process:
        def __init__(self, what, name, kind, mode, batch_size):
            kinds.append((name, kind))
            self.name, self.kind = name, kind

        def answer(self):
            return {"rounding": {}} if self.kind == "rounding" else {"median": medians[self.name], "loss": 0.0}

        def stop(self):
            kinds.append("stopped")

    monkeypatch.setattr(zoo, "Process", Process)
    assert zoo.compared("linen", "training", "float32", zoo.Config()) == {"median": 1e-6, "loss": 0.0}
    assert zoo.compared("nnx", "training", "float32", zoo.Config()) == {"median": 1e-3, "loss": 0.0, "rounding": {}}
    assert kinds == [
        ("linen", "float32"), "stopped", ("nnx", "float32"), "stopped", ("nnx", "rounding"), "stopped",
    ]  # fmt: skip


@pytest.mark.slow("compiles a whole net twice")
def test_a_net_of_the_zoo_equals_stock_jax():
    pytest.importorskip("haiku")
    with jax.enable_x64(True):
        found = zoo.differences("linen-groups", "float64", False, 1)
    assert max(found["loss"], found["median"], found["largest"]) < 1e-10
    assert "kernel" in found["parameter"] or "bias" in found["parameter"] or "scale" in found["parameter"]


@pytest.mark.parametrize(
    ("result", "expected", "distance"),
    [([3.0, 4.0], [3.0, 4.0], 0.0), ([0.0, 4.0], [3.0, 4.0], 0.6), ([np.nan], [1.0], np.inf), ([1], [2], np.inf)],
)
def test_distance_of_the_zoo(result, expected, distance):
    assert zoo.distance(np.array(result), np.array(expected)) == distance
