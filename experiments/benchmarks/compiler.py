"""A process that compiles programs for a TPU or GPU that need not exist: python -m experiments.benchmarks.compiler.

A compiler may abort its process or run for too long. `Compiler` then ends the process, and the next program gets a
new one.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks import hlo
from experiments.errors import UsageError, is_installed

FORWARD, BOTH, STEP = "forward", "both passes", "training step"
OURS, STOCK, FLAX = "jaxcnn", "stock JAX", "flax nnx"
PYTHON = (3, 12)
"""Oldest Python version for which all compilers are published."""
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""Description of the GPU for XLA."""
_OPERATION = re.compile(r"\s+(%\w+)(?::\d+)? = (stablehlo\.\w+ ?[^{}]*(?:\{[^{}\n]*\}[^{}]*)*)")
"""An operation without a body, in one line: its name, and what it computes."""


@dataclasses.dataclass(frozen=True)
class Platform:
    """One kind of device."""

    #: XLA's name of the platform.
    name: str
    #: The device description: a topology's name for TPU.
    topology: str
    #: Modules that contain the compiler, and the distribution whose version is reported.
    modules: tuple[str, ...]
    distribution: str
    environment: Mapping[str, str]
    #: Bytes per cycle of the device's memory, for TPU.
    bytes_per_cycle: float | None = None

    @property
    def measure(self) -> str:
        """The main measure of a program."""
        return "cycles" if self.bytes_per_cycle else "moved"


def _tpu(accelerator: str, topology: str, bytes_per_cycle: float) -> Platform:
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return Platform("tpu", topology, ("libtpu",), "libtpu", environment, bytes_per_cycle)


PLATFORMS = {
    "tpu-v5e": _tpu("v5litepod-4", "v5e:2x2", 819 / 1.5),
    "tpu-v6e": _tpu("v6e-4", "v6e:2x2", 1640 / 1.75),
    "cuda-h100": Platform(
        "cuda", "1x1x{chips}", ("jax_cuda12_plugin", "jax_plugins.xla_cuda12"), "jax-cuda12-plugin",
        # Autotuning needs a device.
        {"XLA_FLAGS": "--xla_gpu_autotune_level=0"},
    ),
}  # fmt: skip
"""The devices; rates of TPUs are gigabytes per second divided by gigahertz."""


def require(platform: str) -> None:
    """Raise UsageError if the compiler for a platform is not installed."""
    hint = f"make compiled ARGS='--platform {platform}' installs it in .venv-compiled"
    if sys.version_info[:2] < PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        needed = ".".join(map(str, PYTHON))
        raise UsageError(f"--platform {platform}: needs Python {needed} or newer, got {version}: {hint}")
    for module in PLATFORMS[platform].modules:
        if not is_installed(module):
            package = PLATFORMS[platform].distribution
            raise UsageError(f"--platform {platform}: needs the package {package}, which is not installed: {hint}")


