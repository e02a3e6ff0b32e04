"""The training loop over steps and epochs: progress, checkpoints, signals, and three outcomes."""

import copy
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.checkpoints import Params
from experiments.dataset import Batch
from experiments.run_folder import Epoch, History
from experiments.terminal import Progress
from jaxcnn import TrainState

Metrics = dict[str, Any]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Evaluate = Callable[[TrainState], dict[str, float]]
Save = Callable[[TrainState, int, History], None]
Log = Callable[[Sequence[Mapping[str, Any]]], None]

CHECK_EVERY = 16
"""Steps between two checks of the metrics. A check waits for the device; between checks, steps are queued."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of the loop: its reason, and the result up to that point.

    `state` is the newest state known to give finite metrics, after `step` steps. `history` has the metrics up to there,
    and `rows` also has a row for an unfinished epoch. For "interrupted", `signal` is the signal's number. For
    "diverged", `bad_step` is the first step with a metric that is not finite (counted from 1), `bad_metric` is the
    metric's name, and `bad_value` is its value.
    """

    end: Literal["finished", "interrupted", "diverged"]
    step: int
    state: TrainState
    rows: list[Epoch]
    history: History
    signal: int = 0
    bad_step: int = 0
    bad_metric: str = ""
    bad_value: float = 0.0

    @property
    def params(self) -> Params:
        """The parameters of `state`."""
        return self.state.params


class _Diverged(Exception):
    def __init__(self, step: int, metric: str, value: float) -> None:
        self.step, self.metric, self.value = step, metric, value


