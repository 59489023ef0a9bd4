"""Node: wav2vec2 file to AUDIO_ENCODER."""

from comfy_api.latest import io

from ..turbotalk_core.checkpoints.audio_encoder import load_audio_encoder
from .host.checks import hides_folders
from .host.encoders import HostAudioEncoder
from .host.folders import find_model, list_models
from .sockets import CATEGORY


class LoadAudioEncoder(io.ComfyNode):
    """Node that loads wav2vec2 encoders of any size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkLoadAudioEncoder",
            display_name="TurboTalk · Load audio encoder",
            category=CATEGORY,
            description="Loads a wav2vec2 network of any size, which encodes the voice.",
            search_aliases=["wav2vec", "speech", "infinitetalk"],
            inputs=[
                io.Combo.Input(
                    "audio_encoder_name",
                    options=list_models("audio_encoders"),
                    tooltip="A wav2vec2 file in models/audio_encoders. It must be the one that the "
                    "audio adapter was trained with: chinese-wav2vec2-base for InfiniteTalk.",
                )
            ],
            outputs=[
                io.AudioEncoder.Output(
                    display_name="audio_encoder",
                    tooltip="For Encode speech, or the host's own Audio Encoder Encode.",
                )
            ],
        )

    @classmethod
    @hides_folders
    def execute(cls, audio_encoder_name: str) -> io.NodeOutput:
        """Load the file."""
        path = find_model("audio_encoders", audio_encoder_name)
        return io.NodeOutput(HostAudioEncoder(load_audio_encoder(path)))