@dataclasses.dataclass(frozen=True)
class Job:
    """One program: an op of `rows`, or the training step of a net of `nets`."""

    #: Name of the row or the net.
    row: str
    product: str
    contender: str
    dtype: str
    #: Images per batch; None means the default. Ops use it if it is smaller than theirs.
    batch: int | None = None
    #: Devices over which the batch is split.
    chips: int = 1


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Counts of one compiled program. `cycles` is None except on TPU."""

    #: See `fingerprint`; programs with the same one are compiled once.
    program: str
    moved: int
    kernels: int
    calls: Mapping[str, int]
    collectives: Mapping[str, int]
    cycles: float | None
    temporary: int
    #: Bytes of the arguments and the results: what a program moves that reads and writes each of them once.
    least: int
    compile_seconds: float


class Compiler:
    """The process that compiles for one platform."""

    def __init__(self, platform: str, timeout: float, command: tuple[str, ...] = ()) -> None:
        """Compile for a key of `PLATFORMS`, each program for at most ``timeout`` seconds."""
        self._platform, self._timeout = platform, timeout
        self._command = command or (sys.executable, "-m", "experiments.benchmarks.compiler", platform)
        self._process: subprocess.Popen[str] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="jaxcnn-compiled-"))

    def compile(self, job: Job) -> Compiled | str:
        """Return the counts of a program, or the reason why there are none."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None  # they are pipes  # noqa: PT018
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], self._timeout)
            line = process.stdout.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if line is None:
            self.stop()
            return f"no result after {self._timeout:.0f} s"
        if not line:
            status = process.wait()
            self.stop()
            return f"the compiler ended with status {status}{self._last_words()}"
        answer = json.loads(line)
        return answer["error"] if "error" in answer else Compiled(**answer)

    def stop(self) -> None:
        """End the process; the next program starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        """End the process and delete its files."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> "subprocess.Popen[str]":
        bundles = self._folder / "bundles"
        shutil.rmtree(bundles, ignore_errors=True)
        bundles.mkdir()
        dump = f"--xla_jf_dump_to={bundles} --xla_jf_dump_llo_text=true"
        dump += " --xla_jf_dump_llo_pass_label_regex=^final_bundles$"
        environment = {**os.environ, **PLATFORMS[self._platform].environment, "JAX_PLATFORMS": "cpu"}
        with (self._folder / "stderr").open("w") as log:
            self._process = subprocess.Popen(
                [*self._command, str(bundles)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment | {"LIBTPU_INIT_ARGS": dump},
                process_group=0,  # only the script receives Ctrl-C, and it ends this process
            )
        return self._process

    def _last_words(self) -> str:
        lines = (self._folder / "stderr").read_text(errors="replace").split("\n")
        fatal = [line for line in lines if line.startswith("F") or "Error" in line]
        return f": {fatal[-1].strip()[:200]}" if fatal else ""


# ---------------------------------------------------------------------------------------------------------------------
# In the process


def main(platform: str, folder: str) -> None:
    """Answer each line of stdin, a job, with the counts of its program."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of the compilers goes to stderr
    mesh = _mesh(PLATFORMS[platform])
    known: dict[str, Compiled] = {}
    for line in sys.stdin:
        job = Job(**json.loads(line))
        try:
            lowered = _lower(mesh(job.chips), job)
            key = fingerprint(lowered.as_text())
            if key not in known:
                known[key] = _compile(PLATFORMS[platform], lowered, key, Path(folder))
            answer = dataclasses.asdict(known[key])
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _mesh(platform: Platform) -> Callable[[int], Any]:
    """Return a function from a number of devices to their mesh."""
    import jax
    import numpy as np
    from jax._src import xla_bridge
    from jax.experimental import topologies

    # Without a GPU, JAX does not know the platform of a topology's devices (jax#23971).
    canonicalize = xla_bridge.canonicalize_platform

    def canonical(name: str) -> str:
        try:
            return canonicalize(name)
        except RuntimeError:
            return platform.name

    vars(xla_bridge)["canonicalize_platform"] = canonical

    def mesh(chips: int) -> Any:
        topology = platform.topology.format(chips=chips)
        if platform.name == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        else:
            found = topologies.get_topology_desc(platform=platform.name, target_config=H100, topology=topology)
        return jax.sharding.Mesh(np.array(found.devices[:chips]), ("data",))

    return mesh


def _lower(mesh: Any, job: Job) -> Any:
    """Return a job's program for the devices of a mesh."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

    jitted, arguments, split = program(job)

    def placed(argument: Any, along_batch: bool) -> Any:
        # On one device there is no mesh, as in a program that does not shard.
        sharding: Any = SingleDeviceSharding(mesh.devices.flat[0])
        if job.chips > 1:
            sharding = NamedSharding(mesh, PartitionSpec("data") if along_batch else PartitionSpec())
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), argument)

    arguments = [placed(argument, along) for argument, along in zip(arguments, split, strict=True)]
    return jitted.lower(*arguments)


