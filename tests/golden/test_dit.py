"""The transformer: its output for one and several speakers, and what it computes on the way."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tests.golden.conftest import FindWeights
from tests.golden.figures import Golden
from tests.golden.networks import build_dit
from turbotalk_core.model.audio_adapter import AudioProjection
from turbotalk_core.model.denoiser import ProjectionAdapter, WanDenoiser
from turbotalk_core.model.wan import WanModel
from turbotalk_core.types import AudioTokens, AudioWindows, Conditioning


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


def _hear(golden: Golden, projection: AudioProjection, results: dict[str, Tensor]) -> AudioTokens:
    """Regroup per-frame windows as the transformer does inside the reference."""
    windows_STKLD = golden["in.audio"]
    assert windows_STKLD.shape[0] == 1
    windows = _regroup(windows_STKLD[0])
    tokens = ProjectionAdapter(projection)(windows)
    results["mid.audio_first_in"] = windows.first_KLD[None, None]
    results["mid.audio_latter_in"] = windows.later_FKLD[None]
    results["mid.audio_tokens"] = tokens.tokens_FND.unsqueeze(0)
    return tokens


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
    golden: Golden, model: WanModel, tokens: AudioTokens, timestep: float | None = None
) -> Tensor:
    conditioning = Conditioning(
        reference_BCFHW=golden["in.y"].unsqueeze(0),
        text_BND=golden["in.context"].unsqueeze(0),
        image_embeds_BND=golden["in.clip_fea"],
    )
    sigma = (golden["in.t"].item() if timestep is None else timestep) / 1000
    return WanDenoiser(model)(golden["in.x"].unsqueeze(0), sigma, conditioning, tokens)[0]


def _watch(model: WanModel) -> dict[str, Tensor]:
    """Note what the modules compute in the first call, under the names of the figures."""
    results: dict[str, Tensor] = {}

    def note(name: str, module: torch.nn.Module, which: str) -> None:
        def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            results.setdefault(f"mid.{name}", inputs[0] if which == "in" else output)

        module.register_forward_hook(hook)

    for index, block in enumerate(model.blocks):
        note(f"block{index}.out", block, "out")
        for part in ("self_attn", "cross_attn", "ffn"):
            note(f"block{index}.{part}_in", block.get_submodule(part), "in")
            note(f"block{index}.{part}_out", block.get_submodule(part), "out")
        note(f"block{index}.audio_attn_in", block.get_submodule("audio_cross_attn"), "in")
        note(f"block{index}.audio_attn_out", block.get_submodule("audio_cross_attn"), "out")
    note("head_out", model.head, "out")
    return results
