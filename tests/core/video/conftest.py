"""Simulation of a full disk."""

import resource

import pytest


@pytest.fixture
def small_files_only():
    """Limit on file size of 40 kB: the system refuses to write more, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
