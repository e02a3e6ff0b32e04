"""Test configuration: float64, eight CPU devices, strict dtypes."""

import gc
import importlib.util
import itertools
import os
import shutil
import sys
import time
import types

import hypothesis
import jax
import pytest
import torch

from tests.compilation import quickly
from tests.conformance import summary

quickly()
# Eight devices, so that every dim can be split, even over two mesh axes. JAX reads this when it first looks for
# devices.
jax.config.update("jax_num_cpu_devices", 8)
# On inputs this small PyTorch's threads would only compete with XLA's.
torch.set_num_threads(1)
# The tests check the kernels in JAX, whether or not the library of `jaxcnn.native` is built; its own tests turn it on.
os.environ.setdefault("JAXCNN_NATIVE", "0")
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
#: Tests that are in the sample, and tests that are not.
COUNTS = pytest.StashKey[tuple[int, int]]()
#: Names of the tests with which a run with a time limit begins, and the time at which the process began.
FIRST = pytest.StashKey[set[str]]()
BEGAN = pytest.StashKey[float]()
LATE = "the time of --seconds is over"
#: Memory that one process of the suite needs.
PROCESS_BYTES = 3 * 2**30


def pytest_addoption(parser):
    group = parser.getgroup("jaxcnn")
    group.addoption("--quick", action="store_true", help="run a covering sample of the tests, as `make test` does")
    group.addoption("--seconds", type=float, metavar="SECONDS",
                    help="begin with the covering sample and the slow tests; skip others after this time")  # fmt: skip
    group.addoption("--seed", type=int, default=0, help="draw another sample with another number (default: 0)")
    group.addoption("--clear-every", type=int, default=250, metavar="N",
                    help="clear JAX's caches after N tests; with 1, each test traces all that it uses")  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Sort the tests, and leave out all but the sample if there is one."""
    from tests import sampling  # not above, because coverage would miss the import of jaxcnn

    items[:] = sampling.by_row(items)
    # By default, tracing runs Python's garbage collector often, and each time it visits all that torch and jax hold.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)
    if config.option.seconds is not None:
        first = sampling.sample(items, config.option.seed, slow=True)
        items[:] = sampling.sample_first(items, first, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
        config.stash[FIRST] = {item.nodeid for item in first}
    if not config.option.quick:
        return
    chosen = sampling.sample(items, config.option.seed)
    names = {item.nodeid for item in chosen}
    left_out = [item for item in items if item.nodeid not in names]
    config.stash[COUNTS] = len(chosen), len(left_out)
    if hasattr(config, "workeroutput"):
        config.workeroutput["sample"] = config.stash[COUNTS]
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip a test that is not in the sample if the time is over."""
    limit, stash = item.config.option.seconds, item.config.stash
    if limit is not None and item.nodeid not in stash[FIRST] and time.monotonic() - stash[BEGAN] > limit:
        pytest.skip(LATE)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take the counts of a sample from the first process of pytest-xdist that ends; all have the same."""
    if "sample" in getattr(node, "workeroutput", {}) and COUNTS not in node.config.stash:
        node.config.stash[COUNTS] = node.workeroutput["sample"]
        # Hypothesis reads the __dict__ of each.
        node.config.hook.pytest_deselected(items=[types.SimpleNamespace()] * node.workeroutput["sample"][1])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Return as many processes as there are processors, fewer if memory is short."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // PROCESS_BYTES))


def pytest_terminal_summary(terminalreporter, config):
    summary.show(terminalreporter)
    if COUNTS in config.stash:
        chosen, left_out = config.stash[COUNTS]
        terminalreporter.section("sample")
        terminalreporter.write_line(
            f"{chosen} of {chosen + left_out} tests ran, a covering sample with seed {config.option.seed}; "
            "`make test-full` runs all"
        )
    if config.option.seconds is not None:
        late = sum(LATE in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
        terminalreporter.section("time")
        terminalreporter.write_line(
            f"{late} tests that are not in the sample were skipped after {config.option.seconds:g} s"
            if late
            else f"all tests ran within {config.option.seconds:g} s"
        )


def pytest_configure(config):
    """Cache compiled programs in .pytest_cache, keyed by the program, its options and the versions.

    A second run takes a third of the time, even on another Python version with the same jaxlib.
    """
    config.stash[BEGAN] = time.monotonic()
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
def memory(pytestconfig):
    """Clear the caches of compiled programs now and then; keeping all of them would take 5 GB per process."""
    yield
    if next(ENDED) % pytestconfig.option.clear_every == 0:
        jax.clear_caches()
