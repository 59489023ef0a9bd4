"""Where takes lie in the host, which of them may go, and what decides what is in one.

Not in the host's temporary folder, which it empties when it starts: an unfinished take is there for
who queues the same work again after the host was killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from functools import cache
from hashlib import blake2b
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...turbotalk_core.fingerprints import fingerprint
from ...turbotalk_core.takes.cache_key import CacheKey, describe_changes
from ...turbotalk_core.takes.take import Take, delete_take
from .folders import new_temporary_path, output_folder

_log = getLogger(__name__)

FOLDER = "turbotalk_takes"  # of the host's output folder
_DAY = 86_400.0  # seconds
KEPT_WHOLE = 1 * _DAY  # of earlier sessions
KEPT_UNFINISHED = 14 * _DAY


def choose_folder(identity: CacheKey, graph: str) -> Path:
    """Choose the folder of a take, and log why an unfinished one is not continued.

    Args:
        identity: the cache key, with the graph among its fields.
        graph: of ``describe_graph``.

    Returns:
        The folder of ``place_take``.
    """
    folder = place_take(identity, graph)
    if not folder.exists() and (note := find_relative(identity)):
        _log.info("%s", note)
    return folder


def place_take(identity: CacheKey, graph: str) -> Path:
    """Choose the folder of a take, by what it is a take of.

    Args:
        identity: the cache key.
        graph: of ``describe_graph``.

    Returns:
        The same folder for the same identity, whether it is there or not. Where the graph is not
        known, patches are not, so none of another take: a new one in the temporary folder.
    """
    if not graph:
        return new_temporary_path("_take")
    folder = output_folder() / FOLDER
    _tidy(folder)
    text = json.dumps(dict(sorted(identity.fields.items())))
    return folder / blake2b(text.encode(), digest_size=10).hexdigest()


def find_relative(identity: CacheKey) -> str | None:
    """Say what is not as it was when an unfinished take of the same picture and voice was begun.

    Args:
        identity: of the take that is wanted, which is not there yet.

    Returns:
        A sentence for people; None where there is no such take.
    """
    found = []
    for path in (output_folder() / FOLDER).glob("*/take.journal"):
        try:
            take = Take.open(path.parent)
        except OSError:
            continue
        theirs, ours = take.identity.fields, identity.fields
        same = all(theirs.get(name) == ours[name] for name in ("picture", "voice"))
        if same and not take.is_whole:
            found.append((describe_changes(take.identity, identity), take))
    if not found:
        return None
    changes, take = min(found, key=lambda pair: len(pair[0]))
    return (
        f"begins anew, and keeps {take.num_frames} of {take.length} frames made before, because "
        f"{', '.join(changes)}"
    )


@cache  # once in a session: what this session made is still in the host's cache
def _tidy(folder: Path) -> None:
    """Delete takes of earlier sessions that nobody came back for."""
    for path in folder.glob("*/take.journal"):
        age = time.time() - path.stat().st_mtime
        try:
            kept = KEPT_WHOLE if Take.open(path.parent).is_whole else KEPT_UNFINISHED
        except OSError:  # no chunk, or damaged
            kept = KEPT_WHOLE
        if age > kept:
            _log.info("deleting a take of %.0f days ago: %s", age / _DAY, path.parent)
            delete_take(path.parent)


def describe_graph(graph: Any, node_id: str | None) -> str:
    """Tell apart what leads to a node: all nodes before it, with their settings.

    Digests of values cannot see what a patch of another pack does to a MODEL; its node is seen.

    Args:
        graph: the host's DynamicPrompt, or None where a program calls the node.
        node_id: of the node.

    Returns:
        Hexadecimal digits; empty where the graph is not known.
    """
    if graph is None or node_id is None or not graph.has_node(node_id):
        return ""
    known: dict[str, str] = {}

    def describe(name: str) -> str:
        if name not in known:
            node = graph.get_node(name)
            inputs = {
                key: [describe(value[0]), value[1]] if _is_link(graph, value) else value
                for key, value in sorted(node["inputs"].items())
            }
            text = json.dumps([node["class_type"], inputs], default=str)
            known[name] = blake2b(text.encode(), digest_size=10).hexdigest()
        return known[name]

    return describe(node_id)


def _is_link(graph: Any, value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and graph.has_node(str(value[0]))


def fingerprint_networks(networks: Iterable[nn.Module]) -> str:
    """Tell the weights of networks of the host apart, as they are before patches.

    Args:
        networks: any.

    Returns:
        Of ``fingerprints.fingerprint``.
    """
    return fingerprint(
        (f"{number} {name}", weight)
        for number, network in enumerate(networks)
        for name, weight in network.state_dict().items()
        if type(weight) in (Tensor, nn.Parameter)  # others would be multiplied out for it
    )
