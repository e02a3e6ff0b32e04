import copy
import dataclasses
import math
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import training_loop
from experiments.run_folder import History
from experiments.training_loop import CHECK_EVERY, fit

BATCHES_PER_EPOCH = 20
BATCH_SIZE = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A training state whose only parameter counts steps."""

    params: dict


class Silent:
    def __init__(self) -> None:
        self.updates: list[int] = []
        self.lines: list[str] = []

    def update(self, step, loss, accuracy, images_per_second):
        self.updates.append(step)

    def line(self, text):
        self.lines.append(text)


def one_step(state, batch):
    """Count a step; the loss is finite exactly if the parameters before the step are."""
    before = state.params["weight"]
    return State({"weight": before + batch}), {"loss": 1.0 / (1.0 + abs(before)), "accuracy": jnp.float32(0.5)}


@dataclasses.dataclass
class Saved:
    calls: list = dataclasses.field(default_factory=list)
    histories: list = dataclasses.field(default_factory=list)

    def __call__(self, state: State, step: int, history: History) -> None:
        self.calls.append((len(history.epochs), float(state.params["weight"]), step))
        self.histories.append((copy.deepcopy(history), state))


def run(
    step=one_step,
    *,
    count=3,
    max_steps=1000,
    evaluate=None,
    batches=None,
    per_epoch=BATCHES_PER_EPOCH,
    weight=0.0,
    **options,
):
    progress, saved = Silent(), Saved()
    outcome = fit(
        step,
        State({"weight": jnp.float32(weight)}),
        batches or (lambda step: jnp.float32(1)),
        evaluate or (lambda state: {"loss": 0.25, "accuracy": float(state.params["weight"]) / 100}),
        max_steps=min(count * per_epoch, max_steps),
        per_epoch=per_epoch,
        batch_size=BATCH_SIZE,
        progress=progress,
        save=saved,
        describe=lambda row: f"epoch {row.epoch}",
        **options,
    )
    return outcome, progress, saved


@pytest.fixture
def default_signals(monkeypatch):
    """Handle Ctrl-C as in a process just started from a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the loop must restore the handler"
    signal.signal(signal.SIGINT, before)


def test_every_epoch_is_trained_evaluated_and_saved():
    outcome, progress, saved = run()
    assert outcome.end == "finished"
    assert outcome.step == 60
    assert outcome.params["weight"] == 60
    assert saved.calls == [(1, 20.0, 20), (2, 40.0, 40), (3, 60.0, 60)]
    assert [row.epoch for row in outcome.rows] == [1, 2, 3]
    assert [row.validation_accuracy for row in outcome.rows] == pytest.approx([0.2, 0.4, 0.6])
    assert progress.lines == ["epoch 1", "epoch 2", "epoch 3"]
    assert progress.updates == [16, 20, 36, 40, 56, 60]


def test_training_numbers_are_means_over_the_epoch():
    outcome, _, _ = run()
    for row in outcome.rows:
        steps = range(row.step - BATCHES_PER_EPOCH, row.step)
        assert row.train_loss == pytest.approx(np.mean([1 / (1 + n) for n in steps]), rel=1e-5)
        assert row.train_accuracy == 0.5
        assert row.images_per_second == pytest.approx(BATCHES_PER_EPOCH * BATCH_SIZE / row.seconds)


@pytest.mark.parametrize("max_steps", [1, 19, 20, 21, 59])
def test_max_steps_ends_within_an_epoch_and_still_evaluates(max_steps):
    outcome, _, saved = run(max_steps=max_steps)
    assert outcome.end == "finished"
    assert outcome.step == max_steps == outcome.params["weight"]
    assert len(outcome.rows) == math.ceil(max_steps / BATCHES_PER_EPOCH)
    assert outcome.rows[-1].step == max_steps
    assert outcome.rows[-1].validation_loss == 0.25
    assert saved.calls[-1] == (len(outcome.rows), max_steps, max_steps)


def diverging(bad_step):
    """Return a step function that makes the parameters infinite at `bad_step`, so the next loss is not finite."""

    def step(state, batch):
        before = float(state.params["weight"])
        after = jnp.float32(math.inf if before + 1 == bad_step else before + 1)
        return State({"weight": after}), {"loss": before * 0 + 1.0, "accuracy": jnp.float32(0)}

    return step


@pytest.mark.parametrize("bad", [1, 2, 15, 16, 17, 30, 33, 40, 41, 58])
def test_a_loss_that_is_not_finite_is_named_and_good_parameters_survive(bad):
    outcome, _, saved = run(diverging(bad), evaluate=lambda state: {"loss": 1.0, "accuracy": 0.0})
    assert outcome.end == "diverged"
    assert outcome.bad_step == bad + 1
    assert outcome.bad_metric == "loss"
    assert math.isnan(outcome.bad_value)
    assert math.isfinite(outcome.params["weight"])
    assert outcome.params["weight"] == outcome.step < bad
    assert outcome.step >= bad - 2 * CHECK_EVERY  # few steps are lost
    assert len(outcome.rows) == len(saved.calls) == bad // BATCHES_PER_EPOCH


