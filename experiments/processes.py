"""Several processes that train together, on one machine or many, through JAX's distributed runtime.

Each process computes its part of every batch. Process 0 coordinates: the others connect to it, it reads the
checkpoints, and it alone writes the run's folder. If a process ends or cannot be reached, each of the others ends
within 60 s with a line on stderr and a status that is not 0; none waits in a collective.
"""

import ctypes
import dataclasses
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from tyro.conf import FlagCreatePairsOff, arg

from experiments import cli
from experiments.errors import RunError, UsageError, bad_value

START_TIMEOUT = 40
"""Seconds in which all processes must start."""
HEARTBEAT_TIMEOUT = 20
"""Seconds without a heartbeat of a process after which the runtime ends all others."""
END_TIMEOUT = 24 * 3600
"""Seconds that a finished process waits for the others, such as the one that writes the report."""

_LOST = re.compile(r"gloo|nccl|unavailable|deadline.exceeded|coordination|connection|peer", re.IGNORECASE)
"""Words in the errors of a collective whose peer is lost; their types differ between backends."""


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """Options of several processes; they change results by rounding only."""

    coordinator: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Address of process 0, at which the others connect to it; the port is any free one."""
    processes: int = 1
    """Number of processes that train together. All get the same command, except for --process."""
    process: Annotated[int | None, arg(metavar="INT")] = None
    """Number of this process, from 0. Process 0 writes the run's folder; all must be able to read the data."""
    cluster: FlagCreatePairsOff[bool] = False
    """Take coordinator, number of processes and number of this one from the cluster, if jax detects it: Slurm,
    Open MPI, TPU pods, and Kubernetes with the package kubernetes."""


def check(options: ProcessOptions) -> None:
    """Raise UsageError for options that are invalid or contradict each other."""
    cli.check_count("--processes", options.processes)
    given = {"--coordinator": options.coordinator, "--process": options.process}
    if options.cluster:
        given["--processes"] = options.processes if options.processes > 1 else None
        for flag, value in given.items():
            if value is not None:
                raise bad_value(UsageError, flag, "omitted with --cluster", value)
        return
    if options.process is not None and not 0 <= options.process < options.processes:
        raise bad_value(UsageError, "--process", f"from 0 to {options.processes - 1}", options.process)
    if options.processes > 1:
        for flag, value in given.items():
            if value is None:
                expected = "the number of this process" if flag == "--process" else "HOST:PORT of process 0"
                raise bad_value(UsageError, flag, f"{expected} with --processes {options.processes}", "nothing")
    if options.coordinator is not None:
        _address(options.coordinator)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise bad_value(UsageError, "--coordinator", "HOST:PORT", repr(text))
    return host.strip("[]"), int(port)


def start(options: ProcessOptions) -> None:
    """Connect to the other processes, if there are any; must be called before the first computation with jax.

    Afterwards only process 0 writes to stdout.

    Raises:
        UsageError: jax detects no cluster.
        RunError: The coordinator cannot be reached. If another process does not start, this one ends.
    """
    if options.processes == 1 and not options.cluster:
        return
    import jax

    if "jax_enable_preemption_service" in jax.config.values:
        jax.config.update("jax_enable_preemption_service", False)  # the training loop handles SIGTERM
    ends = time.monotonic() + START_TIMEOUT
    timeouts: dict[str, Any] = {
        "heartbeat_timeout_seconds": HEARTBEAT_TIMEOUT,
        "shutdown_timeout_seconds": END_TIMEOUT,
    }
    name = "a process of the cluster" if options.cluster else f"process {options.process} of {options.processes}"
    if options.process:
        assert options.coordinator is not None
        _wait_for(*_address(options.coordinator), ends)
    timeouts["initialization_timeout"] = max(1, round(ends - time.monotonic()))
    _report_aborts(f"{name}: not all processes have started within {START_TIMEOUT} s")
    try:
        if options.cluster:
            jax.distributed.initialize(**timeouts)
        else:
            # Without "deactivate", jax would look for a cluster although all options are given.
            arguments = (options.coordinator, options.processes, options.process)
            jax.distributed.initialize(*arguments, cluster_detection_method="deactivate", **timeouts)
    except ValueError as error:
        if not options.cluster:
            raise
        expected = "used in a cluster that jax detects (Slurm, Open MPI, a TPU pod, Kubernetes with its Python package)"
        raise bad_value(UsageError, "--cluster", expected, f"none ({error})", "use --coordinator") from error
    except RuntimeError as error:
        flag = "--cluster" if options.cluster else f"--coordinator {options.coordinator}"
        got = " ".join(str(error).split())
        raise bad_value(RunError, flag, "an address at which process 0 can listen", got) from error
    continue_with("")
    if index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, open until the process ends


