"""Graphs as ComfyUI's page saves them, and the videos that they make."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
BUTTONS = {"image", None}  # what LoadImage, LoadAudio and LoadVideo save for their upload buttons


def to_prompt(ui: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Convert a graph as the page saves it to what the page would queue.

    Args:
        ui: the saved graph.
        definitions: the server's /object_info.

    Returns:
        The prompt, without titles.
    """
    links = {link[0]: link for link in ui["links"]}
    assert len(links) == len(ui["links"])
    nodes = {node["id"]: node for node in ui["nodes"]}
    for _, source, slot, target, place, kind in ui["links"]:
        assert nodes[source]["outputs"][slot]["type"] == kind
        assert kind in nodes[target]["inputs"][place]["type"].split(",")
    prompt = {}
    for node in ui["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        definition = definitions[node["type"]]
        values = iter(node["widgets_values"])
        inputs = {}
        for name, spec in [
            *definition["input"].get("required", {}).items(),
            *definition["input"].get("optional", {}).items(),
        ]:
            options = spec[1] if len(spec) > 1 else {}
            if not (isinstance(spec[0], list) or spec[0] in WIDGETS):
                continue
            try:
                inputs[name] = next(values)
            except StopIteration:  # saved before the node had it: the page takes the default
                assert name in definition["input"]["optional"]
                continue
            if options.get("control_after_generate"):
                assert next(values) in ("fixed", "randomize")
        assert set(values) <= BUTTONS
        for socket in node["inputs"]:
            if socket["link"] is not None:
                _, source, slot, target, place, _ = links[socket["link"]]
                assert (target, node["inputs"][place]) == (node["id"], socket)
                assert socket["link"] in nodes[source]["outputs"][slot]["links"]
                inputs[socket["name"]] = [str(source), slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@dataclass(frozen=True, kw_only=True)
class Video:
    """What is in an mp4."""

    pictures: list[np.ndarray]
    seconds: float
    sound_seconds: float
    sound_rate: int
    channels: int
    tags: dict[str, str]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        height, width, _ = self.pictures[0].shape
        return width, height


def probe(content: bytes) -> Video:
    """Read an mp4 with sound."""
    with av.open(io.BytesIO(content)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        return Video(
            pictures=[frame.to_ndarray(format="rgb24") for frame in container.decode(video)],
            seconds=float(video.duration * video.time_base),
            sound_seconds=float(sound.duration * sound.time_base),
            sound_rate=sound.rate,
            channels=sound.channels,
            tags=container.metadata,
        )
