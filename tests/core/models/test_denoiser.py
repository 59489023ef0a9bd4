"""The pipeline's adapters of networks return what the networks return when called directly."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from turbotalk_core.errors import MismatchError
from turbotalk_core.models.audio_adapter import AudioProjection
from turbotalk_core.models.denoiser import ProjectionAdapter, WanDenoiser
from turbotalk_core.models.wan import WanModel
from turbotalk_core.protocols import AudioAdapter
from turbotalk_core.types import AudioTokens, AudioWindows, Conditioning


def _told(dit_io: dict[str, Tensor]) -> tuple[Conditioning, AudioTokens]:
    conditioning = Conditioning(
        reference_BCFHW=dit_io["in.y"].unsqueeze(0),
        text_BND=dit_io["in.context"].unsqueeze(0),
        image_embeds_BND=dit_io["in.clip_fea"],
    )
    return conditioning, AudioTokens(tokens_FND=dit_io["mid.audio_tokens"][0])


def test_the_audio_strength_is_passed_on(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    conditioning, tokens = _told(dit_io)
    latents = dit_io["in.x"].unsqueeze(0)
    result = WanDenoiser(dit, audio_scale=0.5)(latents, 1.0, conditioning, tokens)
    with torch.no_grad():
        expected = dit(
            latents,
            torch.tensor([1000.0]),
            conditioning.reference_BCFHW,
            text_BND=conditioning.text_BND,
            image_embeds_BND=conditioning.image_embeds_BND,
            audio_BFND=tokens.tokens_FND.unsqueeze(0),
            audio_scale=0.5,
        )
    assert torch.equal(result, expected)


def test_several_voices_need_regions(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    conditioning, tokens = _told(dit_io)
    two = AudioTokens(tokens_FND=tokens.tokens_FND.repeat(1, 2, 1), num_speakers=2)
    with pytest.raises(MismatchError, match="2 voices without regions"):
        WanDenoiser(dit)(dit_io["in.x"].unsqueeze(0), 1.0, conditioning, two)


def test_one_voice_is_heard_in_the_whole_picture(dit: WanModel, dit_io: dict[str, Tensor]) -> None:
    conditioning, tokens = _told(dit_io)
    latents = dit_io["in.x"].unsqueeze(0)
    expected = WanDenoiser(dit)(latents, 1.0, conditioning, tokens)
    placed = replace(conditioning, regions_PHW=dit_io["in.ref_target_masks"])
    assert torch.equal(WanDenoiser(dit)(latents, 1.0, placed, tokens), expected)


def test_without_text_and_image_the_null_text_is_told(
    dit: WanModel, dit_io: dict[str, Tensor]
) -> None:
    conditioning, tokens = _told(dit_io)
    bare = Conditioning(reference_BCFHW=conditioning.reference_BCFHW)
    latents = dit_io["in.x"].unsqueeze(0)
    with torch.no_grad():
        expected = dit(
            latents,
            torch.tensor([500.0]),
            bare.reference_BCFHW,
            audio_BFND=tokens.tokens_FND.unsqueeze(0),
        )
    assert torch.equal(WanDenoiser(dit)(latents, 0.5, bare, tokens), expected)


def test_a_projection_takes_windows_of_any_dtype(
    projection: AudioProjection, dit_io: dict[str, Tensor]
) -> None:
    adapter: AudioAdapter = ProjectionAdapter(projection)
    windows = AudioWindows(
        first_KLD=dit_io["mid.audio_first_in"][0, 0].double(),
        later_FKLD=dit_io["mid.audio_latter_in"][0].double(),
    )
    tokens = adapter(windows).tokens_FND
    assert tokens.dtype == torch.float32
    assert not tokens.requires_grad
    with torch.no_grad():
        expected = projection(windows.first_KLD[None].float(), windows.later_FKLD[None].float())
    assert torch.equal(tokens, expected[0])
