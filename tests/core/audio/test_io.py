"""Reading sound: every container and sample format, and everything that must be refused."""

import math
import struct
from fractions import Fraction
from pathlib import Path

import av
import av.container
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.audio.io import (
    from_samples,
    open_sound,
    read_audio,
    to_waveform,
)
from turbotalk_core.errors import AudioError
from turbotalk_core.geometry import count_frames


def _sweep(sample_rate: int, num_channels: int, seconds: float = 1.0) -> np.ndarray:
    """A tone gliding from 200 to 800 Hz, half as loud in each further channel."""
    times = np.arange(round(sample_rate * seconds)) / sample_rate
    tone = 0.5 * np.sin(2 * math.pi * (200 * times + 300 * times**2))
    return np.stack([tone / 2**channel for channel in range(num_channels)]).astype(np.float32)


def _write(
    path: Path,
    codec: str,
    sample_format: str,
    sample_rate: int = 44_100,
    layout: str = "stereo",
    *,
    seconds: float = 1.0,
    delay: int = 0,
    quality: int | None = None,
) -> np.ndarray:
    """Write the sweep, with a picture track where the container is one for video."""
    samples = _sweep(sample_rate, av.AudioLayout(layout).nb_channels, seconds)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=sample_rate, layout=layout)
        stream.codec_context.format = sample_format
        if quality is not None:  # instead of a rate
            stream.codec_context.qscale = True
            stream.codec_context.global_quality = quality * 118  # FFmpeg's FF_QP2LAMBDA
        if path.suffix in {".mp4", ".mov", ".mkv"}:
            _write_picture(container)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = sample_rate
        frame.pts = delay
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return samples


def _write_picture(container: av.container.OutputContainer) -> None:
    stream = container.add_stream("mpeg4", rate=25)
    stream.width = stream.height = 16
    stream.pix_fmt = "yuv420p"
    picture = np.zeros((16, 16, 3), np.uint8)
    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode(None))


def _wav_bytes(data: bytes, *, code: int, bits: int, channels: int = 1) -> bytes:
    width = channels * bits // 8
    header = struct.pack("<IHHIIHH", 16, code, channels, 16_000, 16_000 * width, width, bits)
    return (
        b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + header
        + b"data" + struct.pack("<I", len(data)) + data
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "tolerance"),
    [
        ("a.wav", "pcm_u8", "u8", 2**-7),
        ("a.wav", "pcm_s16le", "s16", 2**-15),
        ("a.wav", "pcm_s24le", "s32", 2**-22),
        ("a.wav", "pcm_s32le", "s32", 2**-23),
        ("a.wav", "pcm_f32le", "flt", 0.0),
        ("a.wav", "pcm_f64le", "dbl", 0.0),
        ("a.flac", "flac", "s16", 2**-15),
        ("a.m4a", "alac", "s16p", 2**-15),
        ("a.mov", "pcm_s16le", "s16", 2**-15),
    ],
)
def test_lossless_formats_come_back_exactly(
    tmp_path: Path, name: str, codec: str, sample_format: str, tolerance: float
) -> None:
    samples = _write(tmp_path / name, codec, sample_format)
    waveform = read_audio(tmp_path / name)
    assert waveform.sample_rate == 44_100
    assert waveform.samples_CS.shape == samples.shape
    assert waveform.samples_CS.dtype == torch.float32
    assert np.abs(waveform.samples_CS.numpy() - samples).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "codec", "sample_format"),
    [
        ("a.mp3", "libmp3lame", "fltp"),
        ("a.opus", "libopus", "flt"),
        ("a.ogg", "libopus", "flt"),
        ("a.m4a", "aac", "fltp"),
        ("a.mp4", "aac", "fltp"),
        ("a.mkv", "aac", "fltp"),
        ("a.webm", "libopus", "flt"),
    ],
)
def test_lossy_formats_come_back_in_time(
    tmp_path: Path, name: str, codec: str, sample_format: str
) -> None:
    samples = _write(tmp_path / name, codec, sample_format, sample_rate=48_000)
    waveform = read_audio(tmp_path / name)
    assert waveform.sample_rate == 48_000
    assert 48_000 <= waveform.samples_CS.shape[1] < 48_000 + 1_024  # AAC may end on a whole block
    heard, spoken = waveform.samples_CS[0].numpy(), samples[0]
    middle = slice(4_000, 44_000)
    agreement = {
        lag: float(np.corrcoef(heard[4_000 + lag : 44_000 + lag], spoken[middle])[0, 1])
        for lag in range(-1_200, 1_200, 4)
    }
    assert max(agreement, key=agreement.__getitem__) == 0
    assert agreement[0] > 0.97


