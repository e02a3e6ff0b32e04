"""Nets by name, in one interface: those of `experiments.models`, and any that can be imported.

    lecture, mlp, …        a net of `experiments.models`
    mymodule:make          a function that returns a net of jaxcnn, a Flax module (linen or nnx), an Equinox module, or
                           a pair of functions (init, apply)

A net of another library becomes an `OwnNet`, a `jaxcnn.Serial` that computes it through `jaxcnn.explicit`. Training,
checkpoints, prediction and figures then treat all nets alike. Its parameters are a nested dictionary: "params" is
trained, and every other entry is state, such as the running averages of a batch norm.

A step of the optimizer also updates the state: its gradient is (old − new), and its learning rate is 1.
"""

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

import jaxcnn
from experiments.errors import UsageError, bad_value
from jaxcnn.layers import BatchNorm, Layer, Params, Shape
from jaxcnn.net import Serial
from jaxcnn.selection import Rules, Selection
from jaxcnn.summary import Row, Summary

PARAMS = "params"
"""The entry of an OwnNet's parameters that is trained."""
OUTPUTS = "outputs"
"""The name of an OwnNet's outputs among the activations."""
KINDS = "a net of jaxcnn, a Flax or Equinox module, or a pair (init, apply)"
ARGUMENTS = ("classes", "shape", "key", "rngs")
"""What a function that makes a net may take, by name."""
TRAINING = {"train": True, "training": True, "is_training": True, "deterministic": False, "use_running_average": False}
"""Arguments that other libraries use for the mode, and their value in training."""

Variables = dict[str, Any]
"""{"params": …} and entries for the state; nested dictionaries of arrays."""


@dataclasses.dataclass(frozen=True)
class Functions:
    """A net as functions of its variables and a batch x (N, H, W, C)."""

    init: Callable[[Array], Variables]
    """key → variables."""
    train: Callable[[Variables, Any, Array], tuple[Array, Variables]]
    """variables, x, key → outputs (N, …, classes), and the new state: the variables without "params"."""
    predict: Callable[[Variables, Any], Array]
    """variables, x → outputs in evaluation."""


