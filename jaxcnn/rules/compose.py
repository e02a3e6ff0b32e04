"""Check which op a rule accepts, and compose rules for `hidden_layer` from rules for its three parts."""

import dataclasses
from typing import Any

from jax import Array

from jaxcnn.arguments import fail
from jaxcnn.ops import hidden
from jaxcnn.ops.rule import Call, Rule


def check_fits(rule: Any, call: Call, *ops: str) -> None:
    """Raise ValueError unless the call is of one of ``ops``."""
    if call.name not in ops:
        name = getattr(rule, "__name__", repr(rule))
        fail(call.name, f"rule {name}: expected as a rule of {', '.join(ops)}")


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

    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        """Apply the three rules in sequence."""
        check_fits(self, call, "hidden_layer")
        conv, relu, pool = hidden.parts(call)
        (delta_a,) = _by(self.pool, pool, delta)
        (delta_l,) = _by(self.relu, relu, delta_a)
        return _by(self.conv, conv, delta_l)


def _by(rule: Rule | None, call: Call, delta: Array) -> tuple[Any, ...]:
    return call.exact(delta) if rule is None else rule(call, delta)
