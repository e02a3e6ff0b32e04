"""Experiments run as their users run them: in JAX's default configuration."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def strict():
    """In place of the library's strict float64."""
