"""What the sampler says, in the log and on its node, where settings do not fit the loaded weights.

The rules are the core's (``advice``). Separate because it is here that a MODEL must tell which file
it came from.
"""

from __future__ import annotations

from html import escape
from logging import getLogger
from pathlib import Path

from comfy.model_patcher import ModelPatcher
from server import PromptServer

from ..turbotalk_core.advice import advise
from ..turbotalk_core.checkpoints.inspect import ADAPTER, DIT, CheckpointInfo, inspect
from ..turbotalk_core.errors import CheckpointError
from ..turbotalk_core.request import TalkRequest
from ..turbotalk_core.safe_io.paths import show
from .adapter import find_audio_adapter

_log = getLogger(__name__)


def show_notes(model: ModelPatcher, request: TalkRequest, node_id: str | None) -> list[str]:
    """Compare settings with what the model's file ships with, and show what does not fit.

    The node keeps the text when the run is over, until the next one; so something is said in any
    case. Nothing here can fail a run.

    Args:
        model: as it will be sampled.
        request: as it will be sampled.
        node_id: of the node that shows the text; None where there is none.

    Returns:
        The notes; none where all fits, or where the file is not known.
    """
    info = find_info(model)
    if info is None:
        notes, text = [], "settings not compared: which file the model came from is not known"
    else:
        adapter = find_info(find_audio_adapter(model), ADAPTER)
        adapter_settings = None if adapter is None else adapter.settings
        notes = advise(request, info.settings, has_lora(model), adapter_settings)
        text = "\n".join(notes) or f"the settings fit {info.path.name}"
    for note in notes:
        _log.warning("%s", note)
    show_text(text, node_id)
    return notes


def show_text(text: str, node_id: str | None) -> None:
    """Write on a node of the page, which keeps the text until its next run.

    Args:
        text: any, of whatever origin.
        node_id: of the node; None where there is none.
    """
    # The page takes the text for HTML, and a file may have any name.
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
        What the file is; None where the loader did not leave its path, as those of other packs need
        not, or where the file is of another kind or none that TurboTalk reads, such as GGUF.
    """
    # Kept by the host's loaders to load the model once more: a function and its arguments.
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


def ships_anchored(model: ModelPatcher) -> bool:
    """Tell whether a MODEL's file says that its chunks want an anchor; not where none is known."""
    info = find_info(model)
    return info is not None and info.settings.get("anchors_chunks") is True


def has_lora(model: ModelPatcher) -> bool:
    """Tell whether a LoRA was put on a MODEL, into its weights or beside them."""
    return bool(model.patches) or model.get_injections("bypass_lora") is not None
