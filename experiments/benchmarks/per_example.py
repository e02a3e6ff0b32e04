"""Compare per-example gradients with vmap(grad): python -m experiments.benchmarks.per_example --help."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import arg

from experiments import cli
from experiments.errors import RunError, UsageError, bad_value

if TYPE_CHECKING:
    from experiments.benchmarks.nets import Timed

PROG = "python -m experiments.benchmarks.per_example"
LIBRARIES = ("jaxcnn", "flax nnx", "equinox")
EQUAL = 1e-4
"""Relative L2 distance up to which two results are equal."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Time per-example gradients, their norms, and sums of clipped gradients, in jaxcnn and by vmap(grad).

    The results are compared before anything is timed.
    """

    net: str = "lecture"
    """Net: lecture or lenet5, with the same parameters in all libraries; linen (a ResNet with group norm) or equinox, a
    function that jaxcnn gets as it is."""
    batch_size: int = 64
    """Examples per batch."""
    libraries: tuple[str, ...] = LIBRARIES[1:]
    """Libraries to compare jaxcnn with on lecture and lenet5: "flax nnx", equinox."""
    max_norm: float = 1.0
    """Norm to which longer gradients are clipped."""
    rounds: int = 10
    """Number of rounds. In each round, every library has one turn."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """JSON file for all numbers; a bar chart of the ratios is written next to it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Compare and time the libraries. Return 0, or 130 after Ctrl-C."""
    from experiments.benchmarks import results, timing
    from experiments.benchmarks.nets import NETS

    check(config)
    results.check_out(config.out)
    if config.net in FUNCTIONS:
        others: tuple[str, ...] = ("vmap(grad)",)
        calls = contenders_of_function(*FUNCTIONS[config.net](config.batch_size), config.max_norm)
    else:
        others = config.libraries
        timed = dataclasses.replace(NETS[config.net](), batch=config.batch_size)
        calls = contenders(timed, ["jaxcnn", *others], config.max_norm)
    for what in WHAT:
        expected = calls["jaxcnn", what]()
        for name in others:
            d = distance(calls[name, what](), expected)
            if not d <= EQUAL:
                raise bad_value(
                    RunError, f"{what} of {name}", f"within {EQUAL:g} of jaxcnn's", f"a distance of {d:.1g}"
                )
    machine = timing.machine(("jax", "jaxlib"), others=("flax", "equinox"))
    results.heading(machine, f"{config.net}, batch {config.batch_size}, {config.rounds} rounds; results are equal")
    times: dict[str, Any] = {}
    ratios = {}
    with results.until_stopped(lambda: times) as stopped:
        for what in WHAT:
            print(f"\n{what}")
            times[what] = timing.in_turns({name: call for (name, w), call in calls.items() if w == what}, config.rounds)
            results.contenders(times[what], "jaxcnn")
            for name in others:
                ratios[f"{what}, {name}"] = times[what][name].median / times[what]["jaxcnn"].median
    if config.out is not None:
        results.write(config.out, machine, config, seconds=times)
        label = "time / jaxcnn's time (medians)"
        title = f"{config.net}, batch {config.batch_size}: vmap(grad)"
        if ratios:
            results.bars(config.out.with_suffix(".png"), title, label, ratios)
    return stopped[0] if stopped else 0


def check(config: Config) -> None:
    """Raise UsageError for every error that can be detected in the options."""
    for flag, number in (("--batch-size", config.batch_size), ("--rounds", config.rounds)):
        cli.check_count(flag, number)
    if not config.max_norm > 0:
        raise bad_value(UsageError, "--max-norm", "> 0", config.max_norm)
    for flag, got, known in (
        ("--net", config.net, ["lecture", "lenet5", *FUNCTIONS]),
        *(("--libraries", name, list(LIBRARIES[1:])) for name in config.libraries),
    ):
        cli.check_choice(flag, got, known)


WHAT = ("gradients", "norms", "clipped sums")


def contenders(timed: "Timed", names: Sequence[str], max_norm: float) -> dict[tuple[str, str], Callable[[], Any]]:
    """Return a call for each library and computed quantity."""
    import jax

    from experiments.benchmarks.contenders import images

    x, labels = images(timed)
    params = timed.net.init(jax.random.key(0), timed.shape)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name in names:
        inputs = np.moveaxis(x, -1, 1).copy() if name == "equinox" else x
        functions = ours(timed, params) if name == "jaxcnn" else theirs(name, timed, params)
        for what, (f, weights) in functions.items():
            arguments = jax.device_put((weights, inputs, labels, max_norm))
            calls[name, what] = functools.partial(f, *arguments)
    return calls


def ours(timed: "Timed", params: Any) -> Mapping[str, tuple[Any, Any]]:
    """Return the functions of jaxcnn: one backward pass, and one product per layer and example."""
    return {what: (function, params) for what, function in with_products(timed.net).items()}


def with_products(net: Any) -> dict[str, Callable[..., Any]]:
    """Return the functions (params, x, labels, max_norm) of jaxcnn for a net or a function."""
    import jax

    import jaxcnn

    loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    f: dict[str, Callable[..., Any]] = {
        "gradients": lambda p, x, y, max_norm: jaxcnn.per_example_gradients(net, loss, p, x, y),
        "norms": lambda p, x, y, max_norm: jaxcnn.per_example_norms(net, loss, p, x, y),
        "clipped sums": lambda p, x, y, max_norm: jaxcnn.clipped_gradient(net, loss, p, x, y, max_norm),
    }
    return {what: jax.jit(function) for what, function in f.items()}


def theirs(name: str, timed: "Timed", params: Any) -> Mapping[str, tuple[Any, Any]]:
    """Return `jax.vmap` of `jax.grad` of one example's loss, without dropout."""
    logits, weights = model(name, timed, params)
    return {what: (function, weights) for what, function in by_vmap(logits).items()}


