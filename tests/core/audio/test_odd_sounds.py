"""Sounds that are late, damaged, one of several, out of range, or cancel themselves in mono."""

import math
import struct
from fractions import Fraction
from pathlib import Path

import av
import av.container
import numpy as np
import pytest
import torch
from av.stream import Disposition

from tests.family import ENCODER_CONFIG
from tests.forks import call_in_child
from turbotalk_core.audio.conversation import encode_conversation
from turbotalk_core.audio.io import from_samples, open_sound, read_audio, to_waveform
from turbotalk_core.audio.resample import pick_audible, read_mono_16k, to_mono_16k
from turbotalk_core.audio.wav2vec2 import build_audio_encoder
from turbotalk_core.errors import AudioError
from turbotalk_core.request import EncodeMode
from turbotalk_core.types import Conversation, Speaker, Waveform

RATE = 16_000


def _tone(seconds: float = 1.0) -> np.ndarray:
    times = np.arange(round(RATE * seconds)) / RATE
    return (0.5 * np.sin(2 * math.pi * 300 * times)).astype(np.float32)[None]


def _encode(container: av.container.OutputContainer, stream, samples_CS, delay: float = 0) -> None:
    frame = av.AudioFrame.from_ndarray(samples_CS, format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, round(delay * RATE), Fraction(1, RATE)
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _write_film(path: Path, *, sound_at: float = 0, picture_at: float = 0) -> None:
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=RATE, layout="mono")
        picture = container.add_stream("mpeg4", rate=25, width=16, height=16, pix_fmt="yuv420p")
        for number in range(25):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = number + round(25 * picture_at), Fraction(1, 25)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        _encode(container, sound, _tone(), sound_at)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_a_late_sound_has_silence_before_it(tmp_path: Path, name: str) -> None:
    _write_film(tmp_path / name, sound_at=0.5)
    notes: list[str] = []
    sound = open_sound(tmp_path / name, on_note=notes.append)
    samples_S = to_waveform(sound).samples_CS[0]
    assert sound.num_silent == pytest.approx(8_000, abs=1_100)  # AAC begins a block early
    assert not samples_S[: sound.num_silent].any()
    assert samples_S[8_400:23_000].abs().max() > 0.4
    assert samples_S.shape[0] == sound.num_samples >= 24_000
    assert len(notes) == 1
    assert "begins late" in notes[0]
    for start in (0, 5, sound.num_silent, sound.num_silent + 7, 20_000):
        rest_CS = torch.cat(list(sound.blocks(start)), dim=1)
        assert torch.equal(rest_CS[0], samples_S[start:])


@pytest.mark.parametrize(("sound_at", "picture_at"), [(0, 0), (0, 0.48)])
def test_nothing_is_added_or_lost_otherwise(
    tmp_path: Path, sound_at: float, picture_at: float
) -> None:
    _write_film(tmp_path / "a.mp4", sound_at=sound_at, picture_at=picture_at)
    notes: list[str] = []
    sound = open_sound(tmp_path / "a.mp4", on_note=notes.append)
    assert (sound.num_silent, notes) == (0, [])
    assert RATE <= sound.num_samples < RATE + 1_024


def _write_streams(path: Path, levels: list[float], default: int | None) -> None:
    with av.open(str(path), "w") as container:
        streams = []
        for number, _ in enumerate(levels):
            stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
            if default is not None:
                flag = Disposition.default if number == default else Disposition.original
                stream.disposition = flag.value  # PyAV 16 takes numbers alone
            streams.append(stream)
        for stream, level in zip(streams, levels, strict=True):
            _encode_s16(container, stream, level)


def _encode_s16(container: av.container.OutputContainer, stream, level: float) -> None:
    samples_CS = (_tone() * 2 * level * 32_000).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(samples_CS, format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("levels", "default", "taken"),
    [
        ([0.2, 0.8], None, 0),
        ([0.2, 0.8], 1, 1),
        ([0.0, 0.8], None, 1),
        ([0.0, 0.8, 0.4], 2, 2),
        ([0.2, 0.0], 1, 0),
        ([0.0, 0.0], 1, 1),
    ],
)
def test_of_several_streams_the_default_is_taken_and_none_that_is_silent(
    tmp_path: Path, levels: list[float], default: int | None, taken: int
) -> None:
    _write_streams(tmp_path / "a.mkv", levels, default)
    notes: list[str] = []
    sound = open_sound(tmp_path / "a.mkv", on_note=notes.append)
    assert sound.stream == taken
    peak = to_waveform(sound).samples_CS.abs().max().item()
    assert peak == pytest.approx(levels[taken] * 32_000 / 2**15, abs=1e-3)
    assert len(notes) == 1
    assert f"has {len(levels)} audio streams, of which number {taken + 1} is used" in notes[0]


def _write_mp3(path: Path, broken: set[int]) -> int:
    """Write an mp3 and zero some of its packets; return the number of packets."""
    with av.open(str(path), "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=RATE, layout="mono")
        _encode(container, stream, _tone(3.0))
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(audio=0) if p.size and p.pos]
    data = bytearray(path.read_bytes())
    for number in broken:
        place, size = packets[number]
        data[place + 4 : place + size] = b"\xff" * (size - 4)  # the header stays
    path.write_bytes(data)
    return len(packets)


