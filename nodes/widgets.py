"""Widgets for the encode mode and the part of a voice to use."""

from fractions import Fraction

from comfy_api.latest import io

from ..turbotalk_core.geometry import FPS, MAX_FRAMES
from ..turbotalk_core.request import ENCODE_MODES
from ..turbotalk_core.takes.take import Take

MAX_SECONDS = MAX_FRAMES / FPS


def make_encode_inputs(whose: str) -> list[io.Combo.Input | io.Float.Input]:
    """Return the inputs of the three widgets.

    Args:
        whose: voice, for the tooltips.

    Returns:
        ``hearing``, ``start_seconds`` and ``end_seconds``.
    """
    return [
        io.Combo.Input(
            "hearing",
            options=list(ENCODE_MODES),
            default="auto",
            tooltip=f"whole: {whose} is encoded at once, which takes about a gigabyte per "
            "minute. sections: 40 seconds at a time, for hours of sound. auto: whole up to five "
            "minutes.",
            optional=True,
            advanced=True,
        ),
        _make_seconds("start_seconds", f"Of {whose}, leave out what lies before."),
        _make_seconds("end_seconds", f"Of {whose}, leave out what lies after; 0 keeps all."),
    ]


def _make_seconds(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=0.0,
        min=0.0,
        max=MAX_SECONDS,
        step=0.01,
        tooltip=tooltip,
        optional=True,
        advanced=True,
    )


def find_span(start_seconds: float, end_seconds: float) -> tuple[Fraction, Fraction | None]:
    """Convert the widgets' values to the start and the end of a span.

    Args:
        start_seconds: of the widget.
        end_seconds: of the widget; 0 keeps all.

    Returns:
        Start and end for ``sound.cut``; an end of None is the end of the sound.
    """
    return Fraction(start_seconds), Fraction(end_seconds) if end_seconds else None


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
