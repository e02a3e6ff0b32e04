"""Test configuration: float64, eight CPU devices, strict dtypes."""

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

# Compilation dominates: LLVM optimizations are off except in `optimised`. XLA reads this when it starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
# Eight devices, so that every dim can be split, even over two mesh axes. JAX reads this when it first looks for
# devices.
jax.config.update("jax_num_cpu_devices", 8)
# On inputs this small PyTorch's threads would only compete with XLA's.
torch.set_num_threads(1)
# The same examples every time, and no deadline, because the first compilation is slow.
hypothesis.settings.register_profile("jaxcnn", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("jaxcnn")

# zennit needs only the class names of torchvision's nets; the package itself would install another PyTorch.
if importlib.util.find_spec("torchvision") is None:
    for name in ("torchvision", "torchvision.models", "torchvision.models.resnet"):
        sys.modules[name] = types.ModuleType(name)
    for name in ("BasicBlock", "Bottleneck"):
        setattr(sys.modules["torchvision.models.resnet"], name, type(name, (), {}))


KEPT = 2 * 2**30  # bytes; the cache also holds programs of older versions of the library


def pytest_configure(config):
    """Cache compiled programs in .pytest_cache, keyed by the program, its options and the versions.

    A second run takes a third of the time, even on another Python version with the same jaxlib.
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
    """Enable float64, standard dtype promotion and typed keys.

    This applies only to the modules in this folder. Doctests of the library run in JAX's default configuration, like
    user code.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.legacy_prng_key("error"):
        yield


ENDED = itertools.count(1)


@pytest.fixture(autouse=True)
def memory():
    """Clear the caches of compiled programs every 250 tests; keeping all of them would take 5 GB per process."""
    yield
    if next(ENDED) % 250 == 0:
        jax.clear_caches()
