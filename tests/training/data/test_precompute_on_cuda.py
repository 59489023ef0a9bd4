"""Encoding of a shot with the networks of Wan 2.1 in full size, on a fake CUDA device."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fake_cuda import CUDA, FakeCuda, write_unread
from tests.family import make_encoder_config, train_tokenizer
from training.data.precompute import EncoderFiles, encode_shot, load_encoders
from training.data.shots import Shot
from turbotalk_core.audio.wav2vec2 import build_audio_encoder
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder, save_audio_encoder
from turbotalk_core.models.image_encoder import ImageEncoder
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.types import Waveform

pytestmark = pytest.mark.slow

HEIGHT, WIDTH, NUM_FRAMES = 480, 832, 9
GIB = 2**30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> EncoderFiles:
    """Files of the public sizes without weights; only the audio encoder, on the CPU, is real."""
    from transformers import UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("files")
    sizes: dict[str, Any] = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240}
    sizes |= {"num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        vae = WanVAE(96)
        image = ImageEncoder(
            dim=1280, mlp_dim=5120, num_heads=16, num_layers=32, patch=14, num_patches=256
        )
        text = UMT5EncoderModel(UMT5Config(**sizes))
    save_audio_encoder(
        build_audio_encoder(make_encoder_config(), seed=0), folder / "audio.safetensors"
    )
    (folder / "spiece.model").write_bytes(train_tokenizer())
    visual = {f"visual.{name}": weight for name, weight in image.half().state_dict().items()}
    words = text.bfloat16().state_dict()
    del words["encoder.embed_tokens.weight"]
    return EncoderFiles(
        vae=write_unread(folder / "vae.safetensors", vae.state_dict()),
        audio=folder / "audio.safetensors",
        image=write_unread(folder / "clip.safetensors", visual),
        text=write_unread(folder / "umt5.safetensors", words),
        tokenizer=folder / "spiece.model",
    )


def _make_shot() -> Shot:
    def show(start: int, stop: int) -> Tensor:
        return torch.zeros(3, stop - start, HEIGHT, WIDTH)

    voice = Waveform(samples_CS=torch.zeros(1, 640 * 20), sample_rate=16_000)
    return Shot(
        show=show,
        voices=(voice, voice),
        num_frames=20,
        clip_frames=NUM_FRAMES,
        later_start=7,
        caption="a man speaks",
    )


def test_a_shot_is_encoded_on_the_device_and_ends_on_the_cpu(files: EncoderFiles) -> None:
    with FakeCuda() as cuda:
        with cuda.unread():
            encoders = load_encoders(files, CUDA)
        encoders = replace(encoders, audio=load_audio_encoder(files.audio))
        held = cuda.live
        cuda.reset_peak()
        cuda.syncs.clear()
        sample = encode_shot(_make_shot(), encoders)
        waits = cuda.places()
    assert all(tensor.device.type == "cpu" for tensor in sample.tensors().values())
    assert sample.text_ND is not None
    assert sample.opening_CFHW.dtype == sample.text_ND.dtype == torch.float16
    by_file: Counter[str] = Counter()
    for place, count in waits.items():
        by_file[place.split()[0]] += count
    # Frames go to the device and latents and tokens come back, once each; nothing is needed again.
    assert by_file == {
        "models/vae.py": 3,  # two clips and the reference
        "models/image_encoder.py": 3,  # the picture, its statistics, and the tokens
        "models/text_encoder.py": 3,
        "training/data/precompute.py": 5,  # four tensors of latents, and the length of one
    }
    assert files.image is not None
    assert files.text is not None
    halved = files.image.stat().st_size  # read as float32
    weights = files.vae.stat().st_size + 2 * halved + files.text.stat().st_size
    assert held == pytest.approx(weights, rel=0.01)
    assert cuda.peak < held + 6 * GIB  # of frames of 480x832
