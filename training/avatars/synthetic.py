"""Complete clips of the synthetic talking-avatar set: picture, sound and the true mouth curve.

Input: a split and a seed. Output: clips, or files from `python -m training.avatars.synthetic`.
Training and evaluation use the set through this module.

Axes: C channels, T video frames, H height, W width, S audio samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.avatars.avatars import draw_avatar
from training.avatars.motion import draw_motion
from training.avatars.mouth import MouthCurve, mouth_curve
from training.avatars.portrait import paint
from training.avatars.seeds import open_stream
from training.avatars.speech import draw_speech
from training.outputs import hold_files, write_picture
from turbotalk_core.cli.arguments import Parser, run
from turbotalk_core.errors import RequestError
from turbotalk_core.geometry import FPS, MAX_FRAMES, SAMPLE_RATE
from turbotalk_core.safe_io.atomic import reports_disk_errors, whole_file
from turbotalk_core.types import Waveform
from turbotalk_core.video.mux import assemble, quantize_frames

SAMPLES_PER_FRAME = SAMPLE_RATE // FPS
SILENT_SHARE = 0.03  # Fraction of silent clips, from which a model learns the closed mouth.


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticClip:
    """Clip of one avatar with one utterance.

    Attributes:
        frames_CTHW: float32 in [-1, 1].
        waveform_S: float32 mono, exactly as long as the frames.
        sample_rate: Hz.
        mouth: true mouth curve, which follows from the waveform alone.
        still_mask_HW: True where no pixel changes, neither in this clip nor from its reference.
    """

    frames_CTHW: Tensor
    waveform_S: Tensor
    sample_rate: int
    mouth: MouthCurve
    still_mask_HW: Tensor


def draw_clip(split: str, seed: int, num_frames: int) -> SyntheticClip:
    """Draw a clip.

    Args:
        split: `train` or `heldout`.
        seed: 0 or more.
        num_frames: at least 1, at 25 frames a second.

    Returns:
        The clip; the same arguments return the same one.

    Raises:
        MissingToolError: if espeak-ng is not installed.
        RequestError: if the split is unknown, the seed negative, or there are no frames.
    """
    return draw_clip_with_reference(split, seed, num_frames, gap_frames=0)[0]


def draw_clip_with_reference(
    split: str, seed: int, num_frames: int, gap_frames: int
) -> tuple[SyntheticClip, Tensor]:
    """Draw a clip, and an earlier frame of the same recording as its reference.

    Args:
        split: `train` or `heldout`.
        seed: 0 or more.
        num_frames: frames of the clip, at least 1.
        gap_frames: frames from the reference to the clip's first frame, with continuous motion and
            speech. With 0 the first frame is the reference.

    Returns:
        The clip, and the reference `[3, H, W]`.

    Raises:
        MissingToolError: if espeak-ng is not installed.
        RequestError: if the split is unknown, the seed or gap negative, or there are no frames.
    """
    if num_frames < 1 or gap_frames < 0:
        raise RequestError(
            f"got {num_frames} frames after a gap of {gap_frames}; ask for at least 1 frame and "
            "a gap of 0 or more"
        )
    total = gap_frames + num_frames
    if open_stream(split, seed, "silence").random() < SILENT_SHARE:
        take_S = torch.zeros(total * SAMPLES_PER_FRAME)
    else:
        take_S = draw_speech(split, seed, total / FPS)
    return film(split, seed, take_S, gap_frames)


def film(
    split: str, seed: int, take_S: Tensor, gap_frames: int = 0
) -> tuple[SyntheticClip, Tensor]:
    """Render an avatar that says a given sound.

    Args:
        split: `train` or `heldout`.
        seed: seed of the avatar and its motion.
        take_S: the sound, mono at SAMPLE_RATE, a whole number of frames and longer than the gap.
        gap_frames: frames at the start that come before the clip; the first of them is the
            reference.

    Returns:
        The clip, and the reference `[3, H, W]`.
    """
    total = take_S.shape[0] // SAMPLES_PER_FRAME
    avatar = draw_avatar(split, seed)
    take_mouth = mouth_curve(take_S)
    motion = draw_motion(avatar, split, seed, total, take_mouth.opening_T)
    waveform_S = take_S[gap_frames * SAMPLES_PER_FRAME :].clone()
    # The mouth curve of the clip is computed from its own sound, without the sound before it.
    mouth = mouth_curve(waveform_S)
    painting = paint(avatar, motion.select(gap_frames, total), mouth)
    frames_CTHW, still_mask_HW = painting.frames_CTHW, painting.still_mask_HW
    reference_CHW = frames_CTHW[:, 0].clone()
    if gap_frames > 0:
        earlier = paint(avatar, motion.select(0, 1), take_mouth.select(0, 1))
        reference_CHW = earlier.frames_CTHW[:, 0]
        still_mask_HW = still_mask_HW & earlier.still_mask_HW
    clip = SyntheticClip(
        frames_CTHW=frames_CTHW,
        waveform_S=waveform_S,
        sample_rate=SAMPLE_RATE,
        mouth=mouth,
        still_mask_HW=still_mask_HW,
    )
    return clip, reference_CHW


def to_pixels(frames_CTHW: Tensor) -> np.ndarray:
    """Convert frames in [-1, 1] to uint8 `[T, H, W, C]`."""
    return quantize_frames(frames_CTHW.unsqueeze(0)).contiguous().numpy()


def make_sheet(clips_CTHW: Sequence[Tensor], columns: int) -> np.ndarray:
    """Arrange evenly spaced frames, one row per clip, in one uint8 picture `[H, W, C]`."""
    rows = []
    for frames_CTHW in clips_CTHW:
        chosen = torch.linspace(0, frames_CTHW.shape[1] - 1, columns).round().long()
        rows.append(np.concatenate(list(to_pixels(frames_CTHW[:, chosen])), axis=1))
    return np.concatenate(rows, axis=0)


def _write_files(clip: SyntheticClip, reference_CHW: Tensor, folder: Path) -> None:
    # Imported when used: training itself writes no files.
    from PIL import Image
    from scipy.io import wavfile

    write_picture(folder / "portrait.png", Image.fromarray(to_pixels(reference_CHW[:, None])[0]))
    write_picture(folder / "sheet.png", Image.fromarray(make_sheet([clip.frames_CTHW], 10)))
    sound = (clip.waveform_S.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    with whole_file(folder / "speech.wav") as part, reports_disk_errors(part):
        wavfile.write(part, clip.sample_rate, sound)
    waveform = Waveform(samples_CS=clip.waveform_S.unsqueeze(0), sample_rate=clip.sample_rate)
    assemble(
        folder / "clip.mp4", [quantize_frames(clip.frames_CTHW.unsqueeze(0))], waveform, crf=12
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one clip of the set to a folder; returns the exit code."""
    parser = Parser(
        prog="python -m training.avatars.synthetic",
        description="Draw one clip of the synthetic talking-avatar set and write portrait.png, "
        "speech.wav, clip.mp4 (the true rendering, with sound) and sheet.png (ten of its frames).",
    )
    parser.add_argument(
        "--split",
        choices=("train", "heldout"),
        default="heldout",
        help="which half of the set; models never train on heldout (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, required=True, help="which clip, 0 or more")
    parser.add_argument("--out", type=Path, required=True, help="folder, made if it is not there")
    parser.add_argument(
        "--frames", type=int, default=125, help="length at 25 a second (default: %(default)s)"
    )
    parser.add_argument(
        "--gap",
        type=int,
        default=0,
        help="frames between the portrait and the clip's start (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    return run(lambda: _draw(options))


def _draw(options: argparse.Namespace) -> None:
    if max(options.frames, options.gap) > MAX_FRAMES:
        raise RequestError(
            f"got {options.frames} frames after a gap of {options.gap}; a clip has at most "
            f"{MAX_FRAMES}"
        )
    with hold_files(options.out / "clip.mp4"):
        clip, reference_CHW = draw_clip_with_reference(
            options.split, options.seed, options.frames, options.gap
        )
        _write_files(clip, reference_CHW, options.out)


if __name__ == "__main__":
    sys.exit(main())
