"""Ops: each is a forward pass with its backward rule directly below it, joined by `jax.custom_vjp`.

Every file has the same order: public function (options, checks, docstring), core, ``_fwd``, ``_bwd``, ``defvjp``.
``delta`` is always ∂E/∂(output of this op). A rule returns ``delta_x``, ``grad_w``, ``grad_b``, in the order of the
op's inputs.
"""
