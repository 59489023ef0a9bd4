"""Prepared sets of random samples, without encoders."""

from __future__ import annotations

from pathlib import Path

import torch

from training.data.resumable_stage import ItemLog, Work, open_stage
from training.data.shards import INDEX, Sample, describe_sample, write_shard

NUM_FRAMES = 30


def make_sample(
    seed: int,
    *,
    rows: int = 2,
    columns: int = 4,
    num_latents: int = 5,
    voices: int = 1,
    tokens: int = 0,
    layers: int = 2,
) -> Sample:
    """Draw a sample with latents of the given rows and columns."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    return Sample(
        opening_CFHW=draw(16, num_latents, rows, columns),
        later_CFHW=draw(16, num_latents, rows, columns),
        reference_CFHW=draw(16, 2, rows, columns),
        weight_HW=draw(rows, columns),
        features_PTLD=draw(voices, NUM_FRAMES + 25, layers, 3),
        sound_PS=torch.zeros(voices, NUM_FRAMES * 640, dtype=torch.int16),
        text_ND=draw(tokens, 6) if tokens else None,
    )


def write_set(
    folder: Path,
    samples: dict[str, Sample],
    tiers: dict[str, int] | None = None,
    captions: dict[str, str] | None = None,
) -> Path:
    """Write a prepared set with a shard per sample."""
    open_stage(folder, {"made": "here"}, Work())
    for number, (key, sample) in enumerate(samples.items()):
        shard = write_shard(folder, f"00-of-01-{number:06d}", [sample])
        record = {
            "key": key,
            "num_frames": NUM_FRAMES,
            "later_start": 3 + number % 5,
            "tier": (tiers or {}).get(key, 0),
            "caption": (captions or {}).get(key),
            **describe_sample(sample),
            **shard,
            INDEX: 0,
        }
        ItemLog(folder, Work()).append([record])
    return folder
