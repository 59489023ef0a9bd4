"""Widgets for the part of a take to use."""

from comfy_api.latest import io

from ..turbotalk_core.geometry import MAX_FRAMES
from ..turbotalk_core.takes.take import Take


def make_trim_inputs(num_frames: int) -> list[io.Int.Input]:
    """Return the inputs of the two widgets.

    Args:
        num_frames: default length, 0 for the whole take.

    Returns:
        ``start_frame`` and ``num_frames``.
    """
    return [
        io.Int.Input(
            "start_frame",
            default=0,
            min=0,
            max=MAX_FRAMES,
            tooltip="Frames to leave out at the start, 25 a second.",
            advanced=True,
        ),
        io.Int.Input(
            "num_frames",
            default=num_frames,
            min=0,
            max=MAX_FRAMES,
            tooltip="Frames to keep from there, fewer where the take ends earlier; 0 keeps all.",
            advanced=True,
        ),
    ]


def find_stop(take: Take, start_frame: int, num_frames: int) -> int:
    """Return one past the last frame that the widgets select."""
    return min(start_frame + num_frames, take.num_frames) if num_frames else take.num_frames
