"""A sound that swells as speech does, without a speech synthesiser."""

from __future__ import annotations

import torch
from torch.nn import functional

RATE = 16000


def make_syllables(seconds: float, seed: int = 0) -> torch.Tensor:
    """A buzzing tone whose loudness and brightness wander as in speech."""
    generator = torch.Generator().manual_seed(seed)
    count = round(seconds * RATE)
    times = torch.arange(count) / RATE
    knots = torch.rand(2, 1, 2 + int(6 * seconds), generator=generator)
    loudness, brightness = functional.interpolate(knots, count, mode="linear")[:, 0]
    low, high = torch.sin(2 * torch.pi * 300 * times), torch.sin(2 * torch.pi * 2500 * times)
    return 0.3 * 10 ** (1.6 * loudness - 1.6) * (low + 0.6 * brightness * high)
