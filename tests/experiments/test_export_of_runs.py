"""Exports of a run: each format is read by its own library, and gives the logits of the net."""

import json

import jax
import jax.export
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import jaxcnn
from experiments import checkpoints, errors, export, torch_source
from experiments.restore import restore
from tests.run_folder import untrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained("lenet5", tmp_path_factory.mktemp("runs") / "lenet5")


@pytest.fixture(scope="module")
def expected(run):
    """Return images of the test set, and their logits."""
    trained = restore(run)
    x = trained.dataset.test_images[:5]
    return x, np.asarray(trained.net.apply(trained.params, x))


def main(*argv):
    return export.main([str(arg) for arg in argv])


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def channels_first(x):
    return torch.tensor(np.moveaxis(x, -1, 1))


@pytest.mark.slow("compiles")
def test_every_format_gives_the_logits_of_the_net(run, expected, tmp_path, capsys):
    pytest.importorskip("flatbuffers", reason="jax.export writes bytes with it")
    assert main(run, "--format", "safetensors", "npz", "stablehlo", "pytorch", "--out", tmp_path / "new" / "out") == 0
    out, (x, logits) = tmp_path / "new" / "out", expected
    names = ["net.safetensors", "net.npz", "net.jax_export", "net.mlirbc", "net_pytorch.py", "net_pytorch.safetensors"]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    trained = restore(run)
    ours = checkpoints.flatten(trained.params)
    with safe_open(out / "net.safetensors", "numpy") as file:
        metadata = file.metadata()
        assert {name: file.get_tensor(name).tobytes() for name in file.keys()} == {  # noqa: SIM118
            name: a.tobytes() for name, a in ours.items()
        }
    assert json.loads(metadata["config"])["model"] == "lenet5"
    assert json.loads(metadata["image_shape"]) == [28, 28, 1]
    assert tuple(json.loads(metadata["class_names"])) == trained.dataset.class_names
    with np.load(out / "net.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {*ours, *metadata}
        assert str(arrays["config"]) == metadata["config"]
    program = jax.export.deserialize(bytearray((out / "net.jax_export").read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    for batch in (1, 2, 5):
        assert_close(program.call(x[:batch]), logits[:batch])
    assert (out / "net.mlirbc").read_bytes() == program.mlir_module_serialized
    module = export.load_source(out / "net_pytorch.py")
    assert trained.dataset.class_names == module.CLASSES
    with torch.no_grad():
        assert_close(module.load()(channels_first(x)).numpy(), logits)


@pytest.mark.slow("compiles")
def test_onnx(run, expected, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    assert main(run, "--format", "onnx", "--out", tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    x, logits = expected
    for batch in (1, 5):
        assert_close(session.run(None, {"images": channels_first(x[:batch]).numpy()})[0], logits[:batch])


@pytest.mark.slow("compiles")
def test_a_state_dict_of_pytorch_is_imported(run, tmp_path):
    """A sequential net of PyTorch with torchvision's names becomes a net of jaxcnn with the same logits."""
    features = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2))
    )
    classifier = nn.Sequential(nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10))
    net = nn.ModuleDict({"features": features, "classifier": classifier})
    save_file(net.state_dict(), tmp_path / "theirs.safetensors")
    assert main(run, "--from-pytorch", tmp_path / "theirs.safetensors", "--format", "safetensors", "pytorch") == 0
    trained = restore(run)
    params = checkpoints.load(run / "export" / "net.safetensors", trained.params)
    x = trained.dataset.test_images[:3]
    with torch.no_grad():
        theirs = classifier(features(channels_first(x)).flatten(1)).numpy()
    assert_close(trained.net.apply(params, x), theirs)
    # And with our names, there and back.
    assert main(run, "--from-pytorch", run / "export" / "net_pytorch.safetensors", "--out", tmp_path / "back") == 0
    again = checkpoints.load(tmp_path / "back" / "net.safetensors", trained.params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


LAYERS = {
    "padding": (jaxcnn.Conv(4, 3, 2, "SAME"), jaxcnn.LeakyRelu(0.2), jaxcnn.Conv(3, 2, padding=((0, 1), (2, 1)))),
    "groups": (jaxcnn.Conv(6, 3, dilation=2, groups=3, bias=False), jaxcnn.Gelu(), jaxcnn.DepthwiseConv(2, 2)),
    "transposed": (jaxcnn.ConvTranspose(4, 3, 2, 1, 1), jaxcnn.Elu(0.5), jaxcnn.MaxPool(3, 2, "SAME")),
    "hidden": (jaxcnn.HiddenLayer(4, 3, padding="SAME"), jaxcnn.Flatten(), jaxcnn.Dropout(0.5), jaxcnn.Dense(3)),
    "norms": (jaxcnn.BatchNorm(), jaxcnn.LayerNorm(), jaxcnn.GroupNorm(3), jaxcnn.Relu6()),
    "pools": (jaxcnn.AvgPool(2, padding="SAME"), jaxcnn.AvgPool(2, 1, 1, False), jaxcnn.MaxPool(2, ceil_mode=True)),
    "adaptive": (jaxcnn.AdaptiveAvgPool(3), jaxcnn.AdaptiveMaxPool((2, 1)), jaxcnn.HardSwish(), jaxcnn.GlobalMaxPool()),
    "features": (jaxcnn.GlobalAvgPool(), jaxcnn.Dense(4, bias=False), jaxcnn.LayerNorm(), jaxcnn.Selu()),
    "nested": (
        jaxcnn.residual(jaxcnn.Conv(3, 3, padding="SAME"), jaxcnn.Silu()),
        jaxcnn.branches(jaxcnn.serial(jaxcnn.Conv(2, 1), jaxcnn.Mish()), jaxcnn.Conv(2, 3, padding="SAME"), join="add"),
        jaxcnn.branches(jaxcnn.Conv(1, 1), jaxcnn.Softplus()),
    ),
}


def prepared(*layers, shape=(7, 6, 3)):
    """Return a net, its parameters away from the initial zeros and ones, and images."""
    rng = np.random.default_rng(0)
    net = jaxcnn.serial(*layers)
    x = rng.standard_normal((4, *shape)).astype(np.float32)
    params = net.init(jax.random.key(0), shape)
    params = jax.tree.map(lambda a: np.asarray(a + 0.1 * rng.standard_normal(a.shape).astype(np.float32)), params)
    return net, jax.tree.map(np.asarray, jaxcnn.calibrate(net, params, [(x, np.zeros(4))])), x


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_pytorch(tmp_path, name):
    net, params, x = prepared(*LAYERS[name])
    source = torch_source.convert(net, params, x.shape[1:], name, ("a", "b"))
    path = tmp_path / "module.py"
    path.write_text(source.text, "utf-8")
    tensors = source.tensors(params)
    save_file({key: torch.tensor(a) for key, a in tensors.items()}, tmp_path / "module.safetensors")
    with torch.no_grad():
        y = export.load_source(path).load()(channels_first(x)).numpy()
    y = np.moveaxis(y, 1, -1) if y.ndim == 4 else y
    np.testing.assert_allclose(y, net.apply(params, x), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, source.params(tensors, params, "file"), params)


@pytest.mark.parametrize(
    ("layers", "got"),
    [
        ([jaxcnn.LpPool(2)], r"lp_pool1: .*LpPool\("),
        ([lambda x: x + 1], "layer .*: .*Function"),
        ([jaxcnn.Flatten()], "flatten1: .*Flatten at the end"),
        ([jaxcnn.Flatten(), jaxcnn.LayerNorm()], "layer_norm1: .*LayerNorm of flattened images"),
        ([jaxcnn.Conv(2, 3, padding="CIRCULAR")], "conv1: .*padding 'CIRCULAR'"),
        ([jaxcnn.BatchNorm(scale=False)], "batch_norm1: .*only one of scale and bias"),
        ([jaxcnn.AvgPool(2, divisor=2.5)], "avg_pool1: .*divisor 2.5"),
    ],
)
def test_layers_that_pytorch_does_not_have(layers, got):
    net, params, x = prepared(*layers)
    with pytest.raises(errors.UsageError, match=f"{got}"):
        torch_source.convert(net, params, x.shape[1:], "net", ())


def test_wrong_options_and_state_dicts(run, tmp_path, monkeypatch, capsys):
    def fails(status, expected, *argv):
        assert main(*argv) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert expected in line
        assert not (run / "nothing").exists()

    out = ("--out", run / "nothing")
    fails(
        2, "--format: must be one of safetensors, npz, stablehlo, pytorch, onnx, got 'keras'", run, "--format", "keras"
    )
    fails(1, "none: must be the folder of a run, got no such folder", tmp_path / "none")
    fails(1, "config.json: must be the config of a run", tmp_path)
    pt = tmp_path / "net.pt"
    fails(2, f"--from-pytorch: must be a file *.safetensors, got {pt}; save it", run, "--from-pytorch", pt, *out)
    file = tmp_path / "a.safetensors"
    fails(1, "a.safetensors: must be a safetensors file, got no such file", run, "--from-pytorch", file, *out)
    file.write_bytes(b"pickle")
    fails(1, "a.safetensors: must be an intact safetensors file", run, "--from-pytorch", file, *out)
    tensors = {"conv1.weight": torch.zeros(6, 1, 3, 3)}
    save_file(tensors, file)
    fails(
        *(1, "conv1.weight: must be float32 (6, 1, 5, 5), got float32 (6, 1, 3, 3)", run, "--from-pytorch", file, *out)
    )
    (tmp_path / "blocked").write_text("")
    fails(1, "--out: must be a folder that can be created", run, "--out", tmp_path / "blocked" / "x")
    monkeypatch.setattr(errors, "is_installed", lambda package: package not in ("flatbuffers", "torch"))
    expected = "needs the package flatbuffers, which is not installed: pip install 'jaxcnn[export]'"
    fails(2, expected, run, "--format", "stablehlo", *out)
    expected = "needs the package torch, which is not installed: pip install 'jaxcnn[bench]'"
    fails(2, expected, run, "--format", "pytorch", *out)


def test_an_export_that_computes_something_else_is_not_written(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch_source, "_first", lambda a: a[::-1].transpose(3, 2, 0, 1))
    assert main(run, "--format", "pytorch", "--out", tmp_path / "out") == 1
    line = capsys.readouterr().err
    assert "net_pytorch.py: must be the logits of the net up to" in line
    assert list((tmp_path / "out").iterdir()) == []