def fit(
    step: Step,
    state: TrainState,
    batches: Callable[[int], Batch],
    evaluate: Evaluate | None,
    *,
    max_steps: int,
    per_epoch: int,
    batch_size: int,
    progress: Progress,
    save: Save,
    describe: Callable[[Epoch], str],
    log: Log = lambda records: None,
    save_every: int | None = None,
    first_step: int = 0,
    history: History | None = None,
    agree: Callable[[int], int] | None = None,
) -> Outcome:
    """Train until `max_steps` steps are taken in all.

    Ctrl-C or SIGTERM ends the loop after the current step; a second Ctrl-C ends it immediately. A metric that is not
    finite ends it at the next check. Neither raises an error.

    Args:
        step: The training step.
        state: The state after `first_step` steps.
        batches: Returns the batch of a step, counted from 0.
        evaluate: Returns the validation metrics of a state; None without validation images.
        max_steps: Number of steps in all, including those before `first_step`.
        per_epoch: Number of steps in an epoch. The last epoch may have fewer.
        batch_size: Images per step.
        progress: Receives the state of the training.
        save: Called with the state, the number of steps and the metrics so far, after each evaluation, after each
            `save_every` steps, and when a signal ends the loop.
        describe: Returns the line that is printed for an epoch.
        log: Called with the metrics of each step, several steps at a time.
        save_every: Steps between two calls of `save`; None means one for each epoch.
        first_step: Number of steps taken before.
        history: The metrics of these steps; it is not modified.
        agree: With several processes, returns the largest of their numbers. It is called at each check, and a signal to
            any process then ends the loop in all of them. None if there is one process.

    Returns:
        How the loop ended, with the newest good state.
    """
    monitor = _Monitor(state, first_step, history or History(), progress, batch_size, log)
    saved = first_step if history else -1
    try:
        with _signals() as received:

            def stopping() -> int:
                """Return the signal that ends the loop, or 0; all processes end it after the same step."""
                if agree is None:
                    return received()
                return 0 if monitor.waiting else agree(received())

            batch: Batch | None = None
            while True:
                if monitor.step and (monitor.step % per_epoch == 0 or monitor.step == max_steps):
                    if monitor.history.steps or monitor.waiting:
                        monitor.check(state)
                        if stop := stopping():
                            break
                        row = monitor.end_epoch(-(-monitor.step // per_epoch), state, evaluate)
                        progress.line(describe(row))
                        save(state, monitor.step, monitor.history)
                        saved = monitor.step
                        monitor.restart_clock()
                    if monitor.step == max_steps:
                        return Outcome("finished", monitor.step, state, monitor.rows(per_epoch), monitor.history)
                elif save_every and monitor.step > first_step and monitor.step % save_every == 0:
                    monitor.check(state)
                    save(state, monitor.step, monitor.history)
                    saved = monitor.step
                    monitor.restart_clock()
                if stop := stopping():
                    break
                state, metrics = step(state, batches(monitor.step) if batch is None else batch)
                # The step still runs, so the next batch is read and put on the device meanwhile.
                batch = batches(monitor.step + 1) if monitor.step + 1 < max_steps else None
                monitor.add(metrics, state)
            monitor.check(state)
            if monitor.step != saved:
                save(state, monitor.step, monitor.history)
            rows = monitor.rows(per_epoch)
            return Outcome("interrupted", monitor.step, state, rows, monitor.history, signal=stop)
    except _Diverged as error:
        rows = monitor.history.epochs
        good = (monitor.good_step, monitor.good, rows, monitor.history)
        return Outcome("diverged", *good, bad_step=error.step, bad_metric=error.metric, bad_value=error.value)


class _Monitor:
    """Counts steps, collects metrics without blocking the device, and keeps the newest good state."""

    def __init__(
        self, state: TrainState, step: int, history: History, progress: Progress, batch_size: int, log: Log
    ) -> None:
        self.step, self.history = step, copy.deepcopy(history)
        self.good, self.good_step = _copy(state), step
        self._next, self._next_step = self.good, step
        self.waiting: list[Metrics] = []
        self._progress, self._batch_size, self._log = progress, batch_size, log
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last check."""
        self._since = time.perf_counter()

    def add(self, metrics: Metrics, state: TrainState) -> None:
        self.step += 1
        self.waiting.append(metrics)
        if len(self.waiting) == CHECK_EVERY:
            self.check(state)

    def check(self, state: TrainState) -> None:
        """Wait for the pending steps; raise _Diverged at the first with a metric that is not finite."""
        if not self.waiting:
            return
        finished, self.waiting = jax.tree.map(float, jax.device_get(self.waiting)), []
        first = self.step - len(finished) + 1
        numbered = list(enumerate(finished, first))
        bad = next(((number, *named) for number, metrics in numbered if (named := _not_finite(metrics))), None)
        # The loss of the first step after a copy was computed with the copy, so a finite loss shows that it is good.
        if bad is None or bad[0] > first:
            self.good, self.good_step = self._next, self._next_step
        last = self.step if bad is None else bad[0]
        self._log([{"step": number, **metrics} for number, metrics in numbered if number <= last])
        if bad is not None:
            raise _Diverged(*bad)
        self._next, self._next_step = _copy(state), self.step

        # One by one, because the sum must not depend on the steps between two checks, which a resumed run changes.
        for metrics in finished:
            self.history.loss += metrics["loss"]
            self.history.accuracy += metrics["accuracy"]
        self.history.steps += len(finished)
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self.history.seconds += elapsed
        rate = len(finished) * self._batch_size / elapsed
        self._progress.update(self.step, finished[-1]["loss"], finished[-1]["accuracy"], rate)

    def end_epoch(self, number: int, state: TrainState, evaluate: Evaluate | None) -> Epoch:
        """Evaluate, and turn the sums of the epoch into a row; raise _Diverged if the evaluation is not finite."""
        validated = _NOT_EVALUATED if evaluate is None else evaluate(state)
        if evaluate is not None and (bad := _not_finite(validated)):
            raise _Diverged(self.step, f"validation {bad[0]}", bad[1])
        row = self._row(number, validated)
        self.history = History([*self.history.epochs, row])
        return row

    def rows(self, per_epoch: int) -> list[Epoch]:
        """Return the rows of the finished epochs, and one of the unfinished epoch if it has steps."""
        unfinished = [self._row(-(-self.step // per_epoch), _NOT_EVALUATED)] if self.history.steps else []
        return [*self.history.epochs, *unfinished]

    def _row(self, number: int, validated: Mapping[str, float]) -> Epoch:
        sums = self.history
        return Epoch(
            epoch=number,
            step=self.step,
            train_loss=sums.loss / sums.steps,
            train_accuracy=sums.accuracy / sums.steps,
            validation_loss=validated["loss"],
            validation_accuracy=validated["accuracy"],
            seconds=sums.seconds,
            images_per_second=sums.steps * self._batch_size / sums.seconds,
            validation_mean_iou=validated.get("mean_iou", math.nan),
        )


_NOT_EVALUATED = {"loss": math.nan, "accuracy": math.nan}


def _not_finite(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the name and the value of the first metric that is not finite, the loss first, or None."""
    for name in sorted(metrics, key=lambda name: name != "loss"):
        value, words = metrics[name], name.replace("_", " ")
        if isinstance(value, Mapping):
            if bad := _not_finite(value):
                return f"{words.removesuffix('s')} of {bad[0]}", bad[1]
        elif not math.isfinite(value):
            return words, value
    return None


def _copy(state: TrainState) -> TrainState:
    # A step donates the buffers of its state, so a state that is used after the next step must be a copy.
    return jax.tree.map(jnp.copy, state)


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of the first SIGINT or SIGTERM, or 0 before one.

    The current step then finishes. A second signal has its usual effect.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    # A process that ignores a signal (nohup) continues to ignore it. Only the main thread receives signals.
    main = threading.current_thread() is threading.main_thread()
    replaced = [number for number in before if main and before[number] == usual[number]]

    def first(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for number in replaced:
            signal.signal(number, before[number])

    for number in replaced:
        signal.signal(number, first)
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number in replaced:
            signal.signal(number, before[number])