def fingerprint(program: str) -> str:
    """Return a hash of a program's StableHLO text, without the module's name.

    Operations may be in any order, unless the program has calls or operations with a body.
    """
    module, function, *body, results, _, _, _ = re.sub(r"^module @\S+", "", program).split("\n")
    values: dict[str, str] = {}
    for line in body:
        match = _OPERATION.fullmatch(line)
        if match is None:
            return _hash(module, function, *body, results)
        name, expression = match.groups()
        values[name] = _hash(_replaced(expression, values))
    return _hash(module, function, _replaced(results, values))


def _replaced(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"%\w+", lambda name: values.get(name[0], name[0]), text)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


def _compile(platform: Platform, lowered: Any, key: str, folder: Path) -> Compiled:
    for old in folder.iterdir():
        old.unlink()
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    bundles = _bundles(folder) if platform.name == "tpu" else None
    counts = hlo.count(compiled.as_text(), bundles, platform.bytes_per_cycle or float("inf"))
    memory = compiled.memory_analysis()
    return Compiled(
        program=key,
        **dataclasses.asdict(counts),
        temporary=int(memory.temp_size_in_bytes),
        least=int(memory.argument_size_in_bytes + memory.output_size_in_bytes),
        compile_seconds=round(seconds, 2),
    )


def _bundles(folder: Path) -> dict[str, int]:
    bundles: dict[str, int] = {}
    for path in folder.iterdir():
        if (name := hlo.dumped_instruction(path.name)) is not None:
            with path.open(errors="replace") as lines:
                bundles[name] = hlo.executed_bundles(lines)
    return bundles


def program(job: Job) -> tuple[Any, list[Any], list[bool]]:
    """Return a job's jitted function, its abstract arguments, and whether each is split along its first dim."""
    return _step_program(job) if job.product == STEP else _op_program(job)


def _op_program(job: Job) -> tuple[Any, list[Any], list[bool]]:
    import jax

    from experiments.benchmarks import rows

    row = next(row for row in rows.rows() if row.name == job.row)
    f = row.ours if job.contender == OURS else row.stock
    named = row.arguments(job.batch)
    arguments = [_as(job.dtype, a) for a in named.values()]
    split = [name in rows.BATCHED for name in named]
    if job.product == FORWARD:
        return jax.jit(f), arguments, split
    at = [i for i, name in enumerate(named) if name in row.differentiable]

    def both(delta: Any, *arguments: Any) -> Any:
        def inner(*variables: Any) -> Any:
            every = list(arguments)
            for i, variable in zip(at, variables, strict=True):
                every[i] = variable
            return f(*every)

        y, pull = jax.vjp(inner, *(arguments[i] for i in at))
        return y, pull(delta)

    return jax.jit(both), [jax.eval_shape(f, *arguments), *arguments], [True, *split]


def _step_program(job: Job) -> tuple[Any, list[Any], list[bool]]:
    import jax
    import optax

    from experiments.benchmarks import contenders
    from experiments.benchmarks.nets import LARGE, NETS
    from jaxcnn import TrainState, make_train_step, rules, softmax_cross_entropy_with_integer_labels

    timed = {**NETS, **LARGE}[job.row]()
    timed = dataclasses.replace(timed, batch=job.batch or timed.batch)
    if job.contender == FLAX:
        step, state = contenders.flax_training_step(timed)
    else:
        optimizer = optax.adam(contenders.LEARNING_RATE)
        state = jax.eval_shape(lambda: TrainState.create(timed.net, optimizer, jax.random.key(0), timed.shape))
        rule = rules.autodiff if job.contender == STOCK else None

        def loss(logits: Any, labels: Any) -> Any:
            return softmax_cross_entropy_with_integer_labels(logits, labels, rule=rule)

        step = make_train_step(timed.net, loss, optimizer, rules=rule)
    state, batch = jax.tree.map(lambda a: _as(job.dtype, a), (state, contenders.images(timed)))
    return jax.jit(step, donate_argnums=0), [state, batch], [False, True]


def _as(dtype: str, a: Any) -> Any:
    """Return the abstract array of the same shape, with floats of ``dtype``."""
    import jax
    import jax.numpy as jnp

    return jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
