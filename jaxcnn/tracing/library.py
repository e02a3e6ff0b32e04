"""The library's own ops in a traced function."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxcnn.geometry import Correlation, Window
from jaxcnn.ops import (
    activation,
    adaptive,
    convolution,
    dropout,
    hidden,
    kronecker,
    linear,
    losses,
    normalization,
    pooling,
    signal,
)
from jaxcnn.ops.mark import Marked, marked_call
from jaxcnn.ops.rule import Rule, apply_rule
from jaxcnn.tracing.program import Equation, Form

_MODULES = (
    activation,
    adaptive,
    convolution,
    dropout,
    hidden,
    kronecker,
    linear,
    losses,
    normalization,
    pooling,
    signal,
)


@dataclasses.dataclass(frozen=True)
class LibraryForm(Form):
    """A call of one of the library's ops."""

    marked: Marked

    @property
    def op(self) -> Callable[..., Any]:  # type: ignore[override]
        """Return the public function."""
        found = (getattr(module, self.marked.op, None) for module in _MODULES)
        return next(function for function in found if function is not None)

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Return the name of the op."""
        return self.marked.op

    def prepare(self, *inputs: Any) -> tuple[Any, ...]:
        """Return the arguments, None for those that are omitted."""
        given = iter(inputs)
        return tuple(None if kind is None else next(given, None) for kind in self.marked.types)

    def call(self, rule: Rule | None, *arguments: Any) -> Any:
        """Return the op's result."""
        call = self.marked
        return apply_rule(call.core, call.rule if rule is None else rule, call.plain, call.op)(call.static, *arguments)

    def weights(self) -> tuple[int, ...]:
        """Return the positions of weights among the inputs."""
        names = list(inspect.signature(self.op).parameters)
        places = [i for i, kind in enumerate(self.marked.types) if kind is not None]
        return tuple(i for i, place in enumerate(places) if names[place] in ("w", "b", "weight", "scale", "bias"))

    def flops(self, inputs: Sequence[Any], output: Any) -> int:
        """Count the additions and multiplications of convolutions, products and pools, 1 per element otherwise."""
        static, out = self.marked.static, math.prod(output.shape)
        if isinstance(static, Correlation):
            taps = static.window.entries * inputs[1].shape[-2]
            if self.kind == "conv_transpose":
                return math.prod(inputs[0].shape) * 2 * taps + out * (len(inputs) > 2)
            return out * (2 * taps - 1 + (len(inputs) > 2))
        if self.kind == "dense":
            return out * (2 * inputs[1].shape[0] - 1 + (len(inputs) > 2))
        win = getattr(static, "window", static)
        if isinstance(win, Window):
            return out * (win.entries - (self.kind.endswith("max_pool")))
        return out


def library_form(step: Equation) -> LibraryForm | None:
    """Return the form of a call of the library's, or None."""
    call = marked_call(step.eqn)
    return None if call is None or len(step.outputs) != 1 else LibraryForm(call)
