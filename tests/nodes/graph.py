"""Graphs as ComfyUI's page saves them."""

from __future__ import annotations

from typing import Any

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
            inputs[name] = next(values)
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
