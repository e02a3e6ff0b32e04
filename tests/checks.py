"""Checks that every row of `tests/cases.py` goes through.

Each check is a function of a case that raises AssertionError. `tests/test_rules.py` runs the checks over the table.
`tests/test_planted_errors.py` runs the same functions over wrong rules and asserts that they are caught.

The cotangents δ (of the result) and ξ (of the cotangents) are always random. A plain sum, or a cotangent of ones, does
not detect errors that permute elements.
"""

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_vjp

import jaxcnn
from jaxcnn.platforms import PER_PLATFORM
from tests import oracles
from tests.cases import Case, compiled, cotangents_twice, optimized, with_cotangents

Arrays = Sequence[Any]

#: Relative L2 tolerance, by the coarsest dtype involved; for 16-bit dtypes, two roundings.
TOLERANCE = {jnp.dtype(d): t for d, t in ((np.float64, 1e-10), (np.float32, 1e-5))}
TOLERANCE |= {jnp.dtype(d): float(jnp.finfo(d).eps) for d in (jnp.bfloat16, jnp.float16)}


def within(case: Case, dtype: Any = np.float64) -> float:
    """Return the tolerance for a case in this dtype, by the coarsest dtype involved."""
    return max(TOLERANCE[jnp.dtype(d)] for d in (dtype, case.options.get("preferred_element_type", dtype)))


def assert_close(found: Arrays, expected: Arrays, tolerance: float | Sequence[float]) -> None:
    """Assert pair by pair that shapes are equal and ‖found − expected‖ ≤ tolerance·‖expected‖.

    ``tolerance`` is one number or one per pair.
    """
    each = np.broadcast_to(tolerance, len(found))
    for i, (a, b, tolerance) in enumerate(zip(found, expected, each, strict=True)):
        assert np.shape(a) == np.shape(b), f"array {i} has shape {np.shape(a)}, expected {np.shape(b)}"
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error, norm = np.linalg.norm(a - b), np.linalg.norm(b)
        # Where zero is expected, rounding errors of numbers near one are accepted.
        assert error <= tolerance * max(norm, 1e-3), f"array {i} is off by {error:.3g}, of {norm:.3g}"


def cotangent(case: Case, args: Arrays, seed: int = 1) -> np.ndarray:
    """Return a random δ for the result of a case, with the same numbers in every dtype."""
    y = case.forward.eval_shape(*args)
    return np.random.default_rng(seed).standard_normal(y.shape).astype(np.float32).astype(y.dtype)


def cotangents(args: Arrays, seed: int = 2) -> tuple[np.ndarray, ...]:
    """Return a random ξ for the cotangents of a case."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(a.shape).astype(np.float32).astype(a.dtype) for a in args)


def drawn(case: Case, dtype: Any = np.float64) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    args = case.arrays(dtype)
    return args, cotangent(case, args)


@functools.lru_cache(maxsize=8)
def by_pytorch(case: Case) -> tuple[np.ndarray, Arrays, Arrays]:
    """Return PyTorch's y, the cotangents for the δ of `drawn`, and theirs for the ξ of `cotangents`, in float64."""
    args, delta = drawn(case)
    return oracles.gradients(case.oracle, args, delta.astype(np.float64), cotangents(args))


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and dtypes


def shapes_and_dtypes(case: Case) -> None:
    """Cotangents have their primals' shapes and dtypes, and the result PyTorch's shape and x's dtype.

    This is checked in every dtype, and for stock JAX where the op has such a form. The op is traced under strict dtype
    and rank promotion, because all its conversions are explicit; with bfloat16 for every platform.
    """
    shape = by_pytorch(case)[0].shape
    for dtype in (np.float64, np.float32, jnp.bfloat16, np.float16):
        args, delta = drawn(case, dtype)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            program = case.run.trace(args, delta)
            if dtype == jnp.bfloat16:
                for _ in computed(program.jaxpr.jaxpr):  # it traces the lowerings of all platforms
                    pass
        reference = [] if case.plain is None else [case.run_reference.eval_shape(args, delta)]
        for y, found in [program.out_info, *reference]:
            assert (y.shape, y.dtype) == (shape, case.options.get("preferred_element_type", dtype))
            assert [(c.shape, c.dtype) for c in found] == [(a.shape, dtype) for a in args]


