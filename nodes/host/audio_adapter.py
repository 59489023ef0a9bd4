"""Audio adapter for the host: a MODEL_PATCH that adds audio attention to the host's Wan model.

The layers are the host's own InfiniteTalk classes, so that the host counts, moves and casts the
weights, and so that our adapters work in its native nodes and its adapters in ours. The
differences: every size is read from the file; float8 weights with scales stay float8 in memory, and
the host multiplies them out when it computes; any number of voices and a background are
distinguished with the core's functions, where the host's classes support two voices without a
background; and attention functions of other packs are used here as well.

Axes: B batch, F latent frames, K window length, L encoder layers, N tokens, H heads, D width,
P speakers and last the background.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.wan.model_multitalk import MultiTalkAudioProjModel, SingleStreamMultiAttention
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from torch import Tensor, nn

from ...turbotalk_core.checkpoints.inspect import ADAPTER, inspect
from ...turbotalk_core.errors import CheckpointError, MismatchError
from ...turbotalk_core.geometry import FIRST_WINDOW, LATER_WINDOW
from ...turbotalk_core.models.rotary import rotate
from ...turbotalk_core.models.speaker_embedding import (
    draw_line,
    measure_likeness,
    speaker_tables,
)
from ...turbotalk_core.types import AudioTokens, AudioWindows
from .convert import check_finite

# In the host's transformer_options:
TOKENS_KEY = "turbotalk_audio_tokens"  # [1, F, N, D]
REGIONS_KEY = "turbotalk_regions"  # of several speakers, [P, N]
_LIKENESS_KEY = "turbotalk_likeness"  # within a block, from its first patch to its second
_LINE_KEY = "turbotalk_line"  # within a call, from its first block on

# Where the host calls patches in every block:
_SELF_ATTENTION = "attn1_patch"  # inside of it, with queries and keys
PATCH_POINT = "attn2_patch"  # right after the text attention
NORM_EPS = 1e-6  # Wan 2.1
FLOAT8_FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


class _AudioBlock(nn.Module):
    """Audio attention of the adapter for one block of the model."""

    def __init__(self, dim: int, token_dim: int, num_heads: int) -> None:
        super().__init__()
        self.audio_cross_attn = SingleStreamMultiAttention(
            dim,
            token_dim,
            num_heads=num_heads,
            qkv_bias=True,
            device="meta",
            operations=comfy.ops.manual_cast,
        )
        self.norm_x = comfy.ops.manual_cast.LayerNorm(dim, eps=NORM_EPS, device="meta")


class _AdapterModule(nn.Module):
    """Adapter layers under InfiniteTalk's names, on the meta device until weights are loaded."""

    def __init__(self, sizes: dict[str, int], hidden_dim: int) -> None:
        super().__init__()
        self.audio_proj = MultiTalkAudioProjModel(
            seq_len=FIRST_WINDOW,
            seq_len_vf=LATER_WINDOW,
            blocks=1,
            channels=sizes["audio values per frame"],
            intermediate_dim=hidden_dim,
            out_dim=sizes["token width"],
            context_tokens=sizes["tokens per latent frame"],
            device="meta",
            operations=comfy.ops.manual_cast,
        )
        self.blocks = nn.ModuleList(
            _AudioBlock(sizes["video width"], sizes["token width"], sizes["heads"])
            for _ in range(sizes["layers"])
        )


# Compiled code would reuse the transformer_options of its first call for every later block and
# voice, because the host excludes them from the compiler's guards. So the patches are not compiled.
@torch.compiler.disable
def measure_speakers(arguments: dict[str, Any]) -> Tensor:
    """Measure the likeness of each video token to each speaker, if there are several voices.

    The result is stored in the transformer options for the audio attention of the same block.

    Args:
        arguments: of the host's patch in each self-attention.

    Returns:
        The input ``x``, unchanged.
    """
    options = arguments["transformer_options"]
    regions_PN = options.get(REGIONS_KEY)
    if regions_PN is not None:
        q_BNHD, k_BNHD = arguments["q"], arguments["k"]
        options[_LIKENESS_KEY] = measure_likeness(q_BNHD, k_BNHD, regions_PN.to(q_BNHD.device))
    return arguments["x"]


