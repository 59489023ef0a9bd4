"""Node: reference image and speakers to an IMAGE of their regions."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..turbotalk_core.conditioning.regions import draw_regions
from ..turbotalk_core.types import Speaker
from .host.checks import checks_values
from .host.convert import open_pictures
from .sockets import CATEGORY, SpeakersSocket


class SpeakersPreview(io.ComfyNode):
    """Node that draws the regions of speakers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkSpeakersPreview",
            display_name="TurboTalk · Speakers preview",
            category=CATEGORY,
            description="Draws each speaker's region, name and turn over the reference image. "
            "Needs no model, so a mistake shows before anything is sampled.",
            search_aliases=["region", "mask", "bbox", "conversation", "multitalk", "infinitetalk"],
            is_output_node=True,
            inputs=[
                io.MultiType.Input(
                    "reference_image",
                    types=[io.Image, io.Video],
                    tooltip="What the sampler gets; of a video the first frame is shown.",
                ),
                SpeakersSocket.Input("speakers", tooltip="From the last Speaker of the chain."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture with its regions.")
            ],
        )

    @classmethod
    @checks_values
    def execute(
        cls, reference_image: Tensor | io.Video.Type, speakers: tuple[Speaker, ...]
    ) -> io.NodeOutput:
        """Draw the regions."""
        with open_pictures(reference_image) as pictures:
            drawn_THWC = draw_regions(pictures[0], speakers).unsqueeze(0)
        return io.NodeOutput(drawn_THWC, ui=ui.PreviewImage(drawn_THWC, cls=cls))
