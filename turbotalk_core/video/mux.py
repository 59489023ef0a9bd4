"""Muxing of frames and the original sound into one mp4 while the frames are being made.

Axes: T frames, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError
from ..geometry import FPS, retime
from ..sound import Sound
from .background_worker import BackgroundWorker
from .writer import Encoding, VideoWriter, open_video

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


class Mp4Writer:
    """A video file in the making; made by ``open_mp4``."""

    def __init__(self, writer: VideoWriter, background: BackgroundWorker, fps: Fraction) -> None:
        """Prepare for the first frame."""
        self._writer = writer
        self._background = background
        self._fps = fps

    @property
    def num_frames(self) -> int:
        """Frames that are encoded by now; after ``open_mp4``, all of them."""
        return self._writer.num_frames

    def write(self, frames: Iterable[Tensor]) -> None:
        """Encode frames as they come; call it once.

        Args:
            frames: batches of all frames, each uint8 [T, H, W, 3], at 25 frames per second.
        """
        for frames_THWC in _retime_batches(frames, self._fps):
            self._background.do(self._writer.write, frames_THWC)


@contextmanager
def open_mp4(
    path: Path,
    waveform: Sound | None,
    *,
    codec: str = "h264",
    crf: int = 18,
    pixel_format: str = "yuv420p",
    metadata: Mapping[str, str] | None = None,
    fps: str = "25",
    part_folder: Path | None = None,
) -> Iterator[Mp4Writer]:
    """Open an mp4 file for writing, and check its settings and folder before there is a frame.

    The sound is read along with the frames. It is encoded as AAC at its own rate, if AAC supports
    it, and cut or padded with silence to the length of the frames. A frame rate other than 25
    leaves frames out or repeats them, so that each is shown at its time; the sound does not change.
    If the block raises an exception, no file is left.

    Args:
        path: ``.mp4`` file to write; an existing file is replaced when the new one is complete.
        waveform: the original sound, or None for a video without sound.
        codec: one of ``CODECS``.
        crf: constant rate factor, 0 (best) to ``MAX_CRF``; 18 is visually lossless.
        pixel_format: one of ``PIXEL_FORMATS``; yuv420p plays everywhere.
        metadata: container tags.
        fps: frames per second of the file, one of ``FRAME_RATES``.
        part_folder: folder of the unfinished file, on the same file system; None is that of the
            path.

    Yields:
        The writer of the frames.

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
        open_video(
            path, encoding, waveform=waveform, metadata=metadata, part_folder=part_folder
        ) as writer,
        BackgroundWorker() as background,
    ):
        yield Mp4Writer(writer, background, encoding.fps)


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
    """Write a video; frames are encoded as they come, so memory does not grow with length.

    Args:
        path: see ``open_mp4``, which has all of the settings.
        frames: batches of frames, each uint8 [T, H, W, 3].
        waveform: see there.
        codec: see there.
        crf: see there.
        pixel_format: see there.
        metadata: see there.
        fps: see there.

    Returns:
        The number of frames written.

    Raises:
        RequestError: a setting out of range.
        GeometryError: no frames, or frames of a size that cannot be encoded.
        OutputError: the file cannot be written.
    """
    with open_mp4(
        path,
        waveform,
        codec=codec,
        crf=crf,
        pixel_format=pixel_format,
        metadata=metadata,
        fps=fps,
    ) as video:
        video.write(frames)
    return video.num_frames


def _retime_batches(frames: Iterable[Tensor], fps: Fraction) -> Iterator[Tensor]:
    start = 0
    for frames_THWC in frames:
        stop = start + frames_THWC.shape[0]
        selected = retime(start, stop, fps)
        if fps == FPS:
            yield frames_THWC
        elif selected:
            yield frames_THWC[torch.tensor(selected) - start]
        start = stop
