"""Settings that all tests share: the same sums and the same examples on every machine."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)  # the order of a sum depends on the number of threads

settings.register_profile("house", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tell pytest's command line of the golden suite; only this file is read early enough."""
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden" / "data",
        metavar="DIR",
        help="folder with figures of the reference for tests/golden",
    )
