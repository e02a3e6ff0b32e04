"""Check that the built distributions install and work: python -m tools.check_dist dist.

`python -m build` makes the wheel from the sdist. The wheel must contain the package and nothing else. It is installed
in a fresh environment with only its declared dependencies; it must import, report its version, and train.
"""

import argparse
import email
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

#: Run outside of the clone, so that only the installed package can be imported.
TRAINS = f"""
import importlib.metadata, pathlib, sys
import jax, jax.numpy as jnp, optax
import jaxcnn
assert pathlib.Path(jaxcnn.__file__).is_relative_to(sys.prefix), jaxcnn.__file__
assert importlib.metadata.version("jaxcnn") == {VERSION!r}, importlib.metadata.version("jaxcnn")
assert (pathlib.Path(jaxcnn.__file__).parent / "py.typed").is_file()
net = jaxcnn.serial(jaxcnn.Conv(4, 3), jaxcnn.Relu(), jaxcnn.MaxPool(2), jaxcnn.Flatten(), jaxcnn.Dense(3))
error, adam = jaxcnn.softmax_cross_entropy_with_integer_labels, optax.adam(1e-2)
state = jaxcnn.TrainState.create(net, adam, jax.random.key(0), (8, 8, 1))
step = jaxcnn.make_train_step(net, error, adam)
batch = jax.random.normal(jax.random.key(1), (6, 8, 8, 1)), jnp.arange(6) % 3
losses = []
for _ in range(20):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
assert losses[-1] < losses[0] / 2, losses
print("jaxcnn", {VERSION!r}, "jax", jax.__version__, "trains:", round(losses[0], 3), "to", round(losses[-1], 3))
"""


def wheel_holds_the_package_only(wheel: Path) -> None:
    sources = (path for path in (ROOT / "jaxcnn").rglob("*") if path.suffix in (".py", ".cc", ".h"))
    package = {path.relative_to(ROOT).as_posix() for path in sources} | {"jaxcnn/py.typed"}
    info = f"jaxcnn-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(f"{info}/")}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert names == package, f"{wheel.name}: {sorted(names ^ package)}"
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    required = {line.split(">")[0].split("<")[0].split("=")[0].strip() for line in core}
    assert required == {"jax", "jaxlib", "optax"}, core


def sdist_can_be_tested(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile"}
    wanted |= {"jaxcnn/py.typed", "tests/cases.py", "experiments/train.py", "docs/index.md"}
    assert wanted <= names, f"{sdist.name} lacks {sorted(wanted - names)}"


def installs_and_trains(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, wheel.resolve()], check=True, cwd=folder)
        subprocess.run([python, "-I", "-W", "error", "-c", TRAINS], check=True, cwd=folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the wheel and the sdist in a folder."""
    parser = argparse.ArgumentParser(prog="python -m tools.check_dist", description=__doc__.partition(": python")[0])
    parser.add_argument("folder", type=Path, help="folder that holds one wheel and one sdist")
    folder = parser.parse_args(argv).folder
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    wheel_holds_the_package_only(wheel)
    sdist_can_be_tested(sdist)
    installs_and_trains(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
