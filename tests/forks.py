"""Child processes for tests: forked from a server that has imported torch, so they start at once.

The server itself is a new interpreter without threads. It starts with the first child.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "turbotalk_core.pipeline", "pytest", "hypothesis"])


def run_in_child(target: Callable[..., object], *arguments: object) -> int:
    """Call a function in a process of its own and wait for the end of that process.

    Args:
        target: a function at the top of a module.
        *arguments: its arguments; they must pickle.

    Returns:
        The exit code: 0, 1 after an exception, -N after signal N.
    """
    child = _CONTEXT.Process(target=target, args=arguments)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def start_in_child(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Call a function in a process of its own, and do not wait for its end.

    Args:
        target: a function at the top of a module.
        *arguments: its arguments; they must pickle.

    Returns:
        The process; its ``exitcode`` is that of ``run_in_child`` after ``join``.
    """
    child = _CONTEXT.Process(target=target, args=arguments)
    child.start()
    return child


def call_in_child(target: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a process of its own and return its result.

    Args:
        target: a function at the top of a module.
        *arguments: its arguments; they must pickle.

    Returns:
        The result of the function, which must pickle.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    child = _CONTEXT.Process(target=_send_result, args=(sender, target, arguments))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    child.join()
    assert child.exitcode == 0, f"{target.__name__} failed in a child process; see its output"
    return result


def _send_result(sender: Any, target: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    sender.send(target(*arguments))