def test_a_damaged_packet_is_silence_of_its_length(tmp_path: Path) -> None:
    _write_mp3(tmp_path / "good.mp3", set())
    _write_mp3(tmp_path / "bad.mp3", {40})
    notes: list[str] = []
    good, bad = (
        read_audio(tmp_path / "good.mp3"),
        open_sound(tmp_path / "bad.mp3", on_note=notes.append),
    )
    assert bad.num_samples == good.num_samples
    samples_CS = to_waveform(bad).samples_CS
    differs_S = (samples_CS != good.samples_CS)[0].nonzero()[:, 0]
    assert differs_S[-1] - differs_S[0] < 10 * 576  # the packet and those that share its bits
    assert len(notes) == 1
    assert "is damaged: 0.0" in notes[0]
    assert torch.equal(torch.cat(list(bad.blocks(23_456)), dim=1), samples_CS[:, 23_456:])


def test_a_file_that_is_mostly_damage_is_refused(tmp_path: Path) -> None:
    count = _write_mp3(tmp_path / "bad.mp3", set())
    _write_mp3(tmp_path / "bad.mp3", set(range(5, count)))
    with pytest.raises(AudioError, match=r"more than half of the sound|cannot be decoded"):
        open_sound(tmp_path / "bad.mp3")


def _write_floats(path: Path, samples: np.ndarray) -> None:
    data = samples.astype("<f4").tobytes()
    header = struct.pack("<IHHIIHH", 16, 3, 1, RATE, RATE * 4, 4, 32)
    start = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + header
    path.write_bytes(start + b"data" + struct.pack("<I", len(data)) + data)


@pytest.mark.parametrize("full_scale", [2.0**7, 2.0**15, 2.0**23, 2.0**31])
def test_integers_in_floating_point_are_scaled(tmp_path: Path, full_scale: float) -> None:
    tone_CS = _tone()
    _write_floats(tmp_path / "a.wav", tone_CS * full_scale)
    for read in (
        lambda note: to_waveform(open_sound(tmp_path / "a.wav", on_note=note)),
        lambda note: from_samples(torch.from_numpy(tone_CS * full_scale), RATE, on_note=note),
    ):
        notes: list[str] = []
        assert np.allclose(read(notes.append).samples_CS.numpy(), tone_CS, atol=1e-7)
        assert f"divided by {full_scale:.0f}" in notes[0]


@pytest.mark.parametrize(("peak", "says"), [(1.0, False), (1.2, True), (8.0, True)])
def test_what_is_over_full_scale_is_noted(tmp_path: Path, peak: float, says: bool) -> None:
    _write_floats(tmp_path / "a.wav", _tone() * 2 * peak)
    notes: list[str] = []
    sound = open_sound(tmp_path / "a.wav", on_note=notes.append)
    assert to_waveform(sound).samples_CS.abs().max().item() == pytest.approx(peak, rel=1e-2)
    assert [f"reaches {peak:.2f}" in note for note in notes] == [True] * says


def test_samples_in_no_range_are_refused(tmp_path: Path) -> None:
    _write_floats(tmp_path / "a.wav", _tone() * 1e12)
    with pytest.raises(AudioError, match="samples up to 5e\\+11"):
        open_sound(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("levels", "index"),
    [
        ((1, -1), 0),
        ((0.8, -1), 1),
        ((1, -1, 0.5, -0.5), 0),
        ((1, 1), None),
        ((1, 0), None),
        ((0, *[0] * 30, 1), None),
        ((0, 0), None),
        ((1,), None),
    ],
)
def test_channels_that_cancel_are_not_averaged(
    levels: tuple[float, ...], index: int | None
) -> None:
    tone_S = torch.from_numpy(_tone()[0])
    waveform = Waveform(samples_CS=torch.tensor(levels)[:, None] * tone_S, sample_rate=RATE)
    mono_S = to_mono_16k(waveform)
    expected_S = waveform.samples_CS.mean(0) if index is None else waveform.samples_CS[index]
    assert torch.equal(mono_S, expected_S)
    assert torch.equal(torch.cat(list(read_mono_16k(waveform).blocks()), dim=1)[0], mono_S)
    assert (pick_audible(waveform) is waveform) == (index is None)


def _write_unknown(path: Path) -> None:
    """Write an m4a whose codec no decoder exists for."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        _encode(container, stream, _tone())
    data = path.read_bytes()
    assert data.count(b"mp4a") >= 1
    path.write_bytes(data.replace(b"mp4a", b"apac").replace(b"esds", b"free"))


def test_a_codec_without_a_decoder_is_refused(tmp_path: Path) -> None:
    _write_unknown(tmp_path / "a.m4a")
    assert call_in_child(_refuse, tmp_path / "a.m4a").startswith("the sound of")  # may crash


def _refuse(path: Path) -> str:
    with pytest.raises(AudioError, match="in a format that cannot be decoded here") as refused:
        open_sound(path)
    return str(refused.value)


def test_a_voice_in_opposite_phase_is_encoded_like_one_of_its_channels() -> None:
    tone_CS = torch.from_numpy(_tone())
    notes: list[str] = []
    encoder = build_audio_encoder(ENCODER_CONFIG, seed=0)
    encoder.model.eval()

    def encode(samples_CS: torch.Tensor, hearing: EncodeMode) -> Conversation:
        voice = Waveform(samples_CS=samples_CS, sample_rate=RATE)
        speaker = Speaker(name="Anna", waveform=voice)
        return encode_conversation([speaker], encoder, hearing=hearing, on_note=notes.append)

    modes: tuple[EncodeMode, EncodeMode] = ("whole", "sections")
    for hearing in modes:
        plain = encode(tone_CS, hearing).speeches[0]
        assert notes == []
        conversation = encode(torch.cat([tone_CS, -tone_CS]), hearing)
        assert torch.equal(conversation.speeches[0].features.rows(), plain.features.rows())
        assert conversation.speeches[0].origin != plain.origin
        assert conversation.waveform.num_channels == 2  # the video gets the original
        assert "the voice of Anna are in opposite phase" in notes.pop()
