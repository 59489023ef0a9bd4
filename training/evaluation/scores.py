"""Scores of generated clips against true renders of held-out avatars and utterances.

Each pair is a held-out avatar and a held-out utterance. Its true render supplies the reference
image, the voice and the true mouth curve, because the renderer draws the mouth as a fixed function
of the sound. The models generate a clip from image and voice alone. All scores are computed from
pixels, of the generated and of the true frames alike.

Axes: C channels, T video frames, H height, W width, N samples, D feature width.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from training.avatars.synthetic import SyntheticClip, draw_clip
from training.evaluation.generation import SPLIT, CountingDenoiser, RememberingVAE, generate_clip
from training.evaluation.mouth import estimate_aperture, sync
from training.metrics.distances import frechet_distance
from turbotalk_core.errors import RequestError
from turbotalk_core.pipeline import Models
from turbotalk_core.protocols import AudioEncoder
from turbotalk_core.request import TalkRequest

REACH = 8  # pixels, largest shift of a block that is searched
BLOCK = 12  # pixels, about an eye
SEED_STRIDE = 100_003  # pairs have consecutive seeds, so those of two evaluation seeds differ
MIN_MOUTH_STD = 0.05  # clips with hardly any speech have no mouth motion to compare
FEATURE_SEED = 2604  # seed of the fixed random features
FEATURE_WIDTH = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """Scores of one pair, a held-out avatar with a held-out utterance.

    Attributes:
        pair_seed: seed of the avatar and the utterance.
        sync_correlation: correlation of the mouth measured in the generated frames with the true
            curve, at the best lag.
        sync_lag_frames: that lag; positive if the generated mouth is late.
        identity_error: mean absolute difference from the reference where nothing should move; the
            full range of a pixel is 1.
        flicker: mean absolute change from frame to frame in the same region.
        psnr: PSNR against the true render, dB; it is low because the motion is not determined by
            the input.
        motion: mean absolute change from frame to frame in the whole picture; also of the true
            render.
        edges: mean absolute difference of neighbouring pixels; also of the true render.
        unlikeness: result of ``measure_unlikeness``; also of the true render.
        estimator_correlation: correlation of the mouth measured in the *true* frames with the true
            curve.
    """

    pair_seed: int
    sync_correlation: float
    sync_lag_frames: int
    identity_error: float
    flicker: float
    psnr: float
    motion: float
    true_motion: float
    edges: float
    true_edges: float
    unlikeness: float
    true_unlikeness: float
    estimator_correlation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderMeasures:
    """Measurements of a true render, shared by all models that are compared with it.

    Attributes:
        motion: as in ``PairScores``.
        edges: as in ``PairScores``.
        unlikeness: as in ``PairScores``.
        estimator_correlation: as in ``PairScores``.
    """

    motion: float
    edges: float
    unlikeness: float
    estimator_correlation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutPair:
    """Held-out avatar with a held-out utterance.

    Attributes:
        seed: seed of both.
        clip: the true render.
        measures: measurements of the true render.
        features_ND: features of the true render, see ``extract_features``.
    """

    seed: int
    clip: SyntheticClip
    measures: RenderMeasures
    features_ND: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Evaluation of a model on a set of pairs.

    Attributes:
        scores: scores of each pair.
        summary: result of ``summarize`` for the whole set; also ``calls_per_chunk``, counted
            network calls, and ``seconds_per_clip``, the median without the time of encoding.
        clips: generated frames of the first ``num_kept`` pairs.
    """

    scores: list[PairScores]
    summary: dict[str, float]
    clips: list[Tensor]


def draw_pairs(seed: int, num_pairs: int, num_frames: int) -> list[tuple[int, SyntheticClip]]:
    """Draw held-out avatars with held-out utterances, leaving out those with hardly any speech.

    Args:
        seed: 0 or more; the same seed leads to the same pairs.
        num_pairs: number of pairs, at least 1.
        num_frames: frames of each clip.

    Returns:
        The seed and the true render of each pair.

    Raises:
        RequestError: if there is no pair, or the seed is negative.
        MissingToolError: if espeak-ng is not installed.
    """
    check_draw(seed, num_pairs)
    pairs: list[tuple[int, SyntheticClip]] = []
    pair_seed = seed * SEED_STRIDE
    while len(pairs) < num_pairs:
        clip = draw_clip(SPLIT, pair_seed, num_frames)
        if clip.mouth.aperture_T.std() >= MIN_MOUTH_STD:
            pairs.append((pair_seed, clip))
        pair_seed += 1
    return pairs


