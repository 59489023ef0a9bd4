"""Two avatars side by side, each with its own voice: the two-speaker variant of the set.

Input: a split, a seed, and the turns of the speakers. Output: one wide picture, the speech of each
half, and regions such as a user would draw. Only code for several speakers is here.

Axes: C channels, T video frames, H height, W width, S audio samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from training.avatars.speech import draw_speech
from training.avatars.synthetic import SAMPLES_PER_FRAME, SyntheticClip, film
from turbotalk_core.conditioning.regions import box_mask, fit_regions
from turbotalk_core.errors import RequestError
from turbotalk_core.geometry import FPS, SPATIAL_STRIDE

Turns = Literal["left", "right", "both", "in turn"]
TURNS: tuple[str, ...] = get_args(Turns)
LARGEST_MARGIN = 0.25  # of a half's side, left free by a region at most


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSpeakerClip:
    """Clip of two avatars in one picture.

    Attributes:
        frames_CTHW: float32 in [-1, 1], twice as wide as high; the left avatar's picture beside the
            right one's.
        clips: clips of the left and of the right avatar alone, each with its own voice and mouth.
    """

    frames_CTHW: Tensor
    clips: tuple[SyntheticClip, SyntheticClip]


def draw_two_speakers(split: str, seed: int, num_frames: int, turns: str) -> TwoSpeakerClip:
    """Draw a clip of two avatars.

    Args:
        split: `train` or `heldout`.
        seed: 0 or more; the avatars are those of seeds 2 * seed and 2 * seed + 1.
        num_frames: at least 2, at 25 frames a second.
        turns: who speaks: `left`, `right`, `both` all along, or `in turn`, the left one in the
            first half and the right one in the second.

    Returns:
        The clip; the same arguments return the same one.

    Raises:
        MissingToolError: if espeak-ng is not installed.
        RequestError: if the split or ``turns`` is unknown, the seed negative, or frames are too
            few.
    """
    if turns not in TURNS or num_frames < 2:
        raise RequestError(
            f"got {num_frames} frames and turns {turns!r}; ask for at least 2 frames and one of "
            f"{', '.join(TURNS)}"
        )
    half = num_frames // 2 * SAMPLES_PER_FRAME
    spans = {
        "left": (slice(None), slice(0)),
        "right": (slice(0), slice(None)),
        "both": (slice(None), slice(None)),
        "in turn": (slice(half), slice(half, None)),
    }
    left, right = (
        film(split, number, _speak_within(split, number, num_frames, span))[0]
        for number, span in zip((2 * seed, 2 * seed + 1), spans[turns], strict=True)
    )
    return TwoSpeakerClip(
        frames_CTHW=torch.cat((left.frames_CTHW, right.frames_CTHW), 3), clips=(left, right)
    )


def draw_halves(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a box in each half of a picture, such as a user would draw around two avatars.

    Args:
        rows: height of the latents.
        columns: width of the latents.
        generator: random stream of the margins, up to a quarter of a half on each side.

    Returns:
        Masks, [3, H, W]: left, right and background.
    """
    height, width = SPATIAL_STRIDE * rows, SPATIAL_STRIDE * columns
    half = width // 2
    masks = []
    for start in (0, half):
        margins = LARGEST_MARGIN * torch.rand(4, generator=generator)
        top, bottom = (margins[:2] * height).int().tolist()
        left, right = (margins[2:] * half).int().tolist()
        masks.append(
            box_mask((height, width), top, start + left, height - bottom, start + half - right)
        )
    return fit_regions(masks, height, width)


def _speak_within(split: str, seed: int, num_frames: int, span: slice) -> Tensor:
    """Return an utterance that is silenced outside a range of its samples."""
    voice_S = torch.zeros(num_frames * SAMPLES_PER_FRAME)
    voice_S[span] = draw_speech(split, seed, num_frames / FPS)[span]
    return voice_S
