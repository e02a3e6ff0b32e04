"""Functions with transformed functions inside, and transformations of the explicit form."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn.tracing import trace
from tests.tracing.agreement import assert_same, kinds, random


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def layer(x, w):
    return jax.nn.relu(conv(x, w))


def X(n=2):
    return random(n, 4, 5, 3)


def W():
    return random(3, 3, 3, 3, seed=1)


def in_jit(x, w):
    return jax.jit(layer)(x, w)


def in_two_jits(x, w):
    return jax.jit(lambda x, w: jax.jit(layer)(x, w) + 1)(x, w)


def in_scan(x, w):
    def body(carry, w):
        carry = layer(carry, w)
        return carry, carry.sum()

    return lax.scan(body, x, jnp.stack([w, 2 * w]), unroll=2, reverse=True)


def in_scan_with_constants(x, w):
    return lax.scan(lambda carry, _: (layer(carry, w), None), x, length=2)[0]


def in_while(x, w):
    return lax.fori_loop(0, 2, lambda i, x: layer(x, w), x)


def in_cond(x, w):
    return lax.cond(x[0, 0, 0, 0] > 0, layer, lambda x, w: conv(x, w) * 2, x, w)


def in_switch(x, w):
    return lax.switch(1, [lambda x: x, lambda x: layer(x, w), lambda x: x * 2], x)


def in_checkpoint(x, w):
    return jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)(x, w)


def in_vmap(x, w):
    return jax.vmap(lambda x: layer(x[None], w)[0])(x)


def in_named_scope(x, w):
    with jax.named_scope("outer"):
        return layer(x, w)


def in_a_scan_in_a_jit(x, w):
    return jax.jit(in_scan)(x, w)


def in_checkpoint_in_scan(x, w):
    return lax.scan(lambda c, _: (jax.checkpoint(layer)(c, w), None), x, length=2)[0]


def with_gradient(x, w):
    """A function in which a derivative has already been taken: its equations stay."""
    return jax.grad(lambda x: layer(x, w).sum())(x)


NESTED = [
    in_jit, in_two_jits, in_scan, in_scan_with_constants, in_cond, in_switch, in_checkpoint, in_vmap, in_named_scope,
    in_a_scan_in_a_jit, in_checkpoint_in_scan, with_gradient,
]  # fmt: skip


@pytest.mark.parametrize("fun", NESTED)
def test_nested(fun):
    found = kinds(fun, X(), W())
    assert "conv" in found
    assert "relu" in found or fun is with_gradient
    assert_same(fun, X(), W())


def test_while():
    """Loops without a known length have no reverse mode, neither in JAX nor here."""
    expected = in_while(X(), W())
    np.testing.assert_allclose(jaxcnn.explicit(in_while)(X(), W()), expected, rtol=1e-12)
    assert kinds(in_while, X(), W()) == ["conv", "relu"]


def test_bodies_without_operations_are_not_traced_again():
    def fun(x):
        return lax.scan(lambda c, _: (jnp.sin(c), None), x, length=2)[0]

    (step,) = trace(fun, X()).program.steps
    assert str(jax.make_jaxpr(jaxcnn.explicit(fun))(X())) == str(jax.make_jaxpr(fun)(X()))
    assert step.primitive == "scan"


def test_policy_of_a_checkpoint_is_kept():
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    fun = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    (eqn,) = jax.make_jaxpr(jaxcnn.explicit(fun))(X(), W()).eqns
    assert (eqn.params["policy"], eqn.params["prevent_cse"]) == (policy, False)


# ---------------------------------------------------------------------------------------------------------------------
# Rules of the user's own


def test_a_rule_of_the_user_is_kept_and_not_looked_into():
    @jax.custom_vjp
    def twice(x, w):
        return layer(x, w)

    twice.defvjp(lambda x, w: (layer(x, w), (x, w)), lambda saved, delta: (2 * saved[0], 3 * saved[1]))
    assert kinds(twice, X(), W()) == []
    (row,) = jaxcnn.operations(twice)(X(), W()).rows
    assert (row.op, row.reason) == ("custom_vjp_call", "has a rule of its own")
    assert_same(twice, X(), W())


def test_a_derivative_of_the_user_is_kept_and_not_looked_into():
    @jax.custom_jvp
    def twice(x, w):
        return layer(x, w)

    twice.defjvp(lambda xs, ts: (layer(*xs), 2 * ts[0]))
    assert kinds(twice, X(), W()) == []
    (row,) = jaxcnn.operations(twice)(X(), W()).rows
    assert (row.op, row.reason) == ("custom_jvp_call", "has a derivative of its own")
    assert_same(twice, X(), W())


# ---------------------------------------------------------------------------------------------------------------------
# Effects, donation, static arguments


def test_effects(capfd):
    def fun(x, w):
        jax.debug.print("before {}", x.ndim)
        y = lax.scan(lambda c, _: (jax.debug.print("step") or layer(c, w), None), x, length=2)[0]
        jax.debug.print("after", ordered=True)
        return y

    jaxcnn.explicit(fun)(X(), W())
    jax.jit(jaxcnn.explicit(fun))(X(), W())
    jax.effects_barrier()
    assert sorted(capfd.readouterr().out.split("\n")) == sorted([*(["before 4", "step", "step", "after"] * 2), ""])


def test_callbacks():
    def fun(x, w):
        y = layer(x, w)
        return y + jax.pure_callback(np.sin, y, y)

    np.testing.assert_allclose(jaxcnn.explicit(fun)(X(), W()), fun(X(), W()), rtol=1e-12)


def test_donation():
    step = jax.jit(lambda x, w: layer(x, w) + x, donate_argnums=0)
    x, w = X(), W()
    jaxcnn.explicit(step)(x, w)
    assert x.is_deleted()
    assert not w.is_deleted()


def test_inner_jit_is_compiled_once():
    """Without an outer jit, inner ones stay: the second call compiles nothing."""
    step, x, w = jaxcnn.explicit(jax.jit(lambda x, w: layer(x, w).sum())), X(), W()
    step(x, w)
    records: list[logging.LogRecord] = []
    with jax.log_compiles():
        handler = logging.Handler()
        handler.emit = records.append
        logging.getLogger("jax").addHandler(handler)
        try:
            step(x, w)
        finally:
            logging.getLogger("jax").removeHandler(handler)
    assert not [record for record in records if "Compiling" in record.getMessage()]


def test_static_arguments_and_results():
    def fun(x, *, flag, times, name=None, activation=jax.nn.relu):
        assert isinstance(flag, bool)
        y = activation(x) if flag else x
        return {"y": y * times, "name": name, "times": times, "none": None}

    found = jaxcnn.explicit(fun)(X(), flag=True, times=2, name="net")
    expected = fun(X(), flag=True, times=2, name="net")
    assert found.keys() == expected.keys()
    assert (found["name"], found["times"], found["none"]) == ("net", 2, None)
    np.testing.assert_array_equal(found["y"], expected["y"])


def test_numpy_arrays_are_traced():
    x, w = np.asarray(X()), np.asarray(W())
    np.testing.assert_allclose(jaxcnn.explicit(layer)(x, w), layer(x, w), rtol=1e-12)


def test_closures():
    def loss(w):
        return jaxcnn.explicit(lambda x: layer(x, w).sum())(X())

    def stock(w):
        return layer(X(), w).sum()

    np.testing.assert_allclose(jax.grad(loss)(W()), jax.grad(stock)(W()), rtol=1e-12)
    scale = [1.0]
    fun = jaxcnn.explicit(lambda x: x * scale[0])
    assert fun(jnp.ones(())) == 1
    scale[0] = 2.0  # traced at each call, as the function itself
    assert fun(jnp.ones(())) == 2


def test_signature_is_kept():
    assert jaxcnn.explicit(layer).__name__ == "layer"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'w'"):
        jaxcnn.explicit(layer)(X())


@pytest.mark.parametrize("caller", ["explicit", "operations"])
def test_function_that_cannot_be_traced(caller):
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        getattr(jaxcnn, caller)(lambda x: x if x.sum() > 0 else -x)(X())
    expected = f"jaxcnn: raised while <lambda> was traced; {caller} needs a function that jax.jit accepts"
    assert any(expected in note for note in error.value.__notes__)


# ---------------------------------------------------------------------------------------------------------------------
# Transformations of the explicit form


def net(x, w):
    y = lax.reduce_window(layer(x, w), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
    return jnp.tanh(y.mean((1, 2)))


EXPLICIT = jaxcnn.explicit(net)


def outer_vmap(f, x, w):
    return jax.vmap(lambda x: f(x[None], w)[0])(x)


def outer_vmap_over_weights(f, x, w):
    return jax.vmap(lambda w: f(x, w))(jnp.stack([w, 2 * w]))


def outer_scan(f, x, w):
    return lax.scan(lambda c, w: (c, f(c, w)), x, jnp.stack([w, 2 * w]))[1]


def outer_checkpoint(f, x, w):
    return jax.checkpoint(f)(x, w)


def outer_grad(f, x, w):
    return jax.grad(lambda w: (f(x, w) ** 2).sum())(w)


def outer_grad_of_grad(f, x, w):
    return jax.grad(lambda w: (jax.grad(lambda x: (f(x, w) ** 2).sum())(x) ** 2).sum())(w)


def outer_jacobian(f, x, w):
    return jax.jacrev(lambda x: f(x, w)[0, 0])(x)


def explicit_twice(f, x, w):
    return f(x, w) if f is net else jaxcnn.explicit(f)(x, w)


OUTER = [
    outer_vmap, outer_vmap_over_weights, outer_scan, outer_checkpoint, outer_grad, outer_grad_of_grad, outer_jacobian,
    explicit_twice,
]  # fmt: skip


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("jit", [True, False])
def test_transformed(outer, jit):
    found, expected = (
        (jax.jit if jit else lambda g: g)(functools.partial(outer, f))(X(), W()) for f in (EXPLICIT, net)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def test_forward_mode_by_autodiff():
    forward = jaxcnn.explicit(net, rules=jaxcnn.rules.autodiff)
    np.testing.assert_allclose(jax.jvp(forward, (X(), W()), (X(), W()))[1], jax.jvp(net, (X(), W()), (X(), W()))[1])


def mesh(kind=jax.sharding.AxisType.Auto):
    return jax.make_mesh((8,), ("batch",), axis_types=(kind,))


def test_shard_map_outside():
    x, w = X(8), W()
    run = jax.shard_map(
        EXPLICIT, mesh=mesh(), in_specs=(PartitionSpec("batch"), PartitionSpec()), out_specs=PartitionSpec("batch")
    )
    np.testing.assert_allclose(jax.jit(run)(x, w), net(x, w), rtol=1e-12)
    grad = jax.grad(lambda w: (run(x, w) ** 2).sum())
    np.testing.assert_allclose(jax.jit(grad)(w), jax.grad(lambda w: (net(x, w) ** 2).sum())(w), rtol=1e-10)


def test_shard_map_inside():
    x, w = X(8), W()

    def fun(x, w):
        def part(x, w):
            return net(x, w), lax.pmean(net(x, w).sum(), "batch")

        specs = PartitionSpec("batch"), PartitionSpec()
        return jax.shard_map(part, mesh=mesh(), in_specs=specs, out_specs=specs)(x, w)

    assert "conv" in kinds(fun, x, w)
    found, expected = (jax.jit(f)(x, w) for f in (jaxcnn.explicit(fun), fun))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    found, expected = (
        jax.jit(jax.grad(lambda w, f=f: (f(x, w)[0] ** 2).sum()))(w) for f in (jaxcnn.explicit(fun), fun)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_jit_over_a_mesh(kind):
    devices = mesh(kind)
    with jax.set_mesh(devices):
        x = jax.device_put(X(8), NamedSharding(devices, PartitionSpec("batch")))
        grad = jax.jit(jax.grad(lambda w, x: (EXPLICIT(x, w) ** 2).sum()))
        found = grad(W(), x)
    expected = jax.grad(lambda w: (net(X(8), w) ** 2).sum())(W())
    np.testing.assert_allclose(found, expected, rtol=1e-10)