def float32_stays_float32(case: Case) -> None:
    """No intermediate value of the forward or backward pass is wider than float32."""

    program = case.run.trace(*drawn(case, np.float32)).jaxpr
    wider = {str(a) for a in computed(program.jaxpr) if a.dtype == np.float64}
    assert not wider, f"float64 on the way: {', '.join(wider)}"


def computed(jaxpr: Any) -> Iterator[Any]:
    """Yield the types of all arrays that a jaxpr computes, on every platform."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars if v.aval.shape)
        for inner in jaxprs_in_params(equation.params):
            yield from computed(inner)
        if equation.primitive is PER_PLATFORM:  # it is traced when it is lowered
            implementation = equation.params["implementation"]
            yield from computed(jax.make_jaxpr(implementation.anywhere)(*(v.aval for v in equation.invars)).jaxpr)


def weak_types_change_nothing(case: Case) -> None:
    """Weakly typed arrays give the same shapes and dtypes; strongly typed arrays never give weakly typed results."""
    args = case.arrays()  # float64, because weakly typed arrays have JAX's default dtype
    weak = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=True) for a in args)
    delta = case.forward.eval_shape(*args)
    strong, of_weak = (case.run.eval_shape(given, delta) for given in (args, weak))
    assert not any(a.weak_type for a in flat(strong))
    assert [(a.shape, a.dtype) for a in flat(of_weak)] == [(a.shape, a.dtype) for a in flat(strong)]


# ---------------------------------------------------------------------------------------------------------------------
# The rule against three references: autodiff, PyTorch, finite differences


def rule_against_autodiff(case: Case) -> None:
    """The value and the δ rule agree with stock JAX's autodiff of the plain forward pass, in float64."""
    assert_close(flat(case.run(*drawn(case))), flat(case.run_reference(*drawn(case))), within(case))


def value_of_autodiff(case: Case) -> None:
    """The op has the same value in stock JAX, even where stock JAX has no derivative or a wrong one."""
    args, delta = drawn(case)
    plain = functools.partial(case.function, rule=jaxcnn.rules.autodiff)
    assert_close([compiled(plain)(*args)], [case.run(args, delta)[0]], within(case))


def rule_against_pytorch(case: Case) -> None:
    """The value and the δ rule agree with PyTorch, an independent implementation, in float64 and float32."""
    y, expected, _ = by_pytorch(case)
    assert_close(flat(case.run(*drawn(case))), [y, *expected], within(case))
    assert_close(flat(case.run(*drawn(case, np.float32))), [y, *expected], within(case, np.float32))


def rule_of_rule_against_autodiff(case: Case) -> None:
    """Second derivatives, with respect to the arguments and to δ, agree with autodiff in float64."""
    args, delta = drawn(case)
    xis = cotangents(args)
    assert_close(case.twice(args, delta, xis), case.twice_reference(args, delta, xis), within(case))


def rule_of_rule_against_pytorch(case: Case) -> None:
    args, delta = drawn(case)
    *_, expected = by_pytorch(case)
    assert_close(case.twice(args, delta, cotangents(args)), expected, within(case))


def rules_by_differences(case: Case) -> None:
    """The rules agree with finite differences to second order, as in `jax.test_util.check_grads` in reverse mode.

    It uses the steps of `check_grads` on functions that are already compiled. For the second order `check_grads` passes
    the op's output as δ; this check passes a random δ. Its steps are a hundredth of the default, so few of them cross a
    kink.
    """
    args, delta = drawn(case)

    def once(*args: Any) -> Any:
        return case.run(args, delta)[0]

    def vjp(*args: Any) -> Any:
        return once(*args), lambda delta: case.run(args, delta)[1]

    def rule(*args_and_delta: Any) -> Any:
        *args, delta = args_and_delta
        return case.run(tuple(args), delta)[1]

    def vjp_of_rule(*args_and_delta: Any) -> Any:
        *args, delta = args_and_delta
        return rule(*args, delta), lambda xis: case.twice(tuple(args), delta, xis)

    check_vjp(once, vjp, args, eps=1e-6)
    check_vjp(rule, vjp_of_rule, (*args, delta), eps=1e-6)


def third_order_by_differences(case: Case) -> None:
    """Third derivatives agree with finite differences.

    This reaches the rules of products that only rules of rules call, such as max pooling's `gather_winners`.
    """
    args, delta = drawn(case)
    inputs = args, delta, cotangents(args)
    check_vjp(case.twice, lambda *inputs: (case.twice(*inputs), lambda z: case.thrice(inputs, z)), inputs, eps=1e-6)


