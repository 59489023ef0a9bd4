"""Node: one more person in the picture."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..turbotalk_core.errors import AudioError, ImageError
from ..turbotalk_core.geometry import MAX_SIDE
from ..turbotalk_core.types import Speaker
from .host.checks import checks_values, is_connected
from .host.convert import region_from_mask, waveform_from_audio
from .sockets import CATEGORY, SpeakersSocket

TOGETHER, AFTER = "together", "after previous"


class DescribeSpeaker(io.ComfyNode):
    """Node that adds a speaker: name, region, voice and turn."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkSpeaker",
            display_name="TurboTalk · Speaker",
            category=CATEGORY,
            description="One person in the picture, with a voice or without. Chain one node per "
            "person, then encode them all together.",
            search_aliases=["person", "multi", "conversation", "bbox", "multitalk", "infinitetalk"],
            inputs=[
                io.String.Input(
                    "name",
                    default="Anna",
                    tooltip="Shown in the preview and in messages; give each person another.",
                ),
                io.Combo.Input(
                    "starts",
                    options=[TOGETHER, AFTER],
                    default=TOGETHER,
                    tooltip="together: the voice begins with the video. after previous: when the "
                    "speaker before has ended.",
                ),
                *(
                    io.Int.Input(name, default=0, min=0, max=MAX_SIDE, tooltip=tip, advanced=True)
                    for name, tip in (
                        ("x", "Left edge of the person's box, in pixels of the reference image."),
                        ("y", "Upper edge of the person's box, in pixels of the reference image."),
                        ("width", "Of the box, in pixels; all four 0: no box."),
                        ("height", "Of the box, in pixels; all four 0: no box."),
                    )
                ),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="What this person says. Without it the person listens, mouth shut.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the person is, instead of a box: painted over face and body, "
                    "as large as the reference image. Two people need neither: they get the left "
                    "and the right half.",
                ),
                SpeakersSocket.Input(
                    "speakers", optional=True, tooltip="From the speaker before this one."
                ),
            ],
            outputs=[
                SpeakersSocket.Output(
                    display_name="speakers",
                    tooltip="All so far, for the next Speaker, Speakers preview or Encode "
                    "speakers.",
                )
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    @checks_values
    def execute(
        cls,
        name: str,
        starts: str,
        x: int,
        y: int,
        width: int,
        height: int,
        audio: dict[str, Any] | None = None,
        mask: Tensor | None = None,
        speakers: tuple[Speaker, ...] = (),
    ) -> io.NodeOutput:
        """Append the speaker to the chain."""
        box = (x, y, width, height) if any((x, y, width, height)) else None
        if box is not None and mask is not None:
            raise ImageError(
                f"{name} got a box and a mask; disconnect the mask, or set x, y, width and height "
                "to 0"
            )
        if audio is None and is_connected(cls, "audio"):
            raise AudioError(
                f"{name} got no sound, as from a video that has none; connect a recording, or "
                f"disconnect audio, so that {name} listens"
            )
        speaker = Speaker(
            name=name,
            waveform=None if audio is None else waveform_from_audio(audio),
            follows=starts == AFTER,
            region=box if mask is None else region_from_mask(mask),
        )
        return io.NodeOutput((*speakers, speaker))
