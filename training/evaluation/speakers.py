"""Evaluation with two speakers: whether the mouth of the one who speaks moves.

    python -m training.evaluation.speakers --weights models --pairs 6 --seed 1 --json FILE

Each clip shows two held-out avatars side by side. One of them speaks a held-out utterance, the
other is silent; the side of the speaker alternates. The inputs of the models are the picture, both
voices and a region for each. Both mouths are measured in the generated pixels and compared with the
mouth curve of the utterance. In options and reports such a clip counts as a pair.

Axes: C channels, T video frames, H height, W width.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from training.avatars.pairs import TwoSpeakerClip, draw_two_speakers
from training.avatars.synthetic import make_sheet
from training.evaluation.command import run_command
from training.evaluation.generation import SPLIT, collect_frames, load_family
from training.evaluation.mouth import estimate_aperture, sync
from training.evaluation.scores import MIN_MOUTH_STD, SEED_STRIDE, check_draw
from training.outputs import write_picture
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.cli.arguments import Parser
from turbotalk_core.conditioning.regions import fit_regions, halve_picture
from turbotalk_core.pipeline import Models, generate
from turbotalk_core.protocols import AudioEncoder
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import Waveform

SIDES = ("left", "right")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnScores:
    """Scores of one clip of two speakers.

    Attributes:
        pair_seed: seed of the two avatars and the utterance.
        speaker: side of the speaker, ``left`` or ``right``.
        speaker_sync: correlation of the speaker's mouth with the true curve, at the best lag.
        speaker_lag_frames: that lag.
        other_sync: correlation of the other mouth with the same curve at the same lag.
        other_opening: motion of the other mouth relative to the speaker's: ratio of the standard
            deviations of the measured mouth areas.
    """

    pair_seed: int
    speaker: str
    speaker_sync: float
    speaker_lag_frames: int
    other_sync: float
    other_opening: float


def draw_turns(seed: int, num_pairs: int, num_frames: int) -> list[tuple[int, str, TwoSpeakerClip]]:
    """Draw held-out clips of two speakers, leaving out those with hardly any speech.

    Args:
        seed: 0 or more; the same seed leads to the same clips.
        num_pairs: number of clips, at least 1.
        num_frames: frames of each clip.

    Returns:
        Seed, side of the speaker and true render of each clip.

    Raises:
        RequestError: if there is no clip, or the seed is negative.
        MissingToolError: if espeak-ng is not installed.
    """
    check_draw(seed, num_pairs)
    turns: list[tuple[int, str, TwoSpeakerClip]] = []
    pair_seed = seed * SEED_STRIDE
    while len(turns) < num_pairs:
        place = len(turns) % 2
        true_clip = draw_two_speakers(SPLIT, pair_seed, num_frames, SIDES[place])
        if true_clip.clips[place].mouth.aperture_T.std() >= MIN_MOUTH_STD:
            turns.append((pair_seed, SIDES[place], true_clip))
        pair_seed += 1
    return turns


@torch.no_grad()
def generate_two_speakers(
    true_clip: TwoSpeakerClip, request: TalkRequest, models: Models, encoder: AudioEncoder
) -> Tensor:
    """Generate a clip of two speakers from the first frame and the voices of a true clip.

    Args:
        true_clip: the true clip.
        request: all settings, except that the size is the true clip's.
        models: the networks.
        encoder: the audio encoder.

    Returns:
        Frames [3, T, H, W], rounded to 8 bits as in a file, in [-1, 1].
    """
    height, width = true_clip.frames_CTHW.shape[2:]
    request = replace(request, height=height, width=width)
    voices = [
        encode_speech(
            Waveform(samples_CS=clip.waveform_S.unsqueeze(0), sample_rate=clip.sample_rate),
            encoder,
            normalizes_loudness=request.normalizes_loudness,
        )
        for clip in true_clip.clips
    ]
    regions_PHW = fit_regions(halve_picture((height, width)), height, width)
    reference = true_clip.frames_CTHW[:, 0].unsqueeze(0)
    return collect_frames(generate(request, [reference], voices, models, regions_PHW=regions_PHW))


def score_turn(
    pair_seed: int, speaker: str, true_clip: TwoSpeakerClip, frames_CTHW: Tensor
) -> TurnScores:
    """Measure both mouths of a generated clip.

    Args:
        pair_seed: seed of the clip, for the result.
        speaker: side of the speaker, ``left`` or ``right``.
        true_clip: the true clip.
        frames_CTHW: frames of the generated clip, in [-1, 1].

    Returns:
        The scores.
    """
    place = SIDES.index(speaker)
    true_T = true_clip.clips[place].mouth.aperture_T
    halves = frames_CTHW.chunk(2, dim=3)
    speaker_T, other_T = (estimate_aperture(halves[side]) for side in (place, 1 - place))
    correlation, lag = sync(speaker_T, true_T)
    # The other mouth is compared at the speaker's lag: the best of many lags would be above zero
    # for noise as well.
    shifted_T = true_T.roll(lag)
    return TurnScores(
        pair_seed=pair_seed,
        speaker=speaker,
        speaker_sync=correlation,
        speaker_lag_frames=lag,
        other_sync=sync(other_T, shifted_T, max_lag=0)[0],
        other_opening=float(other_T.std() / speaker_T.std()),
    )


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(prog="python -m training.evaluation.speakers", description=__doc__)
    return run_command(parser, _evaluate, num_pairs=6)


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    request, models, encoder = load_family(arguments.weights, arguments.model)
    request = replace(request, seed=arguments.seed)
    scores: list[TurnScores] = []
    rows: list[Tensor] = []
    turns = draw_turns(arguments.seed, arguments.pairs, arguments.frames)
    for pair_seed, speaker, true_clip in tqdm(turns, desc="pairs", mininterval=10):
        frames = generate_two_speakers(true_clip, request, models, encoder)
        scores.append(score_turn(pair_seed, speaker, true_clip, frames))
        rows += [true_clip.frames_CTHW, frames]
    if arguments.sheet:
        columns = 1 + (arguments.frames - 1) // 16
        write_picture(arguments.sheet, Image.fromarray(make_sheet(rows, columns)))
    names = ("speaker_sync", "other_sync", "other_opening")
    return {
        "settings": {"model": arguments.model, "frames": arguments.frames, **asdict(request)},
        "summary": {name: float(np.mean([getattr(s, name) for s in scores])) for name in names},
        "pairs": [asdict(score) for score in scores],
    }


if __name__ == "__main__":
    sys.exit(main())
