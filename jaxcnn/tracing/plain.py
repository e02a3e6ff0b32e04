"""Rules for functions that are computed as they were traced.

Where JAX's own function is as fast, or differs from the library's at an edge (``maximum(x, 0)`` gives half of δ at a
tie), the function itself is kept. A replacement rule then sees a `Call` whose exact rule is the function's own VJP.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxcnn.ops.rule import Rule, apply_rule


@dataclasses.dataclass(frozen=True)
class PlainCore:
    """A function in the role of a core in `jaxcnn.ops`: its rule is the VJP that JAX derives. Hashable."""

    function: Callable[..., Any]

    def __call__(self, static: Any, *inputs: Any) -> Any:
        """Return the function's value."""
        return self.function(*inputs)

    def fwd(self, static: Any, *inputs: Any) -> tuple[Any, Any]:
        """Return the function's value and its VJP."""
        return jax.vjp(self.function, *inputs)

    def bwd(self, static: Any, pull: Any, delta: Any) -> tuple[Any, ...]:
        """Return the cotangents of all inputs."""
        return pull(delta)


def call_plain(kind: str, function: Callable[..., Any], rule: Rule | None, static: Any, *inputs: Any) -> Any:
    """Return ``function(*inputs)`` with the backward rule ``rule``, as an op of the name ``kind``.

    Args:
        kind: name of the op.
        function: hashable; equal functions compile once.
        rule: None or `jaxcnn.rules.autodiff` for JAX's own derivative.
        static: the static part of the call, as the rules for this op read it.
        *inputs: arrays, or None.
    """
    core = PlainCore(function)
    return function(*inputs) if rule is None else apply_rule(core, rule, core, kind)(static, *inputs)
