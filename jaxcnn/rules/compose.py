"""Declare which ops a rule fits, and compose rules for `hidden_layer` from rules for its three parts."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from jax import Array

from jaxcnn.arguments import bad_value
from jaxcnn.ops import hidden
from jaxcnn.ops.kinds import names_of
from jaxcnn.ops.rule import Call, Rule, rule_name

F = TypeVar("F", bound=Callable[..., Any])


def fits(*ops: str, part: str | None = None) -> Callable[[F], F]:
    """Decorate a rule, or its ``__call__``, to raise ValueError for an op that the rule does not fit.

    Args:
        *ops: names or kinds of the ops that the rule fits.
        part: "conv", "relu" or "pool" if the rule also fits `hidden_layer`, where it applies to this part.

    Returns:
        The decorator.
    """
    all_ops = (*ops, "hidden_layer") if part else ops

    def checked(rule: Rule, formula: Rule, call: Call, delta: Array) -> tuple[Any, ...]:
        if part and call.name == "hidden_layer":
            return HiddenLayerRules(**{part: rule})(call, delta)
        check_fits(rule, call, all_ops)
        return formula(call, delta)

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def of_function(call: Call, delta: Array) -> tuple[Any, ...]:
            return checked(of_function, function, call, delta)

        @functools.wraps(function)
        def of_method(self: Any, call: Call, delta: Array) -> tuple[Any, ...]:
            return checked(self, functools.partial(function, self), call, delta)

        return cast("F", of_method if "self" in inspect.signature(function).parameters else of_function)

    return decorate


def check_fits(rule: Any, call: Call, ops: tuple[str, ...], hint: str = "") -> None:
    """Raise ValueError unless the call is of one of ``ops``, which are names or kinds."""
    if call.name not in ops and call.kind not in ops:
        got = f"{rule_name(rule)}, which fits {', '.join(names_of(*ops))}{hint}"
        raise bad_value(call.name, "rule", f"one that fits {call.name}", got)


@dataclasses.dataclass(frozen=True)
class HiddenLayerRules:
    """A rule for `hidden_layer`, composed of one rule for each of its three ops.

    ``δ_a = pool(δ)``, ``δ_l = relu(δ_a)``, and ``conv`` computes the cotangents from δ_l. The ready-made rules for one
    of these ops accept `hidden_layer` directly. Use this class for several rules at once, or for your own.

    Args:
        conv: rule for the convolution; None for the exact rule.
        relu: rule for the ReLU; None for the exact rule.
        pool: rule for the max pooling; None for the exact rule.

    Raises:
        ValueError: when applied to another op. The three rules may raise errors as well.

    >>> from jaxcnn import HiddenLayer, rules
    >>> rules_of_net = {HiddenLayer: rules.HiddenLayerRules(relu=rules.guided_relu, pool=rules.literal_up)}
    """

    conv: Rule | None = None
    relu: Rule | None = None
    pool: Rule | None = None

    @fits("hidden_layer")
    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        """Apply the three rules in sequence."""
        conv, relu, pool = hidden.parts(call)
        (delta_a,) = _apply(self.pool, pool, delta)
        (delta_l,) = _apply(self.relu, relu, delta_a)
        return _apply(self.conv, conv, delta_l)


def _apply(rule: Rule | None, call: Call, delta: Array) -> tuple[Any, ...]:
    return call.exact(delta) if rule is None else rule(call, delta)
