"""How a net is trained: the optimizer and its schedule, weight decay, label smoothing, averaging; all from optax."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli
from experiments.errors import UsageError, bad_value

if TYPE_CHECKING:  # importing jax takes a second, and --help does not need it
    import optax

    from jaxcnn import Serial, TrainState
    from jaxcnn.net import Loss


class Defaults(NamedTuple):
    """The values of an optimizer's options that the command line does not set."""

    learning_rate: float
    weight_decay: float


OPTIMIZERS: Mapping[str, Defaults] = {
    "adam": Defaults(2e-3, 0.0),
    "adamw": Defaults(2e-3, 0.05),
    "sgd": Defaults(5e-2, 0.0),
    "lion": Defaults(3e-4, 0.3),
}
SCHEDULES = ("cosine", "step", "one-cycle", "constant")
DROPS = (0.5, 0.75)
"""Shares of the steps after which the schedule "step" divides the learning rate by 10 (He et al. 2015, §4.2)."""
NOT_DECAYED = ("bias", "scale", "mean", "var")
"""Names of parameters without weight decay. Parameters with one dim are not decayed either."""


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """Options of the training that change its result."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step."""
    microbatch: Annotated[int | None, arg(metavar="INT")] = None
    """Images that pass through the net at a time, if the batch does not fit into memory; if omitted, all of a step."""
    optimizer: str = "adam"
    """Optimizer: adam, adamw, lion, or sgd with momentum 0.9."""
    learning_rate: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Largest learning rate; if omitted, 0.002 for adam and adamw, 0.05 for sgd, 0.0003 for lion."""
    schedule: str = "cosine"
    """Learning rate over the steps: cosine (to 0), step (a tenth after 50 % and 75 %), one-cycle, or constant."""
    warmup: float = 0.0
    """Epochs in which the learning rate rises to its largest value; one-cycle has its own."""
    weight_decay: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Weight decay of kernels, not of biases and scales; if omitted, 0.05 for adamw, 0.3 for lion, else 0."""
    label_smoothing: float = 0.0
    """Share of each target that is divided among all classes; the validation loss is without it."""
    ema: float = 0.0
    """Decay of an average of the parameters over the steps, which is evaluated and saved; 0 for none."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; a longer one is scaled down. 0 for none."""
    augment: tuple[str, ...] = ()
    """Changes of the training images: crop (padded by an eighth), flip, cutout, mixup. Masks have crop and flip."""
    flip_test: FlagCreatePairsOff[bool] = False
    """In evaluation and prediction, average the probabilities of each image and its mirror image."""


def check(options: RecipeOptions) -> None:
    """Raise UsageError for an option that is invalid whatever the data are."""
    from experiments.augmentation import AUGMENTATIONS

    cli.check_count("--epochs", options.epochs)
    cli.check_count("--batch-size", options.batch_size)
    cli.check_count("--microbatch", options.microbatch)
    if options.microbatch is not None and "mixup" in options.augment:
        expected = "omitted with mixup, whose accuracy needs all outputs of a step"
        raise bad_value(UsageError, "--microbatch", expected, options.microbatch)
    cli.check_choice("--optimizer", options.optimizer, OPTIMIZERS)
    cli.check_choice("--schedule", options.schedule, SCHEDULES)
    for name in options.augment:
        cli.check_choice("--augment", name, AUGMENTATIONS)
    if len(set(options.augment)) < len(options.augment):
        raise bad_value(UsageError, "--augment", "different names", " ".join(options.augment))
    rate, decay = options.learning_rate, options.weight_decay
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise bad_value(UsageError, "--learning-rate", "a finite number > 0", rate)
    for flag, number in (("--warmup", options.warmup), ("--weight-decay", decay), ("--clip-norm", options.clip_norm)):
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise bad_value(UsageError, flag, "a finite number >= 0", number)
    for flag, number in (("--label-smoothing", options.label_smoothing), ("--ema", options.ema)):
        if not 0 <= number < 1:
            raise bad_value(UsageError, flag, "from 0 up to, but not including, 1", number)
    if options.warmup and options.schedule == "one-cycle":
        raise bad_value(UsageError, "--warmup", "0 with --schedule one-cycle, which has its own", options.warmup)
    if decay and options.optimizer == "adam":
        raise bad_value(UsageError, "--weight-decay", "0 with --optimizer adam", decay, "choose --optimizer adamw")
    if options.warmup >= options.epochs:
        raise bad_value(UsageError, "--warmup", f"less than the {options.epochs} epochs", options.warmup)


def sizes(options: RecipeOptions) -> dict[str, int]:
    """Return the numbers of images that the devices divide among themselves, by flag."""
    each = {"--batch-size": options.batch_size}
    return each if options.microbatch is None else {**each, "--microbatch": min(options.microbatch, options.batch_size)}


def filled_in(options: RecipeOptions) -> dict[str, float]:
    """Return the learning rate and the weight decay: those of the options, or the optimizer's defaults."""
    default = OPTIMIZERS[options.optimizer]
    given = {"learning_rate": options.learning_rate, "weight_decay": options.weight_decay}
    return {name: value if value is not None else getattr(default, name) for name, value in given.items()}


