"""What the sampler says, in the log and on its node, where settings do not fit the loaded weights.

The rules are the core's (``advice``). Separate because it is here that a MODEL must tell which file
it came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from logging import getLogger
from pathlib import Path

from comfy.model_patcher import ModelPatcher
from server import PromptServer

from ..turbotalk_core.advice import advise
from ..turbotalk_core.errors import CheckpointError
from ..turbotalk_core.model.checkpoint import ADAPTER, DIT, CheckpointInfo, inspect
from ..turbotalk_core.request import TalkRequest
from ..turbotalk_core.trust import show

_log = getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """Headers of the files that a MODEL and its audio adapter came from, read once for a run.

    Attributes:
        dit: of the video transformer; None where its file is not known.
        adapter: of the audio adapter; None where its file is not known.
        has_lora: whether a LoRA was put on the model.
    """

    dit: CheckpointInfo | None
    adapter: CheckpointInfo | None
    has_lora: bool

    @property
    def anchors_chunks(self) -> bool:
        """Whether the model's file says that it was measured with an anchor in later chunks."""
        return self.dit is not None and self.dit.settings.get("anchors_chunks") is True


def read_shipped(model: ModelPatcher, model_patch: ModelPatcher) -> Shipped:
    """Read the headers of the files of a model.

    Args:
        model: as it will be sampled.
        model_patch: its audio adapter.

    Returns:
        What is known of its files.
    """
    return Shipped(
        dit=find_info(model), adapter=find_info(model_patch, ADAPTER), has_lora=has_lora(model)
    )


def show_notes(shipped: Shipped, request: TalkRequest, node_id: str | None) -> list[str]:
    """Compare settings with what the model's file ships with, and show what does not fit.

    The node keeps the text when the run is over, until the next one; so something is said in any
    case. Nothing here can fail a run.

    Args:
        shipped: of ``read_shipped``.
        request: as it will be sampled.
        node_id: of the node that shows the text; None where there is none.

    Returns:
        The notes; none where all fits, or where the file is not known.
    """
    info = shipped.dit
    if info is None:
        notes, text = [], "settings not compared: which file the model came from is not known"
    else:
        adapter_settings = None if shipped.adapter is None else shipped.adapter.settings
        notes = advise(request, info.settings, shipped.has_lora, adapter_settings)
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
        kind: what the file must be, as ``model.checkpoint.inspect`` calls it.

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


def has_lora(model: ModelPatcher) -> bool:
    """Tell whether a LoRA was put on a MODEL, into its weights or beside them."""
    return bool(model.patches) or model.get_injections("bypass_lora") is not None
