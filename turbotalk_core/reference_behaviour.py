"""Behaviour of InfiniteTalk's pipeline where it differs from this one, for comparisons with it.

``pipeline`` calls a method of ``Behaviour`` at each such place, and only ``choose_behaviour`` reads
``TalkRequest.follows_reference``. Separate because these deviations change frames and have no use
outside of comparisons; docs/numerics.md lists all of them.

Axes: B batch, C channels, T video frames, F latent frames, H height, W width.
Source: InfiniteTalk, wan/multitalk.py, generate_infinitetalk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .audio.windows import Renumbered
from .chunking.stitch import join_frames
from .request import TalkRequest
from .types import Chunk, ChunkPlan, FeatureRows

_EXTRA_MIRRORED = 3  # rows that the reference mirrors beyond the missing ones
_SKIPPED = (".alpha", ".lora_A.weight", ".lora_B.weight")


class Behaviour:
    """TurboTalk's behaviour at each place where InfiniteTalk's differs."""

    def count_frames(self, lengths: Sequence[int], plan: Callable[[int], ChunkPlan]) -> int:
        """Count the frames of a video: as many as those of the longest voice.

        Args:
            lengths: lengths of the voices, video frames.
            plan: function that returns the chunk plan of a number of frames.

        Returns:
            The number of frames.
        """
        return max(lengths)

    def select_rows(self, features: FeatureRows, chunk: Chunk, *, is_last: bool) -> FeatureRows:
        """Select the audio features of a voice that a chunk may use: all, encoded silence included.

        Args:
            features: features of one voice.
            chunk: the chunk that uses them.
            is_last: whether no other chunk follows.

        Returns:
            The features.
        """
        return features

    def draw_unused_noise(
        self, request: TalkRequest, motion_latents_BCFHW: Tensor, generator: torch.Generator
    ) -> None:
        """Draw nothing beyond the noise that is used."""

    def join(self, frames_BCTHW: Tensor, motion_frames_BCTHW: Tensor) -> Tensor:
        """Correct the first new frames of a later chunk by the VAE's error, fading out.

        Args:
            frames_BCTHW: all frames of the chunk, as decoded.
            motion_frames_BCTHW: the last frames of the chunk before.

        Returns:
            The frames of ``stitch.join_frames``.
        """
        return join_frames(frames_BCTHW, motion_frames_BCTHW)


class ReferenceBehaviour(Behaviour):
    """InfiniteTalk's behaviour; see ``Behaviour``."""

    def count_frames(self, lengths: Sequence[int], plan: Callable[[int], ChunkPlan]) -> int:
        """Count the frames of whole chunks over the first voice, at most those of the last."""
        return min(plan(lengths[0]).chunks[-1].stop, lengths[-1])

    def select_rows(self, features: FeatureRows, chunk: Chunk, *, is_last: bool) -> FeatureRows:
        """Drop the encoded silence, and in the last chunk mirror the end of the voice."""
        return mirror_end(features, chunk.stop) if is_last else drop_silence(features)

    def draw_unused_noise(
        self, request: TalkRequest, motion_latents_BCFHW: Tensor, generator: torch.Generator
    ) -> None:
        """Draw the noise that InfiniteTalk adds to motion latents and then overwrites.

        It is not used, but it advances the generator, so that all later noise is different.
        """
        for _ in range(1 + request.num_inference_steps):
            torch.randn(motion_latents_BCFHW.shape, generator=generator)

    def join(self, frames_BCTHW: Tensor, motion_frames_BCTHW: Tensor) -> Tensor:
        """Return the frames as they were decoded."""
        return frames_BCTHW


def choose_behaviour(request: TalkRequest) -> Behaviour:
    """Return the behaviour of the pipeline where the two differ.

    Args:
        request: contains ``follows_reference``.

    Returns:
        TurboTalk's behaviour or InfiniteTalk's.
    """
    return ReferenceBehaviour() if request.follows_reference else Behaviour()


def drop_silence(features: FeatureRows) -> FeatureRows:
    """Drop the rows of encoded silence that follow a voice.

    Args:
        features: features of one voice.

    Returns:
        The rows of the voice.
    """
    return Renumbered(features=features, num_rows=features.num_frames, find=lambda rows: rows)


def mirror_end(features: FeatureRows, stop: int) -> FeatureRows:
    """Continue a voice with its own last rows in reverse.

    Args:
        features: features of one voice; rows of encoded silence are dropped.
        stop: end of the last chunk, in video frames.

    Returns:
        The rows of the voice; if it ends before ``stop``, followed by its last rows in reverse,
        three more than are missing.
    """
    length = features.num_frames
    if stop < length:
        return drop_silence(features)
    return Renumbered(
        features=features,
        num_rows=length + min(length, stop - length + _EXTRA_MIRRORED),
        find=lambda rows: torch.where(rows < length, rows, 2 * length - 1 - rows),
    )


def select_lora_tensors(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors of a LoRA file that InfiniteTalk merges.

    Args:
        lora: all tensors of the file.

    Returns:
        All tensors but alphas, so that alpha / rank is 1, and pairs named ``lora_A`` and
        ``lora_B``; for ``checkpoints.lora.merge_lora``.
    """
    return {name: tensor for name, tensor in lora.items() if not name.endswith(_SKIPPED)}
