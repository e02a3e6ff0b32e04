"""A net that is traced and cut at its batch norms, for `jaxcnn.calibrate`.

Each stage reads only statistics of norms that earlier stages have reached.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcnn.arguments import bad_value, fail
from jaxcnn.caching import remembered
from jaxcnn.kernels.moments import Moments
from jaxcnn.net import Serial
from jaxcnn.statistics import OPAQUE, batch_norm_input_p

#: Primitives that only call a function once.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any


@dataclasses.dataclass(frozen=True)
class _Operation:
    """One operation of a traced net. Values are numbered; an operand without a number is a constant."""

    run: Callable[..., Any]
    operands: tuple[Any, ...]
    results: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _NormInput:
    """A batch norm whose input is value x; the results are its mean and var, in these dtypes."""

    path: str
    x: Any
    results: tuple[int, int]
    dtypes: tuple[Any, Any]


class _Statistic(NamedTuple):
    """A statistic that is not known yet."""

    path: str
    part: str


class Stages:
    """A net traced for one shape, cut so that each stage reads only statistics from earlier stages."""

    def __init__(self, net: Serial, paths: Sequence[str], opaque: tuple[str, ...], tree: Any, leaves: Any, x: Any):
        def apply(leaves: Any, x: Any) -> Array:
            return net.apply(jax.tree.unflatten(tree, leaves), x)

        with OPAQUE(opaque):
            traced = jax.make_jaxpr(apply)(list(map(_type_of, leaves)), jax.tree.map(_type_of, x))
        self._leaves = len(leaves)
        self._inputs = tuple(range(self._leaves, self._leaves + len(jax.tree.leaves(x))))
        self._constants: dict[int, Any] = {}
        self._steps: list[_Operation | _NormInput] = []
        self._numbers = itertools.count(self._leaves + len(self._inputs))
        self._unknown: dict[int, _Statistic] = {}
        numbered = jax.tree.unflatten(tree, range(self._leaves))
        for path in paths:
            norm = functools.reduce(lambda params, name: params[name], path.split("/"), numbered)
            self._unknown |= {norm[part]: _Statistic(path, part) for part in ("mean", "var")}
        self._add(traced.jaxpr, traced.consts, [*range(self._leaves), *self._inputs])
        missing = set(paths) - {step.path for step in self._steps if isinstance(step, _NormInput)}
        if missing:
            fail("calibrate", f"{', '.join(sorted(missing))}: the net must call every BatchNorm with its parameters")
        self._stage, self._ready = self._schedule(len(paths))
        self.count = max(self._ready.values(), default=0)
        self._run = [jax.jit(functools.partial(self._compute, stage)) for stage in range(self.count)]

    def run(self, stage: int, leaves: Any, known: Mapping[str, Any], values: Any) -> tuple[Any, tuple[Array, ...]]:
        """Run a stage.

        Args:
            stage: number of the stage.
            leaves: parameters of the net.
            known: mean and var by batch norm.
            values: arrays from the previous stage; the net's inputs for the first.

        Returns:
            (batch norm, moments of its input) pairs, and the arrays that later stages read.
        """
        known = {path: value for path, value in known.items() if self._ready[path] <= stage}
        moments, values = self._run[stage](leaves, known, tuple(jax.tree.leaves(values)))
        return list(zip(self._reached(stage), moments, strict=True)), values

    def ready(self, stage: int) -> list[str]:
        """Return the batch norms whose inputs are complete after a stage."""
        return [path for path, first in self._ready.items() if first == stage + 1]

    def _reached(self, stage: int) -> list[str]:
        """Return the batch norms whose inputs a stage computes, once per call."""
        inputs = (step for step in self._steps if isinstance(step, _NormInput))
        return [step.path for step in inputs if self._stage_of(step.x) == stage]

    def _stage_of(self, operand: Any) -> int:
        return 0 if isinstance(operand, _Constant) else self._stage.get(operand, 0)

    def _add(self, jaxpr: Any, constants: Any, operands: list[Any]) -> list[Any]:
        """Add the operations of a jaxpr, including those of functions that it calls; return its results."""
        numbers: dict[Any, Any] = {}
        for var, value in zip(jaxpr.constvars, constants, strict=True):
            numbers[var] = next(self._numbers)
            self._constants[numbers[var]] = value
        numbers.update(zip(jaxpr.invars, operands, strict=True))

        def read(var: Any) -> Any:
            return _Constant(var.val) if isinstance(var, jax.extend.core.Literal) else numbers[var]

        for eqn in jaxpr.eqns:
            values = [read(var) for var in eqn.invars]
            unknown = [n for n in values if not isinstance(n, _Constant) and n in self._unknown]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive is batch_norm_input_p:
                results = self._add_norm(eqn, values)
            elif unknown and eqn.primitive.name == "convert_element_type":
                results = [next(self._numbers)]
                self._unknown[results[0]] = self._unknown[unknown[0]]
            elif (unknown or _contains_norm(eqn)) and eqn.primitive.name in _CALLS:
                closed = isinstance(inner, jax.extend.core.ClosedJaxpr)
                results = self._add(inner.jaxpr if closed else inner, inner.consts if closed else (), values)
            elif unknown or _contains_norm(eqn):
                names = sorted({self._unknown[n].path for n in unknown}) or ["a BatchNorm"]
                fail(
                    "calibrate",
                    f"{', '.join(names)}: statistics must reach the BatchNorm unchanged, outside of "
                    f"scan, cond, shard_map and the like; got {eqn.primitive.name}",
                )
            else:
                results = [next(self._numbers) for _ in eqn.outvars]
                used = [
                    n
                    for n, var in zip(results, eqn.outvars, strict=True)
                    if not isinstance(var, jax.extend.core.DropVar)
                ]
                read_by = [read(var) for var in eqn.invars if not isinstance(var, jax.extend.core.Literal)]
                self._steps.append(_Operation(_as_function(jaxpr, eqn), tuple(read_by), tuple(used)))
            numbers.update(zip(eqn.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _add_norm(self, eqn: Any, operands: list[Any]) -> list[int]:
        x, *unknown = operands
        mean, var = (self._unknown.get(n, _Statistic("", "")) for n in unknown)
        if (mean.part, var.part) != ("mean", "var") or mean.path != var.path:
            raise bad_value("calibrate", "every BatchNorm", "called with its own parameters", "those of another layer")
        results = next(self._numbers), next(self._numbers)
        self._steps.append(_NormInput(mean.path, x, results, tuple(var.aval.dtype for var in eqn.outvars)))
        return list(results)

    def _schedule(self, most: int) -> tuple[dict[int, int], dict[str, int]]:
        """Return the stage of each value, and for each batch norm the first stage that may read its statistics.

        A norm that is called several times is ready once all calls have been reached. Stages are found by iteration.
        """
        ready: dict[str, int] = {}
        while True:
            self._stage = {}
            complete: dict[str, int] = {}
            for step in self._steps:
                if isinstance(step, _NormInput):
                    after = self._stage_of(step.x) + 1
                    complete[step.path] = max(complete.get(step.path, 0), after)
                    stage = max(after, ready.get(step.path, 0))
                else:
                    stage = max(map(self._stage_of, step.operands), default=0)
                self._stage.update(dict.fromkeys(step.results, stage))
            if max(complete.values(), default=0) > most:
                names = ", ".join(path for path, stage in complete.items() if stage > most)
                fail("calibrate", f"{names}: the output of a BatchNorm must not reach the same BatchNorm again")
            if complete == ready:
                return self._stage, ready
            ready = complete

    def _compute(self, stage: int, leaves: Any, known: Any, values: Any) -> Any:
        """Run the operations of a stage; return the moments of its norm inputs, and the values for later stages."""
        held = self._inputs if stage == 0 else self._held(stage)
        arrays = {**self._constants, **dict(enumerate(leaves)), **dict(zip(held, values, strict=True))}
        moments = []

        def read(n: Any) -> Any:
            return n.value if isinstance(n, _Constant) else arrays[n]

        for step in self._steps:
            if isinstance(step, _NormInput):
                if self._stage_of(step.x) == stage:
                    moments.append(_moments(read(step.x)))
                if step.path in known:
                    statistics = zip(step.results, known[step.path], step.dtypes, strict=True)
                    arrays.update({n: a.astype(dtype) for n, a, dtype in statistics})
            elif step.results and self._stage[step.results[0]] == stage:
                arrays.update(zip(step.results, step.run(*map(read, step.operands)), strict=True))
        return moments, tuple(arrays[n] for n in self._held(stage + 1))

    def _held(self, stage: int) -> tuple[int, ...]:
        """Return the values that are computed before a stage and read by it or by later ones."""
        held: dict[int, None] = {}
        statistics = {n for step in self._steps if isinstance(step, _NormInput) for n in step.results}
        for step in self._steps:
            if isinstance(step, _NormInput):
                reads, late = (step.x,), stage <= self._stage_of(step.x) < self.count
            else:
                reads, late = step.operands, any(stage <= self._stage[n] < self.count for n in step.results)
            for n in reads if late else ():
                if isinstance(n, _Constant) or n < self._leaves or n in self._constants or n in statistics:
                    continue
                if self._stage_of(n) < stage:
                    held[n] = None
        return tuple(held)


stages_of = remembered(Stages)


@jax.jit
def _moments(x: Array) -> Moments:
    """Return the moments of each channel."""
    pixels = x.reshape(-1, x.shape[-1])
    pixels = pixels.astype(np.promote_types(pixels.dtype, np.float32))
    mean = pixels.sum(0) / max(len(pixels), 1)
    return Moments(mean, jnp.square(pixels - mean[None]).sum(0), len(pixels))


def _type_of(kind: Any) -> Any:
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=getattr(kind, "sharding", None))


def _contains_norm(eqn: Any) -> bool:
    """Whether an operation contains a batch norm."""
    return any(
        inner.primitive is batch_norm_input_p or _contains_norm(inner)
        for jaxpr in jax.extend.core.jaxprs_in_params(eqn.params)
        for inner in jaxpr.eqns
    )


def _as_function(jaxpr: Any, eqn: Any) -> Callable[..., Any]:
    """Return an operation of a jaxpr as a function from its operands to a list of results."""
    operands = [var for var in eqn.invars if not isinstance(var, jax.extend.core.Literal)]
    distinct = list(dict.fromkeys(operands))
    results = [var for var in eqn.outvars if not isinstance(var, jax.extend.core.DropVar)]
    info = jaxpr.debug_info.with_unknown_names()
    alone = jax.extend.core.Jaxpr([], distinct, results, [eqn], eqn.effects, info)
    run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(alone, []))
    return lambda *values: run(*(values[operands.index(var)] for var in distinct))
