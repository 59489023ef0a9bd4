"""Folders of takes in the host, deletion of old takes, and the host's part of the cache key.

Takes are not in the host's temporary folder, which the host empties when it starts: an unfinished
take must be continued when the same workflow is queued again after the host was killed.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...turbotalk_core.errors import OutputError
from ...turbotalk_core.fingerprints import fingerprint
from ...turbotalk_core.takes.cache_key import CacheKey, describe_changes
from ...turbotalk_core.takes.take import Take, delete_take, is_in_use, is_take, measure_size
from .folders import new_temporary_path, output_folder

_log = getLogger(__name__)

FOLDER = "turbotalk_takes"  # in the host's output folder
GRAPH_FIELD = "nodes before it"  # of the cache key
SAMPLER_ID = "TurboTalkSampler"
_NAME = re.compile(r"[0-9a-f]{20}")
_JOURNAL = "take.journal"
HOUR, DAY, _GB = 3_600.0, 86_400.0, 1e9  # seconds, seconds, bytes
TIDY_EVERY = 1 * HOUR
KEPT_AFTER_USE = 1 * HOUR  # whatever the limits are: another server may be reading it
KEPT_UNFINISHED = 14 * DAY
# Environment variables, and what holds without them:
HOURS_VARIABLE, GB_VARIABLE = "TURBOTALK_TAKES_HOURS", "TURBOTALK_TAKES_GB"
DEFAULT_HOURS, DEFAULT_GB = 24.0, 50.0


def choose_folder(cache_key: CacheKey, graph: str, in_use: Collection[str] = ()) -> Path:
    """Choose the folder of a take, and log why an unfinished one is not continued.

    Args:
        cache_key: the cache key, with the graph among its fields.
        graph: result of ``describe_graph``.
        in_use: see ``tidy_takes``.

    Returns:
        The folder of ``place_take``.
    """
    folder = place_take(cache_key, graph)
    if graph:
        tidy_takes(folder.parent, {graph, *in_use})
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
    text = json.dumps(dict(sorted(cache_key.fields.items())))
    return output_folder() / FOLDER / blake2b(text.encode(), digest_size=10).hexdigest()


def describe_restart(cache_key: CacheKey) -> str | None:
    """Describe why an unfinished take of the same picture and voice is not continued.

    Args:
        cache_key: cache key of the requested take, which does not exist yet.

    Returns:
        A readable sentence; None if there is no such take.
    """
    found = []
    for path in (output_folder() / FOLDER).glob(f"*/{_JOURNAL}"):
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


def is_unchanged(take: Take) -> bool:
    """Check whether a take is on disk as it was when its node returned it."""
    try:
        return Take.open(take.folder) == take
    except OSError:
        return False


def read_take(take: Take, start: int, stop: int) -> Iterator[Tensor]:
    """Read frames of a take, and mark it as used meanwhile.

    Args:
        take: of a sampler.
        start: first frame to read.
        stop: one past the last frame to read.

    Yields:
        The batches of ``Take.iterate``.
    """
    for frames_THWC in take.iterate(start, stop):
        with suppress(OSError):  # a folder that may only be read
            os.utime(take.folder / _JOURNAL)
        yield frames_THWC


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Take in the folder of takes.

    Attributes:
        folder: its folder.
        last_use: when it was last written or read, seconds since 1970.
        is_whole: whether all frames are finished.
        size: bytes on disk.
    """

    folder: Path
    last_use: float
    is_whole: bool
    size: int


_last_tidied: dict[Path, float] = {}


def tidy_takes(folder: Path, in_use: Collection[str] = (), now: float | None = None) -> None:
    """Delete old takes, and the oldest ones while all together are too large.

    Complete takes go first. Never deleted are takes that a program writes or that were used within
    the last hour, and folders that have another name than the takes of this module.

    Args:
        folder: the folder of takes.
        in_use: digests of ``describe_graph`` of samplers in the prompt that is running, whose takes
            are kept.
        now: seconds since 1970; None is the present. Within an hour of the last time nothing is
            done.
    """
    now = time.time() if now is None else now
    if 0 <= now - _last_tidied.get(folder, -TIDY_EVERY) < TIDY_EVERY:
        return
    _last_tidied[folder] = now
    kept_whole = read_setting(HOURS_VARIABLE, DEFAULT_HOURS) * HOUR
    found = [_examine(path) for path in folder.glob("*") if _NAME.fullmatch(path.name)]
    found = sorted((take for take in found if take), key=lambda x: (not x.is_whole, x.last_use))
    excess = sum(x.size for x in found) - read_setting(GB_VARIABLE, DEFAULT_GB) * _GB
    for take in found:
        age = now - take.last_use
        is_old = age > (kept_whole if take.is_whole else max(kept_whole, KEPT_UNFINISHED))
        if not is_old and excess <= 0:
            continue
        if age >= KEPT_AFTER_USE and not _is_needed(take.folder, in_use) and _delete(take, age):
            excess -= take.size


def read_setting(name: str, default: float) -> float:
    """Read a number from an environment variable.

    Args:
        name: of the variable.
        default: if it is not set, or is no number of at least 0; the latter is logged.

    Returns:
        The number.
    """
    text = os.environ.get(name, "").strip()
    try:
        number = float(text) if text else default
    except ValueError:
        number = -1.0
    if number >= 0:
        return number
    _log.warning("%s is %r; use a number, 0 or more. %g is used", name, text, default)
    return default


def _examine(folder: Path) -> _Found | None:
    """Describe the take in a folder; None if there is none."""
    if folder.is_symlink() or not is_take(folder):
        return None
    journal = folder / _JOURNAL
    try:
        last_use = (journal if journal.exists() else folder).stat().st_mtime
    except OSError:  # deleted in the meantime
        return None
    try:
        is_whole = Take.open(folder).is_whole
    except OSError:  # damaged, so it is as useless as one that is not needed any more
        is_whole = True
    return _Found(folder=folder, last_use=last_use, is_whole=is_whole, size=measure_size(folder))


def _is_needed(folder: Path, in_use: Collection[str]) -> bool:
    if is_in_use(folder):
        return True
    try:
        return Take.open(folder).cache_key.fields.get(GRAPH_FIELD) in in_use
    except OSError:
        return False


def _delete(take: _Found, age: float) -> bool:
    try:
        delete_take(take.folder)
    except OutputError as error:
        _log.warning("a take of %.1f days ago is not deleted: %s", age / DAY, error)
        return False
    _log.info(
        "deleted a take of %.1f days ago, %.1f MB: %s", age / DAY, take.size / 1e6, take.folder
    )
    return True


def describe_samplers(graph: Any) -> set[str]:
    """Compute ``describe_graph`` of all samplers of a prompt."""
    if graph is None:
        return set()
    return {
        describe_graph(graph, name)
        for name in graph.all_node_ids()
        if graph.get_node(name)["class_type"] == SAMPLER_ID
    }


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