@pytest.mark.parametrize(("layout", "num_channels"), [("mono", 1), ("stereo", 2), ("5.1", 6)])
def test_all_channels_are_kept_in_order(tmp_path: Path, layout: str, num_channels: int) -> None:
    samples = _write(tmp_path / "a.wav", "pcm_f32le", "flt", layout=layout)
    waveform = read_audio(tmp_path / "a.wav")
    assert waveform.samples_CS.shape[0] == num_channels
    assert np.array_equal(waveform.samples_CS.numpy(), samples)


def test_channels_without_a_named_layout_are_read(tmp_path: Path) -> None:
    samples = (1_000 * np.random.default_rng(0).standard_normal((800, 3))).astype("<i2")
    path = tmp_path / "a.wav"
    path.write_bytes(_wav_bytes(samples.tobytes(), code=1, bits=16, channels=3))
    expected_CS = torch.from_numpy(samples.T.astype(np.float32)) / 2**15
    assert torch.equal(read_audio(path).samples_CS, expected_CS)


def test_a_name_is_never_a_protocol(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(_wav_bytes(b"\0\0" * 640, code=1, bits=16))
    (tmp_path / "a.wav").rename(tmp_path / "http:a.wav")
    assert read_audio(tmp_path / "http:a.wav").samples_CS.shape == (1, 640)


def test_a_cut_recording_gives_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(_wav_bytes(b"\1\0" * 6_400, code=1, bits=16)[: 44 + 2 * 3_200])
    assert read_audio(path).samples_CS.shape == (1, 3_200)


_PLAYLIST = (
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.wav", b"", "cannot be decoded"),
        ("noise.bin", np.random.default_rng(0).bytes(4_000), "cannot be decoded|no audio stream"),
        ("list.m3u8", _PLAYLIST.encode(), "cannot be decoded|no audio stream"),
        ("header.wav", _wav_bytes(b"", code=1, bits=16), "cannot be decoded|is empty"),
        ("text.txt", b"hello " * 100, "cannot be decoded|no audio stream"),
        ("nan.wav", _wav_bytes(struct.pack("<f", math.nan) * 800, code=3, bits=32), "NaN"),
        ("inf.wav", _wav_bytes(struct.pack("<f", math.inf) * 800, code=3, bits=32), "infinite"),
        ("s64.wav", _wav_bytes(b"\1" * 8 * 800, code=1, bits=64), "s64"),
    ],
)
def test_what_is_no_sound_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (read_audio, open_sound):
        with pytest.raises(AudioError, match=message):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["list.txt", "list.wav", "list.m3u8", "list.mpd"])
@pytest.mark.parametrize(
    "content",
    [
        "ffconcat version 1.0\nfile other.wav\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.wav\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:other.wav\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_list_of_other_files_opens_none_of_them(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "other.wav").write_bytes(_wav_bytes(b"\1\0" * 640, code=1, bits=16))
    assert read_audio(tmp_path / "other.wav").samples_CS.shape == (1, 640)
    (tmp_path / name).write_text(content)
    with pytest.raises(AudioError):
        read_audio(tmp_path / name)


def test_sound_without_an_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbotalk_core.audio.io.MAX_SAMPLES", 44_100 * 2)
    _write(tmp_path / "a.wav", "pcm_s16le", "s16")
    assert read_audio(tmp_path / "a.wav").samples_CS.numel() == 44_100 * 2
    _write(tmp_path / "b.wav", "pcm_s16le", "s16", layout="2.1")
    with pytest.raises(AudioError, match=r"more than 88200 samples, 44100 a second in 3 channels"):
        read_audio(tmp_path / "b.wav")


def test_a_sound_that_memory_does_not_hold_is_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "a.wav", "pcm_s16le", "s16")
    monkeypatch.setattr("turbotalk_core.audio.io.MAX_SAMPLES", 9)
    sound = open_sound(tmp_path / "a.wav")
    assert sum(block_CS.shape[1] for block_CS in sound.blocks()) == 44_100
    with pytest.raises(AudioError, match="heard in sections"):
        to_waveform(sound)


def test_sound_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.wav", "pcm_s16le", "s16", seconds=2.0)
    for most in (49, 50):
        monkeypatch.setattr("turbotalk_core.audio.io.MAX_FRAMES", most)
        if most == 50:
            assert open_sound(tmp_path / "a.wav").num_frames == 50
            continue
        with pytest.raises(AudioError, match="lasts longer than 1 s"):
            open_sound(tmp_path / "a.wav")
        assert open_sound(tmp_path / "a.wav", Fraction(1)).num_frames == 25


def test_samples_count_as_many_as_they_become_at_16_khz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbotalk_core.audio.io.MAX_SAMPLES", 15_999)
    _write(tmp_path / "a.wav", "pcm_s16le", "s16", sample_rate=4_000, layout="mono")
    with pytest.raises(AudioError, match="4000 a second in 1 channels"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("sample_rate", [384_001, 2**31 - 1])
def test_a_rate_that_no_recorder_has_is_refused(tmp_path: Path, sample_rate: int) -> None:
    data = bytearray(_wav_bytes(b"\1\0" * 640, code=1, bits=16))
    data[24:28] = struct.pack("<I", sample_rate)
    (tmp_path / "a.wav").write_bytes(data)
    for read in (read_audio, open_sound):
        with pytest.raises(AudioError, match=f"{sample_rate} Hz|cannot be decoded"):
            read(tmp_path / "a.wav")
    with pytest.raises(AudioError, match=f"{sample_rate} Hz"):
        from_samples(torch.zeros(10), sample_rate)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "pcm_s16le"), ("a.mov", "pcm_s16le")])
