"""Audio features of a whole sound and of sections, with an encoder that records its input."""

from collections.abc import Iterator
from fractions import Fraction
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.family import ENCODER_CONFIG, FakeEncoder
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.audio.features import (
    CONTEXT_FRAMES,
    MOST_WHOLE_FRAMES,
    SECTION_FRAMES,
    SILENCE_TAIL_FRAMES,
    SectionFeatures,
    describe_encoding,
    encode_in_sections,
    encode_whole,
)
from turbotalk_core.audio.loudness import normalize_loudness
from turbotalk_core.audio.resample import to_mono_16k
from turbotalk_core.audio.wav2vec2 import Wav2Vec2Encoder, build_audio_encoder
from turbotalk_core.errors import AudioError, RequestError
from turbotalk_core.fingerprints import digest_text
from turbotalk_core.protocols import AudioEncoder
from turbotalk_core.request import EncodeMode
from turbotalk_core.types import AudioFeatures, FeatureRows, SoundMoments, Waveform


def _noise(num_samples: int, sample_rate: int = 16_000, channels: int = 1) -> Waveform:
    samples_CS = 0.1 * torch.randn(
        channels, num_samples, generator=torch.Generator().manual_seed(num_samples)
    )
    return Waveform(samples_CS=samples_CS, sample_rate=sample_rate)


@pytest.mark.parametrize("seconds", [0.04, 0.5, 3.21, 11.3])
def test_rows_inside_are_those_of_the_audio_alone_and_silence_follows(seconds: float) -> None:
    waveform, encoder = _noise(round(16_000 * seconds)), FakeEncoder()
    speech = encode_speech(waveform, encoder)
    features_TLD, num_frames = speech.features.rows(), speech.features.num_frames
    assert num_frames == int(25 * seconds)
    assert features_TLD.shape == (num_frames + SILENCE_TAIL_FRAMES, 2, 3)
    heard_S = normalize_loudness(waveform.samples_CS[0])
    assert torch.equal(features_TLD[:num_frames], FakeEncoder().encode(heard_S, num_frames))
    # The rest of the last, unfinished video frame may still sound; then there is nothing.
    assert features_TLD[num_frames].sum() > 0 or heard_S.shape[0] % 640 == 0
    assert not features_TLD[num_frames + 1 :].any()
    assert speech.waveform is waveform


def test_the_tail_hears_at_most_ten_seconds_of_the_voice() -> None:
    waveform, encoder = _noise(16_000 * 12 + 100), FakeEncoder()
    encode_speech(waveform, encoder, normalizes_loudness=False)
    whole_S, tail_S = encoder.heard
    assert torch.equal(whole_S, waveform.samples_CS[0])
    assert tail_S.shape[0] == 11 * 16_000
    assert torch.equal(tail_S[: 160_000 + 100], whole_S[-160_100:])
    assert not tail_S[160_100:].any()


def test_loudness_is_normalised_only_when_asked() -> None:
    waveform = _noise(32_000)
    loud, plain = FakeEncoder(), FakeEncoder()
    encode_speech(waveform, loud)
    encode_speech(waveform, plain, normalizes_loudness=False)
    assert torch.equal(plain.heard[0], waveform.samples_CS[0])
    assert torch.equal(loud.heard[0], normalize_loudness(waveform.samples_CS[0]))
    assert not torch.equal(loud.heard[0], plain.heard[0])


def test_silence_is_valid() -> None:
    waveform = Waveform(samples_CS=torch.zeros(2, 48_000), sample_rate=48_000)
    features = encode_speech(waveform, FakeEncoder()).features
    assert features.num_frames == 25
    assert not features.rows().any()


@given(num_samples=st.integers(1, 9_000), sample_rate=st.sampled_from([8_000, 11_025, 44_101]))
def test_frames_are_counted_on_the_original(num_samples: int, sample_rate: int) -> None:
    waveform = _noise(num_samples, sample_rate, channels=2)
    num_frames = 25 * num_samples // sample_rate
    if num_frames == 0:
        with pytest.raises(AudioError, match="at least one video frame"):
            encode_speech(waveform, FakeEncoder())
        return
    encoder = FakeEncoder()
    features = encode_speech(waveform, encoder, normalizes_loudness=False).features
    assert features.num_frames == num_frames
    assert torch.equal(encoder.heard[0], to_mono_16k(waveform))


