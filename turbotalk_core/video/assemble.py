"""Frames and the original sound into one mp4, while the frames are still being made.

Axes: T frames, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError
from ..sound import Sound
from .writer import Encoding, open_video

PIXEL_FORMATS = ("yuv420p", "yuv420p10le", "yuv444p")
_ENCODERS = {"h264": ("libx264", None), "h265": ("libx265", "hvc1")}  # Apple players ask for hvc1
CODECS = tuple(_ENCODERS)
MAX_CRF = 51  # x264 and x265, 8 bit


def quantize_frames(frames_BCTHW: Tensor) -> Tensor:
    """Turn the model's frames into the bytes that files hold.

    Args:
        frames_BCTHW: [1, 3, T, H, W], float; what lies outside [-1, 1] is clipped.

    Returns:
        uint8 [T, H, W, 3] on the CPU, rounded to nearest.
    """
    frames_THWC = frames_BCTHW[0].permute(1, 2, 3, 0)
    return ((frames_THWC.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def assemble(
    path: Path,
    frames: Iterable[Tensor],
    waveform: Sound | None,
    *,
    codec: str = "h264",
    crf: int = 18,
    pixel_format: str = "yuv420p",
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a video; frames are encoded as they come, so memory does not grow with length.

    The sound is read along with them: the given one at its own rate, as AAC, cut or continued with
    silence to the length of the frames. Whatever is raised, here or by the frames, leaves no file
    behind.

    Args:
        path: the ``.mp4`` to make; an older one is replaced when the new one is whole.
        frames: batches of frames, each uint8 [T, H, W, 3].
        waveform: the original recording, or None for a silent film.
        codec: one of ``CODECS``.
        crf: constant rate factor, 0 (best) to ``MAX_CRF``; 18 is visually lossless.
        pixel_format: one of ``PIXEL_FORMATS``; yuv420p plays everywhere.
        metadata: container tags.

    Returns:
        The number of frames written.

    Raises:
        RequestError: a setting that is not one of the above.
        GeometryError: no frames, or frames of a size that cannot be encoded.
        OutputError: the file cannot be written.
    """
    if path.suffix != ".mp4":
        raise RequestError(f"got the output name {path.name!r}; it must end in .mp4")
    if codec not in CODECS:
        raise RequestError(f"got codec {codec!r}; choose one of {', '.join(CODECS)}")
    if pixel_format not in PIXEL_FORMATS:
        raise RequestError(
            f"got pixel format {pixel_format!r}; choose one of {', '.join(PIXEL_FORMATS)}"
        )
    if not 0 <= crf <= MAX_CRF:
        raise RequestError(f"got crf {crf}; it must lie in 0 to {MAX_CRF}, 18 is a good one")
    encoder, tag = _ENCODERS[codec]
    options = {"crf": str(crf)}
    if codec == "h265":
        options["x265-params"] = "log-level=error"  # it writes to stderr by itself
    encoding = Encoding(encoder=encoder, pixel_format=pixel_format, options=options, tag=tag)
    with open_video(path, encoding, waveform=waveform, metadata=metadata) as writer:
        for frames_THWC in frames:
            writer.write(frames_THWC)
    return writer.num_frames
