"""Networks that are trained: the talking model and the discriminator of videos.

Axes: B batch, C channels, F latent frames, H height, W width, P voices, K window, L encoder
layers, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.batch import Batch
from training.models.lora import merge_adapters
from turbotalk_core.checkpoints.networks import load_dit, save_adapter, save_dit
from turbotalk_core.errors import MismatchError
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.wan import CrossAttention, RMSNorm, WanModel, without_autocast
from turbotalk_core.sampling.steps import denoised_from_velocity

TAP_DEPTHS = (16 / 36, 26 / 36, 36 / 36)  # APT: features after these of 36 layers


class TalkingModel(nn.Module):
    """Transformer with its audio adapter, trained together.

    Args:
        dit: transformer with audio attention.
        projection: audio adapter, from audio windows to the audio tokens that ``dit`` attends to.

    Raises:
        MismatchError: if ``dit`` has no audio attention, or expects tokens of another width.
    """

    def __init__(self, dit: WanModel, projection: AudioProjection) -> None:
        super().__init__()
        width = projection.config.token_dim
        if dit.config.audio_heads is None or dit.config.audio_token_dim != width:
            raise MismatchError(
                f"the audio adapter makes tokens {width} wide, the transformer attends to "
                f"{'none' if dit.config.audio_heads is None else dit.config.audio_token_dim}; "
                "take both from one family"
            )
        self.projection = projection
        self.dit = dit

    def forward(
        self,
        noisy_BCFHW: Tensor,
        sigma_B: Tensor,
        batch: Batch,
        *,
        uses_audio: bool | Tensor = True,
        uses_text: bool | Tensor = True,
        hidden_after: dict[int, Tensor] | None = None,
        taps: Collection[int] | None = None,
    ) -> Tensor:
        """Predict the velocity (noise - data).

        Args:
            noisy_BCFHW: latents at their noise levels, the given frames clean.
            sigma_B: noise level of each chunk, in [0, 1].
            batch: conditions.
            uses_audio: whether the audio is used; False replaces it by null audio, windows of
                zeros, in the whole picture. A bool tensor [B] decides for each chunk.
            uses_text: whether the text is used; False replaces it by the null text. A bool tensor
                [B] decides for each chunk.
            hidden_after: see ``WanModel.forward``.
            taps: see ``WanModel.forward``.

        Returns:
            Velocity, float32, the shape of the latents; with ``taps`` video tokens.
        """
        return self.dit(
            noisy_BCFHW,
            1000 * sigma_B,
            batch.reference_BCFHW,
            text_BND=_choose_text(batch, uses_text),
            image_embeds_BND=batch.image_embeds_BND,
            audio_BFND=self._encode_audio(batch, uses_audio),
            # A single voice, and so null audio too, applies to the whole picture.
            regions_PHW=None if uses_audio is False else batch.regions_PHW,
            hidden_after=hidden_after,
            taps=taps,
        )

    def _encode_audio(self, batch: Batch, uses_audio: bool | Tensor) -> Tensor:
        weight = next(self.projection.parameters())
        first, later = batch.first_BPKLD.to(weight.dtype), batch.later_BPFKLD.to(weight.dtype)
        if isinstance(uses_audio, Tensor):
            used = uses_audio.to(first).view(-1, 1, 1, 1, 1)
            first, later = first * used, later * used.unsqueeze(-1)
        elif not uses_audio:
            first, later = torch.zeros_like(first[:, :1]), torch.zeros_like(later[:, :1])
        tokens = self.projection(first.flatten(0, 1), later.flatten(0, 1))
        return tokens.unflatten(0, first.shape[:2]).transpose(1, 2).flatten(2, 3)

    @classmethod
    def load(
        cls, dit: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32
    ) -> TalkingModel:
        """Load both networks from their files.

        Args:
            dit: file of the transformer, with or without a merged audio adapter.
            adapter: file of the audio adapter; None for the one in the transformer's file.
            dtype: dtype of the weights in memory.

        Returns:
            The networks; all parameters require gradients.

        Raises:
            CheckpointError: if a file is missing, damaged or of another kind.
            MismatchError: if there is no adapter, or it was made for another transformer.
        """
        model, projection = load_dit(dit, adapter, dtype)
        if projection is None:
            raise MismatchError(
                f"{Path(dit).name} has no audio adapter in it and none was given; give both files"
            )
        return cls(model, projection).requires_grad_(True)

    def save(self, dit: Path, adapter: Path, settings: Mapping[str, Any]) -> None:
        """Write both networks as model files.

        LoRA layers are merged into the weights permanently.

        Args:
            dit: file of the transformer.
            adapter: file of the audio adapter.
            settings: settings that ship with the transformer, written to its metadata; its ``kind``
                is written to the adapter's metadata as well.
        """
        merge_adapters(self)
        save_dit(dit, self.dit, settings)
        save_adapter(adapter, self.dit, self.projection, {"kind": settings.get("kind")})


def predict_denoised(
    model: Callable[..., Tensor], noisy_BCFHW: Tensor, sigma_B: Tensor, batch: Batch
) -> Tensor:
    """Predict clean latents, noisy - sigma * velocity, with the given frames put in.

    Args:
        model: a ``TalkingModel``, or an engine around one.
        noisy_BCFHW: latents at their noise levels, the given frames clean.
        sigma_B: noise level of each chunk, in [0, 1].
        batch: conditions, and the given latent frames.

    Returns:
        Clean latents, float32, the shape of the noisy ones.
    """
    velocity = model(noisy_BCFHW, sigma_B, batch)
    sigma = sigma_B.view(-1, 1, 1, 1, 1)
    return batch.pin(denoised_from_velocity(noisy_BCFHW, velocity, sigma))


def tap_blocks(num_layers: int) -> tuple[int, ...]:
    """Choose the blocks whose output the discriminator's heads use.

    Args:
        num_layers: number of the transformer's blocks.

    Returns:
        Three block numbers, from 0; 17, 28, 39 of 40 blocks.

    Source: APT (2501.08316), layers 16, 26 and 36 of 36 [read]; for other depths in proportion
    [inferred].
    """
    return tuple(max(1, round(depth * num_layers)) - 1 for depth in TAP_DEPTHS)


class QueryHead(nn.Module):
    """Cross-attention of one learnable token to all video tokens of one depth.

    Args:
        dim: width of the video tokens.
        ffn_dim: width inside its feed-forward layers.
        num_heads: number of attention heads.
        eps: epsilon of the norms.

    Source: APT (2501.08316), section 3.3 [read]; that the token starts near zero is [inferred].
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.norm_query = RMSNorm(dim, eps)
        self.norm_video = RMSNorm(dim, eps)
        self.attention = CrossAttention(dim, num_heads, eps, has_image=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim, eps), nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim)
        )

    def forward(self, hidden_BND: Tensor) -> Tensor:
        """Reduce the tokens [B, N, D] of each video to one vector, [B, D]."""
        token = self.query.expand(hidden_BND.shape[0], -1, -1)
        token = token + self.attention(self.norm_query(token), self.norm_video(hidden_BND), None)
        return (token + self.mlp(token)).squeeze(1)