def by_vmap(logits: Callable[[Any, Any], Any]) -> dict[str, Callable[..., Any]]:
    """Return the functions (weights, x, labels, max_norm) by `jax.vmap`, of the logits of one example."""
    import jax
    import jax.numpy as jnp
    import optax

    def loss(weights: Any, x: Any, label: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits(weights, x), label)

    def norm(tree: Any) -> Any:
        return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))

    def gradients(weights: Any, x: Any, labels: Any, max_norm: Any) -> Any:
        return jax.vmap(jax.grad(loss), (None, 0, 0))(weights, x, labels)

    def norms(weights: Any, x: Any, labels: Any, max_norm: Any) -> Any:
        return jax.vmap(lambda *example: norm(jax.grad(loss)(weights, *example)))(x, labels)

    def clipped(weights: Any, x: Any, labels: Any, max_norm: Any) -> Any:
        each = gradients(weights, x, labels, max_norm)
        factors = jnp.minimum(1, max_norm / jax.vmap(norm)(each))
        return jax.tree.map(lambda g: jnp.einsum("n,n...->...", factors, g), each)

    functions = {"gradients": gradients, "norms": norms, "clipped sums": clipped}
    return {what: jax.jit(function) for what, function in functions.items()}


def contenders_of_function(
    fun: Callable[[Any, Any], Any], params: Any, x: Any, max_norm: float
) -> dict[tuple[str, str], Callable[[], Any]]:
    """Return the calls of jaxcnn and of vmap(grad) for a function of parameters and a batch."""
    import jax

    arguments = jax.device_put((params, x, np.arange(len(x)) % 10, max_norm))
    functions = {"jaxcnn": with_products(fun), "vmap(grad)": by_vmap(lambda params, x: fun(params, x[None])[0])}
    return {
        (name, what): functools.partial(f, *arguments) for name, each in functions.items() for what, f in each.items()
    }


def linen(batch_size: int) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    """Return a ResNet of three blocks with group norm, written with `flax.linen`, its parameters and images."""
    import flax.linen as nn
    import jax

    class Block(nn.Module):
        features: int
        stride: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
            y = nn.Conv(self.features, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(4)(y)))
            x = x if x.shape == y.shape else nn.Conv(self.features, (1, 1), self.stride)(x)
            return nn.relu(x + nn.GroupNorm(4)(y))

    class Resnet(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3))(x)))
            for features, stride in ((16, 1), (32, 2), (64, 2)):
                x = Block(features, stride)(x)
            return nn.Dense(10)(x.mean((1, 2)))

    x = np.random.default_rng(0).standard_normal((batch_size, 32, 32, 3)).astype(np.float32)
    net = Resnet()
    return net.apply, net.init(jax.random.key(0), x[:1]), x


def equinox(batch_size: int) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    """Return a net with group norm and a grouped convolution, written with Equinox, its parameters and images."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 4)
    relu, pool = eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(2, 2)
    net = eqx.nn.Sequential(
        [
            *(eqx.nn.Conv2d(3, 16, 3, padding=1, key=keys[0]), eqx.nn.GroupNorm(4, 16), relu, pool),
            *(eqx.nn.Conv2d(16, 32, 3, padding=1, groups=4, key=keys[1]), eqx.nn.GroupNorm(4, 32), relu, pool),
            *(eqx.nn.Conv2d(32, 64, 3, padding=1, key=keys[2]), relu, pool),
            *(eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(1024, 10, key=keys[3])),
        ]
    )
    params, static = eqx.partition(net, eqx.is_inexact_array)
    x = np.random.default_rng(0).standard_normal((batch_size, 3, 32, 32)).astype(np.float32)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, x


FUNCTIONS: Mapping[str, Callable[[int], tuple[Callable[[Any, Any], Any], Any, Any]]] = {
    "linen": linen,
    "equinox": equinox,
}
"""Functions of parameters and a batch, which jaxcnn gets as they are: name → (function, parameters, images)."""


def model(name: str, timed: "Timed", params: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    """Return a function from weights and one example to logits, and the weights."""
    from experiments.benchmarks import contenders

    if name == "flax nnx":
        from flax import nnx

        net = contenders.load_flax(contenders.flax_net(timed), timed, params)
        net.eval()
        graph, *states = nnx.split(net, nnx.Param, ...)
        return lambda weights, x: nnx.merge(graph, weights, *states[1:])(x[None])[0], states[0]
    import equinox as eqx

    net = eqx.nn.inference_mode(contenders.load_equinox(contenders.equinox_net(timed), timed, params))
    weights, static = eqx.partition(net, eqx.is_inexact_array)
    return lambda weights, x: eqx.combine(weights, static)(x), weights


def distance(result: Any, expected: Any) -> float:
    """Return the largest relative L2 distance of the arrays of two results; inf if their number or sizes differ.

    The elements of each array are sorted first, because Equinox has channels first.
    """
    import jax

    def arrays(tree: Any) -> list[Any]:
        leaves = (np.sort(np.asarray(leaf, np.float64), axis=None) for leaf in jax.tree.leaves(tree))
        return sorted(leaves, key=len)

    a: list[Any] = arrays(result)
    b: list[Any] = arrays(expected)
    if [len(one) for one in a] != [len(one) for one in b]:
        return float("inf")
    distances = [float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(y)), 1e-30) for x, y in zip(a, b, strict=True)]
    return max(d if np.isfinite(d) else float("inf") for d in distances)


if __name__ == "__main__":
    sys.exit(main())
