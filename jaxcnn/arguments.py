"""Checks of arguments, and the form of their error messages: ``op: argument must be …, got …``.

Every check runs before anything is computed.
"""

import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

#: Largest number of elements along the spatial dims. Beyond it, sizes overflow in XLA and crash the process.
MAX_ELEMENTS = 2**31 - 1

#: Text for a traced value in place of a static argument.
TRACED = "a value traced by jax; it must be static"

#: Default of `static_int`; None would also be what a caller passed.
ITSELF = object()


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def bad_value(op: str, argument: str, expected: str, got: object) -> ValueError:
    """Return the error for an argument of the right type with a wrong value.

    Args:
        op: name of the op, layer or function.
        argument: name of the argument.
        expected: completes "must be".
        got: what was given, as text or as a value whose text is shown.

    >>> from jaxcnn.arguments import bad_value
    >>> bad_value("conv", "stride", "an int >= 1", 0)
    ValueError('conv: stride must be an int >= 1, got 0')
    """
    return ValueError(_message(op, argument, expected, got))


def bad_type(op: str, argument: str, expected: str, got: object) -> TypeError:
    """Return the error for an argument of a wrong type; as `bad_value`."""
    return TypeError(_message(op, argument, expected, got))


def _message(op: str, argument: str, expected: str, got: object) -> str:
    return f"{op}: {argument} must be {expected}, got {got}"


def fail(op: str, message: str) -> NoReturn:
    """Raise ValueError with the op's name in front of a message that is not about one argument."""
    raise ValueError(f"{op}: {message}")


# ---------------------------------------------------------------------------------------------------------------------
# Static arguments


def static_int(op: str, argument: str, value: Any, whole: Any = ITSELF, *, least: int | None = None) -> int:
    """Return ``value`` as an int.

    Args:
        op: name of the op.
        argument: name of the argument.
        value: the value.
        whole: the argument that contains ``value``, for the message; by default the value itself.
        least: smallest accepted value.

    Returns:
        The int.

    Raises:
        TypeError: for bools, floats and traced values.
        ValueError: if the value is below ``least``.
    """
    expected = ints(None if whole is ITSELF else whole, "" if least is None else f">= {least}")
    shown = value if whole is ITSELF else whole
    if isinstance(value, bool | np.bool_):
        raise bad_type(op, argument, expected, repr(shown))
    try:
        number = operator.index(value)
    except TypeError:  # tracers raise a subclass
        raise bad_type(op, argument, expected, _shown(value, repr(shown))) from None
    if least is not None and number < least:
        raise bad_value(op, argument, expected, repr(shown))
    return number


def static_bool(op: str, argument: str, value: Any) -> bool:
    """Return ``value`` as a bool; raise TypeError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise bad_type(op, argument, "a bool", _shown(value, repr(value)))
    return bool(value)


def static_float(op: str, argument: str, value: Any) -> float:
    """Return ``value`` as a float; raise TypeError for bools, arrays and traced values."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_type(op, argument, "a Python float", _shown(value, type(value).__name__))
    try:
        return float(value)
    except OverflowError:
        raise bad_value(
            op, argument, "a number that a float can hold", f"an int of {int(value).bit_length()} bits"
        ) from None


def _shown(value: Any, otherwise: str) -> str:
    return TRACED if isinstance(value, jax.core.Tracer) else otherwise


def static_ints(op: str, argument: str, value: Any, ndim: int) -> tuple[int, ...]:
    """Return one int per dim, from an int or a sequence of ints."""
    each = tuple(value) if is_sequence(value) else (value,) * ndim
    if len(each) != ndim:
        raise bad_value(op, argument, f"one int or {ndim} of them", repr(value))
    numbers = tuple(static_int(op, argument, v, value) for v in each)
    if max(numbers, default=0) > MAX_ELEMENTS:
        raise bad_value(op, argument, ints(value, "< 2**31"), repr(value))
    return numbers


def ints(value: Any, condition: str = "") -> str:
    """Return what a message expects of an argument that is one int, or a sequence of ints as ``value`` is."""
    return f"{'ints' if is_sequence(value) else 'an int'} {condition}".rstrip()


