"""The kind of each op, so that rules can accept kinds instead of lists of names.

A rule reads it as ``call.kind``. Every op that accepts ``rule=`` is in the table.
"""

#: Names of the ops by kind.
KINDS: dict[str, tuple[str, ...]] = {
    # z = x·w + b
    "affine": ("conv", "depthwise_conv", "conv_transpose", "dense"),
    # the three ops conv, relu and max_pool in one
    "hidden": ("hidden_layer",),
    # sums of inputs with constant weights
    "sum": ("avg_pool", "global_avg_pool", "adaptive_avg_pool", "block_sum", "kron_up", "add"),
    # the largest element of each window, which receives its δ
    "max": ("max_pool", "global_max_pool", "adaptive_max_pool"),
    # elementwise functions of one array
    "activation": (
        "relu", "leaky_relu", "relu6", "hard_tanh", "hard_sigmoid", "hard_swish", "sigmoid", "tanh", "elu", "selu",
        "celu", "gelu", "mish", "softsign", "squareplus", "log_sigmoid", "silu", "softplus",
    ),
    # standardization by a mean and a variance, with scale and bias
    "norm": ("batch_norm", "layer_norm", "group_norm"),
    "dropout": ("dropout",),
    "loss": ("squared_error", "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"),
    "other": (
        "lp_pool", "max_pool_with_indices", "max_unpool", "kron", "convolve", "correlate", "autocorrelate",
        "match_template",
    ),
}  # fmt: skip

_KIND_OF = {op: kind for kind, ops in KINDS.items() for op in ops}


def kind_of(op: str) -> str:
    """Return the kind of an op.

    Args:
        op: name of the op, as in `Call`.

    Returns:
        A key of `KINDS`; "other" for an op that is not in the table.
    """
    return _KIND_OF.get(op, "other")


def names_of(*ops: str) -> tuple[str, ...]:
    """Return names of ops, in which each kind is replaced by its ops.

    Args:
        *ops: names and kinds.

    Returns:
        The names of the ops.
    """
    return tuple(name for op in ops for name in KINDS.get(op, (op,)))