class Logit(nn.Module):
    """Last layer of the discriminator: zero at the start, and without a bias.

    A relativistic loss depends on differences of logits, so a bias would cancel. Its gradient would
    be rounding noise, which Adam normalises to full steps. The layer computes in float32, because
    the difference of two logits is much smaller than the logits.

    Args:
        dim: width of its input.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, hidden_BD: Tensor) -> Tensor:
        normed = F.layer_norm(hidden_BD.float(), self.weight.shape)
        return (normed * self.weight.float()).sum(1)


class Discriminator(nn.Module):
    """Discriminator: one logit for a whole video.

    Logits per frame, or a backbone that attends to less than the whole video, lead to frozen videos
    (AAD-1, 2606.03972).

    Args:
        backbone: transformer whose hidden states are used at three depths. The heads are drawn from
            torch's global generator.

    Source: APT [read]; that TurboTalk uses this design, starts the backbone from the 4-step model
    and the last layer from zeros [read].
    """

    def __init__(self, backbone: TalkingModel) -> None:
        super().__init__()
        self.backbone = backbone
        config = backbone.dit.config
        self.taps = tap_blocks(config.num_layers)
        self.heads = nn.ModuleList(
            QueryHead(config.dim, config.ffn_dim, config.num_heads, config.eps) for _ in self.taps
        )
        self.logit = Logit(len(self.taps) * config.dim)
        weight = backbone.dit.patch_embedding.weight
        self.heads.to(weight)
        self.logit.to(weight)

    def forward(self, latents_BCFHW: Tensor, sigma_B: Tensor, batch: Batch) -> Tensor:
        """Score videos.

        Args:
            latents_BCFHW: latents to score, the given frames clean.
            sigma_B: noise level that is passed to the backbone, in [0, 1].
            batch: conditions.

        Returns:
            Logits, [B], float32; higher is more real.
        """
        # The penalties are squared differences of two nearby logits. In bfloat16 a quarter of them
        # and more would be rounding, so autocast is off: float32 weights compute in float32.
        hidden: dict[int, Tensor] = {}
        with without_autocast(latents_BCFHW.device):
            self.backbone(latents_BCFHW, sigma_B, batch, hidden_after=hidden, taps=set(self.taps))
            read = [head(hidden[tap]) for head, tap in zip(self.heads, self.taps, strict=True)]
            return self.logit(torch.cat(read, 1))


def _choose_text(batch: Batch, uses_text: bool | Tensor) -> Tensor | None:
    text, null = batch.text_BND, batch.null_text_BND
    if isinstance(uses_text, bool):
        return text if uses_text else null
    given = null if text is None else text
    if given is None:
        return None
    text, null = (torch.zeros_like(given) if x is None else x.to(given) for x in (text, null))
    # If the lengths differ, the shorter text is padded with zeros, as the network itself does.
    length = max(text.shape[1], null.shape[1])
    text, null = (F.pad(x, (0, 0, 0, length - x.shape[1])) for x in (text, null))
    return torch.where(uses_text.to(given.device).view(-1, 1, 1), text, null)
