"""What nodes made and the host has in its cache, while the files of it may have been deleted.

The host does not run a node again whose inputs are unchanged. A node whose result lies on disk
therefore counts the results that were lost since, and has the number as its fingerprint: after a
loss the host runs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from comfy_api.latest import io

_IsThere = Callable[[], bool]
_made: dict[str, list[_IsThere]] = {}
_lost: dict[str, int] = {}


def remember(node: type[io.ComfyNode], is_there: _IsThere) -> None:
    """Remember a result of a node that is running.

    Args:
        node: the node's class, with the ids that the host sets for the run.
        is_there: checks whether the files of the result are as they were made.
    """
    graph, node_id = node.hidden.dynprompt, node.hidden.unique_id
    if graph is not None and node_id is not None and graph.has_node(node_id):
        name = _name(node, graph.get_node(node_id)["inputs"])
        _made.setdefault(name, []).append(is_there)


def count_losses(node: type[io.ComfyNode], inputs: Mapping[str, Any]) -> int:
    """Count the results of a node that were lost since they were made.

    Args:
        node: the node's class, with the id that the host sets.
        inputs: values of its widgets; inputs that are connected are None.

    Returns:
        A number that is larger after each loss.
    """
    name = _name(node, inputs)
    found = _made.get(name, [])
    kept = [is_there for is_there in found if is_there()]
    if len(kept) < len(found):
        _lost[name] = _lost.get(name, 0) + len(found) - len(kept)
        _made[name] = kept
    return _lost.get(name, 0)


def _name(node: type[io.ComfyNode], inputs: Mapping[str, Any]) -> str:
    """Name the results of a node with the same widgets, whatever is connected to it."""
    widgets = [
        (each.id, value)
        for each in node.define_schema().inputs
        if (value := inputs.get(each.id)) is not None and type(value) is not list
    ]
    return repr((node.hidden.unique_id, widgets))
