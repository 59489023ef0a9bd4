"""The measures give what they must on pictures and numbers whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.family import FakeEncoder
from tests.training.evaluation.conftest import REQUIRED
from training.avatars.mouth import MouthCurve
from training.avatars.synthetic import SyntheticClip
from training.evaluation import scores
from training.evaluation.scores import (
    FEATURE_WIDTH,
    SEED_STRIDE,
    PairScores,
    draw_pairs,
    evaluate,
    extract_features,
    measure_pairs,
    measure_unlikeness,
    score_pair,
    summarize,
)
from training.metrics.distances import frechet_distance
from turbotalk_core.errors import RequestError
from turbotalk_core.pipeline import Models
from turbotalk_core.request import TalkRequest

NUM_FRAMES = 26


def test_features_are_one_row_per_five_frames_and_always_the_same(clip: SyntheticClip) -> None:
    torch.manual_seed(0)
    features = extract_features(clip.frames_CTHW)
    torch.manual_seed(1)
    assert features.shape == (NUM_FRAMES // 5, FEATURE_WIDTH)
    assert torch.equal(extract_features(clip.frames_CTHW), features)
    torch.testing.assert_close(extract_features(clip.frames_CTHW[:, :10]), features[:2])


def test_features_see_pictures_and_their_order(clip: SyntheticClip) -> None:
    features = extract_features(clip.frames_CTHW)
    blurred = torch.nn.functional.avg_pool2d(clip.frames_CTHW, 5, stride=1, padding=2)
    backwards = clip.frames_CTHW.flip(1)
    assert frechet_distance(features, extract_features(blurred)) > 0
    assert not torch.allclose(extract_features(backwards).sum(0), features.sum(0))


def test_the_true_clip_is_perfect(clip: SyntheticClip) -> None:
    assert clip.still_mask_HW.any()
    scores = score_pair(7, clip, clip.frames_CTHW)
    assert scores.pair_seed == 7
    assert scores.sync_correlation == scores.estimator_correlation > 0.9
    assert scores.sync_lag_frames == 0
    assert scores.identity_error == 0
    assert scores.flicker == 0
    assert scores.psnr == math.inf
    assert scores.motion == scores.true_motion > 0
    assert scores.edges == scores.true_edges > 0


def test_a_late_mouth_is_late(clip: SyntheticClip) -> None:
    late = torch.cat((clip.frames_CTHW[:, :1].expand(-1, 2, -1, -1), clip.frames_CTHW[:, :-2]), 1)
    scores = score_pair(0, clip, late)
    assert scores.sync_lag_frames == 2
    assert scores.sync_correlation > 0.9


def test_a_still_picture_says_nothing(clip: SyntheticClip) -> None:
    still = clip.frames_CTHW[:, :1].expand_as(clip.frames_CTHW)
    scores = score_pair(0, clip, still)
    assert scores.sync_correlation == 0
    assert scores.motion == scores.flicker == scores.identity_error == 0
    assert scores.true_motion > 0


def test_known_changes_are_measured_in_shares_of_the_range(clip: SyntheticClip) -> None:
    brighter = clip.frames_CTHW.clone()
    brighter[:, 1::2] += 0.2  # a tenth of the range, on every second frame
    scores = score_pair(0, clip, brighter)
    assert scores.psnr == pytest.approx(-10 * math.log10(0.1**2 / 2), abs=1e-4)
    assert scores.identity_error == pytest.approx(0.05, abs=1e-6)
    assert scores.flicker == pytest.approx(0.1, abs=1e-6)
    assert scores.edges == pytest.approx(scores.true_edges)


class TestUnlikeness:
    """Pictures of noise, in which no two places are alike."""

    reference = torch.rand(3, 1, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def test_what_moves_as_a_whole_is_found_again(self) -> None:
        moved = [self.reference.roll((k, -2 * k), (2, 3)) for k in range(5)]
        frames = torch.cat(moved, 1)
        # Of the moved picture only the blocks at the rim have lost their like.
        assert measure_unlikeness(frames[:, :1], self.reference) == 0
        still = self.reference.expand(-1, 5, -1, -1)
        assert measure_unlikeness(still, self.reference) == 0
        assert measure_unlikeness(frames, self.reference) < 0.1

    def test_a_smear_is_not_found(self) -> None:
        smear = torch.nn.functional.avg_pool2d(self.reference[:, 0], 7, stride=1, padding=3)
        frames = torch.stack([self.reference[:, 0]] + [smear] * 8, 1)
        # Frames 0, 4 and 8 are read.
        alone = measure_unlikeness(smear.unsqueeze(1), self.reference)
        assert alone > 0.2
        assert measure_unlikeness(frames, self.reference) == pytest.approx(alone * 2 / 3)

    def test_a_shift_of_brightness_counts_as_such(self) -> None:
        reference = self.reference * 0.0
        frames = reference.expand(-1, 5, -1, -1) + 0.2
        assert measure_unlikeness(frames, reference) == pytest.approx(0.1, rel=1e-5)


def test_edges_of_stripes() -> None:
    # Columns 0, 1, 0, 1, ... of the range: every neighbour across differs by all, none down.
    stripes = (torch.arange(12) % 2 * 2.0 - 1).expand(3, 10, 12, 12)
    flat = MouthCurve(opening_T=torch.zeros(10), width_T=torch.ones(10), rounding_T=torch.zeros(10))
    clip = SyntheticClip(
        frames_CTHW=stripes,
        waveform_S=torch.zeros(6400),
        sample_rate=16_000,
        mouth=flat,
        still_mask_HW=torch.ones(12, 12, dtype=torch.bool),
    )
    scores = score_pair(0, clip, 0.5 * stripes)
    assert (scores.edges, scores.true_edges) == (0.25, 0.5)


def _scores(**changes: float) -> PairScores:
    scores = PairScores(
        pair_seed=0,
        sync_correlation=0.8,
        sync_lag_frames=0,
        identity_error=0.01,
        flicker=0.002,
        psnr=20.0,
        motion=0.01,
        true_motion=0.02,
        edges=0.03,
        true_edges=0.04,
        unlikeness=0.06,
        true_unlikeness=0.05,
        estimator_correlation=0.99,
    )
    return replace(scores, **changes)


def test_a_summary_holds_the_means_of_all_pairs(clip: SyntheticClip) -> None:
    features = extract_features(clip.frames_CTHW)
    pairs = [
        _scores(),
        _scores(sync_correlation=0.4, sync_lag_frames=-3, psnr=22.0, motion=0.05, edges=0.07),
    ]
    summary = summarize(pairs, [features, features], [features, features])
    assert summary.keys() == REQUIRED | {
        "sync_within_one_frame",
        "estimator_correlation",
        "frechet_floor",
    }
    assert summary["sync_correlation"] == pytest.approx(0.6)
    assert summary["sync_lag_frames"] == pytest.approx(-1.5)
    assert summary["sync_within_one_frame"] == 0.5
    assert summary["psnr"] == pytest.approx(21)
    assert summary["motion_ratio"] == pytest.approx(0.06 / 0.04)
    assert summary["edge_ratio"] == pytest.approx(0.10 / 0.08)
    assert summary["unlikeness_ratio"] == pytest.approx(0.06 / 0.05)
    assert summary["identity_error"] == pytest.approx(0.01)
    assert summary["flicker"] == pytest.approx(0.002)
    assert summary["estimator_correlation"] == pytest.approx(0.99)
    assert summary["frechet"] == pytest.approx(0, abs=1e-4)
    assert summary["frechet_floor"] == pytest.approx(0, abs=1e-4)


def test_one_pair_has_no_halves_to_compare(clip: SyntheticClip) -> None:
    features = extract_features(clip.frames_CTHW)
    summary = summarize([_scores()], [features + 1], [features])
    assert "frechet_floor" not in summary
    assert summary.keys() >= REQUIRED
    assert summary["frechet"] == pytest.approx(FEATURE_WIDTH, rel=1e-3)


def _draw_curves(quiet: Callable[[int], bool]) -> Callable[[str, int, int], SyntheticClip]:
    """Clips without pictures, some of which hardly speak."""

    def draw(split: str, seed: int, num_frames: int) -> SyntheticClip:
        assert split == "heldout"
        opening_T = torch.arange(num_frames) % 2 * (0.01 if quiet(seed) else 1.0)
        return SyntheticClip(
            frames_CTHW=torch.zeros(3, num_frames, 1, 1),
            waveform_S=torch.zeros(640 * num_frames),
            sample_rate=16_000,
            mouth=MouthCurve(
                opening_T=opening_T,
                width_T=torch.ones(num_frames),
                rounding_T=torch.zeros(num_frames),
            ),
            still_mask_HW=torch.ones(1, 1, dtype=torch.bool),
        )

    return draw


def test_pairs_follow_from_the_seed_and_all_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "draw_clip", _draw_curves(lambda seed: seed % 3 == 0))
    seeds = [[seed for seed, _ in draw_pairs(start, 4, 9)] for start in (0, 0, 1)]
    assert seeds[0] == seeds[1] == [1, 2, 4, 5]
    assert all(seed % 3 for seed in seeds[2])
    assert not set(seeds[0]) & set(seeds[2])
    assert [len(clip.mouth.opening_T) for _, clip in draw_pairs(0, 2, 9)] == [9, 9]


@pytest.mark.parametrize(("seed", "num_pairs"), [(0, 0), (-1, 3)])
def test_pairs_that_cannot_be_drawn_are_refused(seed: int, num_pairs: int) -> None:
    with pytest.raises(RequestError, match=f"got {num_pairs} pairs and seed {seed}"):
        draw_pairs(seed, num_pairs, 9)


@pytest.mark.usefixtures("_espeak")
def test_real_pairs_are_held_out_and_repeatable() -> None:
    (first,), (second,) = (draw_pairs(1, 1, 13) for _ in range(2))
    assert first[0] == second[0] >= SEED_STRIDE
    assert torch.equal(first[1].frames_CTHW, second[1].frames_CTHW)
    assert torch.equal(first[1].waveform_S, second[1].waveform_S)


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 2), (2.0, 4)])
def test_network_calls_are_counted_per_chunk(
    clip: SyntheticClip, models: Models, settings: TalkRequest, guidance: float, calls: int
) -> None:
    """Two steps, with and without a call for the guidance, in three chunks of a clip."""
    request = replace(settings, num_inference_steps=2, audio_guidance_scale=guidance)
    pairs = measure_pairs([(7, clip)])
    evaluation = evaluate(request, models, FakeEncoder(), pairs, num_kept=1)
    assert evaluation.summary["calls_per_chunk"] == calls
    assert evaluation.summary["seconds_per_clip"] > 0
    (made,) = evaluation.clips
    assert evaluation.scores == [score_pair(7, clip, made)]
