"""The Wan 2.1 image-to-video transformer with InfiniteTalk's audio cross-attention.

Module names are those of the public checkpoints, so the ``state_dict`` keys match them. All widths
are configurable. Precision follows the reference: time embedding, modulation, gated residual sums,
norms and the head are computed in float32, everything else in the dtype of the weights.

Axes: B batch, C channels, F latent frames, H height, W width, N tokens, D width, P speakers and
last the background.
Source: Wan 2.1, wan/modules/model.py; InfiniteTalk, wan/modules/multitalk_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.utils.checkpoint import checkpoint

from ..errors import MismatchError
from ..geometry import LATENT_CHANNELS, PATCH, TEXT_LENGTH
from .audio_adapter import AudioCrossAttention, layer_norm
from .rotary import ROPE_BASE, RotaryTable, rotary_table, rotate
from .speaker_embedding import measure_likeness, speaker_tables, token_regions
from .teacache import TeaCache


@dataclass(frozen=True, slots=True, kw_only=True)
class WanConfig:
    """Sizes of the transformer; the defaults are those of Wan2.1-I2V-14B with InfiniteTalk.

    Attributes:
        dim: width of the video tokens.
        ffn_dim: hidden width of the feed-forward layers.
        num_heads: attention heads; dim / num_heads must be even and at least 6.
        num_layers: transformer blocks.
        in_channels: noisy latents, mask and reference latents together.
        text_dim: width of the text encoder.
        frequency_dim: width of the timestep sinusoid.
        image_dim: width of the CLIP tokens; None for a model without the image branch.
        audio_heads: heads of the audio attention; None for a model without it.
        audio_token_dim: width of the audio tokens.
        eps: epsilon of the norms.

    Raises:
        MismatchError: if the heads do not divide the width, or a head is odd or under 6 wide.
    """

    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_channels: int = 36
    text_dim: int = 4096
    frequency_dim: int = 256
    image_dim: int | None = 1280
    audio_heads: int | None = 40
    audio_token_dim: int = 768
    eps: float = 1e-6

    def __post_init__(self) -> None:
        head_dim = self.dim // self.num_heads
        if self.dim % self.num_heads or head_dim % 2 or head_dim < 6:
            raise MismatchError(
                f"got width {self.dim} and {self.num_heads} heads; the width must be a multiple of "
                "the heads, and each head even and at least 6 wide (3-D rotary embedding)"
            )


class RMSNorm(nn.Module):
    """RMS norm over the whole width, all heads together, normalised in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return F.rms_norm(hidden.float(), self.weight.shape, None, self.eps).to(hidden.dtype) * (
            self.weight
        )


def time_sinusoid(timestep_B: Tensor, dim: int) -> Tensor:
    """Compute the sinusoidal embedding of timesteps in 0..1000.

    Args:
        timestep_B: timesteps, 1000 * sigma.
        dim: width of the embedding, even.

    Returns:
        [B, dim], float64: dim/2 cosines, then dim/2 sines, at frequencies that fall geometrically
        from 1.
    """
    half = dim // 2
    frequencies = ROPE_BASE ** (
        -torch.arange(half, dtype=torch.float64, device=timestep_B.device) / half
    )
    angle = torch.outer(timestep_B.double(), frequencies)
    return torch.cat((angle.cos(), angle.sin()), 1)


