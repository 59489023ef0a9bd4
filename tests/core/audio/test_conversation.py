"""Turns of speakers, checked with an encoder that records its input."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.family import FakeEncoder
from turbotalk_core.audio.conversation import encode_conversation, encode_speech, mix_voices
from turbotalk_core.audio.loudness import normalize_loudness
from turbotalk_core.errors import AudioError
from turbotalk_core.geometry import count_frames
from turbotalk_core.request import EncodeMode
from turbotalk_core.sound import Sound
from turbotalk_core.types import Conversation, SoundMoments, Speaker, Waveform

RATE = 16_000


def _noise(num_samples: int, sample_rate: int = RATE, channels: int = 1) -> Waveform:
    generator = torch.Generator().manual_seed(num_samples)
    samples_CS = 0.1 * torch.randn(channels, num_samples, generator=generator)
    return Waveform(samples_CS=samples_CS.clamp(-1, 1), sample_rate=sample_rate)


def _talk(*speakers: Speaker) -> tuple[Conversation, list[Tensor]]:
    listener = FakeEncoder()
    conversation = encode_conversation(speakers, listener, normalizes_loudness=False)
    return conversation, listener.heard[::2]  # after each voice the listener hears its end


def _read(sound: Sound) -> Tensor:
    """Read all samples of a sound."""
    return torch.cat(list(sound.blocks()), dim=1)


def _anna(seconds: float, follows: bool = False) -> Speaker:
    return Speaker(name="Anna", waveform=_noise(round(RATE * seconds)), follows=follows)


@given(
    num_samples=st.integers(1764, 40_000),
    sample_rate=st.sampled_from([16_000, 44_100, 44_101]),
    normalizes=st.booleans(),
)
def test_a_lone_speaker_is_heard_as_speech_is(
    num_samples: int, sample_rate: int, normalizes: bool
) -> None:
    waveform = _noise(num_samples, sample_rate, channels=2)
    speaker = Speaker(name="Anna", waveform=waveform, follows=True)
    conversation = encode_conversation([speaker], FakeEncoder(), normalizes_loudness=normalizes)
    speech = encode_speech(waveform, FakeEncoder(), normalizes_loudness=normalizes)
    (ours,) = conversation.speeches
    assert torch.equal(ours.features.rows(), speech.features.rows())
    assert ours.features.num_frames == speech.features.num_frames
    assert torch.equal(_read(conversation.waveform), waveform.samples_CS)
    assert conversation.waveform.sample_rate == sample_rate


def test_a_follower_begins_with_the_sample_after_the_last() -> None:
    first, second = _noise(16_123), _noise(9_001)
    conversation, heard = _talk(
        Speaker(name="Anna", waveform=first), Speaker(name="Bob", waveform=second, follows=True)
    )
    total = 16_123 + 9_001
    assert [waveform_S.shape[0] for waveform_S in heard] == [total, total]
    assert torch.equal(heard[0][:16_123], first.samples_CS[0])
    assert not heard[0][16_123:].any()
    assert not heard[1][:16_123].any()
    assert torch.equal(heard[1][16_123:], second.samples_CS[0])
    assert torch.equal(_read(conversation.waveform)[0], heard[0] + heard[1])
    for speech in conversation.speeches:
        assert speech.features.num_frames == total // 640
        assert _read(speech.waveform).shape == (1, total)


def test_who_does_not_follow_speaks_at_once() -> None:
    conversation, heard = _talk(_anna(1.0), _anna(0.4))
    assert [waveform_S.shape[0] for waveform_S in heard] == [16_000, 16_000]
    assert heard[1][:6_400].any()
    assert not heard[1][6_400:].any()
    assert torch.equal(_read(conversation.waveform)[0], heard[0] + heard[1])


def test_a_bystander_hears_silence_and_takes_no_turn() -> None:
    carl = Speaker(name="Carl")
    conversation, heard = _talk(_anna(0.5), carl, _anna(0.3, follows=True))
    assert [waveform_S.shape[0] for waveform_S in heard] == [12_800] * 3
    assert not heard[1].any()
    assert not heard[2][:8_000].any()
    assert heard[2][8_000:].any()
    assert not _read(conversation.speeches[1].waveform).any()
    assert conversation.speakers[1] is carl


def test_silence_is_heard_not_made_up() -> None:
    # An encoder for which silence is anything but zeros.
    class Offset(FakeEncoder):
        def encode(
            self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
        ) -> Tensor:
            return super().encode(waveform_S, num_frames) + 7

    conversation = encode_conversation([_anna(0.4), Speaker(name="Carl")], Offset())
    assert (conversation.speeches[1].features.rows() == 7).all()


def test_loudness_is_that_of_the_voice_without_the_silence() -> None:
    listener, voice = FakeEncoder(), _noise(RATE)
    speakers = [_anna(2.0), Speaker(name="Bob", waveform=voice, follows=True)]
    encode_conversation(speakers, listener)
    assert torch.equal(listener.heard[2][-RATE:], normalize_loudness(voice.samples_CS[0]))


@given(
    cuts=st.lists(st.integers(0, 20_000), min_size=1, max_size=4, unique=True),
    sample_rate=st.sampled_from([22_050, 48_000]),
)
def test_a_recording_cut_into_turns_is_mixed_whole_again(cuts: list[int], sample_rate: int) -> None:
    whole = _noise(20_001, sample_rate, channels=2)
    edges = [0, *sorted(set(cuts) - {0}), 20_001]
    speakers = [
        Speaker(
            name="Anna",
            waveform=Waveform(samples_CS=whole.samples_CS[:, start:stop], sample_rate=sample_rate),
            follows=True,
        )
        for start, stop in pairwise(edges)
    ]
    conversation, _ = _talk(*speakers)
    assert torch.equal(_read(conversation.waveform), whole.samples_CS)
    frames = {speech.features.num_frames for speech in conversation.speeches}
    assert frames == {25 * 20_001 // sample_rate}


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 9_000), st.sampled_from([8_000, 11_025, 44_101]), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_all_are_as_long_as_until_the_last_has_ended(
    lengths: list[tuple[int, int, bool]],
) -> None:
    speakers, ends = [], [Fraction(0)]
    for num_samples, rate, follows in lengths:
        speakers.append(Speaker(name="Anna", waveform=_noise(num_samples, rate), follows=follows))
        ends.append((ends[-1] if follows else 0) + Fraction(num_samples, rate))
    num_frames = int(25 * max(ends))
    if num_frames == 0:
        with pytest.raises(AudioError, match="at least one video frame"):
            _talk(*speakers)
        return
    conversation, heard = _talk(*speakers)
    assert {speech.features.num_frames for speech in conversation.speeches} == {num_frames}
    assert len({waveform_S.shape[0] for waveform_S in heard}) == 1
    sound = conversation.waveform
    assert count_frames(sound.num_samples, sound.sample_rate) in (
        num_frames,
        num_frames + 1,
    )  # rates may round


def test_the_mix_has_the_best_rate_and_the_most_channels() -> None:
    mono, stereo = _noise(8_000, 8_000), _noise(24_000, 24_000, channels=2)
    quiet = Waveform(samples_CS=torch.zeros(2, 24_000), sample_rate=24_000)
    conversation, _ = _talk(
        Speaker(name="Anna", waveform=mono), Speaker(name="Bob", waveform=quiet)
    )
    left_S, right_S = _read(conversation.waveform)
    assert conversation.waveform.sample_rate == 24_000
    assert torch.equal(left_S, right_S)
    assert left_S.any()
    both, _ = _talk(Speaker(name="Anna", waveform=mono), Speaker(name="Bob", waveform=stereo))
    torch.testing.assert_close(
        _read(both.waveform), _read(conversation.waveform) + stereo.samples_CS
    )


def test_only_what_overflows_is_scaled_down() -> None:
    loud = Waveform(samples_CS=torch.tensor([[0.8, -0.4]]).repeat(1, 800), sample_rate=RATE)
    twice, _ = _talk(*[Speaker(name="Anna", waveform=loud)] * 2)
    torch.testing.assert_close(_read(twice.waveform), loud.samples_CS / 0.8)
    in_turn, _ = _talk(*[Speaker(name="Anna", waveform=loud, follows=True)] * 2)
    assert torch.equal(_read(in_turn.waveform), loud.samples_CS.repeat(1, 2))
    decoded = Waveform(samples_CS=loud.samples_CS * 1.5, sample_rate=RATE)
    alone, _ = _talk(Speaker(name="Anna", waveform=decoded), Speaker(name="Carl"))
    assert torch.equal(_read(alone.waveform), decoded.samples_CS)


def test_somebody_must_speak() -> None:
    with pytest.raises(AudioError, match="got 2 speakers of whom none has a voice"):
        _talk(Speaker(name="Anna"), Speaker(name="Bob", follows=True))


@pytest.mark.parametrize("num_samples", [9_001, 640 * 30])
def test_in_sections_a_conversation_is_heard_the_same(num_samples: int) -> None:
    speakers = [
        Speaker(name="Anna", waveform=_noise(16_123)),
        Speaker(name="Carl", follows=True),
        Speaker(name="Bob", waveform=_noise(num_samples), follows=True),
        Speaker(name="Dora", waveform=_noise(5_000)),
    ]
    whole = encode_conversation(speakers, FakeEncoder(), hearing="whole")
    listener = FakeEncoder()
    sections = encode_conversation(speakers, listener, hearing="sections")
    assert listener.heard == []
    for ours, theirs in zip(sections.speeches, whole.speeches, strict=True):
        assert ours.features.num_frames == theirs.features.num_frames
        assert torch.equal(ours.features.rows(), theirs.features.rows())
        assert torch.equal(_read(ours.waveform), _read(theirs.waveform))
    assert torch.equal(_read(sections.waveform), _read(whole.waveform))


@pytest.mark.parametrize("hearing", ["whole", "sections"])
def test_who_hears_a_voice_elsewhere_says_so(hearing: EncodeMode) -> None:
    def tell(*speakers: Speaker) -> list[str | None]:
        conversation = encode_conversation(speakers, FakeEncoder(), hearing=hearing)
        return [speech.origin for speech in conversation.speeches]

    anna, bob = _anna(0.5), _anna(0.3)
    at_once = tell(anna, bob)
    in_turn = tell(anna, replace(bob, follows=True))
    assert at_once[0] == in_turn[0]
    assert at_once[1] != in_turn[1]
    # Laid in silence, a voice has the samples of one recorded with it, and another loudness.
    assert tell(anna, _anna(0.5))[1] != at_once[1]


@pytest.mark.slow
@given(st.integers(1, 200_000))
def test_a_mix_is_the_same_from_wherever_it_is_read(start: int) -> None:
    speakers = [
        Speaker(name="Anna", waveform=_noise(100_000, 24_000, channels=2)),
        Speaker(name="Bob", waveform=_noise(60_001, 16_000), follows=True),
        Speaker(name="Dora", waveform=_noise(90_000, 44_100)),
    ]
    mix = mix_voices(speakers)
    whole_CS = _read(mix)
    assert whole_CS.shape == (2, mix.num_samples)
    start = min(start, mix.num_samples)
    rest_CS = torch.cat([torch.zeros(2, 0), *mix.blocks(start)], dim=1)
    assert torch.equal(rest_CS, whole_CS[:, start:])


def test_before_it_is_read_nothing_is_mixed() -> None:
    class Untouched(Waveform):
        def blocks(self, start: int = 0) -> Iterator[Tensor]:
            raise AssertionError("was read")

    voice = Untouched(samples_CS=torch.ones(1, 800), sample_rate=RATE)
    mix = mix_voices([Speaker(name="Anna", waveform=voice)] * 2)
    assert (mix.num_samples, mix.num_channels, mix.sample_rate) == (800, 1, RATE)
    with pytest.raises(AssertionError, match="was read"):
        next(mix.blocks())
