"""A disk that fills up, without filling one."""

import resource

import pytest


@pytest.fixture
def small_files_only():
    """No file may grow over 40 kB: the system refuses to write, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
