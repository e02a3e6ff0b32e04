"""Export the net of a run to other formats: python -m experiments.export --help."""

import dataclasses
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from experiments import checkpoints, cli
from experiments.errors import CheckpointError, RunError, UsageError, bad_value, check_installed
from experiments.files import replacing
from experiments.restore import TrainedNet, read_config, restore_net
from experiments.run_folder import Run, as_json, check_run

if TYPE_CHECKING:
    from experiments.torch_source import Source

PROG = "python -m experiments.export"
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "safetensors": (),
    "npz": (),
    "stablehlo": ("flatbuffers",),
    "pytorch": ("torch",),
    "onnx": ("torch", "onnx", "onnxscript", "onnxruntime"),
}
"""The formats, and the packages that each needs in addition to the extra `experiments`."""
BATCHES = (1, 3)
"""Numbers of images with which an export is run and compared."""
TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest logit."""
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Config:
    """Write the net of a run in other formats. Each file is read again and compared before it gets its name.

    safetensors: net.safetensors, the parameters by name with the config in the metadata.
    npz: net.npz, the same for numpy.load.
    stablehlo: net.jax_export for jax.export.deserialize, and net.mlirbc, its StableHLO; any batch size.
    pytorch: net_pytorch.safetensors, a state dict, and net_pytorch.py, which builds the net and loads it.
    onnx: net.onnx, made by torch.onnx from the net in PyTorch; any batch size.

    The outputs are those of the net for one image, also if the run averages over flips (--flip-test).
    """

    run: Positional[Path]
    """Folder of the run."""
    format: tuple[str, ...] = ("safetensors",)
    """One or more of safetensors, npz, stablehlo, pytorch, onnx."""
    from_pytorch: Annotated[Path | None, arg(metavar="FILE")] = None
    """A state dict of the same net, as safetensors, whose weights are exported instead of those of the run."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder of the files; if omitted, export in the folder of the run. Files of the same names are replaced."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, export, argv, prog=PROG)


def export(config: Config) -> int:
    """Write the files and print their paths; raise UsageError, CheckpointError, DataError or RunError."""
    for name in config.format:
        cli.check_choice("--format", name, PACKAGES)
        check_installed(*PACKAGES[name])
    if not config.format:
        raise bad_value(UsageError, "--format", f"one or more of {', '.join(PACKAGES)}", "none")
    if config.from_pytorch is not None and config.from_pytorch.suffix != ".safetensors":
        hint = "save it with safetensors.torch.save_file(net.state_dict(), …), because pickled files are never read"
        raise bad_value(UsageError, "--from-pytorch", "a file *.safetensors", config.from_pytorch, hint)
    check_run(config.run, config.run, CheckpointError)
    described = read_config(Run(config.run))
    trained = restore_net(config.run)
    if {"pytorch", "onnx"} & set(config.format) or config.from_pytorch is not None:
        from experiments.own_nets import check_layers

        check_layers(trained.net, str(config.run), "the run of a net of jaxcnn for PyTorch and ONNX")
    if config.from_pytorch is not None:
        trained = dataclasses.replace(trained, params=import_state_dict(config.from_pytorch, trained))
        described = {**described, "weights_from": str(config.from_pytorch.absolute())}
    out = config.run / "export" if config.out is None else config.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_value(RunError, "--out", "a folder that can be created", f"{error.strerror}: {out}") from error
    metadata = {
        "config": as_json(described),
        "class_names": json.dumps(trained.inputs.class_names, ensure_ascii=False),
        "image_shape": json.dumps(trained.inputs.image_shape),
    }
    for name in dict.fromkeys(config.format):
        for path in WRITERS[name](out, trained, metadata):
            print(f"{name:<12} {path}  {path.stat().st_size:,} bytes", flush=True)
    return 0


def _safetensors(out: Path, trained: TrainedNet, metadata: Mapping[str, str]) -> list[Path]:
    path = out / "net.safetensors"
    with replacing(path) as temporary:
        checkpoints.save(temporary, trained.params, metadata)
        _check_equal(path, checkpoints.read(temporary), trained)
    return [path]


def _npz(out: Path, trained: TrainedNet, metadata: Mapping[str, str]) -> list[Path]:
    path = out / "net.npz"
    arrays = checkpoints.flatten(trained.params)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, **{**arrays, **{name: np.array(text) for name, text in metadata.items()}})  # type: ignore[arg-type]
        with np.load(temporary, allow_pickle=False) as written:
            _check_equal(path, written, trained)
    return [path]


def _check_equal(path: Path, written: Mapping[str, np.ndarray], trained: TrainedNet) -> None:
    for name, array in checkpoints.flatten(trained.params).items():
        if not np.array_equal(written[name], array):
            raise bad_value(RunError, f"{path}: {name}", "the array that was written", "another one")


