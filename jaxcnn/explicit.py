"""The explicit form of any JAX function: its convolutions, pools, activations and products with the library's rules."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from jaxcnn.arguments import expect_function
from jaxcnn.taps import collecting
from jaxcnn.tracing.evaluate import evaluate
from jaxcnn.tracing.replace import Rules, check_fits, check_rules, with_rules
from jaxcnn.tracing.table import Operations, table_of
from jaxcnn.tracing.trace import trace_call

F = TypeVar("F", bound=Callable[..., Any])


def explicit(fun: F, *, rules: Rules | None = None) -> F:
    """Return ``fun`` with every convolution, pooling, activation and product as this library's op with its rule.

    ``fun`` is any function of JAX: a plain one, ``apply`` of a Flax or Haiku module, a call of an Equinox module or of
    a Keras model. It is traced at each call, and each operation that is recognized is computed by the op; all else is
    computed as it was. Values, derivatives (those at the edge of a ReLU included), types and effects are those of
    ``fun``; where JAX's own derivative is wrong, the op's is right. A function with a rule of its own
    (`jax.custom_vjp`, `jax.custom_jvp`) keeps it and is not looked into. `operations` lists what is recognized.

    The result works under `jax.jit`, `jax.grad`, `jax.vmap`, `jax.lax.scan`, `jax.checkpoint` and `jax.shard_map`, and
    with them inside. The ops have no forward mode; use ``rules=jaxcnn.rules.autodiff`` for `jax.jvp`.

    Each operation has a name, from the modules or `jax.named_scope` s around it, else from its kind and a count:
    "Net/Block_0/Conv_1", "conv2". The name is a `tap`, so that `value_grad_and_deltas` returns the value and δ of every
    operation that is not inside a loop or branch.

    Args:
        fun: the function. Arrays among its arguments are traced; everything else, Python scalars included, is static.
        rules: replacement backward rules: one rule for all operations, or a mapping. Its keys are names (that of a
            module for all operations in it), ops such as `jaxcnn.relu`, or predicates ``(name, op) → bool``; the first
            that matches wins.

    Returns:
        A function of the same signature. Under `jax.jit` it is traced once; without, at each call. It raises the errors
        of ``fun``, and ValueError if a key of ``rules`` matches no operation or a rule does not fit its operation.

    Raises:
        TypeError: if fun is not callable, or rules has the wrong type.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> def net(w, x):
    ...     y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    ...     return jax.nn.relu(y).sum()
    >>> w, x = jnp.ones((3, 3, 1, 4)), jnp.ones((2, 8, 8, 1))
    >>> gradient = jax.jit(jax.grad(jaxcnn.explicit(net)))(w, x)
    >>> result = jaxcnn.value_grad_and_deltas(jaxcnn.explicit(net))(w, x)
    >>> sorted(result.deltas)
    ['conv1', 'relu1']
    >>> guided = jaxcnn.explicit(net, rules={jaxcnn.relu: jaxcnn.rules.guided_relu})
    >>> jax.grad(guided, argnums=1)(w, x).shape
    (2, 8, 8, 1)
    """
    expect_function("explicit", "fun", fun)
    check_rules("explicit", rules)

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        traced = trace_call("explicit", fun, args, kwargs, inline=collecting())
        program = check_fits(with_rules("explicit", traced.program, rules))
        return traced.result(evaluate(program, traced.arrays))

    return wrapped  # type: ignore[return-value]


def operations(fun: Callable[..., Any]) -> Callable[..., Operations]:
    """Return a function that lists the operations of ``fun``: names, ops, shapes, parameters and FLOPs.

    The names are those that ``rules=`` of `explicit` and `value_grad_and_deltas` use. What stays in plain JAX is listed
    with the reason, unless it only moves elements or is cheap.

    Args:
        fun: the function, as in `explicit`.

    Returns:
        A function of the same arguments; arrays may be `jax.ShapeDtypeStruct` s. It computes nothing, and
        returns `Operations`: ``rows`` are data, and ``str()`` is a table.

    Raises:
        TypeError: if fun is not callable.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> def net(params, x):
    ...     x = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    ...     x = jax.nn.relu(x + params["b"])
    ...     return x.mean((1, 2)) @ params["out"]
    >>> params = {"w": jnp.ones((3, 3, 1, 4)), "b": jnp.zeros(4), "out": jnp.ones((4, 10))}
    >>> print(jaxcnn.operations(net)(params, jnp.ones((2, 8, 8, 1))))
    name              op               input    output   parameters   FLOPs  in JAX because
    conv1             conv             2×8×8×1  2×8×8×4          40   9,216
    relu1             relu             2×8×8×4  2×8×8×4           0     512
    global_avg_pool1  global_avg_pool  2×8×8×4  2×4               0     512  as fast there
    dense1            dense            2×4      2×10             40     140  as fast there
    total                                                        80  10,380
    """
    expect_function("operations", "fun", fun)

    @functools.wraps(fun)
    def listed(*args: Any, **kwargs: Any) -> Operations:
        return table_of(trace_call("operations", fun, args, kwargs).program)

    return listed
