"""Node: AUDIO to audio features per video frame."""

from typing import Any

from comfy_api.latest import io

from ..turbotalk_core.audio.conversation import LONE_SPEAKER, encode_conversation
from ..turbotalk_core.request import EncodeMode
from ..turbotalk_core.sound import cut
from ..turbotalk_core.types import Speaker
from .host.checks import checks_values
from .host.convert import waveform_from_audio
from .host.encoders import make_audio_encoder
from .sockets import CATEGORY, SpeechSocket
from .widgets import find_span, make_encode_inputs


class EncodeSpeech(io.ComfyNode):
    """Node that encodes a voice."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkEncodeSpeech",
            display_name="TurboTalk · Encode speech",
            category=CATEGORY,
            description="Lets the audio encoder hear the voice. The video will be exactly as long "
            "as the voice, at 25 frames a second, and carries the original sound.",
            search_aliases=["wav2vec", "audio", "voice", "infinitetalk"],
            inputs=[
                io.AudioEncoder.Input(
                    "audio_encoder",
                    tooltip="From Load audio encoder; the host's own loader works as well.",
                ),
                io.Audio.Input(
                    "audio",
                    tooltip="The voice: any rate, mono or more. Silence is fine and gives a closed "
                    "mouth; music and noise are better removed before.",
                ),
                io.Boolean.Input(
                    "normalize_loudness",
                    default=True,
                    tooltip="Bring the voice to -23 LUFS before it is heard, as the model was "
                    "trained. The sound of the video is never changed.",
                    advanced=True,
                ),
                *make_encode_inputs("the voice"),
            ],
            outputs=[
                SpeechSocket.Output(
                    display_name="speech", tooltip="What was heard, its length, the original sound."
                )
            ],
        )

    @classmethod
    @checks_values
    def execute(
        cls,
        audio_encoder: Any,
        audio: dict[str, Any],
        normalize_loudness: bool,
        hearing: EncodeMode = "auto",
        start_seconds: float = 0.0,
        end_seconds: float = 0.0,
    ) -> io.NodeOutput:
        """Encode the voice as a conversation of one speaker."""
        voice = cut(waveform_from_audio(audio), *find_span(start_seconds, end_seconds))
        conversation = encode_conversation(
            [Speaker(name=LONE_SPEAKER, waveform=voice)],
            make_audio_encoder(audio_encoder),
            normalizes_loudness=normalize_loudness,
            hearing=hearing,
        )
        return io.NodeOutput(conversation)
