"""The loop over epochs and steps, with its progress reports and its three kinds of end."""

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

LOOK_EVERY = 16
"""Steps between two looks at the loss. A look waits for the device; in between, steps queue up without a pause."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended, and the result up to that point.

    `params` are the newest parameters that are known to be good, after `step` steps. For "diverged", `bad_step` is the
    first step whose loss was not finite (counted from 1), and `bad_loss` is that loss.
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
    """Train for `count` epochs, or `max_steps` steps if that is less; `epochs(n)` returns the batches of epoch n ≥ 1.

    After each epoch, it evaluates and calls `on_epoch(rows, params, steps)`. Ctrl-C ends the loop after the current
    step (a second one ends it immediately). A loss that is not finite ends it at the next check. Neither raises: see
    Outcome.
    """
    rows: list[Epoch] = []
    watch = _Watch(state.params, progress, batch_size)
    try:
        with _interrupts() as interrupted:
            for number in range(1, count + 1):
                watch.begin_epoch()
                for batch in epochs(number):
                    if watch.step == max_steps or interrupted():
                        break
                    state, metrics = step(state, batch)
                    watch.saw(metrics, state)
                watch.look(state)
                whole = not interrupted()
                tested = evaluate(state.params) if whole else {"loss": math.nan, "accuracy": math.nan}
                if whole and not math.isfinite(tested["loss"]):
                    raise _Diverged(watch.step, tested["loss"])
                if watch.steps_in_epoch:
                    rows.append(watch.row(number, tested))
                    progress.line(describe(rows[-1]))
                if not whole:
                    return Outcome("interrupted", watch.step, state.params, rows)
                on_epoch(rows, state.params, watch.step)
                if watch.step == max_steps:
                    break
    except _Diverged as found:
        return Outcome("diverged", watch.good_step, watch.good, rows, found.step, found.loss)
    return Outcome("finished", watch.step, state.params, rows)


class _Watch:
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

    def saw(self, metrics: dict[str, jax.Array], state: TrainState) -> None:
        self.step += 1
        self._waiting.append(metrics)
        if len(self._waiting) == LOOK_EVERY:
            self.look(state)

    def look(self, state: TrainState) -> None:
        """Wait for the pending steps; raise _Diverged at the first whose loss is not finite."""
        if not self._waiting:
            return
        seen, self._waiting = jax.device_get(self._waiting), []
        losses = [float(metrics["loss"]) for metrics in seen]
        first = self.step - len(seen) + 1
        # A finite loss at the first step after a copy shows that the copy is good: the loss was computed with it.
        if math.isfinite(losses[0]):
            self.good, self.good_step = self._next, self._next_step
        for number, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise _Diverged(number, loss)
        self._next, self._next_step = _copy(state.params), self.step

        self.steps_in_epoch += len(seen)
        self._loss += sum(losses)
        self._accuracy += sum(float(metrics["accuracy"]) for metrics in seen)
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self._seconds += elapsed
        accuracy = float(seen[-1]["accuracy"])
        self._progress.update(self.step, losses[-1], accuracy, len(seen) * self._batch_size / elapsed)

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
    # A step donates its state's buffers, so parameters that must outlive the next step are copied.
    return jax.tree.map(jnp.copy, params)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that no step is cut in two; a second one interrupts as usual."""
    flag = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    # A process that ignores Ctrl-C (nohup) continues to ignore it. Only the main thread receives signals.
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()

    def first(signum: int, frame: FrameType | None) -> None:
        flag.set()
        signal.signal(signal.SIGINT, before)

    if ours:
        signal.signal(signal.SIGINT, first)
    try:
        yield flag.is_set
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
