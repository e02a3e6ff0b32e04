"""Ops: a forward half and a δ rule each, one under the other, joined by `jax.custom_vjp`.

Every file reads the same way: public function (options, checks, docstring) · core · ``_fwd`` · ``_bwd`` · ``defvjp``.
``delta`` is always ∂E/∂(this op's output); what a rule returns is ``delta_x``, ``grad_w``, ``grad_b``, in the order of
its inputs.  Rooms: ops import `jaxcnn.kernels` and `jaxcnn.geometry`.
"""
