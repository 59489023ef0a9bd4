"""The transformer: its output for one and several speakers, and what it computes on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.conftest import FindWeights
from tests.golden.figures import Golden
from tests.golden.networks import build_dit
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.denoiser import ProjectionAdapter, WanDenoiser
from turbotalk_core.models.wan import WanModel
from turbotalk_core.types import AudioTokens, AudioWindows, Conditioning

Pick = Callable[[tuple[Tensor, ...], Any], Tensor | None]


@torch.no_grad()
def test_equals_the_reference(golden: Golden, find_weights: FindWeights) -> None:
    if "head.modulation" in golden:
        build_dit(golden)  # a file of weights: its names and shapes are ours
        return
    model, projection = build_dit(find_weights("dit_weights", golden.settings["config"]))
    results = _watch(model)
    tokens = _hear(golden, projection, results)
    velocity = _call(golden, model, tokens)
    golden.expect("out.v", velocity)
    golden.expect_known(results)
    for name in golden.under("out."):
        if match := re.fullmatch(r"t(\d+)", name):
            golden.expect(f"out.{name}", _call(golden, model, tokens, timestep=float(match[1])))
    golden.expect("out.null_audio", _call(golden, model, _hear_nothing(golden, projection)))
    if "out.alt_masks" in golden:
        golden.expect(
            "out.alt_masks", _call(golden, model, tokens, masks="in.alt_ref_target_masks")
        )


def _hear(golden: Golden, projection: AudioProjection, results: dict[str, Tensor]) -> AudioTokens:
    """Regroup per-frame windows as the transformer does inside the reference."""
    windows = [_regroup(windows_TKLD) for windows_TKLD in golden["in.audio"]]
    adapter = ProjectionAdapter(projection)
    tokens = [adapter(speaker).tokens_FND for speaker in windows]
    results["mid.audio_first_in"] = torch.stack([w.first_KLD for w in windows]).unsqueeze(1)
    results["mid.audio_latter_in"] = torch.stack([w.later_FKLD for w in windows])
    results["mid.audio_tokens"] = torch.stack(tokens)
    return AudioTokens(tokens_FND=torch.cat(tokens, 1), num_speakers=len(tokens))


def _hear_nothing(golden: Golden, projection: AudioProjection) -> AudioTokens:
    return ProjectionAdapter(projection)(_regroup(torch.zeros_like(golden["in.audio"][0])))


def _regroup(windows_TKLD: Tensor) -> AudioWindows:
    """Give the windows of the latent frames: the last four frames' neighbourhoods, joined."""
    first, *later = windows_TKLD
    groups = [later[i : i + 4] for i in range(0, len(later), 4)]
    return AudioWindows(
        first_KLD=first,
        later_FKLD=torch.stack(
            [torch.cat((g[0][:3], g[1][2:3], g[2][2:3], g[3][2:])) for g in groups]
        ),
    )


def _call(
    golden: Golden,
    model: WanModel,
    tokens: AudioTokens,
    *,
    timestep: float | None = None,
    masks: str = "in.ref_target_masks",
) -> Tensor:
    conditioning = Conditioning(
        reference_BCFHW=golden["in.y"].unsqueeze(0),
        text_BND=golden["in.context"].unsqueeze(0),
        image_embeds_BND=golden["in.clip_fea"],
        regions_PHW=golden[masks],
    )
    sigma = (golden["in.t"].item() if timestep is None else timestep) / 1000
    return WanDenoiser(model)(golden["in.x"].unsqueeze(0), sigma, conditioning, tokens)[0]


def _watch(model: WanModel) -> dict[str, Tensor]:
    """Note what the modules compute in the first call, under the names of the figures."""
    results: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, pick: Pick) -> None:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            picked = pick(inputs, output)
            if picked is not None:
                results.setdefault(f"mid.{name}", picked)

        module.register_forward_hook(hook)

    for index, block in enumerate(model.blocks):
        note(f"block{index}.out", block, _output)
        note(f"block{index}.ref_attn_map", block.get_submodule("self_attn"), _likeness)
        for name, module in (
            ("self_attn", "self_attn"),
            ("cross_attn", "cross_attn"),
            ("audio_attn", "audio_cross_attn"),
            ("ffn", "ffn"),
        ):
            note(f"block{index}.{name}_in", block.get_submodule(module), _first_input)
            note(f"block{index}.{name}_out", block.get_submodule(module), _output)
    note("head_out", model.head, _output)
    return results


def _first_input(inputs: tuple[Tensor, ...], _output: Any) -> Tensor:
    return inputs[0]


def _output(_inputs: tuple[Tensor, ...], output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _likeness(_inputs: tuple[Tensor, ...], output: Any) -> Tensor | None:
    return None if output[1] is None else output[1][0]
