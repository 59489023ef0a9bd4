"""Muxing of frames and the original sound into one mp4 while the frames are being made.

Axes: T frames, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError
from ..geometry import FPS, retime
from ..sound import Sound
from .background import Background
from .writer import Encoding, open_video

PIXEL_FORMATS = ("yuv420p", "yuv420p10le", "yuv444p")
_ENCODERS = {"h264": ("libx264", None), "h265": ("libx265", "hvc1")}  # Apple players require hvc1
CODECS = tuple(_ENCODERS)
MAX_CRF = 51  # x264 and x265, 8 bit
# By their common names; those of US television (NTSC) are fractions.
FRAME_RATES = {
    "25": Fraction(25),
    "24": Fraction(24),
    "23.976": Fraction(24_000, 1001),
    "29.97": Fraction(30_000, 1001),
    "30": Fraction(30),
    "50": Fraction(50),
    "59.94": Fraction(60_000, 1001),
    "60": Fraction(60),
}


def quantize_frames(frames_BCTHW: Tensor) -> Tensor:
    """Quantise the model's frames to 8 bits.

    Args:
        frames_BCTHW: [1, 3, T, H, W], float; values outside [-1, 1] are clipped.

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
    fps: str = "25",
) -> int:
    """Write an mp4 from a stream of frames and a sound, in memory that does not grow with length.

    The sound is encoded as AAC at its own rate, if AAC supports it, and cut or padded with silence
    to the length of the frames. A frame rate other than 25 leaves frames out or repeats them, so
    that each is shown at its time; the sound does not change. If an exception is raised, here or
    by ``frames``, no file is left.

    Args:
        path: ``.mp4`` file to write; an existing file is replaced when the new one is complete.
        frames: batches of frames at 25 per second, each uint8 [T, H, W, 3].
        waveform: the original sound, or None for a video without sound.
        codec: one of ``CODECS``.
        crf: constant rate factor, 0 (best) to ``MAX_CRF``; 18 is visually lossless.
        pixel_format: one of ``PIXEL_FORMATS``; yuv420p plays everywhere.
        metadata: container tags.
        fps: frames per second of the file, one of ``FRAME_RATES``.

    Returns:
        The number of frames written.

    Raises:
        RequestError: if a setting is not one of those allowed.
        GeometryError: if there are no frames, or their size cannot be encoded.
        OutputError: if the file cannot be written.
    """
    if path.suffix != ".mp4":
        raise RequestError(f"got the output name {path.name!r}; it must end in .mp4")
    if codec not in CODECS:
        raise RequestError(f"got codec {codec!r}; choose one of {', '.join(CODECS)}")
    if pixel_format not in PIXEL_FORMATS:
        raise RequestError(
            f"got pixel format {pixel_format!r}; choose one of {', '.join(PIXEL_FORMATS)}"
        )
    if fps not in FRAME_RATES:
        raise RequestError(f"got fps {fps!r}; choose one of {', '.join(FRAME_RATES)}")
    if not 0 <= crf <= MAX_CRF:
        raise RequestError(f"got crf {crf}; it must lie in 0 to {MAX_CRF}, 18 is a good one")
    encoder, tag = _ENCODERS[codec]
    options = {"crf": str(crf)}
    if codec == "h265":
        options["x265-params"] = "log-level=error"  # x265 bypasses FFmpeg's log and uses stderr
    encoding = Encoding(
        encoder=encoder,
        pixel_format=pixel_format,
        options=options,
        tag=tag,
        fps=FRAME_RATES[fps],
    )
    with (
        open_video(path, encoding, waveform=waveform, metadata=metadata) as writer,
        Background() as background,
    ):
        for frames_THWC in _retime_batches(frames, encoding.fps):
            background.do(writer.write, frames_THWC)
    return writer.num_frames


def _retime_batches(frames: Iterable[Tensor], fps: Fraction) -> Iterator[Tensor]:
    start = 0
    for frames_THWC in frames:
        stop = start + frames_THWC.shape[0]
        shown = retime(start, stop, fps)
        if fps == FPS:
            yield frames_THWC
        elif shown:
            yield frames_THWC[torch.tensor(shown) - start]
        start = stop