def adjoint(case: Case) -> None:
    """⟨f(x), δ⟩ = ⟨x, fᵀ(δ)⟩ for each argument in which the op is linear, after subtracting the constant f(0)."""
    args, delta = drawn(case)
    y, found = case.run(args, delta)
    for i in case.linear:
        without = tuple(np.zeros_like(a) if i == j else a for j, a in enumerate(args))
        constant, _ = case.run(without, delta)
        left, right = inner(np.asarray(y) - np.asarray(constant), delta), inner(args[i], found[i])
        scale = np.linalg.norm(args[i]) * np.linalg.norm(found[i])
        assert abs(left - right) <= within(case) * scale, f"argument {i}: ⟨f(x), δ⟩ = {left}, ⟨x, fᵀ(δ)⟩ = {right}"


# ---------------------------------------------------------------------------------------------------------------------
# Under JAX's transformations


def jit_equals_eager(case: Case) -> None:
    """Op-by-op execution and jit with the default XLA and LLVM optimizations give the same results.

    Op-by-op execution uses `jax.debug_nans`, which raises if an intermediate value is NaN.
    """
    args, delta = drawn(case)
    run = with_cotangents(case.function)
    with jax.debug_nans(True):
        eager = run(tuple(map(jnp.asarray, args)), jnp.asarray(delta))
    assert_close(flat(eager), flat(case.run(args, delta)), within(case))
    assert_close(flat(optimized(run)(args, delta)), flat(case.run(args, delta)), within(case))


