"""Taps: named points of a computation, at which `jaxcnn.backprop` sees what passes and its δ.

A tap is an identity.  While a sweep collects, each tap also meets a *probe*, an array of zeros that is never read: its
tangent is added to that of x, so that on the way back δ arrives at x and at the probe.

    y = x + 0·p        ẏ = ẋ + ṗ        δ_x = δ        δ_p = δ

Rooms: taps import nothing; nets and `jaxcnn.backprop` import them.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

#: A part of the keys of JAX's caches: what was traced with no sweep about, with its taps idle, is traced anew in one.
_COLLECTING = jax.make_user_context(False)
_LOCAL = threading.local()


def tap(name: str, x: Any) -> Array:
    """``x``, whose value and δ are known by ``name`` to the sweep that runs, if one does.

    Nets tap every layer.  In your own function, tap what `value_grad_and_deltas` shall show.

    Args:
        name: what the sweep calls it; each name once.
        x: an array of any shape; ∂E/∂x is shown if its dtype is floating.

    Returns: x.

    Raises: in a sweep: ValueError for a name that is used twice, and for a tap inside a function that JAX transforms by
        itself within the swept one (jit, vmap, scan, checkpoint, …), which neither value nor δ can leave; TypeError for
        a name that is no str.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> def error(w, x):
    ...     return jnp.sum(jaxcnn.tap("product", w * x) ** 2)
    >>> sweep = jaxcnn.value_grad_and_deltas(error)(jnp.array(3.0), jnp.array([1.0, 2.0]))
    >>> sweep.activations["product"], sweep.deltas["product"]
    (Array([3., 6.], dtype=float32), Array([ 6., 12.], dtype=float32))
    """
    collector = getattr(_LOCAL, "collector", None)
    return x if collector is None else collector.meet(name, x)


@contextlib.contextmanager
def idle() -> Iterator[None]:
    """Taps inside this context belong to no collector: each returns its argument and nothing is recorded."""
    outer = getattr(_LOCAL, "collector", None)
    _LOCAL.collector = None
    try:
        with _COLLECTING(False):
            yield
    finally:
        _LOCAL.collector = outer


class Collector:
    """What the taps of one call of a function meet.  Without probes it only looks, to learn names and types."""

    def __init__(self, probes: Mapping[str, Array] | None = None) -> None:
        self.found: dict[str, Array] = {}
        self._probes = probes or {}

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Taps within belong to this collector."""
        outer = getattr(_LOCAL, "collector", None)
        self._trace = jax.extend.core.get_opaque_trace_state()
        _LOCAL.collector = self
        try:
            with _COLLECTING(True):
                yield
        finally:
            _LOCAL.collector = outer

    def meet(self, name: str, x: ArrayLike) -> Array:
        """``x``, seen."""
        if not isinstance(name, str):
            raise TypeError(f"tap: name expected a str, got {name!r}")
        if name in self.found:
            raise ValueError(f"tap: expected each name once, got {name!r} twice")
        if jax.extend.core.get_opaque_trace_state() != self._trace:
            raise ValueError(
                f"tap: {name!r} stands inside a function that jax transforms by itself (jit, vmap, scan, checkpoint, "
                "…), and no δ can leave it; expected taps outside of such functions, and the transformation around "
                "the whole sweep"
            )
        x = jnp.asarray(x)
        self.found[name] = x
        return _meet(x, self._probes[name]) if name in self._probes else x

    def types(self) -> dict[str, Any]:
        """Of all that was found and has a δ."""
        return {name: jax.typeof(x) for name, x in self.found.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def probe(kind: Any) -> Array:
    """Zeros to meet an array of this type; under jit they are never made."""
    zeros = jnp.zeros(kind.shape, kind.dtype)
    axes = tuple(kind.manual_axis_type.varying)  # inside `jax.shard_map`: what each device has its own of
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


@jax.custom_jvp
def _meet(x: Array, probe: Array) -> Array:
    return x


@_meet.defjvp
def _meet_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """ẏ = ẋ + ṗ."""
    return primals[0], tangents[0] + tangents[1]