class AudioAttentionPatch:
    """Patch that adds audio attention to the video tokens; the host calls it in each block."""

    def __init__(self, model_patch: ModelPatcher, strength: float) -> None:
        """Store the adapter and its strength.

        Args:
            model_patch: the adapter, ours or the host's.
            strength: factor on the output of the audio attention; 1 is as trained.
        """
        self.model_patch = model_patch
        self.strength = strength

    @torch.compiler.disable  # as above
    def __call__(self, arguments: dict[str, Any]) -> Tensor:
        """Attend from the video tokens of each latent frame to its audio tokens."""
        options, hidden_BND = arguments["transformer_options"], arguments["x"]
        tokens_BFND = options.get(TOKENS_KEY)
        if tokens_BFND is None:
            raise MismatchError(
                "this MODEL has a TurboTalk audio adapter and got no speech; sample it with "
                "TurboTalk · Sampler, or take the MODEL from before Apply audio adapter"
            )
        block = self.model_patch.model.blocks[options["block_index"]]
        tokens_BFND = tokens_BFND.to(hidden_BND).expand(hidden_BND.shape[0], -1, -1, -1)
        attended_BND = _attend_audio(
            block.audio_cross_attn, block.norm_x(hidden_BND), tokens_BFND, options
        )
        return hidden_BND + self.strength * attended_BND

    def models(self) -> list[ModelPatcher]:
        """Return the patchers whose weights the host must load with the model."""
        return [self.model_patch]


def _attend_audio(
    attention: Any, normed_BND: Tensor, tokens_BFND: Tensor, options: dict[str, Any]
) -> Tensor:
    """Compute the core's ``AudioCrossAttention`` with the weights of the host's layer.

    The layer's own ``forward`` would ignore attention overrides of other packs in the options.
    """
    heads = (attention.num_heads, -1)
    q = attention.q_linear(normed_BND).unflatten(2, heads)
    k, v = attention.kv_linear(tokens_BFND.flatten(0, 1)).chunk(2, -1)
    k, v = (x.unflatten(2, heads) for x in (k, v))
    regions_PN = options.get(REGIONS_KEY)
    if regions_PN is not None:
        likeness_BPN = options.pop(_LIKENESS_KEY, None)
        if likeness_BPN is None:
            raise MismatchError(
                "something replaced this MODEL's self-attention, in which several speakers are "
                "told apart; take the node out that did, or use one speaker"
            )
        line = options.get(_LINE_KEY)
        if line is None or line.frequencies_D.device != q.device:
            line = options[_LINE_KEY] = draw_line(
                len(regions_PN) - 1, tokens_BFND.shape[2], attention.head_dim, q.device
            )
        places = speaker_tables(likeness_BPN, line)
        q, k = rotate(q, places[0]), rotate(k, places[1])
    q = q.unflatten(1, (tokens_BFND.shape[1], -1)).flatten(0, 1)
    attended = optimized_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        heads=attention.num_heads,
        skip_reshape=True,
        transformer_options=options,
    )
    return attention.proj(attended.reshape(normed_BND.shape))


class HostAdapter:
    """Audio projection of an adapter; satisfies ``protocols.AudioAdapter``."""

    def __init__(self, model_patch: ModelPatcher) -> None:
        """Wrap an adapter."""
        self._projection = model_patch.model.audio_proj

    def __call__(self, windows: AudioWindows) -> AudioTokens:
        """Compute the audio tokens of one chunk; see ``protocols.AudioAdapter``."""
        _, num_layers, width = windows.first_KLD.shape
        expected = self._projection.proj1.in_features // FIRST_WINDOW
        if num_layers * width != expected:
            raise MismatchError(
                f"the speech has {num_layers} layers of {width} values per frame "
                f"({num_layers * width}), the audio adapter takes {expected} values; load the "
                "audio encoder that the adapter was trained with"
            )
        tokens_BFND = self._projection(windows.first_KLD[None, None], windows.later_FKLD[None])
        return AudioTokens(tokens_FND=tokens_BFND[0].float())


