"""Node: take to IMAGE."""

from logging import getLogger

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..turbotalk_core.errors import RequestError
from ..turbotalk_core.takes.take import Take
from .host.checks import checks_values
from .host.convert import image_from_bytes
from .host.messages import show_text
from .host.takes import read_take
from .sockets import CATEGORY, TakeSocket
from .widgets import find_stop, make_trim_inputs

_log = getLogger(__name__)
_GB = 1e9  # bytes


class TakeFrames(io.ComfyNode):
    """Node that reads frames of a take into memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the schema of the node."""
        return io.Schema(
            node_id="TurboTalkTakeFrames",
            display_name="TurboTalk · Take frames",
            category=CATEGORY,
            description="Reads frames of a take into memory, for upscalers and other packs. "
            "832x480 needs 4.8 MB a frame: read long takes in parts. The node says what it takes.",
            search_aliases=["images", "frames", "infinitetalk"],
            inputs=[
                TakeSocket.Input("take", tooltip="From the TurboTalk sampler."),
                *make_trim_inputs(num_frames=81),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames, lossless.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checks_values
    def execute(cls, take: Take, start_frame: int, num_frames: int) -> io.NodeOutput:
        """Read the frames."""
        stop = find_stop(take, start_frame, num_frames)
        if start_frame < stop:  # otherwise read_take raises
            show_text(_check_memory(take, stop - start_frame), cls.hidden.unique_id)
        return io.NodeOutput(_read(take, start_frame, stop))


def _check_memory(take: Take, num_frames: int) -> str:
    """Compute the memory of the frames, and check that it is free.

    Args:
        take: the source of the frames.
        num_frames: how many.

    Returns:
        A message for the user, which is also logged.

    Raises:
        RequestError: The frames do not fit in the free main memory.
    """
    frame_bytes = take.height * take.width * 3 * torch.float32.itemsize
    needed = num_frames * frame_bytes
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    frames = f"{num_frames} frames of {take.width}x{take.height} as images"
    if needed > free:
        raise RequestError(
            f"{frames} take {needed / _GB:.2f} GB of memory, and {free / _GB:.2f} GB are free; "
            f"read at most {int(free // frame_bytes)} frames at a time with start_frame and "
            "num_frames, or make the video with Assemble video, which never holds them all"
        )
    text = f"{frames} take {needed / _GB:.2f} GB of memory"
    _log.warning("%s", text)
    return text


def _read(take: Take, start: int, stop: int) -> Tensor:
    """Read frames batch by batch, so that little more memory is used than was reported."""
    images_THWC = torch.empty(max(0, stop - start), take.height, take.width, 3)
    first = 0
    for frames_THWC in read_take(take, start, stop):
        images_THWC[first : first + len(frames_THWC)] = image_from_bytes(frames_THWC)
        first += len(frames_THWC)
    return images_THWC
