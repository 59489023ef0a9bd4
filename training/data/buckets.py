"""Buckets of a prepared set that are too small for a step: merged with others, or left out.

A step takes its samples from one bucket, of one size and number of voices. A rare size would
otherwise end a run whose steps take more samples than it has.

Axes: H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
BucketKey = tuple[int, int, int]
"""Height and width in pixels, and number of voices."""

LEAST_KEPT = 2 / 3  # share of a picture that cropping must leave; a face is near its middle


def merge_small(
    buckets: Mapping[BucketKey, Sequence[T]], least: int
) -> tuple[dict[BucketKey, list[T]], list[str]]:
    """Merge buckets with too few samples, or leave them out.

    A small bucket joins another one with as many voices whose size lies inside its own, or a small
    one, both at the size that they have in common. Samples of large buckets are never cropped.

    Args:
        buckets: samples by bucket.
        least: number of samples that a bucket needs.

    Returns:
        Buckets with at least ``least`` samples, whose keys are the sizes to crop to, and what was
        done, one sentence per small bucket.
    """
    merged = {key: list(samples) for key, samples in buckets.items()}
    notes: list[str] = []
    while small := [key for key, samples in merged.items() if len(samples) < least]:
        key = min(small, key=lambda key: (len(merged[key]), key))
        samples = merged.pop(key)
        partners = {
            other: common
            for other in merged
            if (common := _find_common(key, other, crops_other=other in small)) is not None
        }
        what = f"{len(samples)} samples of {key[1]}x{key[0]} with {key[2]} voices"
        if not partners:
            notes.append(f"{what} are left out, because a step takes {least} of one size")
            continue
        partner = max(partners, key=lambda other: (_area(partners[other]), other))
        common = partners[partner]
        samples += merged.pop(partner)
        merged[common] = [*merged.pop(common, []), *samples]
        notes.append(f"{what} are cropped to {common[1]}x{common[0]}, as a step takes {least}")
    return dict(sorted(merged.items())), notes


def crop_to(tensor_HW: Tensor, height: int, width: int) -> Tensor:
    """Cut the middle out of a tensor whose last two axes are rows and columns."""
    top = (tensor_HW.shape[-2] - height) // 2
    left = (tensor_HW.shape[-1] - width) // 2
    return tensor_HW[..., top : top + height, left : left + width]


def _find_common(key: BucketKey, other: BucketKey, *, crops_other: bool) -> BucketKey | None:
    common = (min(key[0], other[0]), min(key[1], other[1]), key[2])
    largest = max(_area(key), _area(other)) if crops_other else _area(key)
    fits = key[2] == other[2] and (crops_other or common == other)
    return common if fits and _area(common) >= LEAST_KEPT * largest else None


def _area(key: BucketKey) -> int:
    return key[0] * key[1]
