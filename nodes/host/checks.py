"""What enters and leaves a node: values of widgets that are checked, errors without server paths.

The host checks the range and the list of a widget, but neither its step nor that a number is a
number, and nothing of a value that another node computed. Its ``validate_inputs`` would report one
wrong value once for every input that the method names, and switch off the range checks of all of
them. So the checks here run twice: on a prompt before the host validates it, where each wrong value
is replaced by one that refuses to be converted, which the host reports on that widget alone; and
before a node runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NoReturn

from comfy_api.latest import io

from ...turbotalk_core import errors
from ...turbotalk_core.errors import OutputError, RequestError, TurboTalkError
from ..sockets import KINDS
from .folders import hide_folders

PUBLIC_MODULE = "turbotalk.errors"
LINKED = object()  # value of an input that another node computes, before the run

_Execute = Callable[..., io.NodeOutput]


def publish_errors() -> None:
    """Name our errors by a stable module; the host's history has the module of an error's class.

    Without it that would be the path of the folder into which the pack was installed.
    """
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, TurboTalkError):
            kind.__module__ = PUBLIC_MODULE


def hides_folders(execute: _Execute) -> _Execute:
    """Decorate a node's ``execute``, so that no error contains a path of the server.

    Args:
        execute: the method, below ``classmethod``.

    Returns:
        The method. Errors of the system become ``OutputError``.
    """

    @wraps(execute)
    def run(cls: type[io.ComfyNode], **inputs: Any) -> io.NodeOutput:
        try:
            return execute(cls, **inputs)
        except TurboTalkError as error:
            error.args = (hide_folders(str(error)),)
            raise
        except OSError as error:
            reason = hide_folders(f"{error.strerror or error} {error.filename or ''}".strip())
            raise OutputError(
                f"got '{reason}' from the system; check the disk and the file, then queue again"
            ) from error

    return run


def checks_values(execute: _Execute) -> _Execute:
    """Decorate a node's ``execute``, so that its widgets' values are checked before it runs.

    Args:
        execute: the method, below ``classmethod``.

    Returns:
        The method, which also does what ``hides_folders`` describes.
    """

    @wraps(execute)
    def run(cls: type[io.ComfyNode], **inputs: Any) -> io.NodeOutput:
        for reason in find_faults(cls, inputs).values():
            raise RequestError(reason)
        return execute(cls, **inputs)

    return hides_folders(run)


def is_connected(node: type[io.ComfyNode], name: str) -> bool:
    """Check whether another node is connected to an input; its value may still be None.

    Args:
        node: the class of a node that is running and has the hidden inputs for its graph.
        name: of the input.

    Returns:
        False also if the graph is not known.
    """
    graph, node_id = node.hidden.dynprompt, node.hidden.unique_id
    if graph is None or not graph.has_node(node_id):
        return False
    return isinstance(graph.get_node(node_id)["inputs"].get(name), list)


def find_faults(node: type[io.ComfyNode], inputs: Mapping[str, Any]) -> dict[str, str]:
    """Find the wrong values of a node's inputs.

    Args:
        node: the node's class. Its ``find_conflicts``, if it has one, gets the inputs and returns
            what is wrong with several of them together.
        inputs: values by name; ``LINKED`` if not known yet.

    Returns:
        The reason for each wrong value, by the name of its widget.
    """
    faults = {
        each.id: reason
        for each in node.define_schema().inputs
        if each.id in inputs and (reason := _check(each, inputs[each.id]))
    }
    find_conflicts = getattr(node, "find_conflicts", None)
    return faults if faults or find_conflicts is None else find_conflicts(inputs)


def _check(widget: io.Input, value: Any) -> str | None:
    kind = KINDS.get(widget.get_io_type())
    if kind is not None and value is not LINKED and not isinstance(value, kind):
        got = "nothing" if value is None else f"a {type(value).__name__}"
        return f"got {got} as {widget.id}; connect it. {widget.tooltip}"
    if isinstance(widget, io.Combo.Input):
        options = list(widget.options or ())
        if isinstance(value, str) and value not in options:
            return f"got {widget.id} {value[:100]!r}; choose one of {', '.join(options)}"
    if not isinstance(widget, io.Int.Input | io.Float.Input) or type(value) not in (int, float):
        return None
    low, high, step = widget.min, widget.max, widget.step or 1
    if not math.isfinite(value):
        return f"got {widget.id} {value}; use a finite number, {low} to {high}"
    if not low <= value <= high:
        return f"got {widget.id} {value}; use {low} to {high}"
    if isinstance(widget, io.Int.Input) and (value - low) % step:
        some = ", ".join(str(low + count * step) for count in range(3))
        return f"got {widget.id} {value}; use {some} and so on, up to {high}"
    return None


def refuse_faults(request: dict[str, Any], nodes: Mapping[str, type[io.ComfyNode]]) -> Any:
    """Make the host refuse the wrong values of a prompt, each on its own widget.

    Args:
        request: what a client posted, untrusted.
        nodes: our nodes, by id.

    Returns:
        The same request. Values that the host finds wrong by itself are left to it.
    """
    prompt = request.get("prompt")
    for each in prompt.values() if isinstance(prompt, dict) else ():
        kind = each.get("class_type") if isinstance(each, dict) else None
        node = nodes.get(kind) if isinstance(kind, str) else None
        if node is None or not isinstance(each.get("inputs"), dict):
            continue
        inputs = each["inputs"]
        known = {name: LINKED if type(x) is list else x for name, x in inputs.items()}
        for name, reason in find_faults(node, known).items():
            if not _is_found_by_host(node, name, inputs[name]):
                inputs[name] = _refuse(inputs[name], reason)
    return request


def _is_found_by_host(node: type[io.ComfyNode], name: str, value: Any) -> bool:
    (widget,) = (each for each in node.define_schema().inputs if each.id == name)
    if isinstance(widget, io.Int.Input | io.Float.Input):
        return value < widget.min or value > widget.max
    return True


class _Refusal:
    """Base of numbers whose conversion, with which the host begins, fails."""

    reason = ""

    def _raise(self) -> NoReturn:
        raise RequestError(self.reason)

    __int__ = __float__ = _raise


class _RefusedInt(_Refusal, int):
    pass


class _RefusedFloat(_Refusal, float):
    pass


def _refuse(value: float, reason: str) -> _Refusal:
    refused = _RefusedInt(value) if type(value) is int else _RefusedFloat(value)
    refused.reason = reason
    return refused
