"""How the tests run: in float64, on eight CPU devices, with strict dtypes."""

import importlib.util
import itertools
import os
import shutil
import sys
import types

import hypothesis
import jax
import pytest
import torch

from tests.conformance.summary import pytest_terminal_summary as pytest_terminal_summary

# Most of the time is compilation: no LLVM optimisations but where `optimised` asks for them.  Read when XLA starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
# Eight devices, so that every dim can be split, also over two axes of a mesh.  Read when JAX first looks for devices.
jax.config.update("jax_num_cpu_devices", 8)
# PyTorch's threads would only contend with XLA's for pictures this small.
torch.set_num_threads(1)
# The same examples each time, and no time limit: what is slow is the first compilation.
hypothesis.settings.register_profile("jaxcnn", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("jaxcnn")

# zennit asks torchvision for the names of its nets alone; the package itself would bring another PyTorch.
if importlib.util.find_spec("torchvision") is None:
    for name in ("torchvision", "torchvision.models", "torchvision.models.resnet"):
        sys.modules[name] = types.ModuleType(name)
    for name in ("BasicBlock", "Bottleneck"):
        setattr(sys.modules["torchvision.models.resnet"], name, type(name, (), {}))


KEPT = 2 * 2**30  # bytes; programs of older versions of the library are never asked for again


def pytest_configure(config):
    """Compiled programs are kept in .pytest_cache: JAX asks for them by the program itself, its options and versions.

    So a second run takes a third of the time, on another Python with the same jaxlib too.
    """
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    folder = config.cache.mkdir("compiled")
    if not hasattr(config, "workerinput") and sum(file.stat().st_size for file in folder.iterdir()) > KEPT:
        shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module", autouse=True)
def strict():
    """float64 stays float64, dtypes never mix by themselves, keys are typed.

    For the modules of this folder alone: doctests of the library run as its users do, in JAX's default configuration.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.legacy_prng_key("error"):
        yield


ENDED = itertools.count(1)


@pytest.fixture(autouse=True)
def memory():
    """Compiled programs are forgotten now and then: those of all tests would take five gigabytes a process."""
    yield
    if next(ENDED) % 250 == 0:
        jax.clear_caches()
