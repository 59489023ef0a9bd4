"""Videos of every rate decode to the frames that are visible 25 times a second."""

import struct
import tracemalloc
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
import torch
from av import VideoStream
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.errors import ImageError
from turbotalk_core.geometry import FPS, MAX_FRAMES
from turbotalk_core.video.reader import VideoFrames
from turbotalk_core.video.writer import Encoding, open_video

TICKS = 12_800  # per second, of the files made here: 512 at 25 frames per second


def _make(
    target: Path | BytesIO,
    times: list[int],
    *,
    codec: str = "libx264",
    container: str | None = None,
    gap: int = 512,
) -> None:
    """Write a video whose n-th frame has grey level 4 n, to n = 63, and starts at times[n]."""
    file = target if isinstance(target, BytesIO) else str(target)
    with av.open(file, "w", format=container) as opened:
        stream = cast(VideoStream, opened.add_stream(codec, rate=Fraction(TICKS, gap)))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        stream.codec_context.gop_size = 7
        for number, pts in enumerate(times):
            pixels = np.full((32, 48, 3), 4 * min(number, 63), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base, frame.duration = pts, Fraction(1, TICKS), gap
            opened.mux(stream.encode(frame))
        opened.mux(stream.encode(None))


def _number(picture_HWC: torch.Tensor) -> int:
    return round(picture_HWC.mean().item() * 255 / 4)


def _numbers(frames: VideoFrames) -> list[int]:
    return [_number(picture_HWC) for picture_HWC in frames]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts"])
def test_our_own_rate_gives_frame_for_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"talk.{suffix}"
    _make(path, [512 * number for number in range(30)])
    frames = VideoFrames(path)
    assert len(frames) == 30
    assert _numbers(frames) == list(range(30))
    picture_HWC = frames[3]
    assert picture_HWC.shape == (32, 48, 3)
    assert picture_HWC.dtype == torch.float32


@pytest.mark.parametrize("fps", [Fraction(10), Fraction(24), Fraction(30), Fraction(60)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_another_rate_gives_what_is_on_the_screen(
    tmp_path: Path, fps: Fraction, suffix: str
) -> None:
    path = tmp_path / f"talk.{suffix}"
    num_frames = 48
    times = [round(number * TICKS / fps) for number in range(num_frames)]
    _make(path, times, gap=round(TICKS / fps))
    frames = VideoFrames(path)
    assert len(frames) == int(num_frames * FPS / fps)
    expected = [int(index * fps / FPS) for index in range(len(frames))]
    assert _numbers(frames) == expected
    assert len(VideoFrames(path, every_frame=True)) == num_frames


@pytest.mark.slow
@given(gaps=st.lists(st.integers(100, 3_000), min_size=1, max_size=30), delay=st.integers(0, 5_000))
def test_a_variable_rate_is_followed(gaps: list[int], delay: int) -> None:
    file = BytesIO()
    times = np.cumsum([0, *gaps]).tolist()
    _make(file, [delay + time for time in times], container="mp4")
    frames = VideoFrames(file)
    seconds = Fraction(times[-1] + 512, TICKS) + Fraction(1, 1000)  # durations may be rounded
    assert len(frames) == max(1, int(seconds * FPS))
    expected = [
        max(number for number, time in enumerate(times) if time <= 512 * index)
        for index in range(len(frames))
    ]
    assert _numbers(frames) == expected
    every = VideoFrames(file, every_frame=True)
    assert _numbers(every) == list(range(len(times)))


def test_any_order_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "talk.mp4"
    _make(path, [512 * number for number in range(20)])
    frames = VideoFrames(path)
    assert [_number(frames[index]) for index in (17, 0, 9, -1, -20)] == [17, 0, 9, 19, 0]
    for index in (20, -21):
        with pytest.raises(IndexError):
            frames[index]


def test_a_picture_asked_for_again_is_not_decoded_again(tmp_path: Path) -> None:
    path = tmp_path / "talk.mp4"
    _make(path, [1280 * number for number in range(8)], gap=1280)  # 10 frames per second
    frames = VideoFrames(path)
    picture_HWC = frames[5]
    path.unlink()
    assert frames[5] is picture_HWC
    assert frames[7] is picture_HWC  # on the screen from 0.2 s to 0.3 s
    with pytest.raises(ImageError, match="no video at"):
        frames[8]


def test_a_file_that_cannot_seek_is_read_from_its_start() -> None:
    file = BytesIO()
    _make(file, [512 * number for number in range(20)], container="mpegts")
    frames = VideoFrames(file)
    assert _numbers(frames) == list(range(20))
    assert _number(frames[18]) == 18


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_it_is_turned_as_the_file_says(quarters: int) -> None:
    file = BytesIO()
    with av.open(file, "w", format="mp4") as opened:
        stream = cast(VideoStream, opened.add_stream("mpeg4", rate=25))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        pixels = np.zeros((32, 48, 3), dtype=np.uint8)
        pixels[:16, :16] = 255  # upper left
        opened.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        opened.mux(stream.encode(None))
    # The matrix of a track header, ISO/IEC 14496-12, 8.3.2: clockwise by quarters.
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    matrix = (cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    data = bytearray(file.getvalue())
    start = data.find(b"tkhd") + 4 + 40
    data[start : start + 36] = struct.pack(">9i", *matrix)
    picture_HWC = VideoFrames(BytesIO(bytes(data)))[0]
    assert picture_HWC.shape == ((32, 48, 3) if quarters % 2 == 0 else (48, 32, 3))
    corners = [picture_HWC[row, column].mean() > 0.5 for row, column in CLOCKWISE]
    assert corners == [quarter == quarters for quarter in range(4)]


CLOCKWISE = ((3, 3), (3, -4), (-4, -4), (-4, 3))


def test_colours_are_those_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "talk.mp4"
    color = torch.tensor([200, 60, 30], dtype=torch.uint8)
    encoding = Encoding(encoder="libx264", pixel_format="yuv444p", options={"crf": "1"})
    with open_video(path, encoding) as writer:
        writer.write(color.expand(2, 32, 48, 3))
    expected = (color / 255).expand(32, 48, 3)
    torch.testing.assert_close(VideoFrames(path)[1], expected, rtol=0, atol=3 / 255)


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    path = tmp_path / "talk.mp4"
    _make(path, [512 * number for number in range(400)])
    tracemalloc.start()
    frames = VideoFrames(path)
    for index in (0, 200, 399):
        assert frames[index].shape == (32, 48, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 32 * 48 * 3  # of 400 such pictures


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no video at .*nowhere\.mp4; give the path of a local"):
        VideoFrames(tmp_path / "nowhere.mp4")
    path = tmp_path / "text.mp4"
    path.write_text("not a video")
    with pytest.raises(ImageError, match=r"cannot read a video from .*text\.mp4.*give an mp4"):
        VideoFrames(path)
    with pytest.raises(ImageError, match="cannot read a video from the video"):
        VideoFrames(BytesIO(b""))
    sound = tmp_path / "voice.wav"
    with av.open(str(sound), "w") as opened:
        stream = opened.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 640), dtype=np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 16_000
        opened.mux(stream.encode(frame))  # pyright: ignore
    with pytest.raises(ImageError, match=r"voice\.wav has sound alone"):
        VideoFrames(sound)


def test_a_title_that_is_not_utf_8_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "talk.mkv"
    with av.open(str(path), "w", metadata_encoding="latin-1") as opened:
        opened.metadata["title"] = "Ein Gespräch"
        stream = cast(VideoStream, opened.add_stream("mpeg4", rate=25))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        pixels = np.zeros((32, 48, 3), dtype=np.uint8)
        opened.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        opened.mux(stream.encode(None))
    assert b"Gespr\xe4ch" in path.read_bytes()
    assert len(VideoFrames(path)) == 1


def test_a_playlist_opens_nothing_else(tmp_path: Path) -> None:
    _make(tmp_path / "talk.ts", [0, 512])
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n%s\n#EXT-X-ENDLIST\n"
    (tmp_path / "net.m3u8").write_bytes(playlist % b"http://127.0.0.1:1/talk.ts")
    with pytest.raises(ImageError):
        VideoFrames(tmp_path / "net.m3u8")
    local = playlist % str(tmp_path / "talk.ts").encode()
    with pytest.raises(ImageError):
        VideoFrames(BytesIO(local))


def test_a_list_of_other_files_opens_none_of_them(tmp_path: Path) -> None:
    _make(tmp_path / "talk.ts", [512 * number for number in range(20)])
    assert len(VideoFrames(tmp_path / "talk.ts")) == 20
    for name, content in (
        ("list.mp4", "ffconcat version 1.0\nfile talk.ts\n"),
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ntalk.ts\n#EXT-X-ENDLIST\n"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ImageError):
            VideoFrames(tmp_path / name)


def test_a_film_of_years_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "talk.mkv"
    _make(path, [0, 512 * (MAX_FRAMES - 2)])
    assert len(VideoFrames(path)) == MAX_FRAMES - 1
    _make(path, [0, 512 * 2 * MAX_FRAMES])
    with pytest.raises(ImageError, match="claims to last 800000 s; at most 400000 s"):
        VideoFrames(path)


def test_frames_larger_than_any_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in ("mp4", "mkv", "ts"):
        path = tmp_path / f"talk.{suffix}"
        _make(path, [512 * number for number in range(20)])  # of 48x32 pixels
        monkeypatch.setattr(
            "turbotalk_core.safe_io.media.MAX_PIXELS", 2 * 48 * 32
        )  # decoders take margins
        assert VideoFrames(path)[1].shape == (32, 48, 3)
        monkeypatch.setattr("turbotalk_core.safe_io.media.MAX_PIXELS", 48 * 32 - 1)
        with pytest.raises(ImageError, match="cannot read a video"):
            VideoFrames(path)[1]


@pytest.mark.parametrize("name", ["a\0b.mp4", "a" * 300])
def test_a_name_that_cannot_be_is_no_video(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="no video at"):
        VideoFrames(tmp_path / name)


def test_damage_is_told_or_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "talk.ts"
    _make(path, [512 * number for number in range(20)])
    frames = VideoFrames(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    assert _number(frames[19]) < 19
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="talk"):
        frames[0]


@pytest.mark.parametrize("span", [(0, 30), (0, 1), (4, 5), (11, 26), (29, 30), (7, 7)])
@pytest.mark.parametrize("fps", [Fraction(10), Fraction(25), Fraction(60)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_playing_gives_the_same_pictures(
    tmp_path: Path, suffix: str, fps: Fraction, span: tuple[int, int]
) -> None:
    path = tmp_path / f"talk.{suffix}"
    num_frames = int(30 * fps / FPS)
    times = [round(number * TICKS / fps) for number in range(num_frames)]
    _make(path, times, gap=round(TICKS / fps))
    frames = VideoFrames(path)
    played = [_number(picture) for picture in frames.play(*span)]
    assert played == [_number(frames[index]) for index in range(*span)]


def test_playing_what_is_gone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "talk.ts"
    _make(path, [512 * number for number in range(20)])
    frames = VideoFrames(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="talk"):
        next(frames.play(0, 20))


def test_the_first_picture_need_not_be_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "talk.mkv"
    _make(path, [6400 + 512 * number for number in range(3)])
    frames = VideoFrames(path)
    assert frames.first_second == Fraction(1, 2)
    assert [_number(picture) for picture in frames.play(0, 3)] == [0, 1, 2]
