"""Differentially private training with --private: DP-SGD (Abadi et al. 2016, algorithm 1), with the ε that it spends.

Each step draws every training image independently with probability q = B/n (Poisson sampling). Gradients are clipped to
norm C and summed, Gaussian noise of standard deviation σC is added, and the sum is divided by B:

    g = (Σ_i g_i · min(1, C/‖g_i‖) + N(0, σ²C²)) / B

A sample has B images on average. It is padded to a fixed size, so that the step compiles once; of a larger sample, a
random subset is used. The accountant counts exactly this: Poisson sampling truncated to a fixed size.

(ε, δ) holds for the weights after any step, if one training image is added or removed. It does not hold for the
training metrics, which have no noise, nor for validation images, which choose the best epoch. Noise and samples depend
on a secret key, which is in the checkpoints and not in the weights file. That file does not have the hash of the images
either. The generator is not cryptographic.
"""

import dataclasses
import functools
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import FlagCreatePairsOff, arg

from experiments.dataset import Batch, Pixels, scaled
from experiments.errors import UsageError, bad_value, check_installed
from experiments.recipe import RecipeOptions

if TYPE_CHECKING:  # importing jax takes a second, and --help does not need it
    import jax
    import optax

    from experiments.training_loop import Step
    from jaxcnn import Serial, TrainState
    from jaxcnn.net import Loss

DEVIATIONS = 5
"""Size of a padded batch, in standard deviations of the number of images above its mean."""
PADDING = -1
"""Label of the images that pad a batch; their loss is 0."""
INTERVAL = 1e-3
"""Step at which the accountant rounds privacy losses, upward."""
_NOISE, _SAMPLES = 3, 4
"""Numbers folded into keys, so that noise and samples differ from the draws of dropout."""


@dataclasses.dataclass(frozen=True)
class PrivacyOptions:
    """Options of differentially private training."""

    private: FlagCreatePairsOff[bool] = False
    """Clip the gradient of each example at --clip-norm, add noise, and report ε; needs the extra private."""
    noise_multiplier: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Standard deviation of the noise, as a multiple of --clip-norm; if omitted, 1."""
    delta: Annotated[float | None, arg(metavar="FLOAT")] = None
    """The δ for which ε is reported; if omitted, 1/n^1.1 for n training images."""


def check(options: PrivacyOptions, training: RecipeOptions, dtype: str) -> None:
    """Raise UsageError for an option that is invalid, or that private training cannot have."""
    numbers = {"--noise-multiplier": options.noise_multiplier, "--delta": options.delta}
    for flag, number in numbers.items():
        if number is not None and not options.private:
            raise bad_value(UsageError, flag, "omitted without --private", number)
    if not options.private:
        return
    check_installed("dp-accounting")
    noise, delta = options.noise_multiplier, options.delta
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise bad_value(UsageError, "--noise-multiplier", "a finite number > 0", noise)
    if delta is not None and not 0 < delta < 1:
        raise bad_value(UsageError, "--delta", "between 0 and 1", delta)
    if training.microbatch is not None:
        raise bad_value(UsageError, "--microbatch", "omitted with --private", training.microbatch)
    if not training.clip_norm:
        raise bad_value(UsageError, "--clip-norm", "a finite number > 0 with --private", training.clip_norm)
    if "mixup" in training.augment:
        names = " ".join(training.augment)
        raise bad_value(UsageError, "--augment", "without mixup, which combines images, with --private", names)
    if dtype != "float32":
        raise bad_value(UsageError, "--dtype", "float32 with --private, whose bound is not exact otherwise", dtype)


def check_net(model: str, net: "Serial") -> None:
    """Raise UsageError if a net computes statistics of a batch, with which one image changes all gradients."""
    import jax

    from experiments import own_nets
    from jaxcnn import BatchNorm

    if isinstance(net, own_nets.OwnNet):
        variables = jax.eval_shape(net.functions.init, jax.random.key(0))
        mixing = [name for name in variables if name != own_nets.PARAMS]
    else:
        mixing = [name for name, layer in net.walk() if isinstance(layer, BatchNorm)]
    if mixing:
        expected = "a net without batch norm, whose statistics combine images, with --private"
        raise bad_value(UsageError, "--model", expected, f"{model} with {mixing[0]}")


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """The numbers on which ε depends.

    Each of `count` images is in a sample with probability `size`/`count`. At most `capacity` of them are used. The
    noise has a standard deviation of `noise_multiplier` times the largest norm.
    """

    count: int
    size: int
    capacity: int
    noise_multiplier: float
    delta: float

    def epsilon(self, steps: int) -> float:
        """Return ε after a number of steps, for `delta` and one image that is added or removed."""
        return _epsilon(self, steps)

    def describe(self, steps: int) -> str:
        """Return ε after a number of steps and what it depends on, in one line."""
        return (
            f"ε = {self.epsilon(steps):.3f}, δ = {self.delta:.3g} after {steps:,} steps with noise multiplier "
            f"{self.noise_multiplier:g} and samples of {self.size} of {self.count:,} training images on average"
        )

    def as_json(self, steps: int) -> dict[str, Any]:
        """Return ε after a number of steps, and all numbers, as JSON values."""
        return {"epsilon": self.epsilon(steps), "steps": steps, **dataclasses.asdict(self)}

    def logged(self, records: Sequence[Mapping[str, Any]], per_epoch: int, steps: int) -> list[Mapping[str, Any]]:
        """Return the metrics of some steps, with "epsilon" in that of the last step of each epoch."""
        return [
            {**record, "epsilon": self.epsilon(record["step"])}
            if record["step"] % per_epoch == 0 or record["step"] == steps
            else record
            for record in records
        ]


@functools.cache
def _epsilon(mechanism: Mechanism, steps: int) -> float:
    import dp_accounting

    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(
        dataset_size=mechanism.count,
        sampling_probability=mechanism.size / mechanism.count,
        truncated_batch_size=mechanism.capacity,
        noise_multiplier=mechanism.noise_multiplier,
    )
    accountant = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=INTERVAL
    )
    return float(accountant.compose(event, steps).get_epsilon(mechanism.delta)) if steps else 0.0


def mechanism(options: PrivacyOptions, size: int, count: int, devices: int) -> Mechanism | None:
    """Return the mechanism of a training, or None if it is not private.

    Args:
        options: The options.
        size: Average number of images in a sample.
        count: Number of training images.
        devices: Number of devices that must divide a padded batch.
    """
    if not options.private:
        return None
    capacity = min(size + math.ceil(DEVIATIONS * math.sqrt(size)), count)
    noise = 1.0 if options.noise_multiplier is None else options.noise_multiplier
    delta = count**-1.1 if options.delta is None else options.delta
    return Mechanism(count, size, -(-capacity // devices) * devices, noise, delta)


def public(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json for the weights file, without the two entries that depend on the images.

    These are their hash, and the brightness of their border, which becomes neither dark nor light.
    """
    kept = {name: value for name, value in record.items() if name != "data_sha256"}
    return {**kept, "inputs": {**record["inputs"], "border": 0.5}}


