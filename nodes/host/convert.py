"""Conversion between values of the host and of the core: axis order and value range.

No other module converts them. The host: IMAGE [T, H, W, C] float in [0, 1], VIDEO, MASK
[B, H, W], AUDIO {"waveform": [B, C, S], "sample_rate": Hz}. The core: frames [B, C, T, H, W] in
[-1, 1], frames on disk uint8 [T, H, W, C], pictures [H, W, C] in [0, 1], ``Waveform``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from comfy_api.latest import Types, io
from torch import Tensor

from ...turbotalk_core.audio.io import from_samples
from ...turbotalk_core.errors import AudioError, ImageError
from ...turbotalk_core.geometry import FPS
from ...turbotalk_core.types import Waveform
from ...turbotalk_core.video.reader import VideoFrames
from .folders import new_temporary_path


def waveform_from_audio(audio: Mapping[str, Any] | None) -> Waveform:
    """Convert an AUDIO to a waveform.

    Args:
        audio: one sound, any rate, channel count and sample type. The host passes None as the sound
            of a video that has none.

    Returns:
        The same sound.

    Raises:
        AudioError: There is no sound, or it cannot be used.
    """
    if audio is None:
        raise AudioError(
            "got no sound; a video without sound has none, so connect a recording, with Load Audio"
        )
    try:
        samples, rate = audio["waveform"], int(audio["sample_rate"])
    except (LookupError, TypeError, ValueError):
        samples, rate = None, 0
    if not isinstance(samples, Tensor):
        raise AudioError(
            f"got a {type(audio).__name__} without samples and their rate as sound; connect AUDIO, "
            "such as that of Load Audio"
        )
    if samples.numel() == 0:
        raise AudioError("the audio has no samples; give at least one video frame (40 ms)")
    return from_samples(samples, rate)


def region_from_mask(mask_BHW: Tensor) -> Tensor:
    """Convert a MASK to a region.

    Args:
        mask_BHW: one mask, [1, H, W] or [H, W].

    Returns:
        The mask [H, W].

    Raises:
        ImageError: There are several masks, or none.
    """
    if not isinstance(mask_BHW, Tensor) or mask_BHW.ndim < 2:
        raise ImageError(
            f"got a {type(mask_BHW).__name__} as mask; connect a MASK, white where the person is"
        )
    num_masks = mask_BHW.shape[:-2].numel()
    if num_masks != 1:
        raise ImageError(
            f"got {num_masks} masks; a speaker stands in one place, so pick one of them"
        )
    return mask_BHW.reshape(mask_BHW.shape[-2:])


def describe_pictures(reference: object) -> str:
    """Describe what several pictures are taken for; empty for a single one and for a VIDEO."""
    if not isinstance(reference, Tensor) or reference.ndim != 4 or len(reference) < 2:
        return ""
    num_pictures = len(reference)
    return (
        f"{num_pictures} pictures are taken as the frames of a film, {FPS} a second "
        f"({num_pictures / FPS:g} s); for {num_pictures} videos queue {num_pictures} times, with "
        "one picture each"
    )


@contextmanager
def open_pictures(reference: Tensor | io.Video.Type | None) -> Iterator[Sequence[Tensor]]:
    """Convert a reference image, or a video to dub, to pictures.

    Args:
        reference: IMAGE, where several images are the frames of a video at 25 a second; or VIDEO of
            any frame rate, decoded on access. If the host has still to crop or to resize a VIDEO,
            it does so into a file in its temporary folder, which is deleted after the block.

    Yields:
        Pictures [H, W, C] in [0, 1], 25 a second.

    Raises:
        ImageError: There is no picture, or the video cannot be read.
    """
    if isinstance(reference, Tensor):
        yield _list_pictures(reference)
        return
    if not hasattr(reference, "get_stream_source"):
        got = "no picture" if reference is None else f"a {type(reference).__name__}"
        raise ImageError(
            f"got {got} as reference image; connect a portrait (IMAGE), or a video to dub (VIDEO)"
        )
    # Only hosts since 0.35 have the method. True means that the source is not edited yet.
    with _reports_host_errors("read the video"):
        has_edits = getattr(reference, "has_pending_frame_edits", lambda: False)()
    if not has_edits:
        yield _open_video(reference)
        return
    path = new_temporary_path(".mp4")
    try:
        _save_edited(reference, path)
        yield VideoFrames(path)
    finally:
        path.unlink(missing_ok=True)


def _list_pictures(images: Tensor) -> list[Tensor]:
    images_THWC = images.unsqueeze(0) if images.ndim == 3 else images
    if images_THWC.ndim != 4 or images_THWC.numel() == 0:
        raise ImageError(
            f"got images of shape {tuple(images.shape)}, in which there is no picture; connect at "
            "least one, [number, height, width, channels]"
        )
    return list(images_THWC)


def _open_video(reference: io.Video.Type) -> Sequence[Tensor]:
    with _reports_host_errors("read the video"):
        source = reference.get_stream_source()
        # If the host trimmed a VIDEO, its source is still the whole file.
        start, seconds = reference.get_active_trim_window()
    pictures = VideoFrames(Path(source) if isinstance(source, str) else source)
    kept = range(len(pictures))[round(start * FPS) :]
    kept = kept[: max(1, round(seconds * FPS))] if seconds else kept
    if not kept:
        raise ImageError(
            f"nothing is left of the video, which is {len(pictures) / FPS:g} s long and trimmed to "
            f"begin at {start:g} s; trim less of it"
        )
    return _Excerpt(pictures, kept)


def _save_edited(reference: io.Video.Type, path: Path) -> None:
    """Let the host save a VIDEO with its edits and its trim, without loss if it can."""
    wanted = {
        "format": Types.VideoContainer.MP4,
        "codec": Types.VideoCodec.H264,
        "crf": 0,  # without loss, for 8 bits
        "preset": "ultrafast",  # larger and faster; the file is soon deleted
    }
    known = signature(reference.save_to).parameters
    options = {name: value for name, value in wanted.items() if name in known}
    with _reports_host_errors("crop or resize the video"):
        reference.save_to(str(path), **options)
        if not path.is_file():
            raise ImageError("it saved no file")


@contextmanager
def _reports_host_errors(what: str) -> Iterator[None]:
    """Raise an error of the host's own code for videos as an ``ImageError``."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(
            f"ComfyUI cannot {what} ({reason}); save it with Save Video, and load that file"
        ) from error


class _Excerpt(Sequence[Tensor]):
    """Range of a video's pictures, decoded on access."""

    def __init__(self, pictures: VideoFrames, kept: range) -> None:
        self._pictures, self._kept = pictures, kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._pictures[self._kept[index]]

    def digest(self) -> str:
        return f"{self._pictures.digest()} {self._kept}"


def image_from_frames(frames_BCTHW: Tensor) -> Tensor:
    """Convert the core's frames to an IMAGE, [T, H, W, C] in [0, 1]."""
    return ((frames_BCTHW[0].permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1)


def frames_from_image(image_THWC: Tensor) -> Tensor:
    """Convert an IMAGE to the core's frames, [1, C, T, H, W] in [-1, 1]."""
    return (image_THWC.permute(3, 0, 1, 2) * 2 - 1).unsqueeze(0)


def image_from_bytes(frames_THWC: Tensor) -> Tensor:
    """Convert uint8 frames to an IMAGE."""
    return frames_THWC.float() / 255
