"""ComfyUI nodes: thin wrappers over the core."""

from functools import partial
from pathlib import Path

import folder_paths  # noqa: TID251
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .apply_audio_adapter import ApplyAudioAdapter
from .assemble_video import AssembleVideo
from .encode_speakers import EncodeSpeakers
from .encode_speech import EncodeSpeech
from .host.checks import publish_errors, refuse_faults
from .load_audio_adapter import LoadAudioAdapter
from .load_audio_encoder import LoadAudioEncoder
from .prompt_schedule import PromptSchedule
from .sampler import Sampler
from .schedule import Schedule
from .speaker import DescribeSpeaker
from .speakers_preview import SpeakersPreview
from .take_frames import TakeFrames

MODELS = Path(__file__).resolve().parent.parent / "models"
NODES: tuple[type[io.ComfyNode], ...] = (  # in the order of a workflow
    LoadAudioEncoder,
    EncodeSpeech,
    DescribeSpeaker,
    SpeakersPreview,
    EncodeSpeakers,
    LoadAudioAdapter,
    ApplyAudioAdapter,
    PromptSchedule,
    Schedule,
    Sampler,
    AssembleVideo,
    TakeFrames,
)
MODEL_FOLDERS = ("audio_encoders", "diffusion_models", "model_patches", "vae")


class TurboTalkExtension(ComfyExtension):
    """Extension object by which ComfyUI loads the nodes."""

    async def on_load(self) -> None:
        """Prepare the host: model folders, checks of prompts, names of errors.

        The folders of the embedded models are added to those that the host's loaders list.
        """
        publish_errors()
        server = getattr(PromptServer, "instance", None)  # none in a program that imports ComfyUI
        if server is not None:
            nodes = {node.define_schema().node_id: node for node in NODES}
            server.add_on_prompt_handler(partial(refuse_faults, nodes=nodes))
        for name in MODEL_FOLDERS:
            folder_paths.add_model_folder_path(name, str(MODELS / name))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes in the order of a workflow."""
        return list(NODES)


async def comfy_entrypoint() -> TurboTalkExtension:
    """Return the extension; ComfyUI's entry point."""
    return TurboTalkExtension()