def _hear_both(
    waveform: Waveform, section_frames: int, context_frames: int = 250
) -> tuple[Tensor, SectionFeatures, FakeEncoder]:
    """Encode 16 kHz mono at once, and section by section."""
    seconds, encoder = Fraction(waveform.num_samples, 16_000), FakeEncoder()
    whole = encode_whole(normalize_loudness(waveform.samples_CS[0]), seconds, FakeEncoder())
    features = encode_in_sections(
        waveform,
        Fraction(0),
        seconds,
        encoder,
        section_frames=section_frames,
        context_frames=context_frames,
    )
    return whole.rows(), features, encoder


@given(st.integers(640, 40_000), st.sampled_from([1, 7, 20, 1_000]), st.sampled_from([0, 3, 250]))
def test_who_hears_each_frame_alone_hears_the_same_in_sections(
    num_samples: int, section_frames: int, context_frames: int
) -> None:
    whole_TLD, features, _ = _hear_both(_noise(num_samples), section_frames, context_frames)
    assert features.num_frames == num_samples // 640
    assert features.num_rows == features.num_frames + SILENCE_TAIL_FRAMES
    assert torch.equal(features.rows(), whole_TLD)


@given(st.lists(st.tuples(st.integers(0, 84), st.integers(1, 40)), min_size=1, max_size=6))
def test_rows_do_not_depend_on_which_were_asked_for_before(wanted: list[tuple[int, int]]) -> None:
    whole_TLD, features, _ = _hear_both(_noise(640 * 60 + 9), 8)
    for start, length in wanted:
        assert torch.equal(features.rows(start, start + length), whole_TLD[start : start + length])


