"""Rotary embeddings: where a token is, written into its queries and keys as angles.

Separate because video tokens carry places in a grid, and tokens of several speakers places on a
line of speakers; both are rotated alike.

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
    """Tabulate the 3-D rotary embedding of a token grid.

    Args:
        grid: latent frames, token rows, token columns.
        head_dim: width of a head; time gets head_dim - 4 * (head_dim // 6) of it, rows and columns
            2 * (head_dim // 6) each.
        device: where the table will be used.

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
    return angle.cos().float().to(device), angle.sin().float().to(device)


def line_table(positions: Tensor, head_dim: int) -> RotaryTable:
    """Tabulate the 1-D rotary embedding of places on a line.

    Args:
        positions: one real number per token, [N] or [B, N].
        head_dim: width of a head, even.

    Returns:
        Cosine and sine, float32, [..., N, head_dim / 2], for adjacent pairs of channels.

    Source: InfiniteTalk, wan/modules/attention.py (RotaryPositionalEmbedding1D).
    """
    frequencies = _frequencies(head_dim).to(positions.device, torch.float32)
    angle = positions.float().unsqueeze(-1) * frequencies
    return angle.cos(), angle.sin()


def rotate(hidden_BNHD: Tensor, table: RotaryTable) -> Tensor:
    """Rotate adjacent channel pairs of each head by the angle of their token.

    Args:
        hidden_BNHD: queries or keys, [B, tokens, heads, head_dim].
        table: of ``rotary_table`` or ``line_table``.

    Returns:
        The same shape and dtype; computed in float32.
    """
    cosine, sine = (x.unsqueeze(-2) for x in table)
    even, odd = hidden_BNHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1)
    return rotated.flatten(-2).to(hidden_BNHD.dtype)


def _frequencies(width: int) -> Tensor:
    return ROPE_BASE ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
