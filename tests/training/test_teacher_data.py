"""Encoded avatars hold what inference will see, and survive their files."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training import teacher_data
from training.data.avatars import draw_avatar
from training.data.motion import Motion, draw_motion
from training.data.mouth import MouthCurve, mouth_curve
from training.data.pairs import TURNS, PairClip
from training.data.portrait import render
from training.data.synthetic import SyntheticClip
from training.teacher_data import (
    GREY_LATENTS,
    LONG_FRAMES,
    SECONDS,
    SHORT_FRAMES,
    TeacherClip,
    encode_avatar,
    encode_pair,
    read_clip,
    save_clip,
)
from turbotalk_core.audio.features import SILENCE_TAIL_FRAMES
from turbotalk_core.audio.loudness import normalize_loudness
from turbotalk_core.geometry import count_latent_frames
from turbotalk_core.model.vae import WanVAE

SIZE = 16
TOTAL = 200  # frames of an utterance
SEED = 5


class LoudnessEncoder:
    """Hears how loud each frame is."""

    def encode(self, waveform_S: Tensor, num_frames: int) -> Tensor:
        return waveform_S[: 640 * num_frames].view(num_frames, 1, 640).abs().mean(2, keepdim=True)


def _sing(split: str, seed: int, seconds: float) -> Tensor:
    """A tone that swells and fades, other for each seed."""
    times_S = torch.arange(round(16_000 * seconds)) / 16_000
    swell_S = 0.2 + torch.sin((2 + seed) * times_S).square()
    return 0.3 * swell_S * torch.sin(2 * torch.pi * 300 * times_S)


def _paint_small(avatar: object, motion: Motion, mouth: MouthCurve) -> Tensor:
    return render(avatar, motion, mouth, SIZE)  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True)
def _small_and_singing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_data, "render", _paint_small)
    monkeypatch.setattr(teacher_data, "draw_speech", _sing)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = WanVAE(1)
        vae.initialize()
    return vae


def _encode(seed: int, vae: WanVAE, *, length: int = SHORT_FRAMES) -> TeacherClip:
    return encode_avatar("train", seed, length, vae, LoudnessEncoder())


def _assert_equal(left: TeacherClip, right: TeacherClip) -> None:
    for field in fields(TeacherClip):
        first, second = getattr(left, field.name), getattr(right, field.name)
        if isinstance(first, Tensor):
            assert first.dtype == second.dtype
            assert torch.equal(first, second)
        else:
            assert first == second


@pytest.mark.parametrize("num_frames", [SHORT_FRAMES, LONG_FRAMES])
def test_an_avatar_has_two_clips_of_one_length(vae: WanVAE, num_frames: int) -> None:
    clip = _encode(SEED, vae, length=num_frames)
    shape = (16, (num_frames - 1) // 4 + 1, SIZE // 8, SIZE // 8)
    for latents in (clip.opening_CFHW, clip.later_CFHW, clip.reference_CFHW):
        assert latents.shape == shape
        assert latents.dtype == torch.float16
        assert latents.isfinite().all()
    assert clip.num_frames == TOTAL
    assert clip.features_PTLD.shape == (1, TOTAL + SILENCE_TAIL_FRAMES, 1, 1)
    assert clip.features_PTLD.dtype == torch.float16
    assert 10 <= clip.later_start <= TOTAL - num_frames


def _render_take(seed: int) -> Tensor:
    """All that an avatar does while its voice sings to the end, [1, 3, TOTAL, SIZE, SIZE]."""
    mouth = mouth_curve(_sing("train", seed, SECONDS))
    avatar = draw_avatar("train", seed)
    motion = draw_motion(avatar, "train", seed, TOTAL, mouth.opening_T)
    return _paint_small(avatar, motion, mouth).unsqueeze(0)


class TalkativeStream:
    """Draws a voice that speaks to the end, and the middle of every range."""

    def random(self) -> float:
        return 0.99

    def integers(self, low: int, high: int) -> int:
        return (low + high) // 2


@pytest.fixture
def _talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_data, "open_stream", lambda *_: TalkativeStream())


@pytest.mark.usefixtures("_talkative")
def test_clips_are_pieces_of_one_take(vae: WanVAE) -> None:
    clip, take = _encode(SEED, vae), _render_take(SEED)
    assert clip.later_start == (10 + TOTAL - SHORT_FRAMES + 1) // 2
    stop = clip.later_start + SHORT_FRAMES
    assert torch.equal(clip.opening_CFHW, vae.encode(take[:, :, :SHORT_FRAMES])[0].half())
    later = take[:, :, clip.later_start : stop]
    assert torch.equal(clip.later_CFHW, vae.encode(later)[0].half())


@pytest.mark.usefixtures("_talkative")
def test_the_reference_is_the_first_frame_and_then_grey(vae: WanVAE) -> None:
    clip = _encode(SEED, vae, length=LONG_FRAMES)
    first = _render_take(SEED)[:, :, :1]
    grey = first.new_zeros(1, 3, 4 * GREY_LATENTS, SIZE, SIZE)
    expected = vae.encode(torch.cat((first, grey), 2))[0].half()
    assert torch.equal(clip.reference_CFHW[:, : GREY_LATENTS + 1], expected)
    tail = clip.reference_CFHW[:, GREY_LATENTS:]
    assert torch.equal(tail, tail[:, :1].expand_as(tail))
    # The clip itself begins with the same picture.
    torch.testing.assert_close(clip.reference_CFHW[:, 0], clip.opening_CFHW[:, 0])


def test_a_pair_is_encoded_side_by_side_with_both_voices(
    vae: WanVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_data, "draw_pair", _draw_small_pair)
    clip = encode_pair("train", SEED, SHORT_FRAMES, vae, LoudnessEncoder())
    shape = (16, (SHORT_FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 4)
    for latents in (clip.opening_CFHW, clip.later_CFHW, clip.reference_CFHW):
        assert latents.shape == shape
    assert clip.features_PTLD.shape == (2, TOTAL + SILENCE_TAIL_FRAMES, 1, 1)
    pair = _draw_small_pair("train", SEED, TOTAL, "both")
    later = pair.frames_CTHW[:, clip.later_start : clip.later_start + SHORT_FRAMES]
    assert torch.equal(clip.later_CFHW, vae.encode(later[None])[0].half())
    heard = LoudnessEncoder().encode(normalize_loudness(pair.clips[1].waveform_S, 16_000), TOTAL)
    torch.testing.assert_close(clip.features_PTLD[1, :TOTAL].float(), heard, atol=1e-3, rtol=1e-3)


def _draw_small_pair(split: str, seed: int, num_frames: int, turns: str) -> PairClip:
    """Two avatars of this size that sing."""
    assert turns in TURNS
    clips = []
    for number in (2 * seed, 2 * seed + 1):
        waveform_S = _sing(split, number, num_frames / 25)
        mouth = mouth_curve(waveform_S)
        avatar = draw_avatar(split, number)
        motion = draw_motion(avatar, split, number, num_frames, mouth.opening_T)
        frames = _paint_small(avatar, motion, mouth)
        clips.append(
            SyntheticClip(
                frames_CTHW=frames,
                waveform_S=waveform_S,
                sample_rate=16_000,
                mouth=mouth,
                still_mask_HW=torch.zeros(SIZE, SIZE, dtype=torch.bool),
            )
        )
    frames_CTHW = torch.cat([clip.frames_CTHW for clip in clips], 3)
    return PairClip(frames_CTHW=frames_CTHW, clips=(clips[0], clips[1]))


def test_the_same_seed_gives_the_same_avatar(vae: WanVAE) -> None:
    clip = _encode(SEED, vae)
    _assert_equal(clip, _encode(SEED, vae))
    heldout = encode_avatar("heldout", SEED, SHORT_FRAMES, vae, LoudnessEncoder())
    assert not torch.equal(clip.opening_CFHW, heldout.opening_CFHW)


def test_some_avatars_say_nothing_and_some_fall_silent(
    vae: WanVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_data, "SILENT_SHARE", 0.5)
    # Pictures do not matter here.
    monkeypatch.setattr(
        teacher_data, "render", lambda _, motion, mouth: torch.zeros(3, len(mouth.opening_T), 8, 8)
    )
    monkeypatch.setattr(
        vae,
        "encode",
        lambda frames: torch.zeros(1, 16, count_latent_frames(frames.shape[2]), 1, 1),
    )
    heard_NT = torch.stack(
        [_encode(seed, vae).features_PTLD[0, :TOTAL, 0, 0] > 0 for seed in range(32)]
    )
    says_nothing_N = ~heard_NT.any(1)
    falls_silent_N = heard_NT.any(1) & ~heard_NT[:, -1]
    assert 0.2 < says_nothing_N.float().mean() < 0.8
    assert 0 < falls_silent_N.sum() < heard_NT.any(1).sum()
    assert heard_NT[falls_silent_N, :60].all()


def test_a_clip_survives_its_file(vae: WanVAE, tmp_path: Path) -> None:
    clip = _encode(SEED, vae)
    path = tmp_path / "000001.safetensors"
    save_clip(path, clip)
    _assert_equal(read_clip(path), clip)
    save_clip(path, replace(clip, later_start=11))
    assert read_clip(path).later_start == 11
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_command_makes_what_is_missing_alone_or_in_parts(
    vae: WanVAE, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clip = _encode(SEED, vae)
    made: list[tuple[int, int]] = []
    pairs: list[tuple[int, int]] = []

    def encode(split: str, seed: int, length: int, *_: object) -> TeacherClip:
        assert split == "train"
        made.append((seed, length))
        return replace(clip, later_start=seed)

    def encode_two(split: str, seed: int, length: int, *_: object) -> TeacherClip:
        pairs.append((seed, length))
        return replace(clip, later_start=100 + seed)

    monkeypatch.setattr(teacher_data, "encode_avatar", encode)
    monkeypatch.setattr(teacher_data, "encode_pair", encode_two)
    monkeypatch.setattr(teacher_data, "load_vae", lambda path: vae)
    monkeypatch.setattr(teacher_data, "load_audio_encoder", lambda path: LoudnessEncoder())
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def run(*options: str) -> list[tuple[int, int]]:
        made.clear()
        places = ["--vae", "v", "--encoder", "e", "--out", str(tmp_path / "clips")]
        monkeypatch.setattr(sys, "argv", ["teacher_data", *places, *options])
        teacher_data.main()
        return list(made)

    assert run("--avatars", "2", "--pairs", "0", "--long-every", "0") == [
        (0, SHORT_FRAMES),
        (1, SHORT_FRAMES),
    ]
    halves = [
        run("--avatars", "7", "--pairs", "3", "--long-every", "3", "--parts", "2", "--part", part)
        for part in ("0", "1")
    ]
    assert halves[0] == [(2, SHORT_FRAMES), (4, SHORT_FRAMES), (6, LONG_FRAMES)]
    assert halves[1] == [(3, LONG_FRAMES), (5, SHORT_FRAMES)]
    files = sorted((tmp_path / "clips").iterdir())
    assert [read_clip(path).later_start for path in files] == [*range(7), 100, 101, 102]
    assert sorted(pairs) == [(0, LONG_FRAMES), (1, LONG_FRAMES), (2, LONG_FRAMES)]


@pytest.mark.usefixtures("_espeak")
def test_a_real_voice_is_heard(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(teacher_data, "render", _paint_small)
    clip = _encode(SEED, vae)
    assert clip.features_PTLD[0, :TOTAL].float().std() > 0
    assert clip.opening_CFHW.isfinite().all()