def positive(op: str, argument: str, value: Any, ndim: int) -> tuple[int, ...]:
    """Return one int >= 1 per dim, from an int or a sequence of ints."""
    each = static_ints(op, argument, value, ndim)
    if min(each, default=1) < 1:
        raise bad_value(op, argument, ints(value, ">= 1"), repr(value))
    return each


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether ``value`` is a list, a tuple or an array with dims."""
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def floating_dtype(op: str, argument: str, value: Any) -> np.dtype:
    """Return a dtype that arrays may have.

    Args:
        op: name of the op.
        argument: name of the argument.
        value: the dtype, or its name.

    Returns:
        The dtype.

    Raises:
        TypeError: if ``value`` is not a floating dtype of at least 16 bits.
        ValueError: if it is float64, and ``jax_enable_x64`` is off.
    """
    try:
        dtype = np.dtype(value)
    except TypeError:
        raise bad_type(op, argument, "a floating dtype", repr(value)) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise bad_type(op, argument, "a floating dtype", dtype)
    if dtype.itemsize < 2:
        raise bad_type(op, argument, "a floating dtype of 16 bits or more", dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise bad_value(op, argument, "a floating dtype of 32 bits or less unless jax_enable_x64 is on", dtype)
    return dtype


# ---------------------------------------------------------------------------------------------------------------------
# Arrays and functions


def array(op: str, argument: str, value: Any) -> Array:
    """Return an argument as an array of any dtype; raise TypeError if it is not an array."""
    if isinstance(value, str) or value is None:
        raise bad_type(op, argument, "an array", repr(value))
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise bad_type(op, argument, "an array", type(value).__name__) from None


def arrays(op: str, **named: Any) -> tuple[Array, ...]:
    """Return the arguments as floating-point arrays of one dtype.

    Raises:
        TypeError: if an argument is not an array of a real floating dtype of at least 16 bits, or the dtypes differ.
    """
    each = {name: array(op, name, value) for name, value in named.items()}
    for name, a in each.items():
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise bad_type(op, name, "of a floating dtype", a.dtype)
        if a.dtype.itemsize < 2:
            raise bad_type(op, name, "of a floating dtype of 16 bits or more", a.dtype)
    if len({a.dtype for a in each.values()}) > 1:
        raise bad_type(op, "arrays", "of one dtype", ", ".join(f"{name} {a.dtype}" for name, a in each.items()))
    return tuple(each.values())


def integers(op: str, argument: str, value: Any) -> Array:
    """Return an argument as an array of integers of 32 bits or more; raise TypeError if it has another dtype."""
    a = array(op, argument, value)
    if not jnp.issubdtype(a.dtype, jnp.integer):
        raise bad_type(op, argument, "of an integer dtype", a.dtype)
    return a if a.dtype.itemsize > 2 else a.astype(jnp.int32)


def check_range(op: str, argument: str, value: Any, count: int, context: str = "") -> None:
    """Raise ValueError if an element is not in 0 … count − 1. Traced values are not checked.

    Args:
        op: name of the op.
        argument: name of the argument.
        value: integers as the caller passed them, because a NumPy array stays concrete under jit.
        count: the number of valid values.
        context: text that follows the range in the message.
    """
    try:
        values = np.asarray(value)  # not jnp, which would be traced inside another trace
    except jax.errors.TracerArrayConversionError:
        return
    if values.size:
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest >= count:
            raise bad_value(op, argument, f"in 0 … {count - 1}{context}", f"{lowest} … {highest}")


def one_key(op: str, key: Any) -> Array:
    """Return a typed key; raise TypeError for anything else, including an array of several keys."""
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape:
        got = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
        raise bad_type(op, "key", "one typed key from jax.random.key(seed)", got)
    return key


def spatial_dims(op: str, x: Array) -> tuple[int, ...]:
    """Return the spatial dims of an input ``(N, *spatial, C)``; raise ValueError unless there are one, two or three."""
    if not 3 <= x.ndim <= 5:
        raise bad_value(op, "x", "(N, *spatial, C) with 1, 2 or 3 spatial dims", f"shape {x.shape}")
    expect_numbers(op, "x", x.shape[1:], x.shape)
    return x.shape[1:-1]


def expect_numbers(op: str, argument: str, sizes: Sequence[Any], shape: Sequence[Any]) -> None:
    """Raise ValueError if a size is a symbol of `jax.export`; only the batch may be one.

    Args:
        op: name of the op.
        argument: name of the array.
        sizes: the sizes that must be numbers.
        shape: the whole shape, for the message.
    """
    if not all(isinstance(n, int) for n in sizes):
        symbols = ", ".join(map(str, shape))
        raise bad_value(op, argument, "an array whose sizes are numbers, except for the batch", f"shape ({symbols})")


def is_predicate(value: Any) -> bool:
    """Whether ``value`` can be called with a name and one more argument, as the predicates among keys of ``rules=``."""
    try:
        inspect.signature(value).bind("name", None)
    except (TypeError, ValueError):
        return False
    return True


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the three names that are most like a wrong one, for its message."""
    return difflib.get_close_matches(name, [*names], n=3, cutoff=0.0)


def expect_function(op: str, argument: str, value: Any, expected: str = "a function") -> Callable[..., Any]:
    """Return ``value``; raise TypeError unless it is callable."""
    if not callable(value):
        raise bad_type(op, argument, expected, repr(value))
    return value


def expect_scalar(op: str, argument: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a floating-point scalar, or the type of one from `jax.eval_shape`."""
    expected = "a floating scalar"
    if not isinstance(value, Array | float | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        raise bad_type(op, argument, expected, type(value).__name__)
    kind = value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)
    if kind.shape or not jnp.issubdtype(kind.dtype, jnp.floating):
        raise bad_type(op, argument, expected, f"{kind.dtype}{list(kind.shape)}")
