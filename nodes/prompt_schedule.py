"""Node: prompts with times to a CONDITIONING that changes during the video."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..turbotalk_core.conditioning.prompts import parse_prompts
from ..turbotalk_core.errors import RequestError, TurboTalkError
from .host.checks import checks_values
from .host.encoders import PROMPT_START
from .sockets import CATEGORY


class PromptSchedule(io.ComfyNode):
    """Node that encodes several prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkPromptSchedule",
            display_name="TurboTalk · Prompt schedule",
            category=CATEGORY,
            description="Several prompts for one video, each for its own seconds, against gestures "
            "that repeat. A chunk of the video gets the prompt of its middle.",
            search_aliases=["prompt travel", "timed prompt", "conditioning", "infinitetalk"],
            inputs=[
                io.Clip.Input("clip", tooltip="umT5, from the host's Load CLIP of type wan."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="0-4s: a man talks and smiles\n4-9s: he frowns",
                    tooltip="A line for each: START-STOPs: prompt, in seconds. The first begins at "
                    "0, each other where the one before stops; the last holds to the end.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="For the sampler; other samplers use the first prompt and all others "
                    "at once.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        """Check the prompts before running; linked or missing text is None here."""
        if text is None:
            return True
        try:
            parse_prompts(text)
        except TurboTalkError as error:
            return str(error)
        return True

    @classmethod
    @checks_values
    def execute(cls, clip: Any, text: str) -> io.NodeOutput:
        """Encode the prompts."""
        if clip is None:
            raise RequestError("got no text encoder; connect Load CLIP of type wan")
        conditioning = []
        for segment in parse_prompts(text):
            tokens = clip.tokenize(segment.text)
            embedding, options = clip.encode_from_tokens_scheduled(tokens)[0]
            conditioning.append([embedding, {**options, PROMPT_START: segment.start}])
        return io.NodeOutput(conditioning)
