"""Quality warnings in the log and on the sampler node: settings that do not fit the weights.

The rules are the core's (``quality_warnings``). Separate because in the host the file from which a
MODEL was loaded must first be found.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from logging import getLogger
from pathlib import Path

from comfy.model_patcher import ModelPatcher
from server import PromptServer

from ...turbotalk_core.checkpoints.inspect import ADAPTER, DIT, CheckpointInfo, inspect
from ...turbotalk_core.errors import CheckpointError
from ...turbotalk_core.quality_warnings import find_quality_warnings
from ...turbotalk_core.request import TalkRequest
from ...turbotalk_core.safe_io.paths import show
from .folders import hide_folders

_log = getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """Headers of the files that a MODEL and its audio adapter came from, read once for a run.

    Attributes:
        dit: header of the video transformer's file; None if the file is not known.
        adapter: header of the audio adapter's file; None if the file is not known.
        has_lora: whether the model has a LoRA.
    """

    dit: CheckpointInfo | None
    adapter: CheckpointInfo | None
    has_lora: bool

    @property
    def anchors_chunks(self) -> bool:
        """Whether the model's file sets ``anchors_chunks``."""
        return self.dit is not None and self.dit.settings.get("anchors_chunks") is True


def read_shipped(model: ModelPatcher, model_patch: ModelPatcher) -> Shipped:
    """Read the headers of the files of a model.

    Args:
        model: the model that will be sampled.
        model_patch: its audio adapter.

    Returns:
        The headers of its files, as far as these are known.
    """
    return Shipped(
        dit=find_info(model), adapter=find_info(model_patch, ADAPTER), has_lora=has_lora(model)
    )


def show_quality_warnings(
    shipped: Shipped, request: TalkRequest, node_id: str | None, *, note: str = ""
) -> list[str]:
    """Compare settings with those stored in the model's file, and show warnings on the node.

    A node keeps its text after a run, until the next one. So a text is shown in every case, which
    replaces the old one. No error here can fail a run.

    Args:
        shipped: of ``read_shipped``.
        request: as it will be sampled.
        node_id: of the node that shows the text; None without a node.
        note: what else the node shows, before the warnings; empty for nothing.

    Returns:
        The warnings; empty if all settings fit, or if the file is unknown.
    """
    info = shipped.dit
    if info is None:
        warnings, text = [], "settings not compared: which file the model came from is not known"
    else:
        adapter_settings = None if shipped.adapter is None else shipped.adapter.settings
        warnings = find_quality_warnings(request, info.settings, shipped.has_lora, adapter_settings)
        text = "\n".join(warnings) or f"the settings fit {info.path.name}"
    for warning in [note, *warnings] if note else warnings:
        _log.warning("%s", warning)
    show_text(f"{note}\n{text}" if note else text, node_id)
    return warnings


def show_text(text: str, node_id: str | None) -> None:
    """Show a text on a node of the page, without paths of the server, until the node's next run.

    Args:
        text: any text, possibly untrusted.
        node_id: of the node; None without a node.
    """
    text = hide_folders(text)
    # The page interprets the text as HTML, and file names are untrusted.
    text = "\n".join(escape(show(line), quote=False) for line in text.split("\n"))
    server = getattr(PromptServer, "instance", None)  # none in a program that imports ComfyUI
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def find_info(model: ModelPatcher, kind: str = DIT) -> CheckpointInfo | None:
    """Read the header of the file that a MODEL or a MODEL_PATCH was loaded from.

    Args:
        model: any MODEL or MODEL_PATCH.
        kind: what the file must be, as ``checkpoints.inspect.inspect`` calls it.

    Returns:
        Description of the file; None if the loader did not store its path (loaders of other packs
        may not), or if the file is of another kind or cannot be read by TurboTalk, such as GGUF.
    """
    # The host's loaders store a function and its arguments here, to load the model again.
    _, arguments, *_ = model.cached_patcher_init or (None, ())
    path = arguments[0] if arguments else None
    if not isinstance(path, str | Path):
        return None
    try:
        info = inspect(Path(path))
    except CheckpointError as error:
        _log.debug("settings are not compared: %s", error)
        return None
    return info if info.kind == kind else None


def has_lora(model: ModelPatcher) -> bool:
    """Check whether a MODEL has a LoRA, in its weights or beside them."""
    return bool(model.patches) or model.get_injections("bypass_lora") is not None