def measure_pairs(pairs: Iterable[tuple[int, SyntheticClip]]) -> list[HeldoutPair]:
    """Measure true renders, once for all models.

    Args:
        pairs: result of ``draw_pairs``.

    Returns:
        The pairs with their measurements.
    """
    return [
        HeldoutPair(
            seed=seed,
            clip=clip,
            measures=measure_render(clip),
            features_ND=extract_features(clip.frames_CTHW),
        )
        for seed, clip in pairs
    ]


def measure_render(clip: SyntheticClip) -> RenderMeasures:
    """Measure a true render."""
    frames_CTHW = clip.frames_CTHW
    return RenderMeasures(
        motion=_mean_abs(frames_CTHW.diff(dim=1)),
        edges=_mean_edge(frames_CTHW),
        unlikeness=measure_unlikeness(frames_CTHW, frames_CTHW[:, :1]),
        estimator_correlation=sync(estimate_aperture(frames_CTHW), clip.mouth.aperture_T)[0],
    )


def check_draw(seed: int, num_pairs: int) -> None:
    """Check the seed and the number of pairs.

    Args:
        seed: 0 or more.
        num_pairs: at least 1.

    Raises:
        RequestError: if there is no pair, or the seed is negative.
    """
    if num_pairs < 1 or seed < 0:
        raise RequestError(
            f"got {num_pairs} pairs and seed {seed}; ask for at least one pair, and a seed from 0"
        )


def evaluate(
    request: TalkRequest,
    models: Models,
    encoder: AudioEncoder,
    pairs: Sequence[HeldoutPair],
    *,
    num_kept: int = 0,
) -> Evaluation:
    """Generate and measure the clips of all pairs.

    Args:
        request: all settings; its seed is the noise seed of every clip.
        models: the networks. A ``RememberingVAE`` can be passed again with the next model, so that
            pictures are encoded once.
        encoder: the audio encoder.
        pairs: result of ``measure_pairs``.
        num_kept: number of pairs, the first ones, whose frames are returned.

    Returns:
        Scores, summary and kept frames.
    """
    vae = models.vae
    if not isinstance(vae, RememberingVAE):
        vae = RememberingVAE(vae)
    denoiser = CountingDenoiser(models.denoiser)
    models = replace(models, vae=vae, denoiser=denoiser)
    num_decoded = vae.num_decoded
    scores, features, seconds, clips = [], [], [], []
    for pair in tqdm(pairs, desc="pairs", mininterval=10):
        started = time.perf_counter() - vae.encode_seconds
        frames = generate_clip(pair.clip, request, models, encoder)
        seconds.append(time.perf_counter() - vae.encode_seconds - started)
        scores.append(score_pair(pair.seed, pair.clip, frames, pair.measures))
        features.append(extract_features(frames))
        if len(clips) < num_kept:
            clips.append(frames)
    summary = summarize(scores, features, [pair.features_ND for pair in pairs])
    summary["calls_per_chunk"] = denoiser.num_calls / (vae.num_decoded - num_decoded)
    summary["seconds_per_clip"] = float(np.median(seconds))
    return Evaluation(scores=scores, summary=summary, clips=clips)


def score_pair(
    pair_seed: int,
    clip: SyntheticClip,
    frames_CTHW: Tensor,
    measures: RenderMeasures | None = None,
) -> PairScores:
    """Measure one generated clip against its true render.

    Args:
        pair_seed: seed of the pair, for the result.
        clip: the true clip.
        frames_CTHW: frames of the generated clip, in [-1, 1].
        measures: measurements of the true clip; None computes them.

    Returns:
        The scores.
    """
    measures = measures or measure_render(clip)
    true = clip.frames_CTHW
    correlation, lag = sync(estimate_aperture(frames_CTHW), clip.mouth.aperture_T)
    still = clip.still_mask_HW
    reference = true[:, :1]
    return PairScores(
        pair_seed=pair_seed,
        sync_correlation=correlation,
        sync_lag_frames=lag,
        identity_error=_mean_abs((frames_CTHW - reference)[..., still]),
        flicker=_mean_abs(frames_CTHW.diff(dim=1)[..., still]),
        psnr=float(-10 * ((frames_CTHW - true) / 2).square().mean().log10()),
        motion=_mean_abs(frames_CTHW.diff(dim=1)),
        true_motion=measures.motion,
        edges=_mean_edge(frames_CTHW),
        true_edges=measures.edges,
        unlikeness=measure_unlikeness(frames_CTHW, reference),
        true_unlikeness=measures.unlikeness,
        estimator_correlation=measures.estimator_correlation,
    )


