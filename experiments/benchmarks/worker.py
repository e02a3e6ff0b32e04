"""A contender in its own process, which runs a turn on request: python -m experiments.benchmarks.worker.

Libraries that have their own threads disturb each other in one process, and each has its own memory to warm up. So
every contender has a process, and all but one wait, without work, for a line on their standard input.
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
"""Seconds before each turn, so that the threads of the one before have stopped spinning."""


@dataclasses.dataclass(frozen=True)
class Told:
    """The message of a contender that is ready."""

    compile_seconds: float | None
    temporary_bytes: int | None


class Contender:
    """The process of one contender."""

    def __init__(self, name: str, net: str, environment: Mapping[str, str], **sizes: int | None) -> None:
        """Start it; it builds its step in parallel with the others. `sizes` are fields of `nets.Timed` or None."""
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmarks.worker", name, net, json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            process_group=0,  # Ctrl-C is for the script, which ends its contenders
        )

    def ready(self) -> Told:
        """Wait until it has built and warmed up its step; raises RunError if it cannot."""
        answer = self._answer()
        if "error" in answer:
            raise RunError(f"{self.name}: {answer['error']}")
        return Told(**answer)

    def turn(self, steps: int) -> list[float]:
        """Return the seconds of each of `steps` steps, after one step that is not counted."""
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
        return json.loads(line)


def main(name: str, net: str, sizes: str) -> None:
    """Build the step, then answer each line with the seconds of the requested number of steps."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the libraries goes to stderr

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    from experiments.benchmarks.contenders import CONTENDERS
    from experiments.benchmarks.nets import NETS

    given = {field: size for field, size in json.loads(sizes).items() if size is not None}
    timed = dataclasses.replace(NETS[net](), **given)
    try:
        step = CONTENDERS[name](timed)
        for _ in range(3):
            step.run()
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        say(error=line)
        return
    say(compile_seconds=step.compile_seconds, temporary_bytes=step.temporary_bytes)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line) + 1):
            began = time.perf_counter()
            step.run()
            seconds.append((time.perf_counter() - began) / (timed.scan or 1))
        say(seconds=seconds[1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
