"""Rules for activations: which part of δ passes through.

The exact rule of ReLU is δ_x = δ ∘ [x > 0]. All rules fit `relu`, and `hidden_layer`, where they apply to its ReLU.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxcnn.arguments import bad_value, static_float
from jaxcnn.ops.rule import Call
from jaxcnn.rules.compose import fits


@fits("relu", part="relu")
def guided_relu(call: Call, delta: Array) -> tuple[Array, ...]:
    """Guided backprop: ``δ_x = δ ∘ [x > 0] ∘ [δ > 0]``.

    The result at the input is positive evidence for an output, through units that were active. Fits `relu` and
    `hidden_layer`.

    Args:
        call: the call of the op.
        delta: δ of the op's output.

    Returns:
        One cotangent per input of the op.

    Raises:
        ValueError: if applied to another op.

    Source: Springenberg et al. 2014, §3.4.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x, delta = jnp.array([-1.0, 2.0, 3.0]), jnp.array([5.0, 5.0, -5.0])
    >>> jax.vjp(lambda x: jaxcnn.relu(x, rule=jaxcnn.rules.guided_relu), x)[1](delta)[0].tolist()
    [0.0, 5.0, 0.0]
    """
    (delta_x,) = call.exact(delta)
    return (jnp.where(delta > 0, delta_x, 0),)


@fits("relu", part="relu")
def deconv_relu(call: Call, delta: Array) -> tuple[Array, ...]:
    """Deconvolutional network: ``δ_x = δ ∘ [δ > 0]``, a ReLU of δ itself, independent of x.

    Fits `relu` and `hidden_layer`.

    Args:
        call: the call of the op.
        delta: δ of the op's output.

    Returns:
        One cotangent per input of the op.

    Raises:
        ValueError: if applied to another op.

    Source: Zeiler & Fergus 2014, §2.1.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x, delta = jnp.array([-1.0, 2.0, 3.0]), jnp.array([5.0, 5.0, -5.0])
    >>> jax.vjp(lambda x: jaxcnn.relu(x, rule=jaxcnn.rules.deconv_relu), x)[1](delta)[0].tolist()
    [5.0, 5.0, 0.0]
    """
    return (jnp.where(delta > 0, delta, 0),)


@fits("activation", part="relu")
def straight_through(call: Call, delta: Array) -> tuple[Array, ...]:
    """Straight through: ``δ_x = δ``, as if the activation were the identity.

    Fits every activation, and `hidden_layer`.

    Args:
        call: the call of the op.
        delta: δ of the op's output.

    Returns:
        One cotangent per input of the op.

    Raises:
        ValueError: if applied to another op.

    Source: Bengio et al. 2013, §4.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x, delta = jnp.array([-1.0, 2.0, 3.0]), jnp.array([5.0, 5.0, -5.0])
    >>> jax.vjp(lambda x: jaxcnn.relu(x, rule=jaxcnn.rules.straight_through), x)[1](delta)[0].tolist()
    [5.0, 5.0, -5.0]
    """
    return (delta,)


@dataclasses.dataclass(frozen=True)
class SoftplusSmoothed:
    """``δ_x = δ ∘ sigmoid(β·x)``: the rule of softplus, log(1 + e^(βx))/β, for a ReLU.

    It gives saliency maps of a net without kinks. β → ∞ is the exact rule; β = 0 halves every δ. Fits `relu` and
    `hidden_layer`.

    Args:
        beta: β, a finite number >= 0.

    Raises:
        TypeError: if beta is not a number.
        ValueError: if beta is negative or not finite, or when the rule is applied to another op.

    Source: Dombrowski et al. 2019, §4.

    >>> import jax, jaxcnn
    >>> rule = jaxcnn.rules.SoftplusSmoothed(beta=2.0)
    >>> float(jax.grad(lambda x: jaxcnn.relu(x, rule=rule))(0.0))
    0.5
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= static_float("SoftplusSmoothed", "beta", self.beta) < float("inf"):
            raise bad_value("SoftplusSmoothed", "beta", "a finite number >= 0", self.beta)

    @fits("relu", part="relu")
    def __call__(self, call: Call, delta: Array) -> tuple[Array, ...]:
        """δ_x = δ ∘ sigmoid(β·x)."""
        (x,) = call.inputs
        return (delta * jax.nn.sigmoid(self.beta * x),)