def _wait_for(host: str, port: int, ends: float) -> None:
    """Wait until something listens at an address, because the runtime's own message is long; raise RunError."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1, ends - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > ends - 1:
                name, got = f"--coordinator {host}:{port}", error.strerror or error
                expected = f"the address of process 0, reachable within {START_TIMEOUT} s"
                raise bad_value(RunError, name, expected, got) from None
            time.sleep(0.5)


def index() -> int:
    """Return the number of this process."""
    import jax

    return jax.process_index()


def count() -> int:
    """Return the number of processes."""
    import jax

    return jax.process_count()


def from_first(tree: Any) -> Any:
    """Return the arrays of process 0, bit for bit. All processes have trees of the same shapes and dtypes."""
    import jax
    from jax.experimental import multihost_utils

    if count() == 1:
        return tree
    arrays = jax.tree.map(np.asarray, tree)
    # Bytes, because the broadcast is a sum, which does not keep the sign of 0.
    data = jax.tree.map(lambda a: np.atleast_1d(np.ascontiguousarray(a)).view(np.uint8), arrays)
    data = multihost_utils.broadcast_one_to_all(data)
    return jax.tree.map(lambda b, a: np.array(b).view(a.dtype).reshape(a.shape), data, arrays)


def text_from_first(text: str) -> str:
    """Return the text of process 0."""
    if count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(from_first(np.int64(len(data))))
    return bytes(from_first(data if index() == 0 else np.zeros(size, np.uint8))).decode()


def largest(number: int) -> int:
    """Return the largest of the processes' numbers."""
    from jax.experimental import multihost_utils

    return number if count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).max())


def run(body: Callable[[], int]) -> int:
    """Return the result of a script. If it fails and there are other processes, end this one at once.

    It must not wait for the others at its end, because they may be waiting for it in a collective.
    """
    try:
        status = body()
    except BaseException as error:
        if not _connected():
            raise
        if isinstance(error, RuntimeError | ValueError) and _LOST.search(str(error)):
            _end(_lost(" ".join(str(error).split())[:200]))
        traceback.print_exc()
        _end("")
    if _connected():
        import jax

        if status:
            _end("", status)
        jax.distributed.shutdown()
    return status


def _connected() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


# ---- the last line of a process ----

_last_line = ""
_handlers: list[Any] = []
_command = ""


def continue_with(command: str) -> None:
    """Set the command that continues the run, for the message about a lost process; "" if there is none yet."""
    global _command
    _command = command
    if _connected():
        _report_aborts(_lost("see the message of jax's runtime above"))


def _lost(reason: str) -> str:
    hint = f"; to continue: {_command}" if _command else ""
    return f"process {index()} of {count()}: another process has ended or cannot be reached ({reason}){hint}"


def _report_aborts(line: str) -> None:
    """Print a line, and exit with status 1, when the runtime aborts this process because another one is lost.

    The runtime does so in a thread of its own, whatever the main thread waits for. jax offers no callback for it, and
    Python's signal handlers only run in the main thread. Hence a handler of the C library.
    """
    global _last_line
    _last_line = line
    if _handlers:
        return

    def handler(signum: int) -> None:
        _end(_last_line)

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handler))
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _handlers[0])


def _end(line: str, status: int = 1) -> Any:
    """Print a line and end the process, without the handlers that wait for other processes."""
    if line:
        os.write(2, f"python -m experiments.train: {line}\n".encode())
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(status)
