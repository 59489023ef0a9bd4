"""InfiniteTalk's audio modules: the projection of windows to tokens, and the audio attention.

Separate from ``wan.py`` because the adapter has a checkpoint file of its own and can be added to
any Wan 2.1 model: in the core through ``WanModel``, in ComfyUI through a patch of the host's model.

Axes: B batch, F latent frames, K window length, L encoder layers, N tokens, D width.
Source: InfiniteTalk, wan/modules/multitalk_model.py (AudioProjModel) and attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MismatchError
from ..geometry import FIRST_WINDOW, LATER_WINDOW
from .rotary import RotaryTable, rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioAdapterConfig:
    """Sizes of the audio modules; the defaults are those of the released adapter.

    Attributes:
        frame_width: audio features per video frame: the encoder's layers times its width.
        hidden_dim: hidden width of the projection.
        num_tokens: audio tokens per latent frame.
        token_dim: width of each token.
    """

    frame_width: int = 12 * 768
    hidden_dim: int = 512
    num_tokens: int = 32
    token_dim: int = 768


class AudioProjection(nn.Module):
    """MLP from audio windows to audio tokens (Eq. 2); keys as under ``audio_proj.``."""

    def __init__(self, config: AudioAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.proj1 = nn.Linear(FIRST_WINDOW * config.frame_width, config.hidden_dim)
        self.proj1_vf = nn.Linear(LATER_WINDOW * config.frame_width, config.hidden_dim)
        self.proj2 = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.proj3 = nn.Linear(config.hidden_dim, config.num_tokens * config.token_dim)
        self.norm = nn.LayerNorm(config.token_dim)

    def forward(self, first_BKLD: Tensor, later_BFKLD: Tensor) -> Tensor:
        """Compute the audio tokens of one chunk.

        Args:
            first_BKLD: window of the chunk's first frame.
            later_BFKLD: windows of its later latent frames.

        Returns:
            Audio tokens, [B, 1 + F, N, D].

        Raises:
            MismatchError: if the windows come from an audio encoder of another size.
        """
        got = first_BKLD.shape[2] * first_BKLD.shape[3]
        if got != self.config.frame_width:
            raise MismatchError(
                f"the audio encoder gives {got} values per video frame ({first_BKLD.shape[2]} "
                f"layers of {first_BKLD.shape[3]}), this audio adapter takes "
                f"{self.config.frame_width}; load the encoder and the adapter of one family"
            )
        first = F.relu(self.proj1(first_BKLD.flatten(1))).unsqueeze(1)
        later = F.relu(self.proj1_vf(later_BFKLD.flatten(2)))
        hidden = F.relu(self.proj2(torch.cat((first, later), 1)))
        tokens = self.proj3(hidden).unflatten(2, (self.config.num_tokens, self.config.token_dim))
        return layer_norm(tokens, self.norm)


class AudioCrossAttention(nn.Module):
    """Cross-attention from each latent frame's video tokens to the audio tokens of that frame.

    Args:
        dim: width of the video tokens.
        num_heads: attention heads; may differ from those of the video model.
        token_dim: width of the audio tokens.
    """

    def __init__(self, dim: int, num_heads: int, token_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(token_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        hidden_BND: Tensor,
        tokens_BFND: Tensor,
        places: tuple[RotaryTable, RotaryTable] | None = None,
    ) -> Tensor:
        """Compute the audio attention.

        Args:
            hidden_BND: normalised video tokens, frame by frame.
            tokens_BFND: audio tokens, one set per latent frame.
            places: with several speakers, the rotary tables of the video tokens (queries) and of
                the audio tokens (keys); see ``speaker_embedding.speaker_tables``.

        Returns:
            [B, N, D], to be added to the video tokens.
        """
        q = self.q_linear(hidden_BND).unflatten(2, (self.num_heads, -1))
        k, v = self.kv_linear(tokens_BFND).flatten(0, 1).chunk(2, -1)
        k, v = (x.unflatten(2, (self.num_heads, -1)) for x in (k, v))
        if places is not None:
            q, k = rotate(q, places[0]), rotate(k, places[1])
        # Frames become part of the batch, so that each attends to its own audio tokens alone.
        q = q.unflatten(1, (tokens_BFND.shape[1], -1)).flatten(0, 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(hidden_BND.shape))


def layer_norm(hidden: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Apply a layer norm in float32 and cast to the input's dtype, as the reference does."""
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    return F.layer_norm(hidden.float(), norm.normalized_shape, weight, bias, norm.eps).to(
        hidden.dtype
    )
