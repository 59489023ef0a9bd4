"""Shots of videos and avatars have one form, and avatars' mouths fit their voices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.avatars.avatars import draw_avatar
from training.avatars.motion import draw_motion
from training.avatars.mouth import mouth_curve
from training.avatars.pairs import TURNS, TwoSpeakerClip
from training.avatars.portrait import render
from training.avatars.synthetic import SyntheticClip
from training.data import shots
from training.data.resumable_stage import SKIPPED
from training.data.shots import AvatarSource, Shot, VideoSource, choose_size
from turbotalk_core.errors import AudioError, GeometryError, RequestError

from .conftest import RATE, MakeVideo, hum

SIZE = 16


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
    def turns(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Small avatars that hum instead of speaking; contains the turns of the pairs drawn."""

        def paint_small(avatar: object, motion: object, mouth: object) -> Tensor:
            return render(avatar, motion, mouth, SIZE)  # pyright: ignore[reportArgumentType]

        def draw_two_speakers(split: str, seed: int, num_frames: int, turns: str) -> TwoSpeakerClip:
            drawn.append(turns)
            return _draw_small_speakers(split, seed, num_frames)

        drawn: list[str] = []
        monkeypatch.setattr(shots, "render", paint_small)
        monkeypatch.setattr(shots, "draw_speech", _hum_as)
        monkeypatch.setattr(shots, "draw_two_speakers", draw_two_speakers)
        return drawn

    def test_keys_name_kind_and_seed(self) -> None:
        assert list(AvatarSource(2, 1).keys) == ["avatar_000000", "avatar_000001", "pair_000000"]

    @pytest.mark.parametrize("seed", [1, 3, 15])
    def test_an_avatar_moves_its_mouth_to_what_is_heard(self, seed: int) -> None:
        shot = AvatarSource(20, 0).open(f"avatar_{seed:06d}")
        (voice,) = shot.voices
        waveform_S = voice.samples_CS[0]
        assert len(waveform_S) == 640 * shot.num_frames == 640 * 200
        avatar, mouth = draw_avatar("train", seed), mouth_curve(waveform_S)
        motion = draw_motion(avatar, "train", seed, 200, mouth.opening_T)
        take = render(avatar, motion, mouth, SIZE)
        for start, stop in ((0, 33), (shot.later_start, shot.later_start + 33)):
            torch.testing.assert_close(shot.show(start, stop), take[:, start:stop])

    def test_most_clips_are_short(self) -> None:
        def lengths(long_every: int) -> list[int]:
            source = AvatarSource(4, 1, short_frames=9, long_frames=17, long_every=long_every)
            return [source.open(key).clip_frames for key in source.keys]

        assert lengths(3) == [17, 9, 9, 17, 17]
        assert lengths(0) == [9, 9, 9, 9, 17]

    def test_some_avatars_say_nothing_and_some_fall_silent(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shots, "SILENT_SHARE", 0.5)
        opened = [AvatarSource(32, 0).open(f"avatar_{seed:06d}") for seed in range(32)]
        voiced_NT = torch.stack([_find_voiced(shot)[0] for shot in opened])
        says_nothing_N = ~voiced_NT.any(1)
        falls_silent_N = voiced_NT.any(1) & ~voiced_NT[:, -1]
        assert 0.2 < says_nothing_N.float().mean() < 0.8
        assert 0 < falls_silent_N.sum() < voiced_NT.any(1).sum()
        assert voiced_NT[falls_silent_N, :60].all()

    def test_a_pair_is_shown_with_the_voices_of_both(self) -> None:
        shot = AvatarSource(0, 3).open("pair_000002")
        speakers = _draw_small_speakers("train", 2, 200)
        assert torch.equal(shot.show(7, 90), speakers.frames_CTHW[:, 7:90])
        for voice, clip in zip(shot.voices, speakers.clips, strict=True):
            assert torch.equal(voice.samples_CS[0], clip.waveform_S)

    def test_pairs_speak_in_every_way(self, turns: list[str]) -> None:
        for seed in range(16):
            AvatarSource(0, 16).open(f"pair_{seed:06d}")
        assert set(turns) == set(TURNS)

    @given(seed=st.integers(0, 10_000), kind=st.sampled_from(["avatar", "pair"]))
    @settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_later_clip_lies_within_the_shot(self, seed: int, kind: str) -> None:
        shot = AvatarSource(1, 1, short_frames=81).open(f"{kind}_{seed:06d}")
        assert 10 <= shot.later_start <= shot.num_frames - 81

    def test_the_draws_do_not_change(self) -> None:
        source = AvatarSource(3, 2, short_frames=81)
        assert [source.open(key).later_start for key in source.keys] == [34, 60, 79, 24, 35]

    def test_splits_differ(self) -> None:
        shown = [
            AvatarSource(1, 0, split=split).open("avatar_000000").show(0, 1)
            for split in ("train", "heldout")
        ]
        assert not torch.equal(*shown)


@pytest.mark.usefixtures("_espeak")
def test_an_avatar_has_a_real_voice() -> None:
    shot = AvatarSource(1, 0).open("avatar_000000")
    assert shot.voices[0].samples_CS.std() > 0.01
    assert _find_voiced(shot).float().mean() > 0.3


def _hum_as(split: str, seed: int, seconds: float) -> Tensor:
    return hum(seconds, 200 + seed)


def _draw_small_speakers(split: str, seed: int, num_frames: int) -> TwoSpeakerClip:
    """Make noise with the voices of two avatars."""
    generator = torch.Generator().manual_seed(seed)
    frames_CTHW = torch.rand(3, num_frames, SIZE, 2 * SIZE, generator=generator) * 2 - 1

    def clip(number: int) -> SyntheticClip:
        waveform_S = _hum_as(split, number, num_frames / 25)
        return SyntheticClip(
            frames_CTHW=frames_CTHW[..., number * SIZE : (number + 1) * SIZE],
            waveform_S=waveform_S,
            sample_rate=RATE,
            mouth=mouth_curve(waveform_S),
            still_mask_HW=torch.zeros(SIZE, SIZE, dtype=torch.bool),
        )

    return TwoSpeakerClip(frames_CTHW=frames_CTHW, clips=(clip(0), clip(1)))


def _find_voiced(shot: Shot) -> Tensor:
    """Return which frames of which voice are not silent, [P, T]."""
    sound_PS = torch.cat([voice.samples_CS for voice in shot.voices])
    return sound_PS.view(len(sound_PS), -1, 640).any(2)