class SelfAttention(nn.Module):
    """Self-attention among all video tokens of a chunk."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def forward(
        self,
        hidden_BND: Tensor,
        table: RotaryTable,
        regions_PN: Tensor | None = None,
        num_pieces: int = 1,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute self-attention and, if there are regions, each token's likeness to them.

        Args:
            hidden_BND: normalised and modulated video tokens.
            table: rotary table of the token grid.
            regions_PN: regions of the speakers on the first frame's tokens, or None.
            num_pieces: parts in which queries, and the keys before attention, are computed one
                after the other. Every query still attends to all keys.

        Returns:
            [B, N, D], and the likeness [B, P, N] or None.
        """
        heads = (self.num_heads, -1)
        likeness: list[Tensor] = []

        def make_keys(hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
            return rotate(self.norm_k(self.k(hidden)).unflatten(2, heads), (cosine, sine))

        def attend(hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
            q = rotate(self.norm_q(self.q(hidden)).unflatten(2, heads), (cosine, sine))
            if regions_PN is not None:
                likeness.append(measure_likeness(q, k, regions_PN))
            return self.o(_attend(q, k, v))

        inputs = (hidden_BND, *(angle.unsqueeze(0) for angle in table))
        k = _in_pieces(make_keys, num_pieces, *inputs)
        v = self.v(hidden_BND).unflatten(2, heads)
        attended = _in_pieces(attend, num_pieces, *inputs)
        return attended, torch.cat(likeness, 2) if likeness else None


class CrossAttention(nn.Module):
    """Cross-attention to the text and, if the model has the branch, to the CLIP image tokens.

    The two share the queries but have separate softmaxes, and their outputs are summed.
    """

    def __init__(self, dim: int, num_heads: int, eps: float, *, has_image: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        if has_image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, hidden_BND: Tensor, text_BND: Tensor, image_BND: Tensor | None) -> Tensor:  # noqa: D102
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(hidden_BND)).unflatten(2, heads)
        k = self.norm_k(self.k(text_BND)).unflatten(2, heads)
        attended = _attend(q, k, self.v(text_BND).unflatten(2, heads))
        if image_BND is not None:
            k = self.norm_k_img(self.k_img(image_BND)).unflatten(2, heads)
            attended = attended + _attend(q, k, self.v_img(image_BND).unflatten(2, heads))
        return self.o(attended)


def _in_pieces(call: Callable[..., Tensor], num_pieces: int, *tensors: Tensor) -> Tensor:
    """Apply a per-token function to equal parts of the second axis, one after the other.

    Needs less memory for intermediate results than one call; the output is the same up to rounding.
    """
    if num_pieces == 1:
        return call(*tensors)
    pieces = zip(*(tensor.tensor_split(num_pieces, 1) for tensor in tensors), strict=True)
    return torch.cat([call(*piece) for piece in pieces], 1)


def _attend(q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BNHD, v_BNHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Transformer block: self-attention, text and image attention, audio attention, feed-forward.

    The timestep enters by modulation (adaptive layer norm): ``modulation_B6D`` plus the block's own
    learned offset holds shift, scale and gate of the self-attention and of the feed-forward layer.
    Each of the two computes x + gate * f(norm(x) * (1 + scale) + shift), so a zero modulation
    leaves the norm as it is and removes the branch. The cross-attentions have plain residual sums:
    their input depends on the timestep through the tokens alone.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, config.num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(
            dim, config.num_heads, eps, has_image=config.image_dim is not None
        )
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        if config.audio_heads is not None:
            self.audio_cross_attn = AudioCrossAttention(
                dim, config.audio_heads, config.audio_token_dim
            )
            self.norm_x = nn.LayerNorm(dim, eps)

    def forward(  # noqa: D102
        self,
        hidden_BND: Tensor,
        modulation_B6D: Tensor,
        table: RotaryTable,
        text_BND: Tensor,
        image_BND: Tensor | None,
        audio_BFND: Tensor | None,
        audio_scale: float,
        regions_PN: Tensor | None,
        num_pieces: int = 1,
    ) -> Tensor:
        dtype = hidden_BND.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation.float() + modulation_B6D
        ).split(1, 1)

        def modulate(hidden: Tensor) -> Tensor:
            return (layer_norm(hidden, self.norm1).float() * (1 + scale1) + shift1).to(dtype)

        def cross_attend(hidden: Tensor, attended: Tensor) -> Tensor:
            hidden = (hidden.float() + attended.float() * gate1).to(dtype)
            return hidden + self.cross_attn(layer_norm(hidden, self.norm3), text_BND, image_BND)

        def audio_attend(hidden: Tensor, audio: Tensor, *angles: Tensor) -> Tensor:
            places = (angles, keys) if angles else None
            attended = self.audio_cross_attn(layer_norm(hidden, self.norm_x), audio, places)
            return hidden + audio_scale * attended

        def feed_forward(hidden: Tensor) -> Tensor:
            normed = layer_norm(hidden, self.norm2).float() * (1 + scale2) + shift2
            return (hidden.float() + self.ffn(normed.to(dtype)).float() * gate2).to(dtype)

        normed = _in_pieces(modulate, num_pieces, hidden_BND)
        attended, likeness_BPN = self.self_attn(normed, table, regions_PN, num_pieces)
        hidden_BND = _in_pieces(cross_attend, num_pieces, hidden_BND, attended)
        if audio_BFND is not None:
            angles, keys = (), None
            if likeness_BPN is not None:
                head_dim = self.audio_cross_attn.head_dim
                angles, keys = speaker_tables(likeness_BPN, audio_BFND.shape[2], head_dim)
            hidden_BND = _in_pieces(audio_attend, num_pieces, hidden_BND, audio_BFND, *angles)
        return _in_pieces(feed_forward, num_pieces, hidden_BND)


class Head(nn.Module):
    """Output head from video tokens to patches of velocity, modulated by the timestep."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, PATCH * PATCH * LATENT_CHANNELS)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, hidden_BND: Tensor, time_BD: Tensor) -> Tensor:  # noqa: D102
        # Shift and scale share one time embedding; only their learned offsets differ.
        shift, scale = (self.modulation.float() + time_BD.unsqueeze(1)).chunk(2, 1)
        normed = layer_norm(hidden_BND, self.norm).float() * (1 + scale) + shift
        with without_autocast(hidden_BND.device):
            return F.linear(normed, self.head.weight.float(), self.head.bias.float())


class ImageEmbedding(nn.Module):
    """Projection of CLIP image tokens to the width of the video tokens."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, image_BND: Tensor) -> Tensor:
        """Project image tokens, [B, N, image width], to [B, N, D]."""
        return self.proj(image_BND)


class WanModel(nn.Module):
    """Transformer that predicts the velocity (noise - data) of a chunk of noisy video latents.

    Args:
        config: sizes of the network.

    Attributes:
        config: sizes of the network.
        uses_checkpointing: whether each block is recomputed in the backward pass, instead of
            storing its activations.
        saves_memory: whether the tokens are processed one latent frame at a time, still
            attending to those of all frames: less memory, more time, equal up to rounding.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.uses_checkpointing = False
        self.saves_memory = False
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_channels, dim, (1, PATCH, PATCH), stride=(1, PATCH, PATCH)
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(dim, config.eps)
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim)

    def initialize(self) -> None:
        """Initialise the weights for training from scratch, from torch's global generator.

        Linear layers are Xavier-uniform with zero bias, text and time embeddings N(0, 0.02). Every
        block starts as an ordinary pre-norm block: gates 1, shifts and scales 0, no influence of
        the timestep. The head starts at zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for layer in (*self.time_projection, self.head.head):
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, Block)
                block.modulation.zero_()
                block.modulation[:, 2::3] = 1  # the gates of self-attention and feed-forward
            self.head.modulation.zero_()

    def forward(
        self,
        latents_BCFHW: Tensor,
        timestep_B: Tensor,
        reference_BCFHW: Tensor,
        *,
        text_BND: Tensor | None = None,
        image_embeds_BND: Tensor | None = None,
        audio_BFND: Tensor | None = None,
        audio_scale: float = 1.0,
        regions_PHW: Tensor | None = None,
        cache: TeaCache | None = None,
        hidden_after: dict[int, Tensor] | None = None,
        taps: Collection[int] | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            latents_BCFHW: noisy latents, 16 channels, even sides.
            timestep_B: 1000 * sigma, in 0..1000.
            reference_BCFHW: mask and reference latents, in_channels - 16 channels.
            text_BND: text embedding of at most 512 tokens, or None for the null text (zeros).
            image_embeds_BND: CLIP image tokens, for a model with the image branch.
            audio_BFND: audio tokens per latent frame, all of one speaker before those of the next,
                or None to skip the audio attention.
            audio_scale: factor on the output of the audio attention.
            regions_PHW: regions of several speakers in the first latent frame, 1 inside, and last
                the background; None with one voice, which applies to the whole picture.
            cache: TeaCache of this kind of call, which skips the blocks in steps where they change
                little; None runs them.
            hidden_after: dict that receives the video tokens after each block, [B, N, D] by the
                block's number from 0, for discriminators that use several depths.
            taps: blocks whose tokens ``hidden_after`` receives; the last of them ends the call.
                None for all blocks and the velocity. Tokens of other blocks are freed at once.

        Returns:
            Velocity, float32, in the shape of ``latents_BCFHW``; with ``taps`` the tokens after the
            last of them.

        Raises:
            MismatchError: if the inputs do not fit the model or each other.
        """
        grid = self._check(latents_BCFHW, reference_BCFHW, image_embeds_BND, audio_BFND)
        batch = latents_BCFHW.shape[0]
        dtype = self.patch_embedding.weight.dtype
        hidden = self._patchify(torch.cat((latents_BCFHW, reference_BCFHW), 1).to(dtype))
        sinusoid = time_sinusoid(timestep_B, self.config.frequency_dim).float()
        time_BD = _in_float32(self.time_embedding, sinusoid)
        modulation = _in_float32(self.time_projection, time_BD).unflatten(1, (6, -1))
        text = self._embed_text(text_BND, batch, dtype)
        image = None
        if self.config.image_dim is not None and image_embeds_BND is not None:
            image = self.img_emb(image_embeds_BND.to(dtype))
        audio = None if audio_BFND is None else audio_BFND.to(dtype)
        table = rotary_table(grid, self.config.dim // self.config.num_heads, hidden.device)
        regions = None
        if audio is not None and regions_PHW is not None:
            _check_regions(regions_PHW, latents_BCFHW, audio)
            regions = token_regions(regions_PHW.to(hidden.device))
        num_pieces = grid[0] if self.saves_memory else 1

        def finish(hidden: Tensor) -> Tensor:
            head = _in_pieces(lambda piece: self.head(piece, time_BD), num_pieces, hidden)
            return self._unpatchify(head, grid)

        if cache is not None and not cache.is_due(modulation):
            assert cache.added is not None  # the blocks always run in the first steps
            return finish(hidden + cache.added)
        before = None if cache is None else hidden  # without a cache its memory is not held
        last = len(self.blocks) - 1 if taps is None else max(taps)
        for number, block in enumerate(self.blocks):
            inputs = (modulation, table, text, image, audio, audio_scale, regions, num_pieces)
            if self.uses_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, *inputs, use_reentrant=False)
            else:
                hidden = block(hidden, *inputs)
            assert isinstance(hidden, Tensor)
            if hidden_after is not None and (taps is None or number in taps):
                hidden_after[number] = hidden
            if number == last:
                break
        if taps is not None:
            return hidden
        if cache is not None and before is not None:
            cache.keep(hidden - before)
        return finish(hidden)

    def _check(
        self,
        latents: Tensor,
        reference: Tensor,
        image_embeds: Tensor | None,
        audio: Tensor | None,
    ) -> tuple[int, int, int]:
        _, channels, frames, height, width = latents.shape
        if channels + reference.shape[1] != self.config.in_channels:
            raise MismatchError(
                f"got {channels} + {reference.shape[1]} channels; this model takes "
                f"{self.config.in_channels} (image-to-video needs 16 noisy and 20 reference)"
            )
        if reference.shape[2:] != latents.shape[2:]:
            raise MismatchError(
                f"the reference latents are {tuple(reference.shape[2:])} (frames, height, width), "
                f"the noisy ones {tuple(latents.shape[2:])}; they must be equal"
            )
        if height % PATCH or width % PATCH:
            raise MismatchError(
                f"got latents of {height}x{width}; both sides must be even (16 pixels each step)"
            )
        if image_embeds is not None and image_embeds.shape[-1] != self.config.image_dim:
            raise MismatchError(
                f"the image embedding is {image_embeds.shape[-1]} wide, the model's image branch "
                f"takes {self.config.image_dim or 'none: leave the image embedding out'}"
            )
        if audio is not None:
            if self.config.audio_heads is None:
                raise MismatchError("this model has no audio attention; load an adapter with it")
            if audio.shape[1] != frames or audio.shape[-1] != self.config.audio_token_dim:
                raise MismatchError(
                    f"got audio tokens for {audio.shape[1]} latent frames, {audio.shape[-1]} wide; "
                    f"needed {frames} frames, {self.config.audio_token_dim} wide"
                )
        return frames, height // PATCH, width // PATCH

    def _patchify(self, latents_BCFHW: Tensor) -> Tensor:
        # A strided convolution whose patches do not overlap is a linear layer on patches.
        patches = latents_BCFHW.unflatten(3, (-1, PATCH)).unflatten(5, (-1, PATCH))
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, patches_BND: Tensor, grid: tuple[int, int, int]) -> Tensor:
        patches = patches_BND.unflatten(2, (PATCH, PATCH, LATENT_CHANNELS)).unflatten(1, grid)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def _embed_text(self, text_BND: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor:
        if text_BND is None:
            # Attention to 512 equal rows returns the same as attention to one of them.
            text_BND = torch.zeros(1, 1, self.config.text_dim, device=self.head.modulation.device)
        elif text_BND.shape[1] > TEXT_LENGTH or text_BND.shape[2] != self.config.text_dim:
            raise MismatchError(
                f"got {text_BND.shape[1]} text tokens, {text_BND.shape[2]} wide; this model takes "
                f"at most {TEXT_LENGTH}, {self.config.text_dim} wide: use its own text encoder"
            )
        else:
            text_BND = F.pad(text_BND, (0, 0, 0, TEXT_LENGTH - text_BND.shape[1]))
        return self.text_embedding(text_BND.to(dtype)).expand(batch, -1, -1)


def _check_regions(regions_PHW: Tensor, latents_BCFHW: Tensor, audio_BFND: Tensor) -> None:
    num_speakers = regions_PHW.shape[0] - 1
    if regions_PHW.shape[1:] != latents_BCFHW.shape[3:]:
        raise MismatchError(
            f"got regions of {tuple(regions_PHW.shape[1:])} cells (height, width) for latents of "
            f"{tuple(latents_BCFHW.shape[3:])}; make the regions at the size of the video"
        )
    if num_speakers < 2 or audio_BFND.shape[2] % num_speakers:
        raise MismatchError(
            f"got {num_speakers} regions and a background for {audio_BFND.shape[2]} audio tokens "
            "per latent frame; give each of at least two speakers a region and equally many tokens"
        )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast rounds nothing: float32 operations stay in float32."""
    if not is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _in_float32(layers: nn.Sequential, hidden: Tensor) -> Tensor:
    with without_autocast(hidden.device):
        for layer in layers:
            if isinstance(layer, nn.Linear):
                hidden = F.linear(hidden, layer.weight.float(), layer.bias.float())
            else:
                hidden = layer(hidden)
    return hidden
