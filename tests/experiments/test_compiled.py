# ruff: noqa: E501  # recorded programs have long lines
"""Counts of recorded programs, and the table of `experiments.benchmarks.compiled`; no TPU or GPU is needed."""

import importlib.machinery
import importlib.util
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import compiled, compiler, hlo, rows
from experiments.benchmarks.compiler import BOTH, FLAX, FORWARD, OURS, STEP, STOCK, Compiled, Compiler, Job

TPU = """HloModule jit_both, is_scheduled=true

%fused_computation (param_0.3: bf16[16,56,56,64]) -> bf16[16,28,28,64] {
  %param_0.3 = bf16[16,56,56,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %reduce_window_max.0 = bf16[16,28,28,64]{3,0,2,1:T(8,128)(2,1)} reduce-window(%param_0.3, %constant.0), window={size=1x3x3x1}
}

ENTRY %main.4 (x.1: bf16[16,56,56,64], d.1: bf16[16,28,28,64]) -> (bf16[16,28,28,64], bf16[16,56,56,64]) {
  %constant.2 = bf16[]{:T(256)} constant(0)
  %x.1 = bf16[16,56,56,64]{3,2,1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}, metadata={op_name="x"}
  %d.1 = bf16[16,28,28,64]{3,0,2,1:T(8,128)(2,1)} parameter(1), sharding={replicated}, metadata={op_name="d"}
  %copy-start = (bf16[16,28,28,64]{3,0,2,1:T(8,128)(2,1)S(1)}, bf16[16,28,28,64]{3,0,2,1:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%d.1)
  %copy.2 = bf16[16,56,56,64]{3,0,2,1:T(8,128)(2,1)S(1)} copy(%x.1), sharding={replicated}
  %copy-done = bf16[16,28,28,64]{3,0,2,1:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %slice-start = ((bf16[16,56,56,64]{3,2,1,0:T(8,128)(2,1)}), bf16[4,56,56,64]{3,2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x.1), slice={[0:4], [0:56], [0:56], [0:64]}
  %select_and_scatter.9 = bf16[16,56,56,64]{3,0,2,1:T(8,128)(2,1)S(1)} select-and-scatter(%copy.2, %copy-done, %constant.2), select=%a, scatter=%b
  %copy.4 = bf16[16,56,56,64]{3,2,1,0:T(8,128)(2,1)} copy(%select_and_scatter.9), backend_config={"estimated_cycles":"91966"}
  %slice-done = bf16[4,56,56,64]{3,2,1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %custom-call = bf16[16,56,56,64]{3,2,1,0:T(8,128)(2,1)S(1)} custom-call(%slice-done), custom_call_target="ConcatBitcast"
  %fusion = bf16[16,28,28,64]{3,0,2,1:T(8,128)(2,1)} fusion(%custom-call), kind=kOutput, calls=%fused_computation
  ROOT %tuple = (bf16[16,28,28,64]{3,0,2,1:T(8,128)(2,1)}, bf16[16,56,56,64]{3,2,1,0:T(8,128)(2,1)}) tuple(%fusion, %copy.4)
}
"""

GPU = """HloModule jit_run, is_scheduled=true

%cond (q: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[] constant(5)
  %q = (s32[], f32[4,8]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%counter, %limit), direction=LT
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %a = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %b = f32[4,8]{1,0} fusion(%a), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %b)
}

ENTRY %main.2 (x.1: f32[16,56,56,64], w.1: f32[3,3,64,128]) -> (f32[16,28,28,128], f32[3,3,64,128]) {
  %x.1 = f32[16,56,56,64]{3,2,1,0} parameter(0), sharding={replicated}, metadata={op_name="a[3]" scheduling_name="x.1"}
  %w.1 = f32[3,3,64,128]{3,2,1,0} parameter(1)
  %wrapped_transpose = f32[128,3,3,64]{3,2,1,0} fusion(%w.1), kind=kInput, calls=%wrapped_transpose_computation
  %cudnn-conv.4 = (f32[16,28,28,128]{3,2,1,0}, u8[0]{0}) custom-call(%x.1, %wrapped_transpose), window={size=3x3 stride=2x2}, custom_call_target="__cudnn$convForward"
  %get-tuple-element.5.0 = f32[16,28,28,128]{3,2,1,0} get-tuple-element(%cudnn-conv.4), index=0
  %c.1 = s32[] constant(0)
  %start = f32[4,8]{1,0} broadcast(%c.1), dimensions={}
  %tuple.1 = (s32[], f32[4,8]{1,0}) tuple(%c.1, %start)
  %while.1 = (s32[], f32[4,8]{1,0}) while(%tuple.1), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %all-reduce-start = f32[3,3,64,128]{3,2,1,0} all-reduce-start(%w.1), to_apply=%add
  %all-reduce-done = f32[3,3,64,128]{3,2,1,0} all-reduce-done(%all-reduce-start)
  ROOT %tuple.5 = (f32[16,28,28,128]{3,2,1,0}, f32[3,3,64,128]{3,2,1,0}) tuple(%get-tuple-element.5.0, %all-reduce-done)
}
"""

BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %2 = vsyncpa [#allocation1], 0  ;;  %s8_s0 = inlined_call_operand.hbm [shape: f32[8,16,128], index: 0] }
   0x1 LB: > { %s44_s9 = sadd.s32 4294967295, %s55_s8 /* iteration index, stage = 1 */ }
   0x2   : > { %v17_v0 = vld [vmem:[#allocation0] sm:$0xff] }
   0x3 LB: >> { %v129_v0 = vld [vmem:[%s41387_s14] sm:$0xf] }
base_bounds: (8, 2, 1)
   0x4   : >> { %p3_p2 = scmp.ge.s32.totalorder %s21_s8, 4 /* loop exit test */ }
   0x5   : > { %p7_p5 = scmp.ge.s32.totalorder %s10_s8, 9 /* loop exit test */  ;;  %s69070_s7 = smov %s69072_s10 }
   0x6   :  { %379 = vsyncadd [#allocation1], 4294965248 }
"""


def test_bytes_of_tiles():
    """The dims that the layout lists first are padded to whole tiles."""
    (a, b) = hlo.arrays("(bf16[16,56,57,64]{3,2,1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[3]{0:T(128)}, token[])")
    assert (a.size, a.on_chip, a.rank) == (16 * 56 * 64 * 128 * 2, True, 4)
    assert (b.size, b.on_chip) == (128 * 4, False)
    assert [array.size for array in hlo.arrays("f32[2,3]{1,0} u8[0]{0} pred[]")] == [24, 0, 1]


def test_counts_of_a_tpu_program():
    bundles = {"copy.2": 60000, "select_and_scatter.9": 40000, "copy.4": 1, "fusion": 30000, "TLP": 100}
    whole, window = 16 * 56 * 56 * 128 * 2, 16 * 28 * 28 * 128 * 2
    moved = window + whole + whole // 4 + whole + window  # into and out of the device's memory, not the chip's
    counts = hlo.count(TPU, bundles, 500.0)
    assert (counts.moved, counts.kernels) == (moved, 6)
    assert counts.cycles == 100 + 60000 + 40000 + whole / 500 + 30000
    assert hlo.count(TPU, {}, 1.0).cycles == moved  # with the asynchronous copies
    assert (counts.calls, counts.collectives) == ({}, {})


def test_counts_of_a_gpu_program():
    """The body of a loop counts as often as it runs; a tuple moves nothing."""
    counts = hlo.count(GPU)
    assert hlo.count(GPU.replace('"known_trip_count":{"n":"5"}', "")) == counts  # the limit in the condition
    assert hlo.count(GPU.replace("constant(5)", "constant(6)")) == counts
    x, w, y, small = 16 * 56 * 56 * 64 * 4, 3 * 3 * 64 * 128 * 4, 16 * 28 * 28 * 128 * 4, 4 * 8 * 4
    assert counts.moved == 2 * w + (x + w + y) + small + 5 * 2 * small + 2 * w
    assert counts.kernels == 2 + 1 + 5 + 1
    assert counts.calls == {"cudnn$convForward": 1}
    assert counts.collectives == {"all-reduce": 1}
    assert counts.cycles is None


SLICES = """HloModule jit_run, is_scheduled=true

%read (p: f32[64,32], q: s32[]) -> f32[4,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %q = s32[] parameter(1)
  ROOT %part = f32[4,32]{1,0} dynamic-slice(%p, %q, %q), dynamic_slice_sizes={4,32}
}

%write (b: f32[4,32], a: f32[64,32], r: s32[]) -> f32[64,32] {
  %a = f32[64,32]{1,0} parameter(1)
  %b = f32[4,32]{1,0} parameter(0)
  %r = s32[] parameter(2)
  ROOT %updated = f32[64,32]{1,0} dynamic-update-slice(%a, %b, %r, %r)
}

ENTRY %main.1 (x: f32[64,32], i: s32[]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %taken = f32[4,32]{1,0} fusion(%x, %i), kind=kLoop, calls=%read
  %other = f32[8,32]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={8,32}
  %sum = f32[4,32]{1,0} fusion(%taken, %other), kind=kLoop, calls=%fused
  ROOT %result = f32[64,32]{1,0} fusion(%sum, %x, %i), kind=kLoop, calls=%write
}
"""


CONDITIONAL = """HloModule conditional

%again (p.1: (f32[64,32], f32[32])) -> f32[32] {
  %p.1 = (f32[64,32]{1,0}, f32[32]{0}) parameter(0)
  %x.1 = f32[64,32]{1,0} get-tuple-element(%p.1), index=0
  ROOT %reduced = f32[32]{0} fusion(%x.1), kind=kLoop, calls=%fused
}

%known (p.2: (f32[64,32], f32[32])) -> f32[32] {
  %p.2 = (f32[64,32]{1,0}, f32[32]{0}) parameter(0)
  %v.2 = f32[32]{0} get-tuple-element(%p.2), index=1
  ROOT %copied = f32[32]{0} copy(%v.2)
}

ENTRY %main (x: f32[64,32], v: f32[32], i: s32[]) -> f32[32] {
  %x = f32[64,32]{1,0} parameter(0)
  %v = f32[32]{0} parameter(1)
  %i = s32[] parameter(2)
  %both = (f32[64,32]{1,0}, f32[32]{0}) tuple(%x, %v)
  ROOT %result = f32[32]{0} conditional(%i, %both, %both), branch_computations={%again, %known}
}
"""


def test_the_branch_of_a_conditional_that_moves_least_counts():
    (step,) = hlo.executed(CONDITIONAL)
    assert (step.instruction.name, step.moved) == ("copied", 2 * 32 * 4)


def test_dynamic_slices_move_their_parts():
    row = 32 * 4
    taken, other, total, result = (step.moved for step in hlo.executed(SLICES))
    assert (taken, other) == (2 * 4 * row, 2 * 8 * row)
    assert total == (4 + 8 + 4) * row
    assert result == 2 * 4 * row  # the array is updated in place


STRIDED = """HloModule jit_run, is_scheduled=true

%rows (p: bf16[8,64,32]) -> f32[8,4,32] {
  %p = bf16[8,64,32]{2,1,0} parameter(0)
  %wide = f32[8,64,32]{2,1,0} convert(%p)
  ROOT %part = f32[8,4,32]{2,1,0} slice(%wide), slice={[0:8], [0:64:16], [0:32]}
}

%images (q: f32[8,64,32]) -> f32[2,64,32] {
  %q = f32[8,64,32]{2,1,0} parameter(0)
  ROOT %part.1 = f32[2,64,32]{2,1,0} slice(%q), slice={[0:8:4], [0:64], [0:32]}
}

%twice (r: f32[8,64,32]) -> f32[2,64,32] {
  %r = f32[8,64,32]{2,1,0} parameter(0)
  %first = f32[2,64,32]{2,1,0} slice(%r), slice={[0:2], [0:64], [0:32]}
  %second = f32[2,64,32]{2,1,0} slice(%r), slice={[6:8], [0:64], [0:32]}
  ROOT %sum = f32[2,64,32]{2,1,0} add(%first, %second)
}

ENTRY %main.1 (x: bf16[8,64,32], y: f32[8,64,32]) -> f32[2,64,32] {
  %x = bf16[8,64,32]{2,1,0} parameter(0)
  %y = f32[8,64,32]{2,1,0} parameter(1)
  %of_rows = f32[8,4,32]{2,1,0} fusion(%x), kind=kLoop, calls=%rows
  %of_images = f32[2,64,32]{2,1,0} fusion(%y), kind=kLoop, calls=%images
  %of_first = f32[8,64,32]{2,1,0} slice(%y), slice={[0:8], [0:64], [0:32]}
  %across = bf16[8,4,32]{0,1,2} slice(%x), slice={[0:8], [0:64:16], [0:32]}
  ROOT %result = f32[2,64,32]{2,1,0} fusion(%y), kind=kLoop, calls=%twice
}
"""


def test_slices_read_their_parts():
    """If no stride is among the two dims of neighboring elements; otherwise whole arrays are read."""
    row = 32 * 4
    rows, images, whole, across, twice = (step.moved for step in hlo.executed(STRIDED))
    assert rows == 8 * 64 * row // 2 + 8 * 4 * row  # a stride along the second dim
    assert images == 2 * 2 * 64 * row
    assert whole == 2 * 8 * 64 * row
    assert across == (8 * 64 + 8 * 4) * row // 2
    assert twice == (4 + 2) * 64 * row


def test_bundles_of_nested_loops():
    assert hlo.executed_bundles(BUNDLES.splitlines()) == 2 + 9 * (3 + 4 * 2)
    assert hlo.dumped_instruction("1795-copy.2-01-final_bundles.txt") == "copy.2"
    assert hlo.dumped_instruction("1795-copy.2-00-schedule-analysis_final_bundles.txt") is None
    assert hlo.dumped_instruction("1795-TLP-hlo.txt") is None


@pytest.mark.parametrize("contender", [OURS, STOCK])
@pytest.mark.parametrize(
    ("row", "product", "split"),
    [
        ("softmax_cross_entropy_with_integer_labels 128×10", BOTH, [True, True, True]),
        ("dense 1024→10, 128", FORWARD, [True, False, False]),
    ],
)
def test_program_of_an_op(row, product, split, contender):
    jitted, arguments, along_batch = compiler.program(Job(row, product, contender, "bfloat16", batch=2))
    assert along_batch == split
    results = jax.tree.leaves(jax.eval_shape(jitted, *arguments))
    assert {str(a.dtype) for a in results} <= {"bfloat16", "float32"}
    assert [a.shape for a in results] == ([(2,), (2, 10)] if product == BOTH else [(2, 10)])


@pytest.mark.parametrize("contender", [OURS, STOCK, FLAX])
def test_program_of_a_step(contender):
    if contender == FLAX:
        pytest.importorskip("flax")
    jitted, (state, batch), split = compiler.program(Job("lecture", STEP, contender, "bfloat16", batch=2))
    new_state, metrics = jax.eval_shape(jitted, state, batch)
    assert split == [False, True]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new_state) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert set(metrics) == {"loss", "accuracy"}


def lowered(f, *arguments):
    return compiler.fingerprint(jax.jit(f).lower(*arguments).as_text())


def test_fingerprints():
    """They ignore names and the order of operations, and nothing else."""
    x, y = jnp.ones((2, 3)), jnp.ones(3)

    def program(x, y):
        return x * y, y + 1

    def same_in_another_order(x, y):
        later = y + 1
        return x * y, later

    assert lowered(program, x, y) == lowered(same_in_another_order, x, y)
    others = (
        lambda x, y: (y + 1, x * y), lambda x, y: (x * y, y + 2), lambda x, y: (x - y, y + 1),
        lambda x, y: (x * y, y + y),
    )  # fmt: skip
    distinct = {lowered(program, x, y), *(lowered(f, x, y) for f in others), lowered(program, x, jnp.ones((1, 3)))}
    assert len(distinct) == 6


def test_fingerprints_of_loops_and_calls():
    """Programs with bodies have equal fingerprints only if all their lines are equal."""

    def counted(n):
        return lambda x: jax.lax.fori_loop(0, n, lambda i, x: x * 2, x)

    def called(f):
        return lambda x: jax.jit(f)(x) - x

    x = jnp.ones(3)
    assert lowered(counted(3), x) == lowered(counted(3), x) != lowered(counted(4), x)
    assert lowered(called(jnp.sin), x) != lowered(called(jnp.cos), x)


def test_convolutions_on_tpu_are_those_of_stock_jax():
    """All but the backward passes of two: one drops windows in the padding, the other slices before it multiplies."""
    different = set()
    for row, product in itertools.product(rows.convolutions(), (FORWARD, BOTH)):
        programs = set()
        for contender in (OURS, STOCK):
            jitted, arguments, _ = compiler.program(Job(row.name, product, contender, "float32"))
            text = jitted.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
            programs.add(compiler.fingerprint(text))
        if len(programs) > 1 and row.name.startswith("conv "):
            different.add((row.name, product))
    names = ("conv 1×1 64→128 stride 2, 32×32×32", "conv 1×2 32→32 padding 4 in front, 16×32×32")
    assert different == {(name, BOTH) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# The process and the table

#: A compiler that aborts, hangs, reports an error or answers, as the name of the row says.
FAKE = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    if "relu6" in job["row"]: print("F0000 Check failed: shape", file=sys.stderr, flush=True); os.abort()
    ours = job["contender"] == "jaxcnn"
    if "elu" == job["row"].split()[0] and ours: time.sleep(60)
    more = 2 if ours else 1
    answer = dict(program="tanh" if "tanh" in job["row"] else job["contender"], moved=10 * more, kernels=3,
        calls={"cudnn$convForward": more}, collectives={}, cycles=5e3 * more, temporary=0, least=2, compile_seconds=1.0)
    print(json.dumps({"error": "no"} if "gelu" in job["row"] else answer), flush=True)
"""


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(compiled, "require", lambda platform: None)
    monkeypatch.setattr(compiled, "versions", lambda platform: {"jax": "0"})

    def start(platform, timeout):
        return Compiler(platform, timeout, (sys.executable, "-c", FAKE))

    monkeypatch.setattr(compiled, "Compiler", start)


@pytest.mark.slow("waits for a timeout")
def test_a_failure_is_one_row(fake, capsys, tmp_path):
    out = tmp_path / "table.json"
    only = "^(relu6|elu|gelu|silu|tanh) .*forward"
    argv = ["--only", only, "--dtypes", "float32", "--timeout", "5", "--out", str(out)]
    assert compiled.main(argv) == 1
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines() if "forward, float32" in line and line[0] != " "}
    assert "failed: jaxcnn: the compiler ended with status -6: F0000 Check failed: shape" in rows["relu6"]
    assert "no result after 5 s" in rows["elu"]
    assert "failed: jaxcnn: no" in rows["gelu"]
    assert rows["silu"].split("float32")[1].split()[:6] == ["10.00", "2.00", "0.00", "2.00", "0.00", "–"]
    assert rows["silu"].endswith("jaxcnn 2 Forward; stock JAX 1 Forward; slower")
    assert "same program" in rows["tanh"]
    assert "ops, bytes of all arguments and results / bytes moved by stock JAX: 0.20" in text
    assert "2 of 2 rows above 1.05:" in text
    numbers = json.loads(out.read_text())["rows"]
    assert [row["ratios"]["cycles"] for row in numbers] == [None, None, None, 2.0, 2.0]
    assert out.with_suffix(".png").stat().st_size > 1000


def test_groups_and_means():
    def row(name, product, ours, dtype="float32"):
        def counts(moved):
            return Compiled(f"{name} {moved}", moved, 1, {}, {}, None, moved, 40, 1.0)

        return compiled.Compared(name, product, dtype, {OURS: counts(ours), STOCK: counts(100)}, "moved")

    rows = [
        row("conv 1×1 64→128", BOTH, 100), row("conv depthwise 3×3", BOTH, 50), row("conv_transpose 3×3", BOTH, 200),
        row("conv_transpose 4×4", BOTH, 50), row("lecture", STEP, 25), row("global_max_pool 64", FORWARD, 10),
    ]  # fmt: skip
    assert [r.group for r in rows] == [
        "convolutions", "grouped convolutions", *["transposed convolutions"] * 2, "steps", "pools",
    ]  # fmt: skip
    text = "\n".join(compiled.summary(rows))
    assert "transposed convolutions: both passes, float32 1.00 (2.00)" in text
    assert "1 of 6 rows above 1.05:\n  2.00  conv_transpose 3×3, both passes, float32" in text


def test_what_is_missing_is_reported_with_the_command_that_installs_it(monkeypatch, capsys):
    found = importlib.machinery.ModuleSpec("module", None)
    for version, specs, message in (
        ((3, 11, 7), {}, "needs Python 3.12 or newer, got 3.11.7"),
        ((3, 12, 1), {}, "needs the package jax-cuda12-plugin, which is not installed"),
        ((3, 12, 1), {"jax_cuda12_plugin": found}, "needs the package jax-cuda12-plugin, which is not installed"),
    ):
        monkeypatch.setattr(compiler.sys, "version_info", version)
        monkeypatch.setattr(importlib.util, "find_spec", specs.get)
        with pytest.raises(Exception, match=message) as error:
            compiler.require("cuda-h100")
        assert str(error.value).endswith(": make compiled ARGS='--platform cuda-h100' installs it in .venv-compiled")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--platform tpu-v5", "did you mean tpu-v5e?"),
        ("--only (", "--only: must be a regular expression, got '('"),
        ("--dtypes float16", "--dtypes: must be one of float32, bfloat16, got 'float16'"),
        ("--nets vg", "did you mean vgg?"),
        ("--chips 0", "--chips: must be at least 1, got 0"),
        ("--timeout 0", "--timeout: must be more than 0, got 0.0"),
        ("--only nothing-like-it", "--only: must be a pattern that matches the name of a row, got 'nothing-like-it'"),
    ],
)
def test_wrong_options(argv, message, capsys, fake):
    assert compiled.main(argv.split()) == 2
    assert message in capsys.readouterr().err
