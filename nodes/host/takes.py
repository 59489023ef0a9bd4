"""Folders of takes in the host, deletion of old takes, and the host's part of the cache key.

Takes are not in the host's temporary folder, which the host empties when it starts: an unfinished
take must be continued when the same workflow is queued again after the host was killed.
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

FOLDER = "turbotalk_takes"  # in the host's output folder
_DAY = 86_400.0  # seconds
KEPT_WHOLE = 1 * _DAY  # takes of earlier sessions
KEPT_UNFINISHED = 14 * _DAY


def choose_folder(cache_key: CacheKey, graph: str) -> Path:
    """Choose the folder of a take, and log why an unfinished one is not continued.

    Args:
        cache_key: the cache key, with the graph among its fields.
        graph: result of ``describe_graph``.

    Returns:
        The folder of ``place_take``.
    """
    folder = place_take(cache_key, graph)
    if not folder.exists() and (message := describe_restart(cache_key)):
        _log.info("%s", message)
    return folder


def place_take(cache_key: CacheKey, graph: str) -> Path:
    """Choose the folder of a take by its cache key.

    Args:
        cache_key: the cache key.
        graph: result of ``describe_graph``.

    Returns:
        The same folder for the same key, whether it exists or not. If the graph is not known, the
        patches of the model are not known either, so no take may be continued: the result is then a
        new folder in the temporary folder.
    """
    if not graph:
        return new_temporary_path("_take")
    folder = output_folder() / FOLDER
    _delete_old_takes(folder)
    text = json.dumps(dict(sorted(cache_key.fields.items())))
    return folder / blake2b(text.encode(), digest_size=10).hexdigest()


def describe_restart(cache_key: CacheKey) -> str | None:
    """Describe why an unfinished take of the same picture and voice is not continued.

    Args:
        cache_key: cache key of the requested take, which does not exist yet.

    Returns:
        A readable sentence; None if there is no such take.
    """
    found = []
    for path in (output_folder() / FOLDER).glob("*/take.journal"):
        try:
            take = Take.open(path.parent)
        except OSError:
            continue
        found_fields, fields = take.cache_key.fields, cache_key.fields
        same = all(found_fields.get(name) == fields[name] for name in ("picture", "voice"))
        if same and not take.is_whole:
            found.append((describe_changes(take.cache_key, cache_key), take))
    if not found:
        return None
    changes, take = min(found, key=lambda pair: len(pair[0]))
    return (
        f"begins anew, and keeps {take.num_frames} of {take.length} frames made before, because "
        f"{', '.join(changes)}"
    )


@cache  # once per session: takes of this session are still in the host's cache
def _delete_old_takes(folder: Path) -> None:
    """Delete takes of earlier sessions that have not been used for a while."""
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
    """Compute a digest of all nodes before a node, with their settings.

    A patch of another pack may change a MODEL without changing its weights, so its fingerprint
    stays the same; the node of that patch changes this digest.

    Args:
        graph: the host's DynamicPrompt, or None if a program calls the node.
        node_id: id of the node.

    Returns:
        Hexadecimal digits; empty if the graph is not known.
    """
    if graph is None or node_id is None or not graph.has_node(node_id):
        return ""
    digests: dict[str, str] = {}

    def describe(name: str) -> str:
        if name not in digests:
            node = graph.get_node(name)
            inputs = {
                key: [describe(value[0]), value[1]] if _is_link(graph, value) else value
                for key, value in sorted(node["inputs"].items())
            }
            text = json.dumps([node["class_type"], inputs], default=str)
            digests[name] = blake2b(text.encode(), digest_size=10).hexdigest()
        return digests[name]

    return describe(node_id)


def _is_link(graph: Any, value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and graph.has_node(str(value[0]))


def fingerprint_networks(networks: Iterable[nn.Module]) -> str:
    """Compute the fingerprint of the weights of the host's networks, without patches.

    Args:
        networks: any networks.

    Returns:
        The result of ``fingerprints.fingerprint``.
    """
    return fingerprint(
        (f"{number} {name}", weight)
        for number, network in enumerate(networks)
        for name, weight in network.state_dict().items()
        if type(weight) in (Tensor, nn.Parameter)  # quantised weights would be dequantised for it
    )
