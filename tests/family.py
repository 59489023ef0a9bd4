"""Very small model families, their files, and what a run of them needs.

``make_…`` functions have small defaults; a test states with keywords what it depends on.
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.benchmark.random_family import TEXT_DIM
from turbotalk_core.audio.wav2vec2 import EncoderConfig, Wav2Vec2Encoder, build_audio_encoder
from turbotalk_core.checkpoints.audio_encoder import save_audio_encoder
from turbotalk_core.checkpoints.networks import save_adapter, save_dit, save_vae
from turbotalk_core.loading import ADAPTER, AUDIO_ENCODER, TEACHER, VAE, ModelFiles
from turbotalk_core.models.audio_adapter import AudioAdapterConfig, AudioProjection
from turbotalk_core.models.image_encoder import ImageEncoder
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.wan import WanConfig, WanModel
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import (
    AudioFeatures,
    Conversation,
    SoundMoments,
    Speaker,
    Speech,
    Waveform,
)

Networks = tuple[WanModel, AudioProjection, WanVAE]

NUM_AUDIO_LAYERS, AUDIO_WIDTH = 2, 16
CONFIG = WanConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=1,
    text_dim=8,
    frequency_dim=16,
    image_dim=None,
    audio_heads=2,
    audio_token_dim=16,
)
PROJECTION_CONFIG = AudioAdapterConfig(
    frame_width=NUM_AUDIO_LAYERS * AUDIO_WIDTH, hidden_dim=8, num_tokens=2, token_dim=16
)
ENCODER_CONFIG = EncoderConfig(
    hidden_size=AUDIO_WIDTH,
    num_hidden_layers=NUM_AUDIO_LAYERS,
    num_attention_heads=2,
    intermediate_size=16,
    conv_dim=(8,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)

SHIPPED = {
    "kind": "student",
    "steps": 2,
    "schedule": "distilled",
    "shift": 5.0,
    "update": "renoise",
    "audio_guidance_scale": 1.0,
    "height": 32,
    "width": 32,
    "chunk_frames": 13,
    "num_motion_frames": 5,
}
NUM_FRAMES = 20  # two chunks of 13 that share 5


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a refused command prints."""
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in captured.err
    return last


def make_config(**changes: Any) -> WanConfig:
    """Return the family's transformer config with other sizes in some places."""
    return replace(CONFIG, **changes)


def make_projection_config(**changes: Any) -> AudioAdapterConfig:
    """Return the family's audio projection config with other sizes in some places."""
    return replace(PROJECTION_CONFIG, **changes)


def make_encoder_config(**changes: Any) -> EncoderConfig:
    """Return the family's audio encoder config with other sizes in some places."""
    return replace(ENCODER_CONFIG, **changes)


def make_request(**changes: Any) -> TalkRequest:
    """Return a request of a distilled model for a small video."""
    fields: dict[str, Any] = {
        "num_inference_steps": 2,
        "schedule": "distilled",
        "shift": 5.0,
        "update": "renoise",
        "seed": 0,
        "height": 32,
        "width": 32,
    }
    return TalkRequest(**{**fields, **changes})


def make_speech(features_TLD: Tensor, num_frames: int | None = None) -> Speech:
    """Return a silent voice with these features, by default as long as they are."""
    num_frames = len(features_TLD) if num_frames is None else num_frames
    return Speech(
        features=AudioFeatures(features_TLD=features_TLD, num_frames=num_frames),
        waveform=Waveform(samples_CS=torch.zeros(1, num_frames * 640), sample_rate=16_000),
    )


def make_conversation(speech: Speech, num_speakers: int = 1) -> Conversation:
    """Return a conversation in which all speakers say the same."""
    speakers = [Speaker(name=f"speaker {n}", waveform=speech.waveform) for n in range(num_speakers)]
    return Conversation(
        speakers=tuple(speakers), speeches=(speech,) * num_speakers, waveform=speech.waveform
    )


class FakeEncoder:
    """Audio encoder with the mean square of a frame's 640 samples, in two layers of three features.

    Attributes:
        heard: all its inputs.
    """

    first_kernel = None

    def __init__(self) -> None:
        self.heard: list[Tensor] = []

    def fingerprint(self) -> str:
        """Return a fixed fingerprint."""
        return "5b"

    def encode(
        self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
    ) -> Tensor:
        """Return features [frames, 2, 3]."""
        self.heard.append(waveform_S)
        padded_S = torch.nn.functional.pad(waveform_S, (0, 640))[: 640 * num_frames]
        level_T = padded_S.reshape(num_frames, 640).square().mean(dim=1)
        return level_T[:, None, None].expand(num_frames, 2, 3)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw from a seed, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_dit(config: WanConfig) -> WanModel:
    """Build a transformer whose output depends on all inputs: the head has random weights too."""
    model = WanModel(config)
    model.initialize()
    torch.nn.init.xavier_uniform_(model.head.head.weight)
    return model


