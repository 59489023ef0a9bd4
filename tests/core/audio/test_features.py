"""What the end of a voice sounds like, told by an encoder that writes down what it hears."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from turbotalk_core.audio.features import SILENCE_TAIL_FRAMES, encode_speech
from turbotalk_core.audio.loudness import normalize_loudness
from turbotalk_core.audio.resample import to_mono_16k
from turbotalk_core.errors import AudioError
from turbotalk_core.types import Waveform


class LevelEncoder:
    """Hears in each video frame the mean square of its 640 samples and how much it was given."""

    def __init__(self) -> None:
        self.heard: list[Tensor] = []

    def encode(self, waveform_S: Tensor, num_frames: int) -> Tensor:
        self.heard.append(waveform_S)
        padded_S = torch.nn.functional.pad(waveform_S, (0, 640))[: 640 * num_frames]
        level_T = padded_S.reshape(num_frames, 640).square().mean(dim=1)
        return level_T[:, None, None].expand(num_frames, 2, 3)


def _noise(num_samples: int, sample_rate: int = 16_000, channels: int = 1) -> Waveform:
    samples_CS = 0.1 * torch.randn(
        channels, num_samples, generator=torch.Generator().manual_seed(num_samples)
    )
    return Waveform(samples_CS=samples_CS, sample_rate=sample_rate)


@pytest.mark.parametrize("seconds", [0.04, 0.5, 3.21, 11.3])
def test_rows_inside_are_those_of_the_audio_alone_and_silence_follows(seconds: float) -> None:
    waveform, encoder = _noise(round(16_000 * seconds)), LevelEncoder()
    speech = encode_speech(waveform, encoder)
    features_TLD, num_frames = speech.features.features_TLD, speech.features.num_frames
    assert num_frames == int(25 * seconds)
    assert features_TLD.shape == (num_frames + SILENCE_TAIL_FRAMES, 2, 3)
    heard_S = normalize_loudness(waveform.samples_CS[0])
    assert torch.equal(features_TLD[:num_frames], LevelEncoder().encode(heard_S, num_frames))
    # The rest of the last, unfinished video frame may still sound; then there is nothing.
    assert features_TLD[num_frames].sum() > 0 or heard_S.shape[0] % 640 == 0
    assert not features_TLD[num_frames + 1 :].any()
    assert speech.waveform is waveform


def test_the_tail_hears_at_most_ten_seconds_of_the_voice() -> None:
    waveform, encoder = _noise(16_000 * 12 + 100), LevelEncoder()
    encode_speech(waveform, encoder, normalizes_loudness=False)
    whole_S, tail_S = encoder.heard
    assert torch.equal(whole_S, waveform.samples_CS[0])
    assert tail_S.shape[0] == 11 * 16_000
    assert torch.equal(tail_S[: 160_000 + 100], whole_S[-160_100:])
    assert not tail_S[160_100:].any()


def test_loudness_is_normalised_only_when_asked() -> None:
    waveform = _noise(32_000)
    loud, plain = LevelEncoder(), LevelEncoder()
    encode_speech(waveform, loud)
    encode_speech(waveform, plain, normalizes_loudness=False)
    assert torch.equal(plain.heard[0], waveform.samples_CS[0])
    assert torch.equal(loud.heard[0], normalize_loudness(waveform.samples_CS[0]))
    assert not torch.equal(loud.heard[0], plain.heard[0])


def test_silence_is_valid() -> None:
    waveform = Waveform(samples_CS=torch.zeros(2, 48_000), sample_rate=48_000)
    features = encode_speech(waveform, LevelEncoder()).features
    assert features.num_frames == 25
    assert not features.features_TLD.any()


@given(num_samples=st.integers(1, 9_000), sample_rate=st.sampled_from([8_000, 11_025, 44_101]))
def test_frames_are_counted_on_the_original(num_samples: int, sample_rate: int) -> None:
    waveform = _noise(num_samples, sample_rate, channels=2)
    num_frames = 25 * num_samples // sample_rate
    if num_frames == 0:
        with pytest.raises(AudioError, match="at least one video frame"):
            encode_speech(waveform, LevelEncoder())
        return
    encoder = LevelEncoder()
    features = encode_speech(waveform, encoder, normalizes_loudness=False).features
    assert features.num_frames == num_frames
    assert torch.equal(encoder.heard[0], to_mono_16k(waveform))
