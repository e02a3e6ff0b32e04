"""A net or function of parameters and x as a traced program, for one call of `jaxcnn.attribute`.

A `Serial` is traced with ``rules=``, so each layer decides which of its ops receive a rule. The rules for any other
function are given to its operations, by the keys of `jaxcnn.explicit`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from jaxcnn.arguments import bad_type
from jaxcnn.net import Model, Serial, expect_model, ops_of
from jaxcnn.ops.rule import Call, Rule, autodiff
from jaxcnn.propagation import for_relevance, for_rescale, reads
from jaxcnn.selection import First, IfThere, without_rule
from jaxcnn.taps import tapped_name
from jaxcnn.tracing import Operation, Program, Traced, Value, evaluate
from jaxcnn.tracing.affine import Chain, channel_dims, run_chains
from jaxcnn.tracing.library import LibraryForm
from jaxcnn.tracing.replace import OfOps, check_fits, check_rules, with_rules
from jaxcnn.tracing.trace import trace_call


@dataclasses.dataclass(frozen=True, eq=False)
class TracedModel:
    """A function of x, whose operations have their rules."""

    traced: Traced
    program: Program
    #: Rules for the operations that have none when relevance is propagated.
    rules: Any

    @functools.cached_property
    def _checked(self) -> Program:
        return check_fits(self.program)

    @property
    def x(self) -> Value:
        """Return the input x, which is the last argument."""
        return self.program.inputs[-1]

    def result_type(self) -> Any:
        """Return the type of the result."""
        return self.traced.result([jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in self.program.outputs])

    def outputs(self, x: Array) -> Any:
        """Return the result for another x."""
        return self._result(self._checked, x)

    def relevance(self, x: Array, select: Callable[[Array], Array]) -> Array:
        """Return relevance, which starts as ``select(y)``."""
        program = for_relevance(self.program, self.x, self.rules)
        y, pull = jax.vjp(functools.partial(self._result, program), x)
        return pull(select(y))[0]

    def rescaled(self, both: Array) -> tuple[Array, Any]:
        """Return outputs and VJP of DeepLIFT for examples followed by references."""
        return jax.vjp(functools.partial(self._result, for_rescale(self.program, self.x)), both)

    def _result(self, program: Program, x: Array) -> Any:
        run = run_chains if any(isinstance(step.form, Chain) for step in program.operations()) else None
        return self.traced.result(evaluate(program, (*self.traced.arrays[:-1], x), run))

    def tap_names(self) -> list[str]:
        """Return the names of all operations and taps."""
        return list(self._tapped())

    def channel(self, name: str) -> int:
        """Return the dim of the channels in the value at a tap."""
        value = self._tapped()[name]
        return channel_dims(self.program).get(value, len(value.shape) - 1)

    def _tapped(self) -> dict[str, Value]:
        steps = self.program.steps
        names = {step: None if isinstance(step, Operation) else tapped_name(step.eqn) for step in steps}
        taps = {name: step.outputs[0] for step, name in names.items() if name is not None}
        return {step.name: step.output for step in self.program.operations() if step.tapped} | taps


def traced_model(net: Model, params: Any, x: Array, rules: Any = None) -> TracedModel:
    """Trace a net or function for these parameters and this x.

    Args:
        net: the net or function.
        params: its parameters.
        x: the input.
        rules: replacement backward rules, as in `Serial.apply` for a net and `jaxcnn.explicit` for a function.

    Returns:
        The traced model.

    Raises:
        ValueError: if a key of rules matches nothing.
        TypeError: if net or rules has the wrong type.
    """
    traced = trace_call("attribute", function_of(net, rules), (params, x))
    program = traced.program.map(_with_own_rule)
    if isinstance(net, Serial):
        return TracedModel(traced, program, _for_ops_without_layer(net, rules))
    rules = _for_operations(program, rules)
    return TracedModel(traced, with_rules("attribute", program, rules), rules)


def function_of(net: Model, rules: Any = None) -> Callable[[Any, Array], Any]:
    """Return a net or function as a function of parameters and x, with the rules that only a `Serial` takes."""
    expect_model("attribute", net)
    if not isinstance(net, Serial):
        return net
    if rules is None:
        return net.apply
    if isinstance(rules, Mapping):
        rules = {key: _by_autodiff if rule is autodiff else rule for key, rule in rules.items()}
    elif not callable(rules):
        raise bad_type("attribute", "rules", "a rule or a mapping from layers to rules", repr(rules))
    elif rules is autodiff:
        rules = _by_autodiff

    def apply(params: Any, x: Array) -> Array:
        return net.apply(params, x, rules=rules)

    return apply


def _by_autodiff(call: Call, delta: Any) -> tuple[Any, ...]:
    """Mark an op for `autodiff` while a net is traced: the trace would not show an op that runs in plain JAX."""
    return autodiff(call, delta)


def _with_own_rule(operation: Operation) -> Operation:
    """Return the operation with the rule that the call of the op has."""
    rule = operation.form.marked.rule if isinstance(operation.form, LibraryForm) else None
    return dataclasses.replace(operation, rule=autodiff if rule is _by_autodiff else rule)


def _for_ops_without_layer(net: Serial, rules: Any) -> Any:
    """Return the rules of composites, by op, for ops that a net calls outside of the layers for which they are."""
    if not isinstance(rules, Mapping):
        return None
    by_op = {OfOps(ops_of(key.kind)): rule for key, rule in rules.items() if isinstance(key, IfThere)}
    return {**dict.fromkeys(without_rule(rules, net)), **by_op}


def _for_operations(program: Program, rules: Any) -> Any:
    """Return rules whose keys are those of `jaxcnn.explicit`, with the keys of composites as op names."""
    check_rules("attribute", None if isinstance(rules, Mapping) else rules)
    if not isinstance(rules, Mapping):
        return rules
    keyed: dict[Any, Rule | None] = {}
    for key, rule in rules.items():
        if isinstance(key, First):
            data = program.without_checkpoints()
            keyed |= dict.fromkeys(_dependent(data, ops_of(*key.kinds))[:1], rule)
        else:
            keyed.setdefault(OfOps(ops_of(key.kind)) if isinstance(key, IfThere) else key, rule)
    check_rules("attribute", keyed)
    return keyed


def _dependent(program: Program, ops: tuple[str, ...]) -> list[str]:
    """Return the names of the operations of these ops that depend on x, in order."""
    data = program.dependents(program.inputs[-1:])
    steps = (step for step in program.steps if isinstance(step, Operation) and reads(step, data))
    return [step.name for step in steps if step.form.kind in ops]
