"""Settings that all tests share: the same sums and the same examples on every machine."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# One thread in each process: the order of a sum depends on the number of threads, and make test
# runs a process per core.
os.environ["OMP_NUM_THREADS"] = "1"  # for child processes
torch.set_num_threads(1)


def pytest_runtest_teardown() -> None:
    """Set back what a tested command may have set."""
    torch.set_num_threads(1)


settings.register_profile("house", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("house")


_CAPABILITIES = (0x20080522, 0)  # version 3, of this thread
_DAC_OVERRIDE = 1 << 1


def _set_capabilities(data: ctypes.Array[ctypes.c_uint32], call: str) -> None:
    header = (ctypes.c_uint32 * 2)(*_CAPABILITIES)
    assert getattr(ctypes.CDLL(None, use_errno=True), call)(header, data) == 0, ctypes.get_errno()


@pytest.fixture
def read_only() -> Callable[[Path], AbstractContextManager[None]]:
    """Make a folder read-only, for root too, who may else write where the mode forbids it."""
    if os.name != "posix":
        pytest.skip("sets modes")

    @contextmanager
    def protect(folder: Path) -> Iterator[None]:
        mode = folder.stat().st_mode
        kept = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
        is_root = os.geteuid() == 0
        folder.chmod(0o555)
        if is_root:
            _set_capabilities(kept, "capget")
            _set_capabilities((ctypes.c_uint32 * 6)(kept[0] & ~_DAC_OVERRIDE, *kept[1:]), "capset")
        try:
            yield
        finally:
            if is_root:
                _set_capabilities(kept, "capset")
            folder.chmod(mode)

    return protect


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tell pytest's command line of the golden suite; only this file is read early enough."""
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden" / "data",
        metavar="DIR",
        help="folder with figures of the reference for tests/golden",
    )
