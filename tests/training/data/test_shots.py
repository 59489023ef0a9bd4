"""Shots of videos and avatars are made in one form; avatars are those the teacher learnt from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training import teacher_data
from training.data import shots
from training.data.pairs import PairClip
from training.data.portrait import render
from training.data.precompute import Encoders, encode_shot
from training.data.shards import fill_reference
from training.data.shots import AvatarSource, VideoSource, choose_size
from training.data.stage import SKIPPED
from training.data.synthetic import film
from training.teacher_data import encode_avatar, encode_pair
from turbotalk_core.errors import AudioError, GeometryError, RequestError
from turbotalk_core.geometry import count_latent_frames
from turbotalk_core.model.vae import WanVAE

from .conftest import RATE, MakeVideo, hum

SIZE = 16


class LoudnessEncoder:
    """Hears how loud each frame is."""

    def encode(self, waveform_S: Tensor, num_frames: int) -> Tensor:
        return waveform_S[: 640 * num_frames].view(num_frames, 1, 640).abs().mean(2, keepdim=True)


class TestVideos:
    @pytest.fixture
    def source(self, tmp_path: Path, make_video: MakeVideo) -> VideoSource:
        make_video(tmp_path / "a.mp4", [(30, 0.2), (40, 0.8)], size=(64, 48))
        shared = {"height": 64, "width": 48, "tier": 1, "scores": {"side": 48}}
        pieces = {
            "a.mp4#30-70": {
                "key": "a.mp4#30-70",
                "video": "a.mp4",
                "start": 30,
                "stop": 70,
                "caption": "A square.",
                **shared,
            },
            "a.mp4#0-9": {
                "key": "a.mp4#0-9",
                "video": "a.mp4",
                "start": 0,
                "stop": 9,
                "caption": None,
                **shared,
            },
            "b.mp4#0-9": {"key": "b.mp4#0-9", SKIPPED: "no sound"},
        }
        return VideoSource(tmp_path, pieces, "print", [(32, 32), (48, 32)], [33, 9, 17])

    def test_a_take_is_the_piece(self, source: VideoSource) -> None:
        shot = source.open("a.mp4#30-70")
        assert (shot.num_frames, shot.clip_frames, shot.caption) == (40, 33, "A square.")
        assert 1 <= shot.later_start <= 7
        (voice,) = shot.voices
        assert voice.samples_CS.shape[1] == round(40 / 25 * voice.sample_rate)
        shown = shot.show(0, 3)
        assert shown.shape == (3, 3, 48, 32)  # the nearer shape of the two
        assert shown[:, :, 30:].mean().item() == pytest.approx(0.6, abs=0.05)
        # The sound of an mp4 is AAC: near to what it was, and in time.
        expected_S = hum(70 / 25)[round(30 / 25 * RATE) :]
        torch.testing.assert_close(voice.samples_CS[0], expected_S, atol=0.05, rtol=0)

    def test_what_was_skipped_is_no_take(self, source: VideoSource) -> None:
        assert list(source.keys) == ["a.mp4#30-70", "a.mp4#0-9"]

    def test_a_piece_of_a_clips_length_has_one_place(self, source: VideoSource) -> None:
        shot = source.open("a.mp4#0-9")
        assert (shot.clip_frames, shot.later_start) == (9, 0)

    def test_a_short_piece_is_refused(self, tmp_path: Path) -> None:
        piece = {"video": "a.mp4", "start": 0, "stop": 8, "height": 64, "width": 48}
        source = VideoSource(tmp_path, {"a": piece}, "print", [(32, 32)], [9])
        with pytest.raises(GeometryError, match="has 8 frames; a clip needs 9"):
            source.open("a")

    def test_a_video_that_is_gone_is_told(self, tmp_path: Path, source: VideoSource) -> None:
        (tmp_path / "a.mp4").unlink()
        with pytest.raises(AudioError, match="no audio file"):
            source.open("a.mp4#0-9")


class TestSizes:
    def test_the_nearest_shape_is_taken(self) -> None:
        sizes = [(480, 832), (832, 480), (640, 640)]
        assert choose_size(1080, 1920, sizes) == (480, 832)
        assert choose_size(1920, 1080, sizes) == (832, 480)
        assert choose_size(500, 480, sizes) == (640, 640)

    @given(height=st.integers(16, 4000), width=st.integers(16, 4000))
    def test_turning_a_picture_turns_its_size(self, height: int, width: int) -> None:
        sizes = [(480, 832), (832, 480), (640, 640)]
        turned = choose_size(width, height, sizes)
        lost = [
            r * width / (c * height) for r, c in (choose_size(height, width, sizes), turned[::-1])
        ]
        assert max(lost[0], 1 / lost[0]) == pytest.approx(max(lost[1], 1 / lost[1]))

    def test_no_size_is_refused(self) -> None:
        with pytest.raises(RequestError, match="640x640"):
            choose_size(10, 10, [])


class TestAvatars:
    @pytest.fixture(autouse=True)
    def _small_and_singing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def paint_small(avatar: object, motion: object, mouth: object) -> Tensor:
            return render(avatar, motion, mouth, SIZE)  # pyright: ignore[reportArgumentType]

        def draw_pair(split: str, seed: int, num_frames: int, turns: str) -> PairClip:
            generator = torch.Generator().manual_seed(seed + len(turns))
            frames = torch.rand(3, num_frames, SIZE, 2 * SIZE, generator=generator) * 2 - 1
            voices = [film(split, s, hum(num_frames / 25, 200 + s))[0] for s in (0, 1)]
            return PairClip(frames_CTHW=frames, clips=(voices[0], voices[1]))

        for module in (shots, teacher_data):
            monkeypatch.setattr(module, "render", paint_small)
            monkeypatch.setattr(module, "draw_speech", lambda _, s, seconds: hum(seconds, 200 + s))
            monkeypatch.setattr(module, "draw_pair", draw_pair)

    @pytest.fixture
    def encoders(self) -> Encoders:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae = WanVAE(1)
            vae.initialize()
        return Encoders(codec=vae, audio=LoudnessEncoder())

    def test_keys_name_kind_and_seed(self) -> None:
        assert list(AvatarSource(2, 1).keys) == ["avatar_000000", "avatar_000001", "pair_000000"]

    @pytest.mark.parametrize("seed", [1, 3, 15])
    def test_an_avatar_is_what_the_teacher_learnt_from(self, encoders: Encoders, seed: int) -> None:
        source = AvatarSource(20, 0, short_frames=9, long_frames=17, long_every=3)
        shot = source.open(f"avatar_{seed:06d}")
        assert shot.clip_frames == (9 if seed % 3 else 17)
        sample = encode_shot(shot, encoders)
        assert isinstance(encoders.codec, WanVAE)
        clip = encode_avatar("train", seed, shot.clip_frames, encoders.codec, encoders.audio)
        assert torch.equal(sample.opening_CFHW, clip.opening_CFHW)
        assert torch.equal(sample.later_CFHW, clip.later_CFHW)
        assert torch.equal(sample.features_PTLD, clip.features_PTLD)
        assert (shot.later_start, shot.num_frames) == (clip.later_start, clip.num_frames)
        # Only the grey tail is not the same to the bit: what repeats is not stored.
        num_latents = count_latent_frames(shot.clip_frames)
        reference = fill_reference(sample.reference_CFHW, num_latents)
        torch.testing.assert_close(
            reference[:, :5], clip.reference_CFHW[:, :num_latents][:, :5], atol=4e-3, rtol=0
        )

    def test_a_pair_is_what_the_teacher_learnt_from(self, encoders: Encoders) -> None:
        shot = AvatarSource(0, 3, short_frames=9, long_frames=9).open("pair_000002")
        sample = encode_shot(shot, encoders)
        assert isinstance(encoders.codec, WanVAE)
        clip = encode_pair("train", 2, 9, encoders.codec, encoders.audio)
        assert torch.equal(sample.later_CFHW, clip.later_CFHW)
        assert torch.equal(sample.features_PTLD, clip.features_PTLD)
        assert sample.features_PTLD.shape[0] == 2
        assert shot.later_start == clip.later_start

    def test_splits_differ(self) -> None:
        shown = [
            AvatarSource(1, 0, split=split).open("avatar_000000").show(0, 1)
            for split in ("train", "heldout")
        ]
        assert not torch.equal(*shown)
