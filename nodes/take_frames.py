"""Node: frames of a take to IMAGE."""

from comfy_api.latest import io

from ..turbotalk_core.video.take import Take
from .convert import image_from_bytes
from .sockets import CATEGORY, TakeSocket
from .trim import find_stop, make_trim_inputs


class TakeFrames(io.ComfyNode):
    """Reads frames of a take into memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="TurboTalkTakeFrames",
            display_name="TurboTalk · Take frames",
            category=CATEGORY,
            description="Reads frames of a take into memory, for upscalers and other packs. "
            "832x480 needs 4.8 MB a frame: read long takes in parts.",
            search_aliases=["images", "frames", "infinitetalk"],
            inputs=[
                TakeSocket.Input("take", tooltip="From the TurboTalk sampler."),
                *make_trim_inputs(num_frames=81),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames, lossless.")],
        )

    @classmethod
    def execute(cls, take: Take, start_frame: int, num_frames: int) -> io.NodeOutput:
        """Read."""
        stop = find_stop(take, start_frame, num_frames)
        return io.NodeOutput(image_from_bytes(take.read(start_frame, stop)))