def build_vae(width: int) -> WanVAE:
    """Build a VAE of another width, with initial weights as for training."""
    with seeded():
        vae = WanVAE(width)
        vae.initialize()
    return vae


def write_family(
    folder: Path,
    networks: Networks,
    settings: Mapping[str, Any],
    encoder: Wav2Vec2Encoder | None = None,
) -> ModelFiles:
    """Write the four files of a family under the names of the embedded ones.

    Args:
        folder: a folder laid out as ComfyUI's ``models``.
        networks: transformer, projection and VAE.
        settings: what the transformer is shipped with.
        encoder: audio encoder; None for a file without one, where a test replaces its loader.

    Returns:
        Paths of the files.
    """
    model, projection, vae = networks
    files = ModelFiles(
        dit=folder / "diffusion_models" / TEACHER,
        adapter=folder / "model_patches" / ADAPTER,
        audio_encoder=folder / "audio_encoders" / AUDIO_ENCODER,
        vae=folder / "vae" / VAE,
    )
    for path in (files.dit, files.adapter, files.audio_encoder, files.vae):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_dit(files.dit, model, dict(settings))
    save_adapter(files.adapter, model, projection, {})
    save_vae(files.vae, vae, {})
    if encoder is None:
        save_file({"nothing": torch.zeros(1)}, files.audio_encoder)
    else:
        save_audio_encoder(encoder, files.audio_encoder)
    return files


def write_host_family(
    folder: Path, *, dim: int = 48, audio_width: int = AUDIO_WIDTH, image_dim: int | None = None
) -> ModelFiles:
    """Write a family that a host can load, too.

    Args:
        folder: a folder laid out as ComfyUI's ``models``.
        dim: width of the transformer.
        audio_width: width of the audio encoder.
        image_dim: width of the CLIP tokens, 1280 in ComfyUI; None: no image branch.

    Returns:
        Paths of the files.
    """
    # audio heads other than the model's, and a width that neither 128 nor 40 divides
    config = make_config(
        dim=dim,
        ffn_dim=96,
        num_heads=4,
        num_layers=2,
        text_dim=TEXT_DIM,
        frequency_dim=256,
        image_dim=image_dim,
        audio_token_dim=24,
    )
    with seeded():
        model = WanModel(config)
        projection = AudioProjection(
            make_projection_config(
                frame_width=NUM_AUDIO_LAYERS * audio_width,
                hidden_dim=32,
                num_tokens=4,
                token_dim=24,
            )
        )
        for module in (model, projection):
            for parameter in module.parameters():
                # far from any initial state: biases, norms and gates all matter
                parameter.data += 0.1 * torch.randn_like(parameter)
        networks = model, projection, WanVAE(4)
    encoder = make_encoder_config(
        hidden_size=audio_width, intermediate_size=32, num_conv_pos_embeddings=16
    )
    return write_family(folder, networks, {}, build_audio_encoder(encoder, seed=0))


def train_tokenizer() -> bytes:
    """Train a SentencePiece model of very few words, with the special tokens of umT5."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a man speaks", "a dog", "she speaks to him"] * 4),
        model_writer=model,
        vocab_size=20,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def save_text_encoder(folder: Path, dim: int) -> None:
    """Save a umT5 with the tokenizer inside (whole) and without (bare), and spiece.model."""
    from transformers import UMT5Config, UMT5EncoderModel  # seconds, which most tests need not wait

    folder.mkdir()
    tokenizer = train_tokenizer()
    config = UMT5Config(
        vocab_size=20,
        d_model=dim,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    with seeded():
        weights = UMT5EncoderModel(config).state_dict()
    weights = {k: t.contiguous() for k, t in weights.items() if k != "encoder.embed_tokens.weight"}
    save_file(weights, folder / "bare.safetensors")
    inside = {"spiece_model": torch.tensor(list(tokenizer), dtype=torch.uint8)}
    save_file(weights | inside, folder / "whole.safetensors")
    (folder / "spiece.model").write_bytes(tokenizer)


def save_image_encoder(path: Path, dim: int) -> None:
    """Save a CLIP image encoder of one block and four patches, in the layout of Wan 2.1."""
    with seeded():
        encoder = ImageEncoder(
            dim=dim, mlp_dim=16, num_heads=1, num_layers=2, patch=14, num_patches=4
        )
    weights = {f"visual.{name}": t.contiguous() for name, t in encoder.state_dict().items()}
    save_file(weights, path)


def save_dit_with_image_branch(path: Path, image_dim: int) -> None:
    """Save the family's transformer with other weights and an image branch."""
    with seeded(1):
        model = build_dit(make_config(image_dim=image_dim))
    save_dit(path, model, SHIPPED)


UPRIGHT = {
    1: (False, ()),
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
"""How a stored picture becomes upright, by EXIF orientation: transposed or not, then flipped."""
