"""Whose voice a video token hears, where there are several speakers.

The model has no input that says where a speaker moves. It is told where each speaker is in the
chunk's first latent frame, and in every block each token is placed on a line by which speaker it
resembles: by what of that frame its self-attention attends to. Audio tokens stand at the middle
of their speaker's stretch of the line, so that a token hears the voice it stands near.

Axes: B batch, H heads (or height), W width, N tokens, P speakers and last the background, D width.
Source: InfiniteTalk, wan/modules/attention.py (SingleStreamMultiAttention) and
wan/utils/multitalk_utils.py (get_attn_map_with_target).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import PATCH
from .rotary import RotaryTable, line_table

STRETCH = 4.0  # length of a speaker's part of the line; InfiniteTalk, class_interval
SPACING = 10.0  # between their starts: two speakers and the background fill class_range, 24


def token_regions(regions_PHW: Tensor) -> Tensor:
    """Bring regions from the latent grid to the tokens of one frame.

    Args:
        regions_PHW: 1 inside, else 0, on latent cells.

    Returns:
        [P, N], float32; each token has the region of its upper left cell.
    """
    return regions_PHW[:, ::PATCH, ::PATCH].flatten(1).float()


def measure_likeness(q_BNHD: Tensor, k_BNHD: Tensor, regions_PN: Tensor) -> Tensor:
    """Measure how much each token attends to each region of the first frame.

    Args:
        q_BNHD: queries of all tokens, rotated.
        k_BNHD: keys of all tokens, rotated; those of the first frame are read.
        regions_PN: of ``token_regions``.

    Returns:
        [B, P, N], float32: the mean over heads, and over the region's tokens, of the attention that
        a token pays to the first frame; 0 for an empty region.
    """
    # A token is told its place and does not learn it, as in the reference.
    q_BNHD, k_BNHD = q_BNHD.detach(), k_BNHD.detach()
    # Attention whose values are the regions sums the weights inside each of them.
    head_dim = q_BNHD.shape[-1]
    values_NP = F.pad(regions_PN.T, (0, -regions_PN.shape[0] % head_dim)).to(q_BNHD.dtype)
    q, k = q_BNHD.transpose(1, 2), k_BNHD[:, : values_NP.shape[0]].transpose(1, 2)
    values = values_NP.expand(*k.shape[:2], -1, -1)
    sums_BHNP = F.scaled_dot_product_attention(q, k, values)[..., : regions_PN.shape[0]]
    counts_P = regions_PN.sum(1).clamp_min(1)
    return (sums_BHNP.float().mean(1) / counts_P).transpose(1, 2)


def place_tokens(likeness_BPN: Tensor) -> Tensor:
    """Place each token on the line of speakers.

    A token goes to the speaker that it resembles most, within that speaker's stretch the further
    the more; one that resembles the background most goes to the middle of the background's.

    Args:
        likeness_BPN: of ``measure_likeness``.

    Returns:
        Positions, [B, N].
    """
    *speakers, background = line_up(likeness_BPN.shape[1] - 1)
    places = [fill_stretch(likeness_BPN[:, index], start) for index, start in enumerate(speakers)]
    places.append(torch.full_like(places[0], background + STRETCH / 2))
    nearest_BN = likeness_BPN.argmax(1, keepdim=True)
    return torch.stack(places, 1).gather(1, nearest_BN).squeeze(1)


def fill_stretch(likeness_BN: Tensor, start: float) -> Tensor:
    """Spread values evenly over a stretch of the line: least at its start, most at its end."""
    low = likeness_BN.amin(-1, keepdim=True)
    span = likeness_BN.amax(-1, keepdim=True) - low
    return start + STRETCH * (likeness_BN - low) / (span + 1e-8)


def line_up(num_speakers: int) -> list[float]:
    """Give where each speaker's stretch of the line starts, and last the background's.

    The background lies in the middle. Two speakers stand where the released model was trained to
    hear them; more stand as far apart as these.

    Args:
        num_speakers: at least 2.

    Returns:
        num_speakers + 1 starts.
    """
    starts = [SPACING * index for index in range(num_speakers + 1)]
    starts.append(starts.pop((num_speakers + 1) // 2))
    return starts


def speaker_tables(
    likeness_BPN: Tensor, num_tokens: int, head_dim: int
) -> tuple[RotaryTable, RotaryTable]:
    """Tabulate the places of video tokens and of audio tokens on the line of speakers.

    Args:
        likeness_BPN: of ``measure_likeness``.
        num_tokens: audio tokens per latent frame, all of the first speaker before those of the
            next.
        head_dim: of the audio attention.

    Returns:
        Rotary tables of the queries, [B, N, head_dim / 2], and of the keys,
        [num_tokens, head_dim / 2].
    """
    positions_BN = place_tokens(likeness_BPN)
    *starts, _ = line_up(likeness_BPN.shape[1] - 1)
    middles = torch.tensor(starts, device=positions_BN.device) + STRETCH / 2
    keys_N = middles.repeat_interleave(num_tokens // len(starts))
    return line_table(positions_BN, head_dim), line_table(keys_N, head_dim)