def test_sound_that_begins_late_says_so(tmp_path: Path, name: str, codec: str) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16_000, layout="mono")
        _write_picture(container)
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1152), dtype=np.int16), format="s16", layout="mono"
            )
            frame.sample_rate, frame.pts = 16_000, 8_000 + 1152 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        pictures = container.streams.video[0]
        picture = next(container.decode(pictures))
        assert picture.pts is not None
        assert picture.time_base is not None
        first_picture = float(picture.pts * picture.time_base)
    assert float(open_sound(path).first_second) - first_picture == pytest.approx(0.5, abs=2e-3)


def test_a_title_that_is_not_utf_8_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", metadata_encoding="latin-1") as container:
        container.metadata["title"] = "Ein Gespräch"
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.ones((1, 640), dtype=np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert b"Gespr\xe4ch" in path.read_bytes()
    assert read_audio(path).samples_CS.shape == (1, 640)


def test_a_silent_film_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        _write_picture(container)
    with pytest.raises(AudioError, match="no audio stream"):
        read_audio(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "path",
    ["missing.wav", "https://127.0.0.1:9/a.wav", ".", "", "a\0b.wav", "a" * 300, "/dev/zero"],
)
def test_what_is_no_local_file_is_refused(path: str) -> None:
    with pytest.raises(AudioError, match="no audio file at"):
        read_audio(path)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (torch.tensor([0.5, -0.25]), [[0.5, -0.25]]),
        (torch.tensor([[0.5], [-0.25]]), [[0.5], [-0.25]]),
        (torch.tensor([[[0.5], [-0.25]]]), [[0.5], [-0.25]]),
        (torch.tensor([0.5, -0.25], dtype=torch.float64), [[0.5, -0.25]]),
        (torch.tensor([0.5, -0.25], dtype=torch.float16), [[0.5, -0.25]]),
        (torch.tensor([0.5, -0.25], dtype=torch.bfloat16), [[0.5, -0.25]]),
        (torch.tensor([0, 128, 192], dtype=torch.uint8), [[-1.0, 0.0, 0.5]]),
        (torch.tensor([-128, 64], dtype=torch.int8), [[-1.0, 0.5]]),
        (torch.tensor([-(2**15), 2**14], dtype=torch.int16), [[-1.0, 0.5]]),
        (torch.tensor([-(2**31), 2**30], dtype=torch.int32), [[-1.0, 0.5]]),
        (torch.tensor([-(2**63), 2**62], dtype=torch.int64), [[-1.0, 0.5]]),
    ],
)
def test_samples_of_any_type_become_float(
    samples: torch.Tensor, expected: list[list[float]]
) -> None:
    waveform = from_samples(samples, 22_050)
    assert waveform.samples_CS.dtype == torch.float32
    assert waveform.samples_CS.tolist() == expected
    assert waveform.sample_rate == 22_050


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(2, 1, 8), "pass a batch one by one"),
        (torch.zeros(1, 1, 1, 8), r"\(1, 1, 1, 8\)"),
        (torch.tensor(1.0), r"\(\)"),
        (torch.zeros(8, dtype=torch.bool), "bool"),
        (torch.zeros(8, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 0), "no samples"),
        (torch.tensor([0.0, math.nan]), "NaN"),
    ],
)
def test_samples_that_are_no_single_sound_are_refused(samples: torch.Tensor, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        from_samples(samples, 16_000)


@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "sample_rate", "layout"),
    [
        ("a.wav", "pcm_s16le", "s16", 8_000, "mono"),
        ("a.wav", "pcm_f32le", "flt", 96_000, "5.1"),
        ("a.flac", "flac", "s16", 22_050, "stereo"),
        ("a.mp3", "libmp3lame", "fltp", 44_100, "stereo"),
        ("a.m4a", "aac", "fltp", 48_000, "5.1"),
        ("a.mp4", "aac", "fltp", 44_100, "mono"),
        ("a.opus", "libopus", "flt", 48_000, "stereo"),
    ],
)
def test_a_sound_on_disk_is_the_same_read_in_blocks_from_anywhere(
    tmp_path: Path, name: str, codec: str, sample_format: str, sample_rate: int, layout: str
) -> None:
    path = tmp_path / name
    _write(path, codec, sample_format, sample_rate, layout, seconds=2.3)
    whole, sound = read_audio(path), open_sound(path)
    assert (sound.num_samples, sound.num_channels) == whole.samples_CS.shape[::-1]
    assert (sound.sample_rate, sound.num_frames) == (sample_rate, whole.num_frames)
    assert torch.equal(to_waveform(sound).samples_CS, whole.samples_CS)
    last = sound.num_samples
    for start in (1, 1_023, 1_024, sample_rate, sample_rate + 7, last - 1, last, last + 9):
        blocks = [torch.zeros(sound.num_channels, 0), *sound.blocks(start)]
        assert torch.equal(torch.cat(blocks, dim=1), whole.samples_CS[:, start:])
    assert max(block_CS.shape[1] for block_CS in sound.blocks()) < 1.2 * sample_rate