def secret_key() -> "jax.Array":
    """Return a key from the system's entropy, because whoever knows the key of the noise can subtract it."""
    import jax
    import jax.numpy as jnp

    return jax.random.wrap_key_data(jnp.array([secrets.randbits(32), secrets.randbits(32)], np.uint32))


class PoissonBatches:
    """The padded samples of a private training, as a function of the step and of a key that is set before its start."""

    def __init__(self, images: Pixels, labels: np.ndarray, chosen: np.ndarray, of: Mechanism, part: slice) -> None:
        self._images, self._labels, self._chosen = images, labels, chosen
        self._mechanism, self._part = of, part
        self._key: list[int] = []

    @property
    def per_epoch(self) -> int:
        """Number of steps after which each image was drawn about once."""
        return len(self._chosen) // self._mechanism.size

    def draw_from(self, key: "jax.Array") -> None:
        """Set the key of the samples, that of the training state."""
        import jax

        self._key = [int(number) for number in np.asarray(jax.random.key_data(key)).ravel()]

    def sample(self, step: int) -> np.ndarray:
        """Return the positions in `chosen` of the images of a step, in random order."""
        of = self._mechanism
        draw = np.random.default_rng([*self._key, _SAMPLES, step])
        return draw.permutation(np.flatnonzero(draw.random(of.count) < of.size / of.count))[: of.capacity]

    def __call__(self, step: int) -> Batch:
        """Return the part of the batch of a step that this process reads."""
        sample = self._chosen[self.sample(step)]
        padded = np.full(self._mechanism.capacity, PADDING, np.intp)
        padded[: len(sample)] = sample
        own = padded[self._part]
        images, labels = np.asarray(self._images[own]), self._labels[own]
        images[own == PADDING], labels[own == PADDING] = 0, PADDING
        return images, labels


def masked(loss: "Loss") -> "Loss":
    """Return a loss that is 0 for the labels of padding, so that its gradient is 0 as well."""
    import jax.numpy as jnp

    def of_images(logits: Any, labels: Any) -> Any:
        return jnp.where(labels == PADDING, 0, loss(logits, jnp.maximum(labels, 0)))

    return of_images


def noisy_gradient(max_norm: float, of: Mechanism) -> Callable[..., Any]:
    """Return the gradient of the module's formula, for `jaxcnn.make_train_step`.

    Args:
        max_norm: The bound C.
        of: The mechanism.
    """
    import jax

    import jaxcnn

    def gradient(net: Any, loss: Any, params: Any, x: Any, targets: Any, *, key: Any) -> Any:
        total = jaxcnn.clipped_gradient(net, loss, params, x, targets, max_norm, key=key)
        leaves, tree = jax.tree.flatten(total)
        keys = jax.random.split(jax.random.fold_in(key, _NOISE), len(leaves))
        deviation = of.noise_multiplier * max_norm
        noisy = [a + deviation * jax.random.normal(key, a.shape, a.dtype) for key, a in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, [a / of.size for a in noisy])

    return gradient


def make_step(
    net: "Serial",
    loss: "Loss",
    optimizer: "optax.GradientTransformation",
    max_norm: float,
    of: Mechanism,
    largest: int = 255,
) -> "Step":
    """Return a private training step, whose metrics are the "loss" and "accuracy" of the images that were drawn.

    Args:
        net: The net.
        loss: A loss per example.
        optimizer: From optax.
        max_norm: The bound of each example's gradient.
        of: The mechanism.
        largest: The pixel of uint8 images that the net receives as 1.
    """
    import jax
    import jax.numpy as jnp

    import jaxcnn

    take = jaxcnn.make_train_step(net, masked(loss), optimizer, gradient=noisy_gradient(max_norm, of))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: "TrainState", batch: Any) -> Any:
        images, labels = batch
        state, metrics = take(state, (scaled(images, largest), labels))
        drawn = jnp.sum(labels != PADDING)
        # A sample without images is possible; its loss and accuracy count as 0.
        loss = metrics["loss"] * len(labels) / jnp.maximum(drawn, 1)
        return state, {"loss": loss, "accuracy": jnp.where(drawn, metrics["accuracy"], 0)}

    return step
