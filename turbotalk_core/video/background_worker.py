"""Background thread that encodes frames while the networks make the next ones.

Separate because takes and finished videos both hide the time of their encoders with it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch


class BackgroundWorker:
    """Thread that runs calls one after the other; the caller is at most one call ahead.

    So memory holds two batches of frames at most, however slow the disk is. An exception of a call
    is raised by the next method called here, and later calls are not run.
    """

    def __init__(self) -> None:
        """Start the thread."""
        self._thread = ThreadPoolExecutor(max_workers=1)
        # Each thread that calls torch operators gets workers of its own. With more workers than
        # cores they block each other, also those of the networks, whose calls then take half as
        # long again. So this thread computes with one worker.
        num_threads = torch.get_num_threads()
        # A thread copies the global number at its first use, so it must be used once before its
        # number is set.
        self._thread.submit(torch.get_num_threads).result()
        self._thread.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(num_threads)  # the line above also changed it for future threads
        self._last: Future[Any] | None = None

    def __enter__(self) -> BackgroundWorker:
        """Return this object."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish the running call and end the thread; an error of the block has precedence."""
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def do(self, call: Callable[..., object], *arguments: object) -> None:
        """Wait for the call before to finish, then start a call in the thread.

        Args:
            call: function to run.
            *arguments: arguments of the function.
        """
        self.wait()
        self._last = self._thread.submit(call, *arguments)

    def wait(self) -> None:
        """Wait until the last call has finished, and raise its exception if it failed."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
