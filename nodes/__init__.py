"""ComfyUI nodes: thin wrappers over the core."""

from pathlib import Path

import folder_paths  # noqa: TID251
from comfy_api.latest import ComfyExtension, io

from .apply_audio_adapter import ApplyAudioAdapter
from .assemble_video import AssembleVideo
from .encode_speakers import EncodeSpeakers
from .encode_speech import EncodeSpeech
from .load_audio_adapter import LoadAudioAdapter
from .load_audio_encoder import LoadAudioEncoder
from .prompt_schedule import PromptSchedule
from .sampler import Sampler
from .schedule import Schedule
from .speaker import DescribeSpeaker
from .speakers_preview import SpeakersPreview
from .take_frames import TakeFrames

MODELS = Path(__file__).resolve().parent.parent / "models"
MODEL_FOLDERS = ("audio_encoders", "diffusion_models", "model_patches", "vae")


class TurboTalkExtension(ComfyExtension):
    """Extension object by which ComfyUI loads the nodes."""

    async def on_load(self) -> None:
        """Add the folders of the embedded models to those that the host's loaders list."""
        for name in MODEL_FOLDERS:
            folder_paths.add_model_folder_path(name, str(MODELS / name))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes in the order of a workflow."""
        return [
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
        ]


async def comfy_entrypoint() -> TurboTalkExtension:
    """Return the extension; ComfyUI's entry point."""
    return TurboTalkExtension()
