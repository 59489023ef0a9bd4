"""Rotary positions that bind video tokens to the voice of their speaker, with several speakers.

The model has no input for where a speaker moves; only the regions of the speakers in the chunk's
first latent frame are given. In every block, the attention that a video token pays to each region
of that frame is its likeness to that speaker. The likeness decides the token's position on a line,
on which each speaker has a stretch. Audio tokens have the position in the middle of their speaker's
stretch. As both are rotated by their positions, a video token attends more to the voice whose
position is nearer its own.

Axes: B batch, H heads (or height), W width, N tokens, P speakers and last the background, D width.
Source: InfiniteTalk, wan/modules/attention.py (SingleStreamMultiAttention) and
wan/utils/multitalk_utils.py (get_attn_map_with_target).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import PATCH
from .rotary import RotaryTable, line_frequencies, line_table

STRETCH = 4.0  # length of a speaker's part of the line; InfiniteTalk, class_interval
SPACING = 10.0  # between their starts: two speakers and the background fill class_range, 24


def token_regions(regions_PHW: Tensor) -> Tensor:
    """Sample regions of the latent grid at the tokens of one frame.

    Args:
        regions_PHW: 1 inside, else 0, on latent cells.

    Returns:
        [P, N], float32; each token has the value of its upper left cell.
    """
    return regions_PHW[:, ::PATCH, ::PATCH].flatten(1).float()


def measure_likeness(q_BNHD: Tensor, k_BNHD: Tensor, regions_PN: Tensor) -> Tensor:
    """Measure how much each token attends to each region of the first frame.

    Args:
        q_BNHD: rotated queries of all tokens.
        k_BNHD: rotated keys of all tokens; those of the first frame are used.
        regions_PN: result of ``token_regions``.

    Returns:
        [B, P, N], float32: the attention weights of a token over the first frame, averaged over
        the heads and over the region's tokens; 0 for an empty region.
    """
    # No gradient flows through the positions, as in the reference.
    q_BNHD, k_BNHD = q_BNHD.detach(), k_BNHD.detach()
    # With the region masks as values, attention returns the sum of the weights inside each region,
    # and a fused kernel never stores the weights themselves. Zeros pad the values to the width of a
    # head.
    head_dim = q_BNHD.shape[-1]
    values_NP = F.pad(regions_PN.T, (0, -regions_PN.shape[0] % head_dim)).to(q_BNHD.dtype)
    q, k = q_BNHD.transpose(1, 2), k_BNHD[:, : values_NP.shape[0]].transpose(1, 2)
    values = values_NP.expand(*k.shape[:2], -1, -1)
    sums_BHNP = F.scaled_dot_product_attention(q, k, values)[..., : regions_PN.shape[0]]
    counts_P = regions_PN.sum(1).clamp_min(1)
    return (sums_BHNP.float().mean(1) / counts_P).transpose(1, 2)


def place_tokens(likeness_BPN: Tensor) -> Tensor:
    """Compute the position of each video token on the line of speakers.

    A token belongs to the speaker with the greatest likeness. Its position within that speaker's
    stretch grows with the likeness. Tokens of the background are in the middle of its stretch.

    Args:
        likeness_BPN: result of ``measure_likeness``.

    Returns:
        Positions, [B, N].
    """
    *speakers, background = line_up(likeness_BPN.shape[1] - 1)
    places = [fill_stretch(likeness_BPN[:, index], start) for index, start in enumerate(speakers)]
    places.append(torch.full_like(places[0], background + STRETCH / 2))
    nearest_BN = likeness_BPN.argmax(1, keepdim=True)
    return torch.stack(places, 1).gather(1, nearest_BN).squeeze(1)


def fill_stretch(likeness_BN: Tensor, start: float) -> Tensor:
    """Scale values linearly to a stretch of the line: the least to its start, the most to its end.

    Args:
        likeness_BN: likeness of all tokens to one speaker.
        start: position where the stretch starts; it is ``STRETCH`` long.

    Returns:
        Positions, [B, N].
    """
    low = likeness_BN.amin(-1, keepdim=True)
    span = likeness_BN.amax(-1, keepdim=True) - low
    return start + STRETCH * (likeness_BN - low) / (span + 1e-8)


def line_up(num_speakers: int) -> list[float]:
    """Return where the stretch of each speaker starts, and last that of the background.

    The background is in the middle of the line. Two speakers have the positions at which the
    released model was trained; more speakers have the same spacing.

    Args:
        num_speakers: number of speakers, at least 2.

    Returns:
        num_speakers + 1 starts.
    """
    starts = [SPACING * index for index in range(num_speakers + 1)]
    starts.append(starts.pop((num_speakers + 1) // 2))
    return starts


class SpeakerLine(NamedTuple):
    """The line of speakers, as the audio attention of all blocks uses it.

    Attributes:
        frequencies_D: frequencies of the rotary table, [head_dim / 2].
        keys: rotary table of the audio tokens, [num_tokens, head_dim / 2].
    """

    frequencies_D: Tensor
    keys: RotaryTable


def draw_line(
    num_speakers: int, num_tokens: int, head_dim: int, device: torch.device
) -> SpeakerLine:
    """Compute the parts of the rotary tables that are the same in all blocks.

    To be called once per network call: its copies wait for the device, which in every block would
    keep it idle.

    Args:
        num_speakers: number of speakers, at least 2.
        num_tokens: audio tokens per latent frame, all of the first speaker before those of the
            next.
        head_dim: head width of the audio attention.
        device: device of the network.

    Returns:
        The line.
    """
    *starts, _ = line_up(num_speakers)
    middles = torch.tensor(starts) + STRETCH / 2
    keys_N = middles.repeat_interleave(num_tokens // num_speakers).to(device)
    frequencies_D = line_frequencies(head_dim, device)
    return SpeakerLine(frequencies_D=frequencies_D, keys=line_table(keys_N, frequencies_D))


def speaker_tables(likeness_BPN: Tensor, line: SpeakerLine) -> tuple[RotaryTable, RotaryTable]:
    """Compute the rotary tables of video tokens and audio tokens on the line of speakers.

    Args:
        likeness_BPN: result of ``measure_likeness``.
        line: result of ``draw_line``.

    Returns:
        Rotary tables of the queries (video tokens), [B, N, head_dim / 2], and of the keys (audio
        tokens), [num_tokens, head_dim / 2].
    """
    return line_table(place_tokens(likeness_BPN), line.frequencies_D), line.keys
