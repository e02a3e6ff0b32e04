"""Which ops a rule fits, and a hidden layer as the three ops that it is."""

import dataclasses
from typing import Any

from jax import Array

from jaxcnn.geometry import fail
from jaxcnn.ops import hidden
from jaxcnn.ops.rule import Call, Rule


def check_fits(rule: Any, call: Call, *ops: str) -> None:
    """ValueError for a call of another op."""
    if call.name not in ops:
        name = getattr(rule, "__name__", repr(rule))
        fail(call.name, f"rule {name}: expected as a rule of {', '.join(ops)}")


@dataclasses.dataclass(frozen=True)
class InHiddenLayer:
    """A rule for `hidden_layer`, from one for each of the ops it is made of; None is the exact one.

    ``δ_a = pool(δ)``, ``δ_l = relu(δ_a)``, and what ``conv`` makes of δ_l.  The ready-made rules for one of these ops
    fit `hidden_layer` as they are; this is for several at once, and for your own.

    Raises: what its rules raise; ValueError, when δ comes, for another op.

    >>> from jaxcnn import HiddenLayer, rules
    >>> rules_of_net = {HiddenLayer: rules.InHiddenLayer(relu=rules.guided_relu, pool=rules.literal_up)}
    """

    conv: Rule | None = None
    relu: Rule | None = None
    pool: Rule | None = None

    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        """The three rules in a row."""
        check_fits(self, call, "hidden_layer")
        conv, relu, pool = hidden.parts(call)
        (delta_a,) = _by(self.pool, pool, delta)
        (delta_l,) = _by(self.relu, relu, delta_a)
        return _by(self.conv, conv, delta_l)


def _by(rule: Rule | None, call: Call, delta: Array) -> tuple[Any, ...]:
    return call.exact(delta) if rule is None else rule(call, delta)
