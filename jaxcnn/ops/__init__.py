"""Ops: each is a forward pass with its backward rule directly below it, joined by `jax.custom_vjp`.

Every file has the same order: public function (options, checks, docstring), core, ``_fwd``, ``_bwd``, ``defvjp``, and
the reference, which is the same function in stock JAX.

The *core* is the differentiable part of the op, a `jaxcnn.ops.rule.custom_vjp` ``core(static, *arrays)``. ``static`` is
one hashable value that holds the checked options, or None. A core is private and has the op's name, such as ``_dense``.
If other modules use it, it is public and has a name such as ``conv_core``.

``delta`` is always ∂E/∂(output of this op). A rule returns ``delta_x``, ``grad_w``, ``grad_b``, in the order of the
op's inputs.
"""
