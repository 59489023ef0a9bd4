"""Node: speakers to audio features of each, per video frame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..turbotalk_core.audio.conversation import encode_conversation
from ..turbotalk_core.request import EncodeMode
from ..turbotalk_core.sound import cut
from ..turbotalk_core.types import Speaker
from .host.checks import checks_values
from .host.encoders import make_audio_encoder
from .sockets import CATEGORY, SpeakersSocket, SpeechSocket
from .widgets import find_span, make_encode_inputs


class EncodeSpeakers(io.ComfyNode):
    """Node that encodes the voices of several speakers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkEncodeSpeakers",
            display_name="TurboTalk · Encode speakers",
            category=CATEGORY,
            description="Lets the audio encoder hear all speakers. The video ends when the last of "
            "them has spoken, and carries all voices mixed.",
            search_aliases=["wav2vec", "audio", "conversation", "multitalk", "infinitetalk"],
            inputs=[
                io.AudioEncoder.Input(
                    "audio_encoder",
                    tooltip="From Load audio encoder; the host's own loader works as well.",
                ),
                SpeakersSocket.Input("speakers", tooltip="From the last Speaker of the chain."),
                io.Boolean.Input(
                    "normalize_loudness",
                    default=True,
                    tooltip="Bring each voice to -23 LUFS before it is heard, as the model was "
                    "trained. The sound of the video keeps the voices as loud as they are.",
                    advanced=True,
                ),
                *make_encode_inputs("each voice"),
            ],
            outputs=[
                SpeechSocket.Output(
                    display_name="speech",
                    tooltip="What was heard of each speaker, and the mix, for the sampler.",
                )
            ],
        )

    @classmethod
    @checks_values
    def execute(
        cls,
        audio_encoder: Any,
        speakers: tuple[Speaker, ...],
        normalize_loudness: bool,
        hearing: EncodeMode = "auto",
        start_seconds: float = 0.0,
        end_seconds: float = 0.0,
    ) -> io.NodeOutput:
        """Encode the conversation."""
        span = find_span(start_seconds, end_seconds)
        conversation = encode_conversation(
            [
                speaker
                if speaker.waveform is None
                else replace(speaker, waveform=cut(speaker.waveform, *span))
                for speaker in speakers
            ],
            make_audio_encoder(audio_encoder),
            normalizes_loudness=normalize_loudness,
            hearing=hearing,
        )
        return io.NodeOutput(conversation)
