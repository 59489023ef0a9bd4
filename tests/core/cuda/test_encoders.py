"""The encoders of the full sizes on a fake CUDA device: sound, text and pictures."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tests.core.cuda.family import make_small_request
from tests.fake_cuda import CUDA, FakeCuda, write_unread
from tests.family import train_tokenizer
from turbotalk_core.audio.features import encode_in_sections, encode_whole
from turbotalk_core.audio.wav2vec2 import EncoderConfig, Wav2Vec2Encoder, make_model
from turbotalk_core.audio.windows import null_windows, take_windows
from turbotalk_core.checkpoints.networks import load_text_encoder
from turbotalk_core.chunking.plan import plan_chunks
from turbotalk_core.models.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.models.denoiser import ProjectionAdapter
from turbotalk_core.models.text_encoder import encode_prompt
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.vae_layers import Stream
from turbotalk_core.types import Waveform

BASE = EncoderConfig(  # wav2vec2-base
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    conv_dim=(512,) * 7,
)


@pytest.mark.slow
@pytest.mark.parametrize("in_sections", [False, True])
def test_a_voice_is_encoded_on_the_device_up_to_its_tokens(in_sections: bool) -> None:
    request = make_small_request()
    with FakeCuda() as cuda:
        with cuda.weights("cuda"):
            encoder = Wav2Vec2Encoder(make_model(BASE).eval(), BASE)
            projection = AudioProjection(AudioAdapterConfig()).to(torch.bfloat16)
        cuda.syncs.clear()
        samples = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
        if in_sections:
            sound = Waveform(samples_CS=samples, sample_rate=16_000)
            features = encode_in_sections(sound, Fraction(0), Fraction(1), encoder)
        else:
            features = encode_whole(samples[0], Fraction(1), encoder)
        chunk = plan_chunks(25, request.chunk_frames, request.num_motion_frames).chunks[1]
        adapter = ProjectionAdapter(projection)
        tokens = [adapter(f(features, chunk)).tokens_FND for f in (take_windows, null_windows)]
        for tokens_FND in tokens:
            assert tokens_FND.shape == (3, 32, 768)
            assert (tokens_FND.device.type, tokens_FND.dtype) == ("cuda", torch.bfloat16)
        places = cuda.places()
    gather = Counter({"audio/windows.py take_windows": 2})
    if in_sections:  # one section
        moments = {"audio/normalization.py normalized_by": 3, "audio/normalization.py <genexpr>": 2}
        assert places == gather + Counter(moments) + Counter({"audio/wav2vec2.py hidden_states": 1})
    else:  # the voice, and the silence after it
        assert places == gather + Counter({"audio/wav2vec2.py hidden_states": 2})


@pytest.mark.slow
def test_a_prompt_is_encoded_on_the_device(tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel  # seconds

    config = UMT5Config(  # umT5-xxl with fewer blocks; a block is that of all 24
        vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=2, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        weights = UMT5EncoderModel(config).bfloat16().state_dict()
    weights.pop("encoder.embed_tokens.weight")
    path = write_unread(tmp_path / "umt5.safetensors", weights)
    (tmp_path / "spiece.model").write_bytes(train_tokenizer())
    with FakeCuda() as cuda, cuda.unread():
        encoder, tokenizer = load_text_encoder(path, tmp_path / "spiece.model", torch.bfloat16)
        torch.nn.Module.to(encoder.model, CUDA)
        cuda.syncs.clear()
        text_BND = encode_prompt("a man speaks", tokenizer, encoder)
        places = cuda.places()
    assert type(text_BND) is torch.Tensor
    assert (text_BND.device.type, text_BND.dtype) == ("cpu", torch.float32)
    assert text_BND.shape[::2] == (1, 4096)
    assert places == {
        "models/text_encoder.py __call__": 2,
        "models/text_encoder.py encode_prompt": 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_streams_through_the_vae(dtype: torch.dtype) -> None:
    with FakeCuda() as cuda, torch.no_grad():
        with cuda.weights("cuda"):
            vae = WanVAE(96).to(dtype)
        cuda.syncs.clear()
        frames = torch.zeros(1, 3, 9, 64, 96, dtype=dtype).to(CUDA)
        stream: Stream = {}
        pieces = [vae.encode_stream(p, stream) for p in frames.split((1, 3, 5), 2)]
        assert [piece.shape[2] for piece in pieces] == [1, 0, 2]
        latents = torch.cat(pieces, 2)
        assert (latents.device.type, latents.dtype) == ("cuda", dtype)
        stream = {}
        shown = torch.cat([vae.decode_stream(p, stream) for p in latents.split((1, 2), 2)], 2)
        assert shown.shape == frames.shape
        assert (shown.device.type, shown.dtype) == ("cuda", dtype)
        assert cuda.places() == Counter({"elsewhere": 1})  # the frames above
