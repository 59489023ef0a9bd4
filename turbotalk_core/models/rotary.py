"""Rotary position embeddings (RoPE) for positions in a 3-D token grid and on a 1-D line.

Queries and keys are rotated, pair of channels by pair, by angles proportional to their position.
The scalar product of a rotated query and a rotated key then depends on the difference of their
positions alone. Separate because two attentions share the rotation: self-attention with positions
in the video's grid, and audio attention with positions on the line of speakers.

Axes: B batch, N tokens, H heads, D width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

ROPE_BASE = 10_000.0

RotaryTable = tuple[Tensor, Tensor]
"""Cosine and sine, float32, [N, head_dim / 2] or [B, N, head_dim / 2]: one per channel pair."""


@lru_cache(maxsize=16)
def rotary_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> RotaryTable:
    """Compute the 3-D rotary table of a token grid.

    The channels of a head are divided among time, rows and columns; each part rotates by the
    token's position on that axis.

    Args:
        grid: numbers of latent frames, token rows and token columns.
        head_dim: width of a head; time gets head_dim - 4 * (head_dim // 6) of it, rows and columns
            2 * (head_dim // 6) each.
        device: device of the returned table.

    Returns:
        Cosine and sine, float32, [N, head_dim / 2], for adjacent pairs of channels.

    Source: Wan 2.1, wan/modules/model.py, rope_params and rope_apply (computed in float64 there).
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, width in enumerate((head_dim - 2 * side, side, side)):
        positions = torch.arange(grid[axis], dtype=torch.float64)
        table = torch.outer(positions, _frequencies(width))
        shape = [1, 1, 1, -1]
        shape[axis] = grid[axis]
        angles.append(table.view(shape).expand(*grid, -1))
    angle = torch.cat(angles, -1).flatten(0, 2)
    # Two copies, which wait for the device, only in the first call at this size.
    return angle.cos().float().to(device), angle.sin().float().to(device)


def line_frequencies(head_dim: int, device: torch.device) -> Tensor:
    """Compute the frequencies of ``line_table``.

    Args:
        head_dim: width of a head, even.
        device: device of the positions.

    Returns:
        One per channel pair, float32, [head_dim / 2].
    """
    return _frequencies(head_dim).to(device, torch.float32)


def line_table(positions: Tensor, frequencies_D: Tensor) -> RotaryTable:
    """Compute the 1-D rotary table of positions on a line.

    Args:
        positions: position of each token, any real number, [N] or [B, N].
        frequencies_D: result of ``line_frequencies``.

    Returns:
        Cosine and sine, float32, [..., N, head_dim / 2], for adjacent pairs of channels.

    Source: InfiniteTalk, wan/modules/attention.py (RotaryPositionalEmbedding1D).
    """
    angle = positions.float().unsqueeze(-1) * frequencies_D
    return angle.cos(), angle.sin()


def rotate(hidden_BNHD: Tensor, table: RotaryTable) -> Tensor:
    """Rotate adjacent channel pairs of each head by the angles of their token.

    Args:
        hidden_BNHD: queries or keys, [B, tokens, heads, head_dim].
        table: result of ``rotary_table`` or ``line_table``.

    Returns:
        Rotated queries or keys, in the same shape and dtype; computed in float32.
    """
    cosine, sine = (x.unsqueeze(-2) for x in table)
    even, odd = hidden_BNHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1)
    return rotated.flatten(-2).to(hidden_BNHD.dtype)


def _frequencies(width: int) -> Tensor:
    return ROPE_BASE ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
