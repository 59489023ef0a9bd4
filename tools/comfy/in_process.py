"""ComfyUI inside this process, with our pack loaded by ComfyUI's own loader.

Used by tests of single nodes and by the benchmark; the demo and tests of workflows start a server.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

PACK = Path(__file__).resolve().parents[2]


def import_host(path: Path, base: Path) -> SimpleNamespace:
    """Import ComfyUI, on the CPU, with separate folders.

    Args:
        path: ComfyUI's checkout.
        base: folder in which its folders for models, input, output and more are created.

    Returns:
        Its modules by short names, and ``base``.
    """
    for name in ("custom_nodes", "models", "input", "output", "temp"):
        (base / name).mkdir()
    sys.path.insert(0, str(path))  # before our checkout, whose ``nodes`` would hide ComfyUI's
    modules = {
        "nodes": "nodes",
        "folder_paths": "folder_paths",
        "attention": "comfy.ldm.modules.attention",
        "audio_encoder_nodes": "comfy_extras.nodes_audio_encoder",
        "model_advanced_nodes": "comfy_extras.nodes_model_advanced",
        "model_patch_nodes": "comfy_extras.nodes_model_patch",
        "io": "comfy_api.latest",
        "lora_debug_nodes": "comfy_extras.nodes_lora_debug",
        "model_patcher": "comfy.model_patcher",
        "ops": "comfy.ops",
        "sd": "comfy.sd",
        "graph": "comfy_execution.graph",
        "sample": "comfy.sample",
        "samplers": "comfy.samplers",
        "compile_nodes": "comfy_extras.nodes_torch_compile",
        "video_nodes": "comfy_extras.nodes_video",
        "wan_nodes": "comfy_extras.nodes_wan",
        "audio_encoders": "comfy.audio_encoders.audio_encoders",
        "model_management": "comfy.model_management",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = importlib.import_module("comfy.cli_args").args
        options.cpu = True
        options.base_directory = str(base)
        imported = {short: importlib.import_module(name) for short, name in modules.items()}
    imported["io"] = imported["io"].io
    return SimpleNamespace(base=base, **imported)


def load_pack(host: SimpleNamespace) -> ModuleType:
    """Load the pack as ComfyUI's own loader does.

    Args:
        host: result of ``import_host``.

    Returns:
        The pack's module, under the name that ComfyUI builds from a path with a dash and a dot. So
        its classes are not those of the module ``turbotalk_core``.
    """
    place = host.base / "custom_nodes" / "ComfyUI-TurboTalk.x"
    place.symlink_to(PACK, target_is_directory=True)
    if not asyncio.run(host.nodes.load_custom_node(str(place))):
        raise ImportError(f"ComfyUI did not load {place}; its log above says why")
    return sys.modules[str(place).replace(".", "_x_")]


def run_node(
    host: SimpleNamespace, node_id: str, *, graph: dict[str, Any] | None = None, **inputs: object
) -> Any:
    """Run a node as the host does: ``run_node(host, "TurboTalkSchedule", steps=4, …)``.

    Args:
        host: result of ``import_host``.
        node_id: id of the node's class.
        graph: a workflow in API format, in which it is the node "7".
        **inputs: inputs of the node.

    Returns:
        Its first output.
    """
    hidden: dict[Any, Any] = {host.io.Hidden.unique_id: "7"}
    if graph is not None:
        hidden[host.io.Hidden.dynprompt] = host.graph.DynamicPrompt(graph)
    node = host.nodes.NODE_CLASS_MAPPINGS[node_id]
    with torch.inference_mode():
        if hasattr(node, "PREPARE_CLASS_CLONE"):
            output = node.PREPARE_CLASS_CLONE({"hidden_inputs": hidden}).EXECUTE_NORMALIZED(
                **inputs
            )
            return output.result[0]
        return getattr(node(), node.FUNCTION)(**inputs)[0]
