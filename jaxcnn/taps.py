"""Taps: named points of a computation, at which `jaxcnn.backprop` records the value and its δ.

A tap is an identity. In a function that `value_grad_and_deltas` runs, each tap adds a *probe*, an array of zeros, to x
in the tangent only. In the backward pass, δ arrives at x and at the probe.

    y = x + 0·p        ẏ = ẋ + ṗ        δ_x = δ        δ_p = δ
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxcnn.arguments import bad_type, bad_value, fail

#: Part of JAX's cache key: functions traced with inactive taps are traced again with active ones.
_COLLECTING: Any = jax.make_user_context(False)
_LOCAL = threading.local()

#: Marks the names of taps among those of `jax.ad_checkpoint.checkpoint_name`.
_PREFIX = "jaxcnn.tap:"


def tap(name: str, x: Any) -> Array:
    """Return ``x`` unchanged; inside `backprop` or `value_grad_and_deltas`, record its value and δ under ``name``.

    Nets tap every layer. In your own function, tap every value that `value_grad_and_deltas` should report. Elsewhere a
    tap does nothing.

    Args:
        name: name in the result; each name can be used once.
        x: an array of any shape; ∂E/∂x is recorded if its dtype is floating-point.

    Returns:
        ``x``.

    Raises:
        ValueError: while recording, if a name is used twice, or if the tap is inside a function that JAX transforms
            within the recorded one (jit, vmap, scan, checkpoint, …), from which neither value nor δ can be returned.
        TypeError: while recording, if name is not a str.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> def loss(w, x):
    ...     return jnp.sum(jaxcnn.tap("product", w * x) ** 2)
    >>> result = jaxcnn.value_grad_and_deltas(loss)(jnp.array(3.0), jnp.array([1.0, 2.0]))
    >>> result.activations["product"], result.deltas["product"]
    (Array([3., 6.], dtype=float32), Array([ 6., 12.], dtype=float32))
    """
    collector = getattr(_LOCAL, "collector", None)
    return x if collector is None else collector.observe(name, x)


def collecting() -> bool:
    """Return whether values are collected the values at taps."""
    return isinstance(getattr(_LOCAL, "collector", None), Collector)


@contextlib.contextmanager
def as_equations() -> Iterator[None]:
    """Inside this context, taps become equations of the traced function, which `tapped_name` recognizes."""
    outer = getattr(_LOCAL, "collector", None)
    _LOCAL.collector = _Recorder()
    try:
        with _COLLECTING("as equations"):
            yield
    finally:
        _LOCAL.collector = outer


class _Recorder:
    """Writes taps into the jaxpr of the function that is traced."""

    def observe(self, name: str, x: Any) -> Any:
        """Return ``x`` with the name of the tap."""
        if not isinstance(name, str):
            raise bad_type("tap", "name", "a str", repr(name))
        if isinstance(x, tuple):  # of a layer with several outputs
            return x
        return checkpoint_name(jnp.asarray(x), f"{_PREFIX}{name}")


def tapped_name(eqn: Any) -> str | None:
    """Return the name of the tap that an equation of a jaxpr is, or None."""
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    return name.removeprefix(_PREFIX) if isinstance(name, str) and name.startswith(_PREFIX) else None


@contextlib.contextmanager
def idle() -> Iterator[None]:
    """Deactivate taps inside this context: each returns its argument and records nothing."""
    outer = getattr(_LOCAL, "collector", None)
    _LOCAL.collector = None
    try:
        with _COLLECTING(False):
            yield
    finally:
        _LOCAL.collector = outer


class Collector:
    """Collects the values at the taps of one function call. Without probes it only records names and types."""

    def __init__(self, probes: Mapping[str, Array] | None = None) -> None:
        self.values: dict[str, Array] = {}
        self._probes = probes or {}

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Make this the collector of all taps inside this context."""
        outer = getattr(_LOCAL, "collector", None)
        self._trace = jax.extend.core.get_opaque_trace_state()
        _LOCAL.collector = self
        try:
            with _COLLECTING(True):
                yield
        finally:
            _LOCAL.collector = outer

    def observe(self, name: str, x: ArrayLike) -> Array:
        """Record ``x`` under ``name`` and return it.

        Args:
            name: name of the tap.
            x: the value.

        Returns:
            ``x`` as an array, with the probe of this name added to its tangent if there is one.

        Raises:
            TypeError: if name is not a str.
            ValueError: if a name is used twice, or the tap is inside a function that JAX transforms.
        """
        if not isinstance(name, str):
            raise bad_type("tap", "name", "a str", repr(name))
        if name in self.values:
            raise bad_value("tap", "name", "used once", f"{name!r} twice")
        if jax.extend.core.get_opaque_trace_state() != self._trace:
            fail(
                "tap",
                f"{name!r} is inside a function transformed by JAX (jit, vmap, scan, checkpoint, …), so its δ cannot "
                "be returned; move the tap outside, or transform the whole computation instead",
            )
        x = jnp.asarray(x)
        self.values[name] = x
        return add_probe(x, self._probes[name]) if name in self._probes else x

    def types(self) -> dict[str, Any]:
        """Return the types of all recorded values that have a δ, by name."""
        return {name: jax.typeof(x) for name, x in self.values.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def probe(kind: Any) -> Array:
    """Return the probe for an array of this type: zeros, which are never materialized under jit.

    Args:
        kind: the type, from `jax.typeof`.

    Returns:
        An array of zeros.
    """
    zeros = jnp.zeros(kind.shape, kind.dtype)
    axes = tuple(kind.manual_axis_type.varying)  # inside `jax.shard_map`: axes along which devices differ
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


@jax.custom_jvp
def add_probe(x: Array, probe: Array) -> Array:
    """Return ``x``, with the probe added to its tangent."""
    return x


@add_probe.defjvp
def _add_probe_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return x with the tangent ẏ = ẋ + ṗ."""
    return primals[0], tangents[0] + tangents[1]