def test_going_on_each_section_is_heard_once_with_what_lies_around_it() -> None:
    _, features, encoder = _hear_both(_noise(640 * 100), 20, 5)
    assert encoder.heard == []
    for start in range(0, 110, 4):
        features.rows(start, start + 13)
    assert [heard_S.shape[0] // 640 for heard_S in encoder.heard] == [25, 30, 30, 30, 25, 125]


def test_a_long_voice_is_heard_in_sections_and_a_short_one_whole() -> None:
    def listen(num_frames: int, hearing: EncodeMode) -> tuple[FeatureRows, FakeEncoder]:
        encoder = FakeEncoder()
        voice = Waveform(samples_CS=torch.zeros(1, 640 * num_frames), sample_rate=16_000)
        return encode_speech(voice, encoder, hearing=hearing).features, encoder

    short: tuple[tuple[int, EncodeMode], ...] = (
        (MOST_WHOLE_FRAMES, "auto"),
        (MOST_WHOLE_FRAMES + 1, "whole"),
    )
    for num_frames, hearing in short:
        features, encoder = listen(num_frames, hearing)
        assert isinstance(features, AudioFeatures)
        assert encoder.heard[0].shape[0] == 640 * num_frames
    long: tuple[tuple[int, EncodeMode], ...] = ((MOST_WHOLE_FRAMES + 1, "auto"), (30, "sections"))
    for num_frames, hearing in long:
        features, encoder = listen(num_frames, hearing)
        assert features.num_frames == num_frames
        assert encoder.heard == []
        features.rows(0, 20)
        (heard_S,) = encoder.heard
        assert heard_S.shape[0] == 640 * min(num_frames, SECTION_FRAMES + CONTEXT_FRAMES)


def test_an_encoder_that_normalises_is_told_the_moments_of_all_that_it_will_hear() -> None:
    told = []

    class Curious(FakeEncoder):
        first_kernel = (10, 5)

        def encode(
            self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
        ) -> Tensor:
            told.append(moments)
            return super().encode(waveform_S, num_frames)

    voice = _noise(64_000)
    features = encode_in_sections(voice, Fraction(1), Fraction(6), Curious(), section_frames=50)
    assert features.num_frames == 150
    features.rows()
    assert len(told) == 4
    assert all(moments is told[0] for moments in told)
    heard_S = torch.nn.functional.pad(normalize_loudness(voice.samples_CS[0]), (16_000, 16_000))
    power = heard_S.square().mean().item()
    assert told[0].covariance_KK.diagonal().tolist() == pytest.approx([power] * 10, rel=1e-2)


@pytest.fixture(scope="module")
def encoder() -> Wav2Vec2Encoder:
    return build_audio_encoder(ENCODER_CONFIG, seed=0)


def _listen(waveform: Waveform, encoder: AudioEncoder) -> SectionFeatures:
    """Encode 16 kHz mono in short sections."""
    seconds = Fraction(waveform.num_samples, 16_000)
    return encode_in_sections(
        waveform, Fraction(0), seconds, encoder, section_frames=50, context_frames=25
    )


@pytest.mark.parametrize("silent", [(0, 100), (100, 200), (200, 300)])
def test_a_pause_sounds_as_it_does_in_the_whole(
    encoder: Wav2Vec2Encoder, silent: tuple[int, int]
) -> None:
    voice = _noise(640 * 300)
    voice.samples_CS[:, 640 * silent[0] : 640 * silent[1]] = 0
    whole_TLD = encode_speech(voice, encoder).features.rows()
    rows_TLD = _listen(voice, encoder).rows()
    assert rows_TLD.isfinite().all()
    for start in range(0, 300, 50):
        part = slice(start, start + 50)
        difference = (rows_TLD[part] - whole_TLD[part]).norm() / whole_TLD[part].norm()
        assert difference < 0.02  # it is 0.04 and more where each section is normalised by itself


def test_a_run_that_goes_on_hears_what_it_would_have_heard(encoder: Wav2Vec2Encoder) -> None:
    voice = _noise(640 * 240 + 99)
    spans = [(start, start + 13) for start in range(0, 253, 8)]
    never_stopped = _listen(voice, encoder)
    expected = [never_stopped.rows(*span) for span in spans]
    for first in (1, 5, 6, 7, 29, 31):
        going_on = _listen(voice, encoder)
        going_on.rows(0, 1)  # as null audio asks for it
        for span, rows_TLD in zip(spans[first:], expected[first:], strict=True):
            assert torch.equal(going_on.rows(*span), rows_TLD)


def test_no_more_is_read_than_the_next_section_needs() -> None:
    class Watched(Waveform):
        def blocks(self, start: int = 0) -> Iterator[Tensor]:
            for block_CS in self.samples_CS[:, start:].split(640, dim=1):
                read.append(block_CS.shape[1])
                yield block_CS

    read: list[int] = []
    encoder = FakeEncoder()
    noise = _noise(640 * 300)
    features = _listen(Watched(samples_CS=noise.samples_CS, sample_rate=16_000), encoder)
    assert sum(read) == 640 * 300  # for loudness and moments
    read.clear()
    for start in range(0, 300, 10):
        features.rows(start, min(start + 10, 300))
        assert sum(read) == 640 * min(start // 50 * 50 + 75, 300)
    assert max(heard_S.shape[0] for heard_S in encoder.heard) == 640 * 100


def test_how_it_was_heard_is_told() -> None:
    def tell(hearing: EncodeMode, normalizes_loudness: bool = True) -> str | None:
        voice, encoder = _noise(640), FakeEncoder()
        return encode_speech(
            voice, encoder, normalizes_loudness=normalizes_loudness, hearing=hearing
        ).origin

    def described(encodes_at_once: bool, normalizes_loudness: bool = True) -> str:
        return describe_encoding(FakeEncoder(), encodes_at_once, normalizes_loudness)

    assert described(True) == "whole, at -23 LUFS, by 5b"
    assert described(False) == "in sections of 1000 and 250 around, at -23 LUFS, by 5b"
    assert described(True, False) == "whole, as loud as it is, by 5b"
    assert tell("whole") == tell("auto") == digest_text(described(True))
    assert tell("sections") == digest_text(described(False))
    assert tell("whole", False) == digest_text(described(True, False))


def test_another_wish_than_there_are_is_refused() -> None:
    with pytest.raises(RequestError, match="got hearing 'loudly'; choose one of auto, whole, sec"):
        encode_speech(_noise(640), FakeEncoder(), hearing=cast(EncodeMode, "loudly"))


@pytest.mark.parametrize("hearing", ["whole", "sections"])
def test_what_is_shorter_than_a_frame_is_refused(hearing: EncodeMode) -> None:
    with pytest.raises(AudioError, match="at least one video frame"):
        encode_speech(_noise(639), FakeEncoder(), hearing=hearing)
