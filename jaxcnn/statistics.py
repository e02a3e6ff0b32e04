"""Statistics of batch norms that are not known yet, while `jaxcnn.calibrate` traces a net.

`calibrate` puts arrays of the shape `UNKNOWN` into the parameters in place of "mean" and "var". A `BatchNorm` that
receives them binds `batch_norm_input_p`, which marks its input in the traced net.
"""

from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import batching

from jaxcnn.arguments import bad_value, fail

#: Shape of unknown statistics.
UNKNOWN = (0, 0)
#: Names of layers with code that `calibrate` cannot inspect, which may contain further batch norms.
OPAQUE = jax.make_user_context(())
#: (x, mean, var) → (mean, var), for statistics that are unknown.
batch_norm_input_p = jax.extend.core.Primitive("batch_norm_input")
batch_norm_input_p.multiple_results = True


def evaluation_statistics(params: Any, x: Array) -> list[Array]:
    """Return mean and var from the parameters of a batch norm, or ``[]`` if there are none."""
    statistics = [params[name] for name in ("mean", "var") if name in params]
    if statistics and all(jnp.shape(a) == UNKNOWN for a in statistics):
        return batch_norm_input_p.bind(x, *statistics)
    if not statistics and OPAQUE.value:
        raise bad_value(
            "calibrate",
            "every BatchNorm",
            "a layer of a Serial, or a field named like its parameters in a layer",
            f"one inside {' or '.join(OPAQUE.value)}",
        )
    return statistics


@batch_norm_input_p.def_impl
def _evaluate(x: Array, *unknown: Array) -> Any:
    raise bad_value("batch_norm", "mean", f"of shape {x.shape[-1:]}, one number for each channel", UNKNOWN)


@batch_norm_input_p.def_abstract_eval
def _types(x: Any, *unknown: Any) -> Any:
    """Return the types of the statistics: the accumulation dtype, unless the unknown ones were cast."""
    dtype = np.promote_types(x.dtype, np.float32)
    return [jax.core.ShapedArray(x.shape[-1:], dtype if a.dtype == np.float32 else a.dtype) for a in unknown]


def _batched(args: Any, dims: Any) -> Any:
    """Bind once for the whole mapped batch: everything that `jax.vmap` maps over reaches the same norm."""
    (x, *unknown), (dim, *rest) = args, dims
    if any(d is not None for d in rest):
        fail("calibrate", "the statistics of a batch norm must not be mapped by jax.vmap")
    return batch_norm_input_p.bind(jnp.moveaxis(x, dim, 0), *unknown), [None] * len(unknown)


batching.primitive_batchers[batch_norm_input_p] = _batched
