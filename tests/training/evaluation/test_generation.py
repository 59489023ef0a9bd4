"""Clips are generated as a file would hold them, and reference images are encoded once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.family import FakeEncoder
from training.avatars.synthetic import SyntheticClip
from training.evaluation.generation import RememberingVAE, generate_clip, load_family
from turbotalk_core.errors import RequestError
from turbotalk_core.pipeline import Models
from turbotalk_core.request import TalkRequest


def test_a_generated_clip_is_as_long_as_the_true_one_and_8_bit(
    clip: SyntheticClip, models: Models, settings: TalkRequest
) -> None:
    frames = generate_clip(clip, settings, models, FakeEncoder())
    assert frames.shape == clip.frames_CTHW.shape
    levels = (frames + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert frames.abs().max() <= 1
    assert frames.diff(dim=1).any()
    assert torch.equal(generate_clip(clip, settings, models, FakeEncoder()), frames)
    other = generate_clip(clip, replace(settings, seed=1), models, FakeEncoder())
    assert not torch.equal(other, frames)


def test_a_transformer_without_its_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="name both or neither"):
        load_family(tmp_path, "teacher", dit=tmp_path / "student.safetensors")


def test_equal_frames_are_encoded_once(clip: SyntheticClip, models: Models) -> None:
    encoded: list[int] = []

    class Codec:
        def encode(self, frames_BCTHW: Tensor) -> Tensor:
            encoded.append(frames_BCTHW.shape[2])
            return models.vae.encode(frames_BCTHW)

        def encode_reference(self, picture_BCHW: Tensor, num_frames: int) -> Tensor:
            encoded.append(num_frames)
            return models.vae.encode_reference(picture_BCHW, num_frames)

        def decode(self, latents_BCFHW: Tensor) -> Tensor:
            return models.vae.decode(latents_BCFHW)

    vae = RememberingVAE(Codec())
    frames = clip.frames_CTHW[None, :, :17]
    first = vae.encode(frames)
    first.zero_()  # what is handed out is the caller's own
    assert torch.equal(vae.encode(frames.clone()), models.vae.encode(frames))
    vae.encode(frames + 0.1)
    vae.encode(frames[:, :, :1])
    picture = frames[:, :, 0]
    reference = vae.encode_reference(picture, 17)
    assert torch.equal(vae.encode_reference(picture.clone(), 17), reference)
    vae.encode_reference(picture, 21)
    vae.encode_reference(picture + 0.1, 21)
    assert encoded == [17, 17, 1, 17, 21, 21]
    assert vae.num_decoded == 0
    vae.decode(first)
    assert vae.num_decoded == 1
