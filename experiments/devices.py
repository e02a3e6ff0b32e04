"""The devices of a run: the platform, and the mesh over which a batch is split."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from experiments import cli
from experiments.errors import UsageError, bad_value

if TYPE_CHECKING:  # importing jax takes a second, and --help does not need it
    import jax

PLATFORMS: Mapping[str, str] = {
    "cpu": "unset JAX_PLATFORMS",
    "gpu": "pip install 'jaxcnn[cuda12]' on a machine with an NVIDIA GPU, or choose --device cpu",
    "tpu": "pip install 'jaxcnn[tpu]' on a machine with a TPU, or choose --device cpu",
}
"""What to do if a platform is missing, by its name."""


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Options of the devices; they change results by rounding only."""

    device: Annotated[str | None, arg(metavar="STR")] = None
    """Where to compute: cpu, gpu or tpu; if omitted, jax chooses."""
    devices: int = 1
    """Number of devices over which each batch is split."""


def check(options: DeviceOptions, batch_size: int) -> None:
    """Raise UsageError for options that are invalid on any machine."""
    if options.device is not None:
        cli.check_choice("--device", options.device, PLATFORMS)
    cli.check_count("--devices", options.devices)
    if batch_size % options.devices:
        expected = f"a multiple of the {options.devices} devices"
        raise bad_value(UsageError, "--batch-size", expected, batch_size)


def choose(options: DeviceOptions) -> "Placement":
    """Return where to put arrays; raise UsageError if the machine does not have these devices.

    Must be called before the first computation with jax, which fixes the platform.
    """
    import jax

    if options.device is not None:
        before = jax.config.values["jax_platforms"]
        try:
            jax.config.update("jax_platforms", options.device)
            available = jax.devices()
        except RuntimeError:
            available = []
        if not available or available[0].platform != options.device:
            jax.config.update("jax_platforms", before)
            got = f"{options.device}, which jax does not find"
            expected = "a platform of this machine and this jaxlib"
            raise bad_value(UsageError, "--device", expected, got, PLATFORMS[options.device])
    available = jax.devices()
    if options.devices > len(available):
        platform = available[0].platform
        hint = "set JAX_NUM_CPU_DEVICES to divide the CPU" if platform == "cpu" else ""
        expected = f"at most {len(available)}, the devices of platform {platform}"
        raise bad_value(UsageError, "--devices", expected, options.devices, hint)
    return Placement(available[: options.devices])


class Placement:
    """Puts the state of a training on all devices, and a part of each batch on each of them."""

    def __init__(self, devices: "list[jax.Device]") -> None:
        self._count = len(devices)
        if self._count > 1:
            import jax

            kind = (jax.sharding.AxisType.Auto,)
            mesh = jax.make_mesh((self._count,), ("batch",), axis_types=kind, devices=devices)
            self._everywhere = jax.NamedSharding(mesh, jax.P())
            self._split = jax.NamedSharding(mesh, jax.P("batch"))

    def replicate(self, tree: Any) -> Any:
        """Return a tree whose arrays are on every device."""
        import jax

        return tree if self._count == 1 else jax.device_put(tree, self._everywhere)

    def split(self, batch: Any) -> Any:
        """Return a batch with a part on every device; one that cannot be divided is not changed."""
        import jax

        if self._count == 1 or len(batch[0]) % self._count:
            return batch
        return jax.device_put(batch, self._split)