def test_parameters_spoiled_by_the_last_step_of_an_epoch_are_detected_by_its_evaluation():
    outcome, _, _ = run(diverging(20), evaluate=lambda state: {"loss": float(state.params["weight"]), "accuracy": 0.0})
    assert outcome.end == "diverged"
    assert outcome.bad_step == 20
    assert outcome.bad_metric == "validation loss"
    assert math.isfinite(outcome.params["weight"])
    assert outcome.rows == []


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_at(*steps):
    def step(state, batch):
        if int(state.params["weight"]) + 1 in steps:
            ctrl_c()
        return one_step(state, batch)

    return step


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("at", [1, 16, 20, 27, 60])
def test_ctrl_c_ends_after_the_current_step(at):
    outcome, _, saved = run(interrupted_at(at))
    assert outcome.end == "interrupted"
    assert outcome.step == at == outcome.params["weight"]
    assert outcome.rows[-1].step == at
    assert math.isnan(outcome.rows[-1].validation_loss)  # an interrupted run skips the evaluation
    assert len(saved.calls) == (at - 1) // BATCHES_PER_EPOCH + 1
    assert saved.calls[-1] == ((at - 1) // BATCHES_PER_EPOCH, at, at)  # a checkpoint, which the run resumes from


@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_while_evaluating_keeps_the_evaluation():
    def evaluate(state):
        ctrl_c()
        return {"loss": 0.5, "accuracy": 0.5}

    outcome, _, saved = run(evaluate=evaluate)
    assert outcome.end == "interrupted"
    assert outcome.step == BATCHES_PER_EPOCH
    assert [row.validation_loss for row in outcome.rows] == [0.5]
    assert len(saved.calls) == 1


@pytest.mark.usefixtures("default_signals")
def test_a_second_ctrl_c_does_not_wait():
    def step(state, batch):
        ctrl_c()
        ctrl_c()
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        run(step)


def test_a_process_that_ignores_ctrl_c_continues_to_ignore_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome, _, _ = run(interrupted_at(3))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.end == "finished"


def test_runs_in_another_thread():
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run()[0]))
    thread.start()
    thread.join()
    assert outcomes[0].end == "finished"


def test_batches_are_requested_by_step():
    requested = []

    def batches(step):
        requested.append(step)
        return jnp.float32(1)

    run(batches=batches, count=4, per_epoch=2)
    assert requested == list(range(8))


def test_the_next_batch_is_requested_before_the_loop_waits_for_a_step():
    events = []

    def batches(step):
        events.append(f"batch {step}")
        return jnp.float32(1)

    def step(state, batch):
        events.append("step")
        return one_step(state, batch)

    run(step, batches=batches, count=1, log=lambda records: events.append("wait"))
    assert events[:5] == ["batch 0", "step", "batch 1", "step", "batch 2"]
    assert events[events.index("wait") - 1] == "batch 16"
    assert events[-3:] == ["batch 19", "step", "wait"]


@pytest.mark.parametrize("at", [1, 5, 16, 20, 25, 40, 59])
@pytest.mark.usefixtures("default_signals")
def test_an_interrupted_loop_continues_where_it_was(at):
    """The losses have many digits, so another order of the sums would give other means."""

    def step(state, batch):
        state, metrics = one_step(state, batch)
        return state, {**metrics, "loss": np.float32(1) / (metrics["loss"] + np.float32(0.1))}

    def interrupted(state, batch):
        if int(state.params["weight"]) + 1 == at:
            ctrl_c()
        return step(state, batch)

    records = []
    whole, _, _ = run(step, log=records.extend)
    again = []
    first, _, saved = run(interrupted, log=again.extend)
    assert first.end == "interrupted"
    history, state = saved.histories[-1]
    start = {"first_step": first.step, "history": history, "weight": state.params["weight"]}
    rest, progress, _ = run(step, log=again.extend, **start)
    assert rest.end == "finished"
    assert again == records
    assert rest.step == whole.step == rest.params["weight"]
    for got, expected in zip(rest.rows, whole.rows, strict=True):
        times = {"seconds": 0.0, "images_per_second": 0.0}
        assert dataclasses.replace(got, **times) == dataclasses.replace(expected, **times)
    assert progress.lines == [f"epoch {n}" for n in range(1, 4)][(at - 1) // BATCHES_PER_EPOCH :]


def test_checkpoints_within_an_epoch():
    _, _, saved = run(save_every=8)
    assert [step for *_, step in saved.calls] == [8, 16, 20, 24, 32, 40, 48, 56, 60]
    assert [history.steps for history, _ in saved.histories] == [8, 16, 0, 4, 12, 0, 8, 16, 0]


def test_sigterm_ends_after_the_current_step():
    def step(state, batch):
        if int(state.params["weight"]) == 26:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step(state, batch)

    outcome, _, saved = run(step)
    assert (outcome.end, outcome.signal, outcome.step) == ("interrupted", signal.SIGTERM, 27)
    assert saved.calls[-1] == (1, 27.0, 27)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("name", ["accuracy", "gradient_norm"])
def test_every_metric_must_be_finite(name):
    def step(state, batch):
        bad = int(state.params["weight"]) == 4
        state, metrics = one_step(state, batch)
        return state, {**metrics, name: jnp.float32(math.inf if bad else 1)}

    outcome, _, _ = run(step)
    expected = ("diverged", 5, name.replace("_", " "), math.inf)
    assert (outcome.end, outcome.bad_step, outcome.bad_metric, outcome.bad_value) == expected
    outcome, _, _ = run(
        lambda state, batch: (one_step(state, batch)[0], {"loss": 1.0, "accuracy": 0.0, "norms": {"a": math.nan}})
    )
    assert outcome.bad_metric == "norm of a"


def test_steps_are_not_waited_for_one_by_one(monkeypatch):
    checks = []
    device_get = training_loop.jax.device_get
    monkeypatch.setattr(training_loop.jax, "device_get", lambda tree: checks.append(len(tree)) or device_get(tree))
    run(count=1, per_epoch=40)
    assert checks == [16, 16, 8]
