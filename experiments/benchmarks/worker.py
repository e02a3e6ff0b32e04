"""A process that runs the training step of one library on request: python -m experiments.benchmarks.worker.

Libraries with their own threads disturb each other in one process, and each has its own memory to warm up. So each
contender has its own process, and all but one wait for a line on their standard input.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from experiments.errors import RunError, explain

PAUSE = 0.3
"""Seconds before each turn, in which the threads of the previous contender stop spinning."""
WARMUP = 4
"""Number of steps before the first turn that are not timed."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """The message of a contender whose step is built."""

    compile_seconds: float | None
    temporary_bytes: int | None


class Contender:
    """The process of one contender."""

    def __init__(self, name: str, net: str, environment: Mapping[str, str], **sizes: int | None) -> None:
        """Start the process, which begins to build its step.

        Args:
            name: A key of `contenders.CONTENDERS`.
            net: A name that `drawn_nets.find` takes.
            environment: Additional environment variables.
            **sizes: Fields of `nets.Timed`; None means the default.
        """
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmarks.worker", name, net, json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            process_group=0,  # only the script receives Ctrl-C, and it ends its contenders
        )

    def ready(self) -> Ready:
        """Wait until the step is built; raise RunError if that fails."""
        return Ready(**self._answer())

    def turn(self, steps: int) -> list[float]:
        """Return the seconds of each of `steps` steps, after one step that is not timed, or `WARMUP` the first time.

        Raise RunError if a step fails.
        """
        time.sleep(PAUSE)
        assert self._process.stdin is not None  # it is a pipe
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"{self.name}: its process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RunError(f"{self.name}: {answer['error']}")
        return answer


def compile_once(name: str, net: str, environment: Mapping[str, str], **sizes: int | None) -> float:
    """Return the seconds in which a new process traces and compiles the step, in a library for JAX.

    The arguments are those of `Contender`.
    """
    contender = Contender(name, net, environment, **sizes)
    try:
        seconds = contender.ready().compile_seconds
    finally:
        contender.stop()
    assert seconds is not None  # only PyTorch's contenders measure none
    return seconds


def main(name: str, net: str, sizes: str) -> None:
    """Build the step, then answer each line of stdin, a number of steps, with their seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of the libraries goes to stderr

    def send(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    from experiments.benchmarks.contenders import CONTENDERS
    from experiments.benchmarks.drawn_nets import find

    fields = {field: size for field, size in json.loads(sizes).items() if size is not None}
    timed = dataclasses.replace(find(net), **fields)
    try:
        step = CONTENDERS[name](timed)
        send(compile_seconds=step.compile_seconds, temporary_bytes=step.temporary_bytes)
        warmup = WARMUP
        for line in sys.stdin:
            for _ in range(warmup):
                step.run()
            warmup, seconds = 1, []
            for _ in range(int(line)):
                began = time.perf_counter()
                step.run()
                seconds.append((time.perf_counter() - began) / (timed.scan or 1))
            send(seconds=seconds)
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        send(error=line)


if __name__ == "__main__":
    main(*sys.argv[1:])
