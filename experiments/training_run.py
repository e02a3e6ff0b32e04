"""One training, from its start or resumption to its results; `experiments.train` has its options."""

import dataclasses
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from experiments import (
    augmentation,
    checkpoints,
    cli,
    event_files,
    gradients,
    own_nets,
    private,
    processes,
    recipe,
    report,
    terminal,
    training_loop,
    training_state,
    watch,
)
from experiments.data import Batches, split, training_batches
from experiments.dataset import Batch, Dataset, scaled
from experiments.devices import Placement
from experiments.errors import CheckpointError, DataError, RunError, WriteError, bad_value, explain
from experiments.evaluation import Evaluation
from experiments.private import Mechanism, PoissonBatches
from experiments.restore import Trained, read_config
from experiments.run_folder import TRAIN, Epoch, History, Run, best, curves_title, finite_or_none
from experiments.tasks import task_of
from experiments.training_loop import Metrics, Outcome, Step
from jaxcnn import Serial, TrainState

if TYPE_CHECKING:
    from experiments.train import Config


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is trained, on what, and where its results go."""

    config: "Config"
    net: Serial
    dataset: Dataset
    run: Run
    """Destination of the results; its folder exists."""
    steps: int
    """Total number of steps."""
    record: Mapping[str, Any]
    """Initial contents of config.json. At the end, the outcome of the run is added."""
    options: Mapping[str, Any]
    """The options that a checkpoint depends on."""
    placement: Placement
    """Where to put the state and the batches."""
    mechanism: Mechanism | None = None
    """The numbers on which ε depends, or None if the training is not private."""


class Training:
    """The parts of a training, and the files that it writes in the course of its steps."""

    def __init__(self, plan: Plan) -> None:
        config, dataset, mechanism = plan.config, plan.dataset, plan.mechanism
        self.plan, self.first = plan, processes.index() == 0
        chosen, self.held_out = split(config, dataset, config.seed)
        self.batches = _batches(plan, chosen)
        of_optimizer = config if mechanism is None else dataclasses.replace(config, clip_norm=0.0)
        self.optimizer = recipe.make_optimizer(of_optimizer, plan.steps, self.batches.per_epoch, plan.net)
        task = task_of(dataset)
        self.loss = task.loss(config.label_smoothing)
        self.evaluation = Evaluation(
            plan.net, task, config, dataset.train_pixels[chosen], dataset.largest, plan.placement
        )
        self.checkpoints = plan.run.folder / "checkpoints"
        self.in_weights = plan.record if mechanism is None else private.public(plan.record)
        self._events: event_files.EventFiles | None = None

    def start(self) -> tuple[TrainState, int, History]:
        """Return the initial state on the devices, or that of the run to resume, its step, and its metrics.

        Raises:
            CheckpointError: The run to resume is damaged, or its data have changed.
        """
        plan, config = self.plan, self.plan.config
        state = TrainState.create(plan.net, self.optimizer, jax.random.key(config.seed), plan.dataset.image_shape)
        if plan.mechanism is not None:
            state = dataclasses.replace(state, key=private.secret_key())
        step, history = 0, History()
        if config.resume is not None:
            state, step, history = self._resume(state)
        state = plan.placement.replicate(processes.from_first(state))
        if isinstance(self.batches, PoissonBatches):
            self.batches.draw_from(state.key)
        return state, step, history

    def _resume(self, state: TrainState) -> tuple[TrainState, int, History]:
        """Return the state of the newest checkpoint, or the initial `state`, and remove the metrics after its step."""
        plan, step, history = self.plan, 0, History()
        check_data(plan.run, plan.dataset)
        restored = training_state.restore_newest(self.checkpoints, state, plan.options) if self.first else None
        if restored is not None:
            state, step, history = restored.state, restored.step, restored.history
        step = int(processes.from_first(np.int64(step)))
        history = History.from_json(json.loads(processes.text_from_first(json.dumps(history.as_json()))))
        print(f"resumed after step {step} of {plan.steps}", flush=True)
        plan.run.rewind(history, step)
        plan.run.describe(plan.record)
        plan.run.add_environment(terminal.environment())
        return state, step, history

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0, on the devices."""
        plan, names = self.plan, self.plan.config.augment
        plain = plan.placement.join(self.batches(step))
        if not names:
            return plain
        classes, largest = len(plan.dataset.class_names), plan.dataset.largest
        return plan.placement.join(augmentation.augmented(names, plan.config.seed, step, plain, classes, largest))

    def check_gradients(self, state: TrainState, step: int) -> None:
        """Raise RunError if the rules differ from autodiff on the batch of a step."""
        plan = self.plan
        loss = self.loss if plan.mechanism is None else private.masked(self.loss)
        images, targets = self.batch(step % plan.steps)
        gradients.check(plan.net, loss, state.params, (scaled(images, plan.dataset.largest), targets), state.key)

    def validate(self, state: TrainState) -> dict[str, float]:
        """Return the validation metrics."""
        dataset = self.plan.dataset
        images, labels = dataset.train_pixels[self.held_out], dataset.train_labels[self.held_out]
        return self.evaluation.evaluate(self.evaluation.params(state), images, labels)

    def open_event_files(self, step: int) -> None:
        """Write the metrics after `step` for TensorBoard as well, if that is requested."""
        if self.plan.config.tensorboard and self.first:
            self._events = event_files.EventFiles(self.plan.run.folder, step)

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the metrics of some steps."""
        mechanism = self.plan.mechanism
        if mechanism is not None and self.first:
            records = mechanism.logged(records, self.batches.per_epoch, self.plan.steps)
        self.plan.run.log(records)
        if self._events is not None:
            self._events.log(records)

    def describe_epoch(self, row: Epoch) -> str:
        """Return the line that is printed for an epoch."""
        mechanism = self.plan.mechanism
        spent = f"   ε {mechanism.epsilon(row.step):.2f}" if mechanism is not None and self.first else ""
        return terminal.describe_epoch(row, self.plan.config.epochs) + spent

    def save(self, state: TrainState, step: int, history: History) -> None:
        """Write the metrics, a checkpoint, and the weights unless an earlier epoch is better."""
        run = self.plan.run
        if self._events is not None and history.epochs and history.epochs[-1].step == step:
            self._events.end_epoch(history.epochs[-1])
        row = best(history.epochs)
        if row is None or row.step == step:
            run.save(history.epochs, self.evaluation.params(state), step, self.in_weights)
        else:
            run.save_metrics(history.epochs)
        if self.first:
            training_state.save(self.checkpoints, state, step, history, self.plan.options, self.plan.config.keep)

    def finish(self, outcome: Outcome) -> dict[str, float] | None:
        """Write the results, and return the test metrics, or None if the run has not finished."""
        plan, run, dataset = self.plan, self.plan.run, self.plan.dataset
        row = best(outcome.history.epochs)
        if row is None:
            run.save(outcome.rows, self.evaluation.params(outcome.state), outcome.step, self.in_weights)
        end: dict[str, Any] = {"end": outcome.end, "steps": outcome.step}
        if plan.mechanism is not None:
            end["privacy"] = plan.mechanism.as_json(outcome.step)
        tested: dict[str, float] | None = None
        if outcome.end == "finished":
            best_step = outcome.step if row is None else row.step
            params = self._best_params(best_step, outcome)
            tested = self.evaluation.evaluate(params, dataset.test_pixels, dataset.test_labels)
            run.save(outcome.rows, params, best_step, self.in_weights)
            end |= {"best_step": best_step} | {f"test_{name}": finite_or_none(x) for name, x in tested.items()}
        run.save_metrics(outcome.rows)
        run.describe({**plan.record, **end})
        return tested

    def _best_params(self, step: int, outcome: Outcome) -> Any:
        """Return the parameters to evaluate after `step`: of the end, the weights file, or a checkpoint."""
        run, params = self.plan.run, self.evaluation.params(outcome.state)
        if step == outcome.step:
            return params
        # One process reads the file; then all processes make the same calls.
        if processes.from_first(np.bool_(self.first and run.saved_step() == step)):
            return processes.from_first(checkpoints.load(run.weights, params) if self.first else params)
        path, state = self.checkpoints / f"{step:08d}", outcome.state
        if self.first:
            training_state.verify(path)
            state = training_state.load(path, state)
        return self.evaluation.params(self.plan.placement.replicate(processes.from_first(state)))

    def draw(self, outcome: Outcome) -> None:
        """Write curves.png and report.html. If that fails, print the reason; the training has ended as it did."""
        run, config = self.plan.run, self.plan.config
        try:
            run.plot(outcome.rows, curves_title(self.plan.record))
            # A process that is terminated has little time.
            if config.report and self.first and outcome.end != "interrupted":
                self._write_report()
        except Exception as error:
            reason = explain(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"
            line = f"the report was not written ({reason}); to write it: {run.report_command}"
            print(f"{TRAIN}: {line}", file=sys.stderr)

    def _write_report(self) -> None:
        plan = self.plan
        like = own_nets.evaluated_shapes(plan.net, plan.dataset.image_shape)
        params = checkpoints.load(plan.run.weights, like)
        model, flip_test, inputs = plan.config.model, plan.config.flip_test, plan.dataset.inputs
        report.write(plan.run.folder, Trained(model, plan.net, params, inputs, flip_test, plan.dataset))

    def where(self, outcome: Outcome) -> str:
        """Return a description of the layer in which the first number was not finite, or ""."""
        plan = self.plan
        if plan.mechanism is not None:
            return ""
        dtype, largest = plan.config.dtype, plan.dataset.largest
        layers = watch.make_step(plan.net, self.loss, self.optimizer, by_layer=True, dtype=dtype, largest=largest)
        return watch.locate(plan.net, layers, outcome.state, self.batch, outcome.step, outcome.bad_step)


def _batches(plan: Plan, chosen: np.ndarray) -> Batches | PoissonBatches:
    """Return the batches of the training images `chosen`."""
    config, dataset, placement = plan.config, plan.dataset, plan.placement
    if plan.mechanism is None:
        part = placement.part(config.batch_size)
        return training_batches(dataset, chosen, config.batch_size, seed=config.seed, part=part)
    images, part = (dataset.train_pixels, dataset.train_labels), placement.part(plan.mechanism.capacity)
    return PoissonBatches(*images, chosen, plan.mechanism, part)


def fit(plan: Plan) -> int:
    """Compile, train, and save the results.

    Returns:
        0, or 128 + the number of the signal that ended the run.

    Raises:
        RunError: The gradients differ, a metric is not finite, or a file cannot be written.
        CheckpointError: The run to resume is damaged, or its data have changed.
    """
    config, run = plan.config, plan.run
    training = Training(plan)
    state, first_step, history = training.start()
    if config.check_grads:
        training.check_gradients(state, first_step)
    step = compiled_step(training, state, first_step)
    training.open_event_files(first_step)
    processes.continue_with(run.resume_command)
    try:
        began = time.perf_counter()
        with terminal.progress(plan.steps) as progress:
            outcome = training_loop.fit(
                step,
                state,
                training.batch,
                training.validate if len(training.held_out) else None,
                max_steps=plan.steps,
                per_epoch=training.batches.per_epoch,
                batch_size=config.batch_size,
                progress=progress,
                save=training.save,
                describe=training.describe_epoch,
                log=training.log,
                save_every=config.save_every,
                first_step=first_step,
                history=history,
                agree=processes.largest if processes.count() > 1 else None,
            )
        wall = time.perf_counter() - began
        tested = training.finish(outcome)
        spent = [] if plan.mechanism is None else [plan.mechanism.describe(outcome.step)]
        text = terminal.summarize(outcome.rows, first_step, wall, tested)
        print(text, *spent, f"results in {run.folder}", sep="\n", flush=True)
    except KeyboardInterrupt:  # a second Ctrl-C, which does not wait for the current step
        print(f"{TRAIN}: interrupted; {run.saved_weights()}; to continue: {run.resume_command}", file=sys.stderr)
        return cli.INTERRUPTED
    except BrokenPipeError:
        raise
    except (OSError, WriteError, DataError) as error:
        hint = f"{run.saved_weights()}; to continue: {run.resume_command}"
        raise RunError(f"{explain(error)}; {hint}") from error
    training.draw(outcome)
    return _status(training, outcome, tested)


def _status(training: Training, outcome: Outcome, tested: Mapping[str, float] | None) -> int:
    """Return the exit status of a training that has ended; raise RunError for a number that is not finite."""
    run = training.plan.run
    if outcome.end == "diverged":
        rate, where = training.plan.record["learning_rate"], training.where(outcome)
        hint = f"try a --learning-rate below {rate:g}; the weights after step {run.saved_step()} are saved"
        name = f"{outcome.bad_metric} of step {outcome.bad_step}"
        raise bad_value(RunError, name, "finite", outcome.bad_value, hint + (f"; {where}" if where else ""))
    if outcome.end == "interrupted":
        verb = "interrupted" if outcome.signal == signal.SIGINT else "terminated"
        line = f"{verb} after step {outcome.step}; its checkpoint is saved; to continue: {run.resume_command}"
        print(f"{TRAIN}: {line}", file=sys.stderr)
        return 128 + outcome.signal
    if tested is not None and not math.isfinite(tested["loss"]):
        raise bad_value(RunError, "test loss", "finite", tested["loss"])
    return 0


def check_data(run: Run, dataset: Dataset) -> None:
    """Raise CheckpointError if the images are not those that the run has started with."""
    expected = read_config(run)["data_sha256"]
    if dataset.sha256 != expected:
        name = f"data of {run.folder}"
        raise bad_value(CheckpointError, name, f"the set with SHA-256 {expected}", dataset.sha256)


def compiled_step(training: Training, state: TrainState, first_step: int) -> Step:
    """Compile the steps, and return a function that measures norms by layer in every `config.norms_every`-th one."""
    plan, config, largest = training.plan, training.plan.config, training.plan.dataset.largest
    # Norms by layer need the activations of the whole batch.
    every = config.norms_every if plan.mechanism is None and config.microbatch is None else 0
    parts, batch = (plan.net, training.loss, training.optimizer), training.batch(0)
    # Before the first step, so that compile time is reported separately from training time.
    print("compiling … ", end="", flush=True)
    began = time.perf_counter()
    make_step = functools.partial(watch.make_step, *parts, dtype=config.dtype, largest=largest)
    if plan.mechanism is None:
        step_without_norms = make_step(by_layer=False, microbatch=config.microbatch)
    else:
        step_without_norms = private.make_step(*parts, config.clip_norm, plan.mechanism, largest)
    plain = by_layer = _compiled(step_without_norms, state, batch)
    if every and first_step // every != plan.steps // every:
        by_layer = _compiled(make_step(by_layer=True), state, batch)
    print(f"{time.perf_counter() - began:.1f} s", flush=True)
    taken = first_step

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal taken
        taken += 1
        return (by_layer if every and taken % every == 0 else plain)(state, batch)

    return step


def _compiled(jitted: Step, state: TrainState, batch: Batch) -> Step:
    """Compile a jitted step before its first call."""
    return cast(jax.stages.Wrapped, jitted).lower(state, batch).compile()
