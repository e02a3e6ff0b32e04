"""Event files: what TensorBoard reads is what the run measured."""

import math
import struct

import pytest

from experiments import errors, event_files, train
from experiments.run_folder import Epoch


def read(folder):
    """Return {name: [(step, value), …]} of the event files in a folder, and the steps from which a restart counts."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, restarts = {}, []
    for path in sorted((folder / event_files.FOLDER).iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.HasField("session_log"):
                restarts.append(event.step)
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars, restarts


def test_events(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    events = event_files.EventFiles(tmp_path, 0)
    norms = {"gradient_norm": 4.0, "delta_norms": {"conv1": 0.5}}
    events.log([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, **norms}])
    events.end_epoch(Epoch(1, 2, 1.75, 0.25, 1.25, math.nan, 1.0, 64.0))
    events.close()
    scalars, restarts = read(tmp_path)
    assert restarts == []
    assert scalars["loss"] == [(1, 2.0), (2, 1.5)]
    assert scalars["gradient_norm"] == [(2, 4.0)]
    assert scalars["delta_norms/conv1"] == [(2, 0.5)]
    assert scalars["loss_by_epoch/train"] == [(2, 1.75)]
    assert scalars["loss_by_epoch/validation"] == [(2, 1.25)]
    assert scalars["images_per_second"] == [(2, 64.0)]
    assert "step" not in scalars
    event_files.EventFiles(tmp_path, 2).close()
    assert read(tmp_path)[1] == [3]


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "is_installed", lambda package: package != "tensorboardX")
    assert train.main(["--tensorboard", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "python -m experiments.train: needs the package tensorboardX, which is not installed: "
        "pip install 'jaxcnn[tensorboard]'\n"
    )
    assert not (tmp_path / "run").exists()
