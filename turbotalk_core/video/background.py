"""Work that goes on while the networks make the next frames.

Separate because takes and finished videos hide the time of their encoders in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch


class Background:
    """A thread that does one thing after the other, in the order given; at most one waits.

    So memory holds two batches of frames, however slow a disk is. What a thing raises is raised by
    the next call here, and nothing after it is done.
    """

    def __init__(self) -> None:
        """Start the thread, with nothing to do yet."""
        self._thread = ThreadPoolExecutor(max_workers=1)
        # Torch computes with as many helpers for each thread that asks. Where there are more of
        # them than cores they wait for each other asleep, also those of the networks, which then
        # take half as long again.
        num_threads = torch.get_num_threads()
        # A thread takes the number of all when it first asks, so it has to ask before it is told.
        self._thread.submit(torch.get_num_threads).result()
        self._thread.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(num_threads)  # for threads to come, whom the line above told as well
        self._last: Future[Any] | None = None

    def __enter__(self) -> Background:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let what was begun come to its end; in a block that fails, its error is the one told."""
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def do(self, call: Callable[..., object], *arguments: object) -> None:
        """Have something done, once what was asked for before is done.

        Args:
            call: what to do.
            *arguments: of the call.
        """
        self.wait()
        self._last = self._thread.submit(call, *arguments)

    def wait(self) -> None:
        """Wait until all is done, and raise what went wrong."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
