"""Experiments run as their users run them: in JAX's default configuration."""

import pytest

from experiments import process


@pytest.fixture(scope="module", autouse=True)
def strict():
    """In place of the library's strict float64."""


@pytest.fixture(autouse=True)
def allocator(monkeypatch):
    """Left as it is in the process of the tests: what has been set stays set."""
    monkeypatch.setattr(process, "keep_freed_memory", lambda: False)