def _mean_abs(difference: Tensor) -> float:
    return float(difference.abs().mean()) / 2


def _mean_edge(frames_CTHW: Tensor) -> float:
    return (_mean_abs(frames_CTHW.diff(dim=-1)) + _mean_abs(frames_CTHW.diff(dim=-2))) / 2


@torch.no_grad()
def measure_unlikeness(frames_CTHW: Tensor, reference_C1HW: Tensor) -> float:
    """Measure how badly blocks of the reference image can reproduce the frames.

    Each block of a frame is compared with the reference at all shifts up to ``REACH`` pixels, and
    the best one counts. A face that has moved matches at some shift; a smeared one matches at none.

    Args:
        frames_CTHW: frames in [-1, 1]; every fourth is used.
        reference_C1HW: the reference image.

    Returns:
        Mean absolute difference at the best shift, over blocks and frames; the full range of a
        pixel is 1.
    """
    frames_TCHW = frames_CTHW[:, ::4].transpose(0, 1)
    around = F.pad(reference_C1HW.transpose(0, 1), (REACH,) * 4, mode="replicate")
    height, width = frames_TCHW.shape[2:]
    best_THW = None
    for row in range(2 * REACH + 1):
        for column in range(2 * REACH + 1):
            shifted = around[..., row : row + height, column : column + width]
            error_THW = F.avg_pool2d((frames_TCHW - shifted).abs().mean(1), BLOCK)
            best_THW = error_THW if best_THW is None else torch.minimum(best_THW, error_THW)
    assert best_THW is not None
    return float(best_THW.mean()) / 2


@torch.no_grad()
def extract_features(frames_CTHW: Tensor) -> Tensor:
    """Compute features of a clip with fixed random convolutions over space and time.

    Args:
        frames_CTHW: frames in [-1, 1].

    Returns:
        One sample per span of five frames, [N, FEATURE_WIDTH].
    """
    generator = torch.Generator().manual_seed(FEATURE_SEED)
    hidden = F.avg_pool2d(frames_CTHW.transpose(0, 1), 2)  # [T, C, H, W]
    spans = hidden[: 5 * (hidden.shape[0] // 5)].unflatten(0, (-1, 5)).flatten(1, 2)
    for width in (32, 64, 96):
        weight = torch.randn(width, spans.shape[1], 3, 3, generator=generator)
        weight = weight / weight[0].numel() ** 0.5
        spans = F.relu(F.conv2d(spans, weight - weight.mean((1, 2, 3), keepdim=True), stride=2))
        spans = spans * 2**0.5
    pooled = torch.cat((spans.mean((2, 3)), spans.std((2, 3))), 1)
    mixing = torch.randn(pooled.shape[1], FEATURE_WIDTH, generator=generator)
    return pooled @ mixing


def average_scores(scores: Sequence[PairScores]) -> dict[str, float]:
    """Average the scores of all pairs.

    Args:
        scores: scores of each pair.

    Returns:
        Means over the pairs. ``sync_within_one_frame`` is the share of pairs whose best lag is at
        most one frame. Ratios to the true renders are ratios of the means.
    """

    def mean(name: str) -> float:
        return float(np.mean([getattr(score, name) for score in scores]))

    return {
        "sync_correlation": mean("sync_correlation"),
        "sync_lag_frames": mean("sync_lag_frames"),
        "sync_within_one_frame": float(np.mean([abs(s.sync_lag_frames) <= 1 for s in scores])),
        "identity_error": mean("identity_error"),
        "flicker": mean("flicker"),
        "psnr": mean("psnr"),
        "motion_ratio": mean("motion") / mean("true_motion"),
        "edge_ratio": mean("edges") / mean("true_edges"),
        "unlikeness_ratio": mean("unlikeness") / mean("true_unlikeness"),
        "estimator_correlation": mean("estimator_correlation"),
    }


def summarize(
    scores: Sequence[PairScores], generated: list[Tensor], true: list[Tensor]
) -> dict[str, float]:
    """Summarize the scores of a set of pairs.

    Args:
        scores: scores of each pair.
        generated: features of the generated clips.
        true: features of the true renders.

    Returns:
        Result of ``average_scores``, and the Fréchet distances ``frechet`` between the sets and
        ``frechet_floor`` between two halves of the true renders.
    """
    summary = average_scores(scores)
    summary["frechet"] = frechet_distance(torch.cat(generated), torch.cat(true))
    if len(true) > 1:
        half = len(true) // 2
        summary["frechet_floor"] = frechet_distance(torch.cat(true[:half]), torch.cat(true[half:]))
    return summary
