"""The devices of a run: the platform, and the mesh over which a batch is split, in one process or several."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import arg

from experiments import cli, processes
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
    """Number of devices, of each process, over which each batch is split."""


def check(options: DeviceOptions, sizes: Mapping[str, int], process_count: int = 1) -> None:
    """Raise UsageError for options that are invalid on any machine.

    Args:
        options: The options.
        sizes: Numbers of images that all devices divide among themselves, by flag.
        process_count: Number of processes.
    """
    if options.device is not None:
        cli.check_choice("--device", options.device, PLATFORMS)
    cli.check_count("--devices", options.devices)
    for flag, size in sizes.items():
        if size % (options.devices * process_count):
            of_processes = f" of {process_count} processes" if process_count > 1 else ""
            expected = f"a multiple of the {options.devices * process_count} devices{of_processes}"
            raise bad_value(UsageError, flag, expected, size)


def choose(options: DeviceOptions) -> "Placement":
    """Return where to put arrays; raise UsageError if the machine does not have these devices.

    Must be called before the first computation with jax, which fixes the platform, and after `processes.start`.
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
    available = jax.local_devices()
    if options.devices > len(available):
        platform = available[0].platform
        hint = "set JAX_NUM_CPU_DEVICES to divide the CPU" if platform == "cpu" else ""
        of_process = " in this process" if processes.count() > 1 else ""
        expected = f"at most {len(available)}, the devices of platform {platform}{of_process}"
        raise bad_value(UsageError, "--devices", expected, options.devices, hint)
    by_process = [jax.local_devices(process) for process in range(processes.count())]
    return Placement([device for each in by_process for device in each[: options.devices]])


class Placement:
    """Puts the state of a training on all devices, and a part of each batch on each of them.

    If there are several processes, each holds the arrays of its own devices, and each must make the same calls.
    """

    def __init__(self, devices: "list[jax.Device]") -> None:
        self._count = len(devices)
        if self._count > 1:
            import jax

            kind = (jax.sharding.AxisType.Auto,)
            mesh = jax.make_mesh((self._count,), ("batch",), axis_types=kind, devices=devices)
            self._everywhere = jax.NamedSharding(mesh, jax.P())
            self._split = jax.NamedSharding(mesh, jax.P("batch"))

    @property
    def devices(self) -> int:
        """Number of devices, of all processes."""
        return self._count

    def part(self, size: int) -> slice:
        """Return the examples of a batch of `size`, which the devices divide, that this process reads."""
        own = size // processes.count()
        return slice(own * processes.index(), own * (processes.index() + 1))

    def replicate(self, tree: Any) -> Any:
        """Return a tree whose arrays are on every device."""
        import jax

        return tree if self._count == 1 else jax.device_put(tree, self._everywhere)

    def join(self, part: Any) -> Any:
        """Return the batch whose `part` each process has, on the devices."""
        import jax

        return jax.device_put(part) if self._count == 1 else self._put(part, self._split)

    def split(self, batch: Any) -> Any:
        """Return a batch, which every process has, with a part on every device.

        One that cannot be divided is on one device, or on every device if there are several processes.
        """
        if self._count == 1:
            return batch
        size = len(batch[0])
        if size % self._count == 0:
            return self._put(batch, self._split, self.part(size))
        return batch if processes.count() == 1 else self._put(batch, self._everywhere)

    def _put(self, batch: Any, sharding: Any, part: slice = slice(None)) -> Any:
        import jax

        def put(a: Any) -> Any:
            if isinstance(a, jax.Array) or processes.count() == 1:
                return jax.device_put(a, sharding)
            return jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(a[part]))

        return jax.tree.map(put, batch)
