"""Frames and sound of a piece are in sync, whatever the timestamps of the file."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av import AudioStream, VideoStream

from training.data.footage import cut_sound, find_videos, open_video, read_sound, show
from turbotalk_core.errors import AudioError, ImageError
from turbotalk_core.types import Waveform

from .conftest import RATE, MakeVideo, hum


def _write_shifted(path: Path, lead_frames: int, codec: str = "pcm_s16le") -> None:
    """Write a click at 0.4 s of a sound that begins a number of frames after the first frame."""
    samples = np.zeros((1, RATE), dtype=np.int16)
    samples[0, round(0.4 * RATE) :] = 20_000
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        assert isinstance(video, VideoStream)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        sound = container.add_stream(codec, rate=RATE, layout="mono")
        assert isinstance(sound, AudioStream)
        begin = max(0, -lead_frames)
        for number in range(30):
            pixels = np.full((32, 48, 3), 8 * number, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = begin + number, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        audio = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        audio.sample_rate, audio.time_base = RATE, Fraction(1, RATE)
        audio.pts = 640 * max(0, lead_frames)
        container.mux(sound.encode(audio))
        container.mux(sound.encode(None))


@pytest.mark.parametrize("lead_frames", [0, 5, -5])
def test_sound_is_heard_when_its_picture_is_shown(tmp_path: Path, lead_frames: int) -> None:
    path = tmp_path / "talk.mkv"
    _write_shifted(path, lead_frames)
    waveform = read_sound(path)
    click = int((waveform.samples_CS[0] > 0.3).nonzero()[0])
    assert click == pytest.approx((0.4 + lead_frames / 25) * RATE, abs=20)  # Matroska: 1 ms


def test_a_webm_of_another_rate_is_read_in_time(tmp_path: Path) -> None:
    path = tmp_path / "talk.webm"
    rate, count = 48_000, 60
    samples = np.zeros((1, 2 * rate), dtype=np.float32)
    samples[0, rate:] = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libvpx-vp9", rate=30)
        sound = container.add_stream("libopus", rate=rate, layout="mono")
        assert isinstance(video, VideoStream)
        assert isinstance(sound, AudioStream)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        for number in range(count):
            level = 50 if number < count // 2 else 200
            pixels = np.full((32, 48, 3), level, dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        whole = av.AudioFrame.from_ndarray(samples, format="flt", layout="mono")
        whole.sample_rate, whole.pts = rate, 0
        resampler = av.AudioResampler("flt", "mono", rate, frame_size=960)
        for audio in (*resampler.resample(whole), *resampler.resample(None)):
            container.mux(sound.encode(audio))
        container.mux(sound.encode(None))
    frames = open_video(path)
    assert len(frames) == 50
    brightness = [picture_HWC.mean().item() for picture_HWC in frames.play(0, 50)]
    assert [level > 0.5 for level in brightness] == [False] * 25 + [True] * 25
    waveform = read_sound(path)
    starts = int((waveform.samples_CS[0].abs() > 0.1).nonzero()[0]) / waveform.sample_rate
    assert starts == pytest.approx(1.0, abs=0.01)


def test_a_piece_has_the_sound_of_its_pictures() -> None:
    waveform = Waveform(samples_CS=hum(1.0)[None], sample_rate=RATE)
    piece = cut_sound(waveform, 5, 15)
    assert torch.equal(piece.samples_CS, waveform.samples_CS[:, 5 * 640 : 15 * 640])
    late = cut_sound(waveform, 20, 30)
    assert torch.equal(late.samples_CS[:, : 5 * 640], waveform.samples_CS[:, 20 * 640 :])
    assert late.samples_CS.shape == (1, 10 * 640)
    assert not late.samples_CS[:, 5 * 640 :].any()


def test_pictures_are_fitted_and_in_order(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "talk.mp4", [(10, 0.2), (10, 0.8)], size=(64, 96))
    shown = show(path, 8, 13, 32, 32)
    assert shown.shape == (3, 5, 32, 32)
    levels_T = shown[:, :, 20:].mean((0, 2, 3))
    expected_T = torch.tensor([-0.6, -0.6, 0.6, 0.6, 0.6])
    torch.testing.assert_close(levels_T, expected_T, atol=0.05, rtol=0)


def test_videos_are_found_in_sub_folders(tmp_path: Path) -> None:
    for name in ("b.MP4", "a/c.webm", "a/d.mkv", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "folder.mp4").mkdir()
    assert find_videos(tmp_path) == ["a/c.webm", "a/d.mkv", "b.MP4"]


def test_what_is_missing_is_told(tmp_path: Path, make_video: MakeVideo) -> None:
    mute = make_video(tmp_path / "mute.mp4", [(5, 0.5)], is_mute=True)
    assert len(open_video(mute)) == 5
    with pytest.raises(AudioError, match="no audio stream"):
        read_sound(mute)
    with pytest.raises(ImageError, match="no video at"):
        open_video(tmp_path / "gone.mp4")


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        ((1, 0, 0, 1), (0, 0)),
        ((-1, 0, 0, 1), (0, 1)),
        ((-1, 0, 0, -1), (1, 1)),
        ((1, 0, 0, -1), (1, 0)),
        ((0, 1, 1, 0), (0, 0)),
        ((0, 1, -1, 0), (0, 1)),
        ((0, -1, -1, 0), (1, 1)),
        ((0, -1, 1, 0), (1, 0)),
    ],
)
def test_pictures_are_turned_and_mirrored_as_a_player_shows_them(
    tmp_path: Path, orientation: tuple[int, ...], turned: tuple[int, int]
) -> None:
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        assert isinstance(video, VideoStream)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        pixels[:16, :16] = 255  # upper left
        for _ in range(3):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(video.encode(None))
    data = path.read_bytes()
    # The matrix of a track header, ISO/IEC 14496-12, 8.3.2.
    a, b, c, d = (number << 16 for number in orientation)
    start = data.find(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:start] + matrix + data[start + 36 :])
    corners = show(path, 0, 1, 32, 32)[0, 0, 8::16, 8::16] > 0
    expected = torch.zeros(2, 2, dtype=torch.bool)
    expected[turned] = True
    assert torch.equal(corners, expected)


def test_pixels_that_are_not_square_keep_their_shape(tmp_path: Path) -> None:
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        assert isinstance(video, VideoStream)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        video.codec_context.sample_aspect_ratio = Fraction(4, 3)
        pixels = np.zeros((32, 48, 3), dtype=np.uint8)
        pixels[:, 12:36] = 255  # a square, when it is shown
        for _ in range(3):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(video.encode(None))
    assert open_video(path)[0].shape == (32, 64, 3)
    assert show(path, 0, 1, 32, 32)[0, 0, 16, 2:30].min() > 0.8  # its middle is the square