def test_a_variable_rate_mp3_is_as_long_as_what_was_spoken(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    spoken = _write(path, "libmp3lame", "fltp", 44_100, "mono", seconds=3.7, quality=7)
    assert b"Xing" in path.read_bytes()[:2_000]  # and not Info, the mark of a constant rate
    assert open_sound(path).num_samples == spoken.shape[1]


def test_the_sound_of_a_video_that_begins_late_is_all_there(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    spoken = _write(path, "aac", "fltp", 48_000, "mono", seconds=1.0, delay=24_000)
    heard = open_sound(path)
    assert heard.first_second >= Fraction(2, 5)
    # AAC ends on a whole block, and a late start hides the one that it begins with
    num_spoken = heard.num_samples - heard.num_silent
    assert spoken.shape[1] <= num_spoken < spoken.shape[1] + 2 * 1_024
    assert count_frames(num_spoken, heard.sample_rate) == 25


@given(st.integers(1, 30_000), st.integers(1, 200))
def test_what_follows_the_end_is_not_asked_for(
    tmp_path_factory: pytest.TempPathFactory, num_samples: int, hundredths: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.wav"
    path.write_bytes(_wav_bytes(b"\1\0" * num_samples, code=1, bits=16))
    sound = open_sound(path, Fraction(hundredths, 100))
    assert sound.num_samples == min(num_samples, 160 * hundredths)
    assert to_waveform(sound).num_samples == sound.num_samples


def test_only_what_is_needed_has_to_be_sound(tmp_path: Path) -> None:
    good = struct.pack("<f", 0.5) * 48_000
    (tmp_path / "a.wav").write_bytes(
        _wav_bytes(good + struct.pack("<f", math.nan) * 48_000, code=3, bits=32)
    )
    assert open_sound(tmp_path / "a.wav", Fraction(2)).num_samples == 32_000
    with pytest.raises(AudioError, match="NaN"):
        open_sound(tmp_path / "a.wav")


@pytest.mark.parametrize("num_samples", [640, 6_400])
def test_a_file_that_changes_while_it_is_in_use_is_refused(
    tmp_path: Path, num_samples: int
) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(_wav_bytes(b"\1\0" * 3_200, code=1, bits=16))
    sound = open_sound(path)
    channels = 1 if num_samples < 3_200 else 2
    path.write_bytes(_wav_bytes(b"\1\0" * num_samples, code=1, bits=16, channels=channels))
    with pytest.raises(AudioError, match="changed while it was in use"):
        to_waveform(sound)
    path.unlink()
    with pytest.raises(AudioError, match="no audio file"):
        to_waveform(sound)
