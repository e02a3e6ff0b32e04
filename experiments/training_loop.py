"""The training loop over epochs and steps, with progress reports and three outcomes."""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.checkpoints import Params
from experiments.data import Batch
from experiments.report import Progress
from experiments.run_folder import Epoch
from jaxcnn import TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
Evaluate = Callable[[Params], dict[str, float]]

CHECK_EVERY = 16
"""Steps between two checks of the loss. A check waits for the device; between checks, steps are queued."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended, and the result up to that point.

    `params` are the newest parameters known to give a finite loss, after `step` steps. For "diverged", `bad_step` is
    the first step whose loss was not finite (counted from 1), and `bad_loss` is that loss.
    """

    end: Literal["finished", "interrupted", "diverged"]
    step: int
    params: Params
    rows: list[Epoch]
    bad_step: int = 0
    bad_loss: float = 0.0


class _Diverged(Exception):
    def __init__(self, step: int, loss: float) -> None:
        self.step, self.loss = step, loss


def fit(
    step: Step,
    state: TrainState,
    epochs: Callable[[int], Iterable[Batch]],
    evaluate: Evaluate,
    *,
    count: int,
    batch_size: int,
    max_steps: int,
    progress: Progress,
    on_epoch: Callable[[list[Epoch], Params, int], None],
    describe: Callable[[Epoch], str],
) -> Outcome:
    """Train for `count` epochs or `max_steps` steps, whichever ends first.

    Ctrl-C ends the loop after the current step; a second Ctrl-C ends it immediately. A loss that is not finite ends it
    at the next check. Neither raises an error.

    Args:
        step: The training step.
        state: The initial state.
        epochs: Returns the batches of epoch n ≥ 1.
        evaluate: Returns the test loss and accuracy of parameters.
        count: Maximum number of epochs.
        batch_size: Images per step.
        max_steps: Maximum number of steps.
        progress: Receives the state of the training.
        on_epoch: Called with the rows, the parameters and the number of steps after each evaluation.
        describe: Returns the line that is printed for an epoch.

    Returns:
        How the loop ended, with the newest good parameters.
    """
    rows: list[Epoch] = []
    monitor = _Monitor(state.params, progress, batch_size)
    try:
        with _interrupts() as interrupted:
            for number in range(1, count + 1):
                monitor.begin_epoch()
                for batch in epochs(number):
                    if monitor.step == max_steps or interrupted():
                        break
                    state, metrics = step(state, batch)
                    monitor.add(metrics, state)
                monitor.check(state)
                complete = not interrupted()
                tested = evaluate(state.params) if complete else {"loss": math.nan, "accuracy": math.nan}
                if complete and not math.isfinite(tested["loss"]):
                    raise _Diverged(monitor.step, tested["loss"])
                if monitor.steps_in_epoch:
                    rows.append(monitor.row(number, tested))
                    progress.line(describe(rows[-1]))
                if not complete:
                    return Outcome("interrupted", monitor.step, state.params, rows)
                on_epoch(rows, state.params, monitor.step)
                if monitor.step == max_steps:
                    break
    except _Diverged as error:
        return Outcome("diverged", monitor.good_step, monitor.good, rows, error.step, error.loss)
    return Outcome("finished", monitor.step, state.params, rows)


class _Monitor:
    """Counts steps, collects losses without blocking the device, and keeps the newest good parameters."""

    def __init__(self, params: Params, progress: Progress, batch_size: int) -> None:
        self.step = 0
        self.good, self.good_step = _copy(params), 0
        self._next, self._next_step = self.good, 0
        self._waiting: list[dict[str, jax.Array]] = []
        self._progress, self._batch_size = progress, batch_size

    def begin_epoch(self) -> None:
        self.steps_in_epoch = 0
        self._loss = self._accuracy = 0.0
        self._seconds = 0.0
        self._since = time.perf_counter()

    def add(self, metrics: dict[str, jax.Array], state: TrainState) -> None:
        self.step += 1
        self._waiting.append(metrics)
        if len(self._waiting) == CHECK_EVERY:
            self.check(state)

    def check(self, state: TrainState) -> None:
        """Wait for the pending steps; raise _Diverged at the first whose loss is not finite."""
        if not self._waiting:
            return
        finished, self._waiting = jax.device_get(self._waiting), []
        losses = [float(metrics["loss"]) for metrics in finished]
        first = self.step - len(finished) + 1
        # The loss of the first step after a copy was computed with the copy, so a finite loss shows that it is good.
        if math.isfinite(losses[0]):
            self.good, self.good_step = self._next, self._next_step
        for number, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise _Diverged(number, loss)
        self._next, self._next_step = _copy(state.params), self.step

        self.steps_in_epoch += len(finished)
        self._loss += sum(losses)
        self._accuracy += sum(float(metrics["accuracy"]) for metrics in finished)
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self._seconds += elapsed
        accuracy = float(finished[-1]["accuracy"])
        self._progress.update(self.step, losses[-1], accuracy, len(finished) * self._batch_size / elapsed)

    def row(self, number: int, tested: dict[str, float]) -> Epoch:
        return Epoch(
            epoch=number,
            step=self.step,
            train_loss=self._loss / self.steps_in_epoch,
            train_accuracy=self._accuracy / self.steps_in_epoch,
            test_loss=tested["loss"],
            test_accuracy=tested["accuracy"],
            seconds=self._seconds,
            images_per_second=self.steps_in_epoch * self._batch_size / self._seconds,
        )


def _copy(params: Params) -> Params:
    # A step donates the buffers of its state, so parameters that are used after the next step must be copies.
    return jax.tree.map(jnp.copy, params)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Convert the first Ctrl-C to a flag, so that the current step finishes; a second one interrupts as usual."""
    flag = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    # A process that ignores Ctrl-C (nohup) continues to ignore it. Only the main thread receives signals.
    replace = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()

    def first(signum: int, frame: FrameType | None) -> None:
        flag.set()
        signal.signal(signal.SIGINT, before)

    if replace:
        signal.signal(signal.SIGINT, first)
    try:
        yield flag.is_set
    finally:
        if replace:
            signal.signal(signal.SIGINT, before)
