"""The audio encoder at the video's frame rate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden.figures import Golden
from tests.golden.networks import load
from turbotalk_core.audio.wav2vec2 import (
    EncoderConfig,
    Wav2Vec2Encoder,
    build_audio_encoder,
    resample_steps,
)
from turbotalk_core.geometry import SAMPLE_RATE, count_frames

FULL_SIZE = {"hidden": 768, "layers": 12, "heads": 12, "ffn": 3072, "conv_dim": 512}
FULL_RATE = "hidden_50hz_layers_"


@pytest.mark.slow
@torch.no_grad()
def test_equals_the_reference(golden: Golden) -> None:
    if "interp.in" in golden:
        _check_resampling(golden)
        return
    encoder = _build(golden.settings.get("config", FULL_SIZE), golden.under("w."))
    wav_S = golden["wav"]
    num_frames = count_frames(len(wav_S), SAMPLE_RATE)
    states = torch.stack(encoder.hidden_states(wav_S[None], num_frames))
    features_TLD = encoder.encode(wav_S, num_frames)
    golden.expect_known({"hidden_states": states, "embedding": features_TLD})
    if "embedding_25fps" in golden:  # only the first channels are kept
        width = golden["embedding_25fps"].shape[-1]
        golden.expect("embedding_25fps", features_TLD[..., :width])
    for name in golden.tensors:
        if name.startswith(FULL_RATE):
            layers = [int(layer) for layer in name.removeprefix(FULL_RATE).split("_")]
            states = encoder.hidden_states(wav_S[None], None)
            width = golden[name].shape[-1]
            golden.expect(name, torch.stack([states[i][0, :, :width] for i in layers]))
    assert golden.checked


def _check_resampling(golden: Golden) -> None:
    sizes = golden.under("interp.out")
    assert sizes
    for size in sizes:
        result = resample_steps(golden["interp.in"].transpose(1, 2), int(size))
        golden.expect(f"interp.out{size}", result.transpose(1, 2))


def _build(config: dict[str, int], weights: dict[str, Tensor]) -> Wav2Vec2Encoder:
    encoder = build_audio_encoder(
        EncoderConfig(
            hidden_size=config["hidden"],
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            intermediate_size=config["ffn"],
            conv_dim=(config["conv_dim"],) * 7,
        ),
        seed=0,
    )
    weights.pop("masked_spec_embed", None)
    load(encoder.model, weights)
    return encoder