def describe(options: RecipeOptions) -> str:
    """Return the recipe in one line."""
    numbers = filled_in(options)
    parts = [f"{options.optimizer} at {numbers['learning_rate']:g}, {options.schedule}"]
    parts += [f"{options.microbatch} images at a time"] if options.microbatch else []
    parts += [f"warm-up {options.warmup:g} epochs"] if options.warmup else []
    parts += [f"weight decay {numbers['weight_decay']:g}"] if numbers["weight_decay"] else []
    parts += [f"label smoothing {options.label_smoothing:g}"] if options.label_smoothing else []
    parts += [f"average with decay {options.ema:g}"] if options.ema else []
    parts += [f"gradients clipped at {options.clip_norm:g}"] if options.clip_norm else []
    parts += [", ".join(options.augment)] if options.augment else []
    parts += ["averaged over flips in evaluation"] if options.flip_test else []
    return ", ".join(parts)


def make_schedule(name: str, rate: float, steps: int, warmup: int = 0) -> "optax.Schedule":
    """Return the learning rate as a function of the step.

    Args:
        name: One of SCHEDULES.
        rate: The largest learning rate.
        steps: Total number of steps.
        warmup: Number of steps at the start in which the rate rises to the largest one.
    """
    import optax

    rest = max(steps - warmup, 1)
    if name == "one-cycle":
        return optax.cosine_onecycle_schedule(steps, rate)
    if name == "cosine":
        after = optax.cosine_decay_schedule(rate, rest)
    elif name == "step":
        after = optax.piecewise_constant_schedule(rate, {round(share * steps) - warmup: 0.1 for share in DROPS})
    else:
        after = optax.constant_schedule(rate)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(rate / (warmup + 1), rate, warmup), after], [warmup])


def make_optimizer(
    options: RecipeOptions, steps: int, per_epoch: int, net: "Serial | None" = None
) -> "optax.GradientTransformation":
    """Return the optimizer of a recipe.

    Args:
        options: The recipe.
        steps: Total number of steps.
        per_epoch: Number of steps in an epoch, in which the warm-up counts.
        net: The net; the state of an `OwnNet` is updated by a step of length 1.
    """
    import optax

    numbers = filled_in(options)
    warmup = min(round(options.warmup * per_epoch), steps - 1)
    schedule = make_schedule(options.schedule, numbers["learning_rate"], steps, warmup)
    decay = numbers["weight_decay"]
    if options.optimizer == "adam":
        update = optax.adam(schedule)
    elif options.optimizer == "adamw":
        update = optax.adamw(schedule, weight_decay=decay, mask=decayed)
    elif options.optimizer == "lion":
        update = optax.lion(schedule, weight_decay=decay, mask=decayed)
    else:
        update = optax.sgd(schedule, momentum=0.9)
        update = optax.chain(optax.add_decayed_weights(decay, decayed), update) if decay else update
    if options.clip_norm:
        update = optax.chain(optax.clip_by_global_norm(options.clip_norm), update)
    if net is not None:
        update = _with_state(net, update)
    return averaging(update, options.ema) if options.ema else update


def _with_state(net: "Serial", update: "optax.GradientTransformation") -> "optax.GradientTransformation":
    """Return an optimizer that applies `update` to what is trained, and replaces state by its new value."""
    import optax

    from experiments import own_nets

    if not isinstance(net, own_nets.OwnNet):
        return update
    labels = functools.partial(own_nets.labels_of_state, net)
    return optax.partition({"params": update, "state": optax.sgd(1.0)}, labels)


def decayed(params: Any) -> Any:
    """Return a tree of bools: whether weight decay applies to a parameter, by its name and number of dims."""
    import jax

    def is_kernel(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
        return name not in NOT_DECAYED and leaf.ndim > 1

    return jax.tree_util.tree_map_with_path(is_kernel, params)


class Averaged(NamedTuple):
    """The state of `averaging`: that of the optimizer, and the average of the parameters."""

    inner: Any
    average: Any


def averaging(optimizer: "optax.GradientTransformation", decay: float) -> "optax.GradientTransformation":
    """Return an optimizer that also keeps an exponential average of the parameters, `decay`·average + (1−`decay`)·w."""
    import optax

    ema = optax.ema(decay)

    def init(params: Any) -> Averaged:
        return Averaged(optimizer.init(params), ema.init(params))

    def update(gradients: Any, state: Averaged, params: Any = None) -> tuple[Any, Averaged]:
        updates, inner = optimizer.update(gradients, state.inner, params)
        _, average = ema.update(optax.apply_updates(params, updates), state.average)
        return updates, Averaged(inner, average)

    return optax.GradientTransformation(init, update)


def averaged_params(options: RecipeOptions, state: "TrainState") -> Any:
    """Return the average of the parameters without the bias of its start at 0, or the parameters if there is none."""
    import optax

    if not options.ema:
        return state.params
    average = state.opt_state.average
    return optax.tree.bias_correction(average.ema, options.ema, average.count)


def make_loss(smoothing: float) -> "Loss":
    """Return the cross-entropy of logits (…, classes) and labels (…), or targets (…, classes).

    Targets are smoothed by a share `smoothing`.
    """
    import jax
    import jax.numpy as jnp
    import optax

    import jaxcnn

    def loss(logits: Any, targets: Any) -> jax.Array:
        are_labels = jnp.issubdtype(targets.dtype, jnp.integer)
        if are_labels and not smoothing:
            return jaxcnn.softmax_cross_entropy_with_integer_labels(logits, targets)
        if are_labels:
            targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
        return jaxcnn.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))

    return loss