def load_audio_adapter(path: Path, disable_dynamic: bool = False) -> ModelPatcher:
    """Read an InfiniteTalk audio adapter of any size as a MODEL_PATCH.

    Args:
        path: safetensors file.
        disable_dynamic: set by the host when it calls this function again to load the same weights
            as a whole.

    Returns:
        The adapter; the host manages its weights.

    Raises:
        CheckpointError: The file is missing, damaged, incomplete, of another kind, or quantised in
            another way than float8 with scales.
    """
    info = inspect(path)
    header = info.header
    if info.kind != ADAPTER:
        raise CheckpointError(
            f"{path.name} is: {info.kind}; needed here: {ADAPTER}. "
            f"What this file is for: {info.uses}"
        )
    if info.quantization not in (None, "fp8", "fp8-scaled"):
        raise CheckpointError(
            f"{path.name} is quantised as {info.quantization}; an audio adapter may be in fp8, "
            "with scales or without: take such a file, or the fp16 one"
        )
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    weights = {name: tensors[stored.name] for name, stored in header.tensors.items()}
    module = _AdapterModule(info.sizes, weights["audio_proj.proj1.weight"].shape[0])
    try:
        module.load_state_dict(weights, assign=True)  # as stored: the host casts when it computes
    except RuntimeError as error:
        raise CheckpointError(
            f"{path.name} is no complete audio adapter: {error}; get a complete file"
        ) from error
    _scale(module, {name: tensors[stored.name] for name, stored in header.scales.items()})
    patcher_type = ModelPatcher if disable_dynamic else CoreModelPatcher
    patcher = patcher_type(
        module.requires_grad_(False).eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # The host uses it to load the adapter again, for example for another GPU; the quality
    # warnings read the file's path from it.
    patcher.cached_patcher_init = (load_audio_adapter, (path,))
    return patcher


def _scale(module: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Replace float8 layers that have a scale by the host's layer class for scaled float8."""
    # Products in full precision, so that the inputs of a layer are not rounded to float8.
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    for name, scale in scales.items():
        parent_name, _, last = name.removesuffix(".weight").rpartition(".")
        parent = module.get_submodule(parent_name)
        plain = getattr(parent, last)
        if not isinstance(plain, nn.Linear):
            raise CheckpointError(
                f"the adapter has a scale for {name}, which is no matrix; get the file again"
            )
        marker = json.dumps({"format": FLOAT8_FORMATS[plain.weight.dtype]})
        scaled = operations.Linear(plain.in_features, plain.out_features)
        scaled.load_state_dict(
            plain.state_dict()
            | {
                "weight_scale": scale.float(),
                "comfy_quant": torch.tensor(list(marker.encode()), dtype=torch.uint8),
            },
            assign=True,
        )
        setattr(parent, last, scaled)


def add_audio_adapter(
    model: ModelPatcher, model_patch: ModelPatcher, strength: float
) -> ModelPatcher:
    """Attach an audio adapter to a clone of the host's Wan model.

    Args:
        model: image-to-video Wan 2.1, possibly with other patches.
        model_patch: the adapter, from our loader or the host's.
        strength: factor on the output of the audio attention.

    Returns:
        The clone.

    Raises:
        MismatchError: The model or the patch is of another kind, the adapter has another size, or
            the model already has an adapter.
        RequestError: The strength is not finite.
    """
    check_finite("strength", strength, ", 1 is as trained")
    wan = get_wan(model)
    module = model_patch.model
    if not (hasattr(module, "audio_proj") and hasattr(module, "blocks")):
        raise MismatchError(
            f"got a model patch of type {type(module).__name__}; an InfiniteTalk audio adapter is "
            "needed: load it with TurboTalk · Load audio adapter"
        )
    width, num_layers = module.blocks[0].norm_x.weight.shape[0], len(module.blocks)
    # The host's own loader always makes 40 blocks, more than a small model has.
    if width != wan.dim or num_layers < len(wan.blocks):
        raise MismatchError(
            f"the audio adapter is for a transformer of width {width} and {num_layers} layers, the "
            f"model has width {wan.dim} and {len(wan.blocks)} layers; load the adapter of the same "
            "family"
        )
    if _find_patches(model):
        raise MismatchError(
            "this MODEL has an audio adapter already; apply one adapter only, with its strength"
        )
    patched = model.clone()
    patched.set_model_patch(measure_speakers, _SELF_ATTENTION)
    patched.set_model_patch(AudioAttentionPatch(model_patch, strength), PATCH_POINT)
    return patched


def find_audio_adapter(model: ModelPatcher) -> ModelPatcher:
    """Find the audio adapter of a model.

    Args:
        model: the result of ``add_audio_adapter``, or a clone of it.

    Returns:
        The adapter.

    Raises:
        MismatchError: The model has no adapter.
    """
    patches = _find_patches(model)
    if not patches:
        raise MismatchError(
            "this MODEL has no audio adapter, so it cannot hear; put TurboTalk · Apply audio "
            "adapter between the loader and the sampler"
        )
    return patches[0].model_patch


def get_wan(model: ModelPatcher) -> Any:
    """Return the transformer inside a MODEL, if it is image-to-video Wan 2.1.

    Args:
        model: any MODEL.

    Returns:
        The host's WanModel.

    Raises:
        MismatchError: The architecture is another one, or the input does not have 36 channels.
    """
    if not isinstance(model.model, comfy.model_base.WAN21):
        raise MismatchError(
            f"got a {type(model.model).__name__} model; TurboTalk drives Wan 2.1 image-to-video"
        )
    wan = model.get_model_object("diffusion_model")
    if wan.in_dim != 36:  # 16 noisy latents, 4 of mask, 16 of reference
        raise MismatchError(
            f"got a Wan model with {wan.in_dim} input channels; the image-to-video one has 36"
        )
    return wan


def _find_patches(model: ModelPatcher) -> list[AudioAttentionPatch]:
    patches = model.model_options["transformer_options"].get("patches", {})
    return [p for p in patches.get(PATCH_POINT, []) if isinstance(p, AudioAttentionPatch)]
