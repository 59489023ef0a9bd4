"""The encoder's training on sounds made here: it learns, and what it saves is what it trained."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.tiny import audio_encoder
from training.tiny.audio_encoder import (
    NUM_CURVES,
    NUM_MELS,
    Clips,
    Recipe,
    Report,
    draw_clips,
    make_clips,
    train_encoder,
)
from turbotalk_core.audio.wav2vec2 import Wav2Vec2Encoder
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder, save_audio_encoder

RECIPE = Recipe(num_clips=8, num_heldout=2, clip_seconds=1.0, num_steps=12, batch_size=4)


def _sing(seed: int, seconds: float = 1.0) -> torch.Tensor:
    """Syllables of random pitch: a tone that swells and fades a few times per second."""
    pitch, rate, phase = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
    times_S = torch.arange(round(16_000 * seconds)) / 16_000
    swell_S = torch.sin(math.pi * (2 + 3 * rate) * times_S + 6 * phase).clamp(min=0)
    return 0.3 * swell_S * torch.sin(2 * math.pi * (200 + 800 * pitch) * times_S)


@pytest.fixture(scope="module")
def clips() -> Clips:
    return make_clips([_sing(seed) for seed in range(RECIPE.num_clips)])


@pytest.fixture(scope="module")
def heldout() -> Clips:
    return make_clips([_sing(seed) for seed in range(100, 102)])


def test_targets_are_one_row_per_video_frame(clips: Clips) -> None:
    assert clips.waveforms_BS.shape == (8, 16_000)
    assert clips.targets_BTD.shape == (8, 25, NUM_CURVES + NUM_MELS)
    assert clips.targets_BTD.isfinite().all()


def test_the_spectrum_belongs_to_the_time_of_its_frame() -> None:
    click_S = torch.zeros(16_000)
    click_S[10 * 640] = 1.0
    mel_TD = make_clips([click_S]).targets_BTD[0, :, NUM_CURVES:]
    assert int(mel_TD.sum(dim=1).argmax()) == 10


@pytest.mark.slow
def test_training_learns_and_saves_what_it_trained(
    clips: Clips, heldout: Clips, tmp_path: Path
) -> None:
    reports: list[Report] = []
    encoder = train_encoder(clips, heldout, RECIPE, lambda _encoder, report: reports.append(report))
    assert [report.step for report in reports] == list(range(1, RECIPE.num_steps + 1))
    assert reports[-1].loss < 0.8 * reports[0].loss
    path = tmp_path / "encoder.safetensors"
    save_audio_encoder(encoder, path)
    sound_S = heldout.waveforms_BS[0]
    assert torch.equal(load_audio_encoder(path).encode(sound_S, 25), encoder.encode(sound_S, 25))


def test_the_seed_decides_the_result(clips: Clips, heldout: Clips) -> None:
    def train(seed: int) -> torch.Tensor:
        recipe = replace(RECIPE, seed=seed, num_steps=2)
        encoder = train_encoder(clips, heldout, recipe, lambda _encoder, _report: None)
        return encoder.encode(heldout.waveforms_BS[0], 25)

    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))


def test_the_pool_holds_silence_and_pauses_and_held_out_clips_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple[str, int]] = []

    def draw_speech(split: str, seed: int, seconds: float) -> torch.Tensor:
        drawn.append((split, seed))
        return 0.1 * torch.randn(
            round(16_000 * seconds), generator=torch.Generator().manual_seed(seed)
        )

    monkeypatch.setattr(audio_encoder, "draw_speech", draw_speech)
    recipe = replace(RECIPE, silent_share=0.25, pausing_share=0.25)
    silent_B = (draw_clips("train", 40, recipe).waveforms_BS == 0).float().mean(dim=1)
    assert (silent_B == 1).any()
    assert ((silent_B > 0.2) & (silent_B < 0.8)).any()
    assert (silent_B < 0.01).any()
    assert (draw_clips("heldout", 40, recipe).waveforms_BS != 0).float().mean() > 0.99
    assert len(set(drawn)) == len(drawn)


def test_the_command_writes_the_encoder_and_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        audio_encoder, "draw_speech", lambda _split, seed, seconds: _sing(seed, seconds)
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda _threads: None)
    path = tmp_path / "models" / "encoder.safetensors"
    audio_encoder.main(["--out", str(path), "--num-clips", "2", "--num-steps", "1"])
    encoder: Wav2Vec2Encoder = load_audio_encoder(path)
    assert encoder.config == audio_encoder.TINY_CONFIG
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "encoder.json",
        "encoder.safetensors",
    ]