def equal_geometry_compiles_once(case: Case) -> None:
    """A second op-by-op call with equal but distinct options compiles nothing: all static arguments are equal."""
    args, delta = drawn(case)

    def run() -> Any:
        again = functools.partial(case.function.func, **copy.deepcopy(dict(case.options)))
        return jax.block_until_ready(with_cotangents(again)(tuple(map(jnp.asarray, args)), jnp.asarray(delta)))

    run()
    compilations: list[str] = []

    def count(event: str, duration: float, **_: Any) -> None:
        compilations.extend([event] * (event == "/jax/core/compile/backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not compilations, f"{len(compilations)} programs were compiled again"


def vmap_equals_a_loop(case: Case) -> None:
    """`vmap` over all arguments together equals a loop."""
    mapped_equals_a_loop(case, (True,) * len(case.shapes))


def vmap_over_each_equals_a_loop(case: Case) -> None:
    """`vmap` over each argument separately (over x, or over w) equals a loop."""
    for i in range(len(case.shapes)):
        mapped_equals_a_loop(case, tuple(j == i for j in range(len(case.shapes))))


def mapped_equals_a_loop(case: Case, over: tuple[bool, ...]) -> None:
    one, other = case.arrays(seed=0), case.arrays(seed=1)
    deltas = np.stack([cotangent(case, one, seed) for seed in (1, 2)])
    args = tuple(np.stack(pair) if mapped else a for a, *pair, mapped in zip(one, one, other, over, strict=True))
    axes = tuple(0 if mapped else None for mapped in over)
    found = compiled(jax.vmap(with_cotangents(case.function), (axes, 0)))(args, deltas)
    turns = (tuple(a[i] if mapped else a for a, mapped in zip(args, over, strict=True)) for i in range(2))
    expected = [flat(case.run(turn, delta)) for turn, delta in zip(turns, deltas, strict=True)]
    assert_close(flat(found), [np.stack(pair) for pair in zip(*expected, strict=True)], within(case))


#: Mesh axes that XLA shards automatically, and axes that appear in array types (the default of `make_mesh`).
SPLIT_BY = (AxisType.Auto, AxisType.Explicit)


def mesh_equals_one_device(case: Case) -> None:
    """A batch split over two devices gives the results of one device; arguments without a batch are replicated."""
    args, delta = drawn(case)
    expected = flat(case.run(args, delta))
    for axis_type in SPLIT_BY:
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
        split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
        shardings = tuple(split if i in case.batched else whole for i in range(len(args)))
        y, found = case.run(jax.device_put(args, shardings), jax.device_put(delta, split))
        assert len(y.sharding.device_set) == 2
        assert_close(flat((y, found)), expected, within(case))


def shard_map_equals_its_shards(case: Case) -> None:
    """Each device processes its half of the batch independently; cotangents of replicated arguments are summed."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("batch"), PartitionSpec()
    args, delta = drawn(case)
    of_args = tuple(split if i in case.batched else whole for i in range(len(args)))
    run = with_cotangents(case.function)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(of_args, split), out_specs=(split, of_args))
    found = flat(compiled(sharded)(args, delta))
    halves = [tuple(np.split(a, 2)[i] if j in case.batched else a for j, a in enumerate(args)) for i in range(2)]
    alone = [flat(case.run(half, d)) for half, d in zip(halves, np.split(delta, 2), strict=True)]
    joined = [True, *(i in case.batched for i in range(len(args)))]
    expected = [np.concatenate(pair) if j else sum(pair) for j, *pair in zip(joined, *alone, strict=True)]
    assert_close(found, expected, within(case))


def scan_and_checkpoint_equal_a_loop(case: Case) -> None:
    """`lax.scan` over the first argument, with rematerialized steps, equals a loop; the other cotangents are summed."""
    first, *rest = case.arrays(seed=0)
    xs = np.stack([first, case.arrays(seed=1)[0]])
    deltas = np.stack([cotangent(case, (first, *rest), seed) for seed in (1, 2)])
    step = jax.checkpoint(case.function)

    def scanned(xs: Any, *rest: Any) -> Any:
        return lax.scan(lambda carry, x: (carry, step(x, *rest)), None, xs)[1]

    y, found = compiled(with_cotangents(scanned))((xs, *rest), deltas)
    (y0, (x0, *rest0)), (y1, (x1, *rest1)) = (case.run((x, *rest), delta) for x, delta in zip(xs, deltas, strict=True))
    expected = [np.stack([y0, y1]), np.stack([x0, x1]), *(a + b for a, b in zip(rest0, rest1, strict=True))]
    assert_close(flat((y, found)), expected, within(case))


def second_derivative_through_scan(case: Case) -> None:
    """The second derivative of `lax.scan` over the first argument equals a loop; shared arguments get sums.

    Here JAX mixes up the residuals of a `custom_vjp` unless its body is opaque, and silently if their shapes agree.
    """
    first, *rest = case.arrays(seed=0)
    xs, rest = np.stack([first, case.arrays(seed=1)[0]]), tuple(rest)
    deltas = np.stack([cotangent(case, (first, *rest), seed) for seed in (1, 2)])
    of_xs, *of_rest = cotangents((xs, *rest))

    def scanned(xs: Any, *rest: Any) -> Any:
        return lax.scan(lambda carry, x: (carry, case.function(x, *rest)), None, xs)[1]

    found = compiled(cotangents_twice(scanned))((xs, *rest), deltas, (of_xs, *of_rest))
    turns = [case.twice((x, *rest), delta, (xi, *of_rest)) for x, delta, xi in zip(xs, deltas, of_xs, strict=True)]
    own = [0, len(turns[0]) - 1]  # x and δ of each step
    expected = [np.stack(pair) if i in own else sum(pair) for i, pair in enumerate(zip(*turns, strict=True))]
    assert_close(found, expected, within(case))


def traces_with_a_symbolic_batch(case: Case) -> None:
    """Op, rule, and rule of the rule can be traced with a symbolic batch size, as in `jax.export`."""
    args, delta = symbolic_batch(case)
    jax.eval_shape(cotangents_twice(case.function), args, delta, args)


def exported_equals_direct(case: Case) -> None:
    """The op exported for any batch size and several platforms gives the same results and cotangents.

    `tests/test_export.py` covers serialization.
    """
    args, _ = symbolic_batch(case)
    exported = jax.export.export(jax.jit(case.function), platforms=("cpu", "cuda", "tpu"))(*args)
    args, delta = drawn(case)
    found = compiled(with_cotangents(exported.call))(args, delta)
    assert_close(flat(found), flat(case.run(args, delta)), within(case))


def symbolic_batch(case: Case) -> tuple[tuple[Any, ...], Any]:
    """Return the types of arguments and δ with a symbolic batch size."""
    args, delta = drawn(case)
    (n,) = jax.export.symbolic_shape("n")

    def of(a: Any) -> Any:
        return jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype)

    return tuple(of(a) if i in case.batched else a for i, a in enumerate(args)), of(delta)


# ---------------------------------------------------------------------------------------------------------------------
# 16 bits, empty batches, custom rules


def sixteen_bits_are_float32_rounded(case: Case, dtype: Any = jnp.bfloat16) -> None:
    """For the same inputs, 16-bit results equal float32 results up to 16-bit rounding."""
    args, delta = drawn(case, dtype)
    wide = tuple(a.astype(np.float32) for a in args)
    y, found = case.run(args, delta)
    expected_y, expected = case.run(wide, delta.astype(jax.eval_shape(case.function, *wide).dtype))
    assert_close([y], [expected_y], within(case, dtype))
    if case.op != "hidden_layer":  # rounding before pooling creates ties, which changes the winner
        assert_close(found, expected, within(case, dtype))


def no_images_no_gradient(case: Case) -> None:
    """An empty batch gives empty results and zero gradients."""
    args = tuple(a[:0] if i in case.batched else a for i, a in enumerate(case.arrays()))
    y, found = case.run(args, cotangent(case, args))
    assert y.shape[0] == 0
    for i, (a, c) in enumerate(zip(args, found, strict=True)):
        assert c.shape == a.shape
        np.testing.assert_array_equal(c, np.zeros(a.shape), err_msg=f"argument {i}")


def doubled(call: Any, delta: Any) -> Any:
    """A ``rule=`` that returns twice the exact cotangents."""
    return jax.tree.map(lambda c: 2 * c, call.exact(delta))


def rule_is_used(case: Case) -> None:
    """A custom rule changes the cotangents and not the value, under grad, jit and vmap."""
    args, delta = drawn(case)
    y, exact = case.run(args, delta)
    expected = flat((y, [2 * c for c in exact]))
    run = with_cotangents(functools.partial(case.function, rule=doubled))
    assert_close(flat(compiled(run)(args, delta)), expected, within(case))
    found = compiled(jax.vmap(run))(tuple(a[None] for a in args), delta[None])
    assert_close([a[0] for a in flat(found)], expected, within(case))


def flat(result: tuple[Any, Arrays]) -> list[Any]:
    """Flatten ``(y, cotangents)`` into one list."""
    y, found = result
    return list(itertools.chain([y], found))


def inner(a: Any, b: Any) -> float:
    return float(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)))


# ---------------------------------------------------------------------------------------------------------------------
# Values that are not finite


def not_finite_stays_within_reach(case: Case) -> None:
    """A NaN or infinity in one element of an argument or of δ reaches only the results that depend on that element.

    A result depends on an element if some finite value in its place changes the result, so the oracle needs no NaN
    arithmetic. Parameters are skipped if there is a batch: their elements also meet the zeros of padding, and 0 · NaN
    is NaN.
    """
    args, delta = drawn(case)
    arrays = [*args, delta]
    own = {*(case.batched or range(len(args))), len(args)}
    rng = np.random.default_rng(0)

    def results(which: int, entry: tuple[int, ...], value: float) -> list[np.ndarray]:
        changed = [a.copy() for a in arrays]
        changed[which][entry] = value
        y, cotangents = case.run(tuple(changed[:-1]), changed[-1])
        kept = [y, *(c for i, c in enumerate(cotangents) if i in own)]
        return [np.asarray(a, np.float64) for a in kept]

    for which in sorted(own):
        entry = tuple(int(rng.integers(n)) for n in arrays[which].shape)
        exact = results(which, entry, arrays[which][entry])
        reached = [np.zeros(a.shape, bool) for a in exact]
        for seen in reached:
            if seen.shape == arrays[which].shape:
                seen[entry] = True  # 0 · NaN is NaN, for example with the slope of a hard sigmoid
        for value in (-50.0, -0.3, 0.2, 50.0):
            for seen, a, b in zip(reached, results(which, entry, value), exact, strict=True):
                seen |= np.abs(a - b) > 1e-11 * np.abs(b)
        for spoilt in (np.nan, np.inf):
            for i, (seen, a) in enumerate(zip(reached, results(which, entry, spoilt), strict=True)):
                beyond = np.argwhere(~np.isfinite(a) & ~seen)
                assert not beyond.size, (
                    f"{spoilt} at {entry} of array {which} reaches {len(beyond)} entries of result {i} that do not "
                    f"depend on it, such as {beyond[0].tolist()}"
                )
