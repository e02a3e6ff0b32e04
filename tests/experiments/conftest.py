"""Test configuration for experiments: JAX's default configuration, which users have."""

import pytest

from experiments import process, report


@pytest.fixture(scope="module", autouse=True)
def strict():
    """Override the library tests' strict float64 configuration."""


@pytest.fixture(autouse=True)
def allocator(monkeypatch):
    """Leave the allocator of the test process unchanged, because its settings cannot be reverted."""
    monkeypatch.setattr(process, "keep_freed_memory", lambda: False)


@pytest.fixture(scope="module", autouse=True)
def reports():
    """Write no report at the end of a training, because the figures take seconds. test_report.py overrides this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda folder, trained: folder / report.FILE)
        yield