@dataclasses.dataclass(frozen=True)
class OwnNet(Serial):
    """A net of another library, as a `jaxcnn.Serial` whose layers are the operations that `explicit` finds."""

    functions: Functions = dataclasses.field(kw_only=True)
    rows: tuple[Row, ...] = dataclasses.field(kw_only=True)

    def init(self, key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Params:
        """Return new variables; they are those for the images that the net was built for, in their own dtypes."""
        del shape, dtype
        return self.functions.init(key)

    def apply(  # type: ignore[override]
        self, params: Params, x: ArrayLike | tuple[ArrayLike, ...], *, key: Array | None = None, rules: Any = None
    ) -> Array:
        """Return the outputs; with a key in training mode, where the gradient of the state is (old − new)."""
        used: Rules | None = rules.rules if isinstance(rules, Selection) else rules
        if key is None:
            return jaxcnn.tap(OUTPUTS, jaxcnn.explicit(self.functions.predict, rules=used)(params, x))
        state = {name: value for name, value in params.items() if name != PARAMS}
        fixed = {**jax.lax.stop_gradient(state), PARAMS: params[PARAMS]}
        y, new = jaxcnn.explicit(self.functions.train, rules=used)(fixed, x, key)
        return jaxcnn.tap(OUTPUTS, _with_state(y, state, new) if state else y)

    def summary(self, shape: Shape) -> Summary:
        """Return the table of the net's operations."""
        return Summary(shape, self.rows)


@jax.custom_vjp
def _with_state(y: Array, old: Variables, new: Variables) -> Array:
    """Return y. In the backward pass δ_y = δ, δ_old = old − new and δ_new = 0."""
    del old, new
    return y


def _with_state_fwd(y: Array, old: Variables, new: Variables) -> tuple[Array, Variables]:
    return y, jax.tree.map(jnp.subtract, old, new)


def _with_state_bwd(difference: Variables, delta: Array) -> tuple[Array, Variables, Variables]:
    return delta, difference, jax.tree.map(jnp.zeros_like, difference)


_with_state.defvjp(_with_state_fwd, _with_state_bwd)


def trained(net: Serial, tree: Any) -> Any:
    """Return the part of a tree like the parameters that is trained, not state."""
    return tree[PARAMS] if isinstance(net, OwnNet) else tree


def check_layers(net: Serial, flag: str, expected: str) -> None:
    """Raise UsageError, which says what the value of `flag` must be, unless the net consists of layers of jaxcnn."""
    if isinstance(net, OwnNet):
        raise bad_value(UsageError, flag, expected, "a net of another library")


def labels_of_state(net: Serial, params: Params) -> Any:
    """Return a tree of "state" and "params", for `optax.partition`."""
    if not isinstance(net, OwnNet):
        return jax.tree.map(lambda _: "params", params)
    return {name: jax.tree.map(lambda _, n=name: "params" if n == PARAMS else "state", t) for name, t in params.items()}


def evaluated_shapes(net: Serial, shape: tuple[int, ...]) -> Any:
    """Return the types of the parameters for evaluation: those of `init`, and the statistics of batch norms."""
    like = jax.eval_shape(lambda: net.init(jax.random.key(0), shape))
    if isinstance(net, OwnNet) or not has_batch_norm(net):
        return like
    channels = {row.name: row.output_shape[-1:] for row in net.summary(shape).rows}
    for path, layer in net.walk():
        if isinstance(layer, BatchNorm):
            statistic = jax.ShapeDtypeStruct(channels[path], jnp.float32)
            inner = functools.reduce(lambda tree, name: tree.setdefault(name, {}), path.split("/"), like)
            inner |= {"mean": statistic, "var": statistic}
    return like


def has_batch_norm(net: Serial) -> bool:
    """Whether the net needs `jaxcnn.calibrate` before evaluation."""
    return any(isinstance(layer, BatchNorm) for _, layer in net.walk())


# ---------------------------------------------------------------------------------------------------------------------
# Nets by name


def is_reference(name: str) -> bool:
    """Whether a name is that of something to import, "module:attribute"."""
    return ":" in name


def check_reference(name: str) -> None:
    """Raise UsageError if a name cannot be imported."""
    _import(name)


def build(name: str, classes: int, shape: tuple[int, ...], outputs: tuple[int, ...] | None = None) -> Serial:
    """Return the net of a name.

    Args:
        name: A name in MODELS, or "module:attribute".
        classes: Number of classes.
        shape: (H, W, C) of the images.
        outputs: The shape of the output for one image, which a net that is imported must have; None means (classes,).

    Raises:
        UsageError: The name cannot be imported, or is not that of a net for these images and classes.
    """
    from experiments.models import MODELS

    if not is_reference(name):
        return MODELS[name](classes)
    value = _import(name)
    make = value if _is_maker(value) else lambda **_: value
    return _converted(f"--model {name}", make, classes, shape, (classes,) if outputs is None else outputs)


def _import(name: str) -> Any:
    """Return the object that "module:attribute" names."""
    from experiments.cli import did_you_mean

    module, _, attribute = name.partition(":")
    flag, expected = f"--model {name}", "module:function, where the module can be imported"
    if not module or not attribute:
        raise bad_value(UsageError, "--model", "module:function", name)
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, and a package that it needs does not
        raise bad_value(UsageError, flag, expected, f"no module {error.name}") from None
    except (TypeError, ValueError):  # a relative or empty name
        raise bad_value(UsageError, flag, expected, f"the module {module!r}") from None
    try:
        return functools.reduce(getattr, attribute.split("."), imported)
    except AttributeError:
        names = [each for each in vars(imported) if not each.startswith("_")]
        hint = did_you_mean(attribute, names)
        raise bad_value(UsageError, flag, f"the name of a function in {module}", attribute, hint) from None


def _is_maker(value: Any) -> bool:
    """Whether a value makes nets, and is not one."""
    return inspect.isclass(value) or (callable(value) and not _is_net(value))


def _is_net(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2
    return pair or isinstance(value, Serial) or bool(_library_of(value))


def _library_of(value: Any) -> str:
    """Return "linen", "nnx" or "equinox" for a module of these libraries, or ""; imports none of them."""
    for kind in type(value).__mro__:
        library = f"{kind.__module__}.{kind.__qualname__}"
        if library == "flax.linen.module.Module":
            return "linen"
        if library.startswith("flax.nnx.") and kind.__qualname__ == "Module":
            return "nnx"
        if library.startswith("equinox.") and kind.__qualname__ == "Module":
            return "equinox"
    return ""


def _arguments(flag: str, make: Callable[..., Any]) -> set[str]:
    """Return which of ARGUMENTS a function takes; raise UsageError if it requires another one."""
    try:  # the classes of Flax and Equinox have a metaclass, which hides the arguments
        described = inspect.signature(make.__init__ if inspect.isclass(make) else make)
    except (TypeError, ValueError):
        return set()
    parameters = [p for p in described.parameters.values() if p.name != "self"]
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in ARGUMENTS
    ]
    if required or any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        got = f"one of {', '.join(p.name for p in parameters)}"
        raise bad_value(UsageError, flag, f"a function of arguments among {', '.join(ARGUMENTS)}", got)
    return {p.name for p in parameters if p.name in ARGUMENTS}


def _converted(
    flag: str, make: Callable[..., Any], classes: int, shape: tuple[int, ...], outputs: tuple[int, ...]
) -> Serial:
    """Return the net that `make` returns, as an `OwnNet` unless it is a net of jaxcnn."""
    taken = _arguments(flag, make)

    def new_net(key: Array) -> Any:
        values: dict[str, Any] = {"classes": classes, "shape": shape, "key": key}
        if "rngs" in taken:
            from flax import nnx

            values["rngs"] = nnx.Rngs(key)
        return make(**{name: values[name] for name in taken})

    value = new_net(jax.random.key(0))
    if isinstance(value, Serial):
        _check_outputs(flag, lambda: jax.eval_shape(functools.partial(_outputs_of, value, shape)), outputs, shape)
        return value
    library = _library_of(value)
    with_state = isinstance(value, tuple) and len(value) == 2 and _library_of(value[0]) == "equinox"
    if library == "linen":
        functions = _linen(value, shape)
    elif library == "nnx":
        functions = _nnx(new_net)
    elif library == "equinox" or with_state:
        functions = _equinox(new_net, with_state)
    elif isinstance(value, tuple) and len(value) == 2 and all(map(callable, value)):
        functions = _pair(*value, shape)
    else:
        raise bad_value(UsageError, flag, f"a function that returns {KINDS}", type(value).__name__)
    return _check_outputs(flag, lambda: _net_of(flag, functions, shape), outputs, shape)


def _check_outputs(flag: str, trace: Callable[[], Any], outputs: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """Return the result of a function that traces a net; raise UsageError if its outputs are not logits."""
    sizes = "×".join(map(str, shape))
    try:
        traced = trace()
    except UsageError:
        raise
    except Exception as error:  # anything that the code of a user or its library raises
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise bad_value(UsageError, flag, f"a net for images (N, {', '.join(map(str, shape))})", text) from error
    out = traced.rows[-1].output_shape if isinstance(traced, OwnNet) else tuple(traced.shape[1:])
    if out != outputs:
        expected = f"a net whose outputs are (N, {', '.join(map(str, outputs))}) for images {sizes}"
        raise bad_value(UsageError, flag, expected, f"(N{''.join(f', {size}' for size in out)})")
    return traced


def _outputs_of(net: Serial, shape: tuple[int, ...]) -> Array:
    return net.apply(net.init(jax.random.key(0), shape), jnp.zeros((1, *shape)))


def _net_of(flag: str, functions: Functions, shape: tuple[int, ...]) -> OwnNet:
    """Return the OwnNet of functions, with one layer for each operation."""
    variables = jax.eval_shape(functions.init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    if not jax.tree.leaves(variables.get(PARAMS, {})):
        raise bad_value(UsageError, flag, "a net with parameters", "one without")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise bad_value(UsageError, flag, "a net whose parameters are floating-point", f"{leaf.dtype} for {name}")
    tables: list[Any] = []

    def look(variables: Any, x: Any, key: Any) -> tuple[Any, Any]:
        tables.append(jaxcnn.operations(functions.train)(variables, x, key))
        return functions.train(variables, x, key), functions.predict(variables, x)

    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    (y, new), evaluated = jax.eval_shape(look, variables, x, jax.random.key(0))
    state = {name: value for name, value in variables.items() if name != PARAMS}
    if jax.tree.map(jnp.shape, new) != jax.tree.map(jnp.shape, state):
        raise bad_value(UsageError, flag, "a net whose state keeps its shapes", str(jax.tree.map(jnp.shape, new)))
    if y.shape != evaluated.shape or y.ndim < 1 or y.shape[0] != 2:
        expected = "a net with one output per image, of one shape in training and evaluation"
        raise bad_value(UsageError, flag, expected, f"{y.shape} and {evaluated.shape} for 2 images")
    rows = [
        Row(row.name, row.op, row.output_shape[1:], row.parameters, row.flops // 2)
        for row in tables[0].rows
        if row.recognized
    ]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables[PARAMS]))
    rest = count - sum(row.parameters for row in rows)
    rows.append(Row(OUTPUTS, "other parameters" if rest else "", evaluated.shape[1:], rest, 0))
    layers = tuple((row.name, Layer()) for row in rows)
    return OwnNet(layers, functions=functions, rows=tuple(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Libraries


class _Tree:
    """A tree as a nested dictionary of arrays, by the names of its paths, and back.

    Counters and flags among a state become floats, which are exact up to 2²⁴ and take part in a step of the optimizer.
    """

    def __init__(self, tree: Any, *, state: bool = False) -> None:
        self._counters = (jnp.bool_, jnp.int32) if state else ()
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        self._paths = [_names(path) for path, _ in leaves]
        self._kinds = [jnp.result_type(leaf) for _, leaf in leaves]
        self._structure = jax.tree.structure(tree)

    def pack(self, tree: Any) -> dict[str, Any]:
        """Return the tree as a nested dictionary."""
        result: dict[str, Any] = {}
        for path, leaf, kind in zip(self._paths, jax.tree.leaves(tree), self._kinds, strict=True):
            inner = functools.reduce(lambda part, name: part.setdefault(name, {}), path[:-1], result)
            inner[path[-1]] = jnp.asarray(leaf).astype(jnp.float32 if kind in self._counters else kind)
        return result

    def unpack(self, packed: Mapping[str, Any]) -> Any:
        """Return the tree that `pack` was called on."""
        leaves: list[Any] = [functools.reduce(lambda part, name: part[name], path, packed) for path in self._paths]
        typed = [
            jnp.round(leaf).astype(kind) if kind in self._counters else leaf
            for leaf, kind in zip(leaves, self._kinds, strict=True)
        ]
        return jax.tree.unflatten(self._structure, typed)


def _names(path: Any) -> tuple[str, ...]:
    """Return the names in the path of a leaf; nnx adds "value" to that of each variable."""
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names or ("value",)


def _mode(call: Callable[..., Any], *, training: bool) -> dict[str, Any]:
    """Return the arguments of a call that select the mode."""
    names = inspect.signature(call).parameters
    return {name: value is training for name, value in TRAINING.items() if name in names}


def _linen(module: Any, shape: tuple[int, ...]) -> Functions:
    """Return the functions of a Flax linen module; state is every collection but "params"."""
    predicting, training = (_mode(module.__call__, training=on) for on in (False, True))

    def init(key: Array) -> Variables:
        return dict(module.init({"params": key, "dropout": key}, jnp.zeros((1, *shape)), **predicting))

    def train(variables: Variables, x: Any, key: Array) -> tuple[Array, Variables]:
        state = [name for name in variables if name != PARAMS]
        y, new = module.apply(variables, x, **training, rngs={"dropout": key}, mutable=state)
        return y, dict(new)

    def predict(variables: Variables, x: Any) -> Array:
        return module.apply(variables, x, **predicting)

    return Functions(init, train, predict)


def _nnx(make: Callable[[Array], Any]) -> Functions:
    """Return the functions of a Flax nnx module; state is every variable that is neither `Param` nor `RngState`."""
    from flax import nnx

    def parts(module: Any) -> tuple[Any, Any, Any, Any]:
        split: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return split

    module = make(jax.random.key(0))
    module.eval()
    predicting = parts(module)[0]
    module.train()
    training, params, random, state = parts(module)
    as_params, as_state = _Tree(params), _Tree(state, state=True)

    def variables_of(params: Any, state: Any) -> Variables:
        return {PARAMS: as_params.pack(params)} | ({"state": as_state.pack(state)} if jax.tree.leaves(state) else {})

    def merged(graph: Any, variables: Variables, random: Any) -> Any:
        return nnx.merge(
            graph, as_params.unpack(variables[PARAMS]), random, as_state.unpack(variables.get("state", {}))
        )

    def init(key: Array) -> Variables:
        _, params, _, state = parts(make(key))
        return variables_of(params, state)

    def train(variables: Variables, x: Any, key: Array) -> tuple[Array, Variables]:
        # A stream of random numbers is a key and a count. Each step has keys of its own, counted from 0.
        leaves, tree = jax.tree.flatten(random)
        fresh = [_fresh(leaf, jax.random.fold_in(key, n)) for n, leaf in enumerate(leaves)]
        module = merged(training, variables, jax.tree.unflatten(tree, fresh))
        y = module(x)
        new = variables_of(*(parts(module)[n] for n in (1, 3)))
        return y, {name: value for name, value in new.items() if name != PARAMS}

    def predict(variables: Variables, x: Any) -> Array:
        return merged(predicting, variables, random)(x)

    return Functions(init, train, predict)


def _fresh(leaf: Any, key: Array) -> Any:
    return key if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)


def _equinox(make: Callable[[Array], Any], with_state: bool) -> Functions:
    """Return the functions of an Equinox module of one image (C, H, W), or of such a module and its state."""
    import equinox as eqx

    def parts(key: Array) -> tuple[Any, Any, Any]:
        value = make(key)
        module, state = value if with_state else (value, None)
        arrays, static = eqx.partition(module, eqx.is_inexact_array)
        return arrays, static, state

    arrays, static, state = parts(jax.random.key(0))
    as_params, as_state = _Tree(arrays), _Tree(state, state=True)
    takes_key = "key" in inspect.signature(type(eqx.combine(arrays, static)).__call__).parameters

    def run(module: Any, state: Any, x: Any, key: Array | None) -> tuple[Array, Any]:
        def one(image: Any, n: Any) -> Any:
            options = {"key": None if key is None else jax.random.fold_in(key, n)} if takes_key else {}
            return module(image, state, **options) if with_state else (module(image, **options), None)

        images = jnp.moveaxis(x, -1, 1)
        return jax.vmap(one, axis_name="batch", out_axes=(0, None))(images, jnp.arange(len(images)))

    def init(key: Array) -> Variables:
        arrays, _, state = parts(key)
        return {PARAMS: as_params.pack(arrays)} | ({"state": as_state.pack(state)} if with_state else {})

    def train(variables: Variables, x: Any, key: Array) -> tuple[Array, Variables]:
        module = eqx.combine(as_params.unpack(variables[PARAMS]), static)
        y, new = run(module, as_state.unpack(variables.get("state", {})), x, key)
        return y, {"state": as_state.pack(new)} if with_state else {}

    def predict(variables: Variables, x: Any) -> Array:
        module = eqx.nn.inference_mode(eqx.combine(as_params.unpack(variables[PARAMS]), static))
        return run(module, as_state.unpack(variables.get("state", {})), x, None)[0]

    return Functions(init, train, predict)


def _pair(init: Callable[..., Any], apply: Callable[..., Any], shape: tuple[int, ...]) -> Functions:
    """Return the functions of init(key, x) → params and apply(params, x) → outputs, which may take a key as well."""
    as_params = _Tree(jax.eval_shape(lambda: init(jax.random.key(0), jnp.zeros((1, *shape)))))
    takes_key = "key" in inspect.signature(apply).parameters

    def init_variables(key: Array) -> Variables:
        return {PARAMS: as_params.pack(init(key, jnp.zeros((1, *shape))))}

    def train(variables: Variables, x: Any, key: Array) -> tuple[Array, Variables]:
        return apply(as_params.unpack(variables[PARAMS]), x, **({"key": key} if takes_key else {})), {}

    def predict(variables: Variables, x: Any) -> Array:
        return apply(as_params.unpack(variables[PARAMS]), x)

    return Functions(init_variables, train, predict)
