"""The codec: encoding, decoding, statistics, and any way to cut a clip in pieces."""

import re

import pytest
import torch

from tests.golden.conftest import FindWeights
from tests.golden.figures import Golden
from tests.golden.networks import build_vae
from turbotalk_core.models.vae import LATENT_MEAN, LATENT_STD, Stream, WanVAE


@pytest.mark.slow
@torch.no_grad()
def test_equals_the_reference(golden: Golden, find_weights: FindWeights) -> None:
    if "decoder.conv1.weight" in golden:
        build_vae(golden)  # a file of weights: its names and shapes are ours
        return
    if "mean" in golden:
        assert torch.equal(torch.tensor(LATENT_MEAN), golden["mean"])
        assert torch.equal(torch.tensor(LATENT_STD), golden["std"])
    vae = build_vae(find_weights("vae_weights", golden.settings.get("config")))
    clips = [name.removesuffix(".video") for name in golden.tensors if name.endswith(".video")]
    assert clips
    for clip in clips:
        assert re.fullmatch(r"n\d+", clip)
        _check_clip(golden, clip, vae)


def _check_clip(golden: Golden, clip: str, vae: WanVAE) -> None:
    frames, latents = golden[f"{clip}.video"], golden[f"{clip}.latent"].unsqueeze(0)
    raw = latents * vae.latent_std_C.view(-1, 1, 1, 1) + vae.latent_mean_C.view(-1, 1, 1, 1)
    golden.expect(f"{clip}.mu_raw", vae.posterior(frames)[0][0])
    golden.expect(f"{clip}.latent", vae.encode(frames)[0])
    golden.expect_known(
        {
            f"{clip}.decoded": vae.decode(latents)[0],
            f"{clip}.decoded_unclamped": vae.reconstruct(raw)[0],
        }
    )
    for length in (1, 2, 4, frames.shape[2]):
        stream: Stream = {}
        pieces = [vae.encode_stream(piece, stream) for piece in frames.split(length, 2)]
        golden.expect(f"{clip}.latent", torch.cat(pieces, 2)[0])
        if f"{clip}.decoded" in golden:
            stream = {}
            pieces = [vae.decode_stream(piece, stream) for piece in latents.split(length, 2)]
            golden.expect(f"{clip}.decoded", torch.cat(pieces, 2)[0])
