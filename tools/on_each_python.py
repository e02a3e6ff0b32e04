"""Run all tests on each installed Python: python -m tools.on_each_python [pytest arguments].

Each Python gets its own environment (.venv-3.12 and so on) with the newest compatible jax. The tests run twice if jax
offers a second implementation of `custom_vjp` (JAX_CUSTOM_VJP3) and it works; in jax 0.10 it does not.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

VERSIONS = ("3.11", "3.12", "3.13")
ROOT = Path(__file__).parents[1]

# A function with a static argument, as every op is, but without jaxcnn. jax 0.10's other custom_vjp fails in
# `checkpoint`.
STATIC_AND_CHECKPOINTED = """
import functools, jax

@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled(factor, x):
    return factor * x

scaled.defvjp(lambda factor, x: (factor * x, None), lambda factor, _, delta: (factor * delta,))
jax.grad(jax.checkpoint(lambda x: scaled(2.0, x)))(1.0)
"""


def interpreters() -> Iterator[tuple[str, Path]]:
    """Yield the Pythons on the PATH and in pyenv; broken pyenv shims are skipped."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for version in VERSIONS:
        on_path = shutil.which(f"python{version}")
        for python in [on_path] * bool(on_path) + sorted(pyenv.glob(f"{version}.*/bin/python")):
            if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
                yield version, Path(python)
                break


def environment_for(version: str, interpreter: Path) -> Path:
    """Return the Python of the version's environment after installing the test dependencies."""
    folder = ROOT / f".venv-{version}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--upgrade", "--upgrade-strategy", "eager", "--editable", ".[experiments,test]"], check=True)
    subprocess.run([*pip, "--no-deps", "zennit==0.5.1"], check=True)  # without torchvision, which would replace PyTorch
    return python


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests on every Python and return the number of failed runs."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.on_each_python", description=__doc__.partition(": python")[0]
    )
    parser.epilog = "All other arguments are passed to pytest, for example tests/ops or -k conv."
    _, to_pytest = parser.parse_known_args(argv)
    failed = []
    pythons = list(interpreters())
    for version, interpreter in pythons:
        python = environment_for(version, interpreter)
        probe = "import jax; print(jax.__version__, hasattr(jax.config, 'jax_custom_vjp3'))"
        output = subprocess.run([python, "-c", probe], check=True, capture_output=True, text=True).stdout
        jax, has_switch = output.split()
        for switch in ("", "1") if has_switch == "True" else ("",):
            run = f"Python {version}, jax {jax}{', JAX_CUSTOM_VJP3=1' if switch else ''}"
            environment = os.environ | ({"JAX_CUSTOM_VJP3": switch} if switch else {})
            if subprocess.run([python, "-c", STATIC_AND_CHECKPOINTED], env=environment, capture_output=True).returncode:
                print(f"\n{run}: skipped, because JAX alone fails", flush=True)
                failed += [run] * (not switch)
                continue
            print(f"\n{run}", flush=True)
            command = [python, "-m", "pytest", "-n", "auto", "--dist", "worksteal", *to_pytest]
            failed += [run] * (subprocess.run(command, env=environment).returncode != 0)
    print("\nfound:", ", ".join(version for version, _ in pythons), "\nfailed:", "; ".join(failed) or "none")
    return len(failed)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
