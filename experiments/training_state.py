"""Checkpoints of a training in progress: everything that the next step depends on, in Orbax's format.

A checkpoint is a folder `checkpoints/<step>` of the run. `state` has the parameters, the optimizer's state, the step
and the key; the position in the data is a function of the step. `checkpoint.json` has the metrics so far, the options
that the training depends on, and the SHA-256 of every file. The folder is written under another name and renamed, so a
process that is killed leaves the previous checkpoints as they were. Nothing in it is unpickled.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.errors import CheckpointError, WriteError, bad_value
from experiments.files import sync
from experiments.run_folder import History, best

FACTS = "checkpoint.json"
STATE = "state"

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every save


@dataclasses.dataclass(frozen=True)
class Restored:
    """A training state from a checkpoint, and the metrics up to its step."""

    path: Path
    step: int
    state: Any
    history: History


def save(folder: Path, state: Any, step: int, history: History, options: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step, and delete those that are no longer needed.

    The newest `keep` checkpoints are kept, and for each of them that of its best epoch.

    Args:
        folder: The folder of the run's checkpoints.
        state: The training state after `step` steps; a tree of arrays.
        step: Number of steps taken.
        history: The metrics so far.
        options: The options that the training depends on, as JSON values.
        keep: Number of checkpoints to keep, at least 1.

    Returns:
        The path of the checkpoint.

    Raises:
        WriteError: The checkpoint cannot be written. The others are unchanged.
    """
    path = folder / f"{step:08d}"
    staging = folder / f".{step:08d}.{uuid.uuid4().hex}"
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    try:
        staging.mkdir(parents=True)
        with _checkpointer() as checkpointer:
            checkpointer.save((staging / STATE).absolute(), leaves)
        facts = {
            "step": step,
            "best": _best_step(history),
            "history": history.as_json(),
            "options": dict(options),
            "leaves": {name: _kind(leaf) for name, leaf in leaves.items()},
            "files": _hashes(staging / STATE),
        }
        record = {"facts": facts, "sha256": _hash_of(facts)}
        (staging / FACTS).write_text(json.dumps(record, separators=(",", ":")), "utf-8")
        sync(staging / FACTS)
        if path.exists():  # of the same step, for example a corrupt one
            path.rename(staging.with_name(f"{staging.name}.old"))
        staging.rename(path)
        sync(folder)
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore raises the latter two, also for a full disk
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        hint = "the earlier checkpoints are unchanged"
        raise bad_value(WriteError, path, "writable", reason, hint) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(staging.with_name(f"{staging.name}.old"), ignore_errors=True)
    _prune(folder, keep)
    return path


def restore_newest(folder: Path, like: Any, options: Mapping[str, Any]) -> Restored | None:
    """Return the newest intact checkpoint, or None if there are no checkpoints.

    For each newer one that is damaged, a warning is printed on stderr.

    Args:
        folder: The folder of the run's checkpoints.
        like: A training state of the expected tree, shapes and dtypes.
        options: The options that the training depends on; those of the checkpoint must be equal.

    Raises:
        CheckpointError: No checkpoint is intact, or the newest one is of a training with other options or leaves.
    """
    for path in folder.glob(".*"):  # what a process that was killed left while it saved
        shutil.rmtree(path, ignore_errors=True)
    paths = list_checkpoints(folder)
    error: CheckpointError | None = None
    for path in paths:
        try:
            facts = verify(path)
        except CheckpointError as caught:
            error = caught
            print(f"warning: {caught}; the checkpoint before it is used", file=sys.stderr, flush=True)
            continue
        _compare(path, "option", options, facts["options"])
        expected = {name: _kind(leaf) for name, leaf in named_leaves(like).items()}
        _compare(path, "array", expected, facts["leaves"])
        return Restored(path, facts["step"], load(path, like), History.from_json(facts["history"]))
    if error is not None:
        raise CheckpointError(f"{folder}: must contain an intact checkpoint, got {len(paths)} damaged ones")
    return None


def load(path: Path, like: Any) -> Any:
    """Return the training state of a verified checkpoint, as a tree like `like`."""
    names = named_leaves(like)
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in names.items()}
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    try:
        with _checkpointer() as checkpointer:
            arguments = ocp.args.PyTreeRestore(item=target, restore_args=as_numpy)
            leaves = checkpointer.restore((path / STATE).absolute(), args=arguments)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise bad_value(CheckpointError, path, "an intact checkpoint", " ".join(str(error).split())) from error
    # A copy, because a step donates its state, and JAX may share the memory of a NumPy array.
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.array(leaves[name], copy=True) for name in names])


def _checkpointer() -> ocp.Checkpointer:
    """Return a checkpointer of this process only; by default Orbax waits for all processes."""
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(own, {own}, f"process{own}")
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first."""
    return sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda p: int(p.name), reverse=True)


def verify(path: Path) -> dict[str, Any]:
    """Return the facts of a checkpoint; raise CheckpointError unless every byte is as it was saved."""
    expected = "an intact checkpoint"
    try:
        record = json.loads((path / FACTS).read_text("utf-8"))
    except OSError as error:
        raise bad_value(CheckpointError, path / FACTS, expected, error.strerror) from None
    except ValueError as error:
        got = f"invalid JSON ({error})" if (path / FACTS).stat().st_size else "an empty file"
        raise bad_value(CheckpointError, path / FACTS, expected, got) from None
    facts = record.get("facts") if isinstance(record, dict) else None
    if not isinstance(facts, dict) or record.get("sha256") != _hash_of(facts):
        raise bad_value(CheckpointError, path / FACTS, expected, "other contents than were saved")
    files = _hashes(path / STATE)
    for name, digest in facts["files"].items():
        if name not in files:
            raise bad_value(CheckpointError, path / STATE / name, expected, "no such file")
        if files[name] != digest:
            size = (path / STATE / name).stat().st_size
            got = f"{size} bytes, which are not those that were saved" if size else "an empty file"
            raise bad_value(CheckpointError, path / STATE / name, expected, got)
    if extra := sorted(set(files) - set(facts["files"])):
        raise bad_value(CheckpointError, path / STATE / extra[0], "absent", "a file that was not saved")
    return facts


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return {"params.conv1.weight": leaf, …}, in the order of the tree."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} {tuple(leaf.shape)}"


def _best_step(history: History) -> int | None:
    row = best(history.epochs)
    return None if row is None else row.step


def _hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _hash_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _compare(path: Path, what: str, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Raise CheckpointError for the first name whose value differs."""
    for name in (*expected, *got):
        wanted, found = expected.get(name, "absent"), got.get(name, f"no such {what}")
        if wanted != found:
            raise bad_value(CheckpointError, f"{path}: {name}", str(wanted), found)


def _prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` ones and the best epoch of each."""
    paths = list_checkpoints(folder)
    needed = {path.name for path in paths[:keep]}
    for path in paths[:keep]:
        try:
            best_step = json.loads((path / FACTS).read_text("utf-8"))["facts"]["best"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if best_step is not None:
            needed.add(f"{best_step:08d}")
    for path in paths:
        if path.name not in needed:
            # Renamed first, so that a process that is killed here leaves no checkpoint without some of its files.
            doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                path.rename(doomed)
            except OSError:
                continue
            shutil.rmtree(doomed, ignore_errors=True)