def _stablehlo(out: Path, trained: TrainedNet, metadata: Mapping[str, str]) -> list[Path]:
    import jax
    import jax.export

    net, params = trained.net, jax.tree.map(np.asarray, trained.params)
    (n,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *trained.inputs.image_shape), np.float32)
    exported = jax.export.export(jax.jit(lambda x: net.apply(params, x)), platforms=PLATFORMS)(images)
    paths = [out / "net.jax_export", out / "net.mlirbc"]
    with replacing(paths[0]) as temporary, replacing(paths[1]) as program:
        temporary.write_bytes(exported.serialize())
        program.write_bytes(exported.mlir_module_serialized)
        written = jax.export.deserialize(bytearray(temporary.read_bytes()))
        compare(paths[0], trained, lambda x: np.asarray(written.call(x)))
    return paths


def _pytorch(out: Path, trained: TrainedNet, metadata: Mapping[str, str]) -> list[Path]:
    from safetensors.numpy import save

    source = torch_source_of(trained)
    module, weights = out / "net_pytorch.py", out / "net_pytorch.safetensors"
    with replacing(weights) as temporary, replacing(module) as text:
        temporary.write_bytes(save(source.tensors(trained.params), dict(metadata)))
        text.write_text(source.text, "utf-8")
        net = load_source(text).load(temporary)
        compare(module, trained, lambda x: run_torch(net, x))
    return [module, weights]


def _onnx(out: Path, trained: TrainedNet, metadata: Mapping[str, str]) -> list[Path]:
    import onnxruntime
    import torch

    path = out / "net.onnx"
    with tempfile.TemporaryDirectory() as folder:
        (module,) = [p for p in _pytorch(Path(folder), trained, metadata) if p.suffix == ".py"]
        net = load_source(module).load()
    height, width, channels = trained.inputs.image_shape
    example = torch.zeros(2, channels, height, width)
    batch = torch.export.Dim("n")
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own deprecated functions
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it logs that torchvision is missing
        program = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
        )
        assert program is not None
        program.save(str(temporary), external_data=False)
        session = onnxruntime.InferenceSession(temporary.read_bytes(), providers=["CPUExecutionProvider"])
        compare(path, trained, lambda x: channels_last(session.run(None, {"images": np.moveaxis(x, -1, 1)})[0]))
    return [path]


WRITERS: Mapping[str, Callable[[Path, TrainedNet, Mapping[str, str]], list[Path]]] = {
    "safetensors": _safetensors,
    "npz": _npz,
    "stablehlo": _stablehlo,
    "pytorch": _pytorch,
    "onnx": _onnx,
}
"""The function that writes each format into a folder and returns the paths of its files."""


def torch_source_of(trained: TrainedNet) -> "Source":
    """Return the source of the net in PyTorch; raise UsageError if it has layers that PyTorch does not have."""
    from experiments.torch_source import convert

    inputs = trained.inputs
    return convert(trained.net, trained.params, inputs.image_shape, trained.model, inputs.class_names)


def import_state_dict(path: Path, trained: TrainedNet) -> Any:
    """Return the parameters in a state dict of the net; raise CheckpointError if it is one of another net."""
    return torch_source_of(trained).params(checkpoints.read(path), trained.params, path)


def load_source(path: Path) -> ModuleType:
    """Return a module of a file that need not have the name of one."""
    module = ModuleType("net_pytorch")
    module.__file__ = str(path)
    exec(compile(path.read_text("utf-8"), str(path), "exec"), module.__dict__)
    return module


def run_torch(net: Any, x: np.ndarray) -> np.ndarray:
    """Return the outputs of a net in PyTorch for images (N, H, W, C), channels-last as well."""
    import torch

    with torch.no_grad():
        return channels_last(np.asarray(net(torch.tensor(np.moveaxis(x, -1, 1)))))


def channels_last(logits: np.ndarray) -> np.ndarray:
    """Return logits (N, classes) as they are, and those of pixels (N, classes, H, W) as (N, H, W, classes)."""
    return logits if logits.ndim == 2 else np.moveaxis(logits, 1, -1)


def compare(path: Path, trained: TrainedNet, run: Callable[[np.ndarray], np.ndarray]) -> None:
    """Raise RunError unless `run` computes the logits of the net, for batches of several sizes."""
    import jax

    for batch in BATCHES:
        x = np.random.default_rng(batch).random((batch, *trained.inputs.image_shape), np.float32)
        expected = np.asarray(jax.jit(trained.net.apply)(trained.params, x))
        got = run(x)
        difference = float(np.abs(got - expected).max()) if got.shape == expected.shape else np.inf
        limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
        if not difference <= limit:
            what = f"the logits of the net up to {limit:.1e} for {batch} images"
            raise bad_value(RunError, path, what, f"a difference of {difference:.1e}", "no file was written")


if __name__ == "__main__":
    sys.exit(main())
