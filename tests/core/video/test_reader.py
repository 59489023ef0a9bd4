"""Videos of every rate decode to the frames that are visible 25 times a second."""

import struct
import tracemalloc
from collections.abc import Iterable, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
import torch
from av import AudioStream, VideoStream
from av.stream import Disposition
from hypothesis import given
from hypothesis import strategies as st

from tests.family import UPRIGHT
from turbotalk_core.errors import ImageError
from turbotalk_core.geometry import FPS, MAX_FRAMES
from turbotalk_core.hdr import HLG, PQ, tone_map
from turbotalk_core.video.reader import VideoFrames
from turbotalk_core.video.writer import Encoding, open_video

from ...heif import box, make_photo, make_tiled_photo

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


# The rows and columns of the stored picture in the one that is shown, by EXIF orientation:
# (a, b, c, d) of the matrix of a track header, ISO/IEC 14496-12, 8.3.2.
ORIENTATIONS = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def _corners() -> np.ndarray:
    """Return a picture with a white and a grey corner, which all orientations tell apart."""
    pixels_HWC = np.zeros((32, 48, 3), dtype=np.uint8)
    pixels_HWC[:16, :16] = 255
    pixels_HWC[:16, 32:] = 128
    return pixels_HWC


def _write(
    pixels_HWC: np.ndarray,
    *,
    container: str = "mp4",
    codec: str = "mpeg4",
    layout: str = "yuv420p",
    num_frames: int = 3,
    **context: object,
) -> bytes:
    """Return a video of frames that all show one picture.

    Args:
        pixels_HWC: RGB or RGBA picture.
        container: FFmpeg's name of the container.
        codec: FFmpeg's name of the encoder.
        layout: FFmpeg's name of the pixel format.
        num_frames: number of frames.
        **context: attributes of the encoder, such as sample_aspect_ratio.
    """
    file = BytesIO()
    with av.open(file, "w", format=container) as opened:
        # VP8 refuses transparency with its frames that are never shown.
        options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
        stream = cast(VideoStream, opened.add_stream(codec, rate=25, options=options))
        stream.height, stream.width = pixels_HWC.shape[:2]
        stream.pix_fmt = layout
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for _ in range(num_frames):
            channels = "rgba" if pixels_HWC.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(pixels_HWC, format=channels)
            opened.mux(stream.encode(frame))
        opened.mux(stream.encode(None))
    return file.getvalue()


def _turn(video: bytes, numbers: tuple[float, ...]) -> BytesIO:
    """Return a video with the entries (a, b, c, d) of its matrix replaced."""
    a, b, c, d = (round(number * 65536) for number in numbers)
    start = video.find(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return BytesIO(video[:start] + matrix + video[start + 36 :])


@pytest.mark.parametrize("container", ["mp4", "mov"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_it_is_turned_and_mirrored_as_the_file_says(container: str, orientation: int) -> None:
    stored = _corners()
    transposes, flipped = UPRIGHT[orientation]
    expected = np.flip(stored.transpose(1, 0, 2) if transposes else stored, flipped)
    frames = VideoFrames(_turn(_write(stored, container=container), ORIENTATIONS[orientation]))
    shown = frames[0].numpy() * 255
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < 8
    assert torch.equal(next(frames.play(0, 1)), frames[0])


@pytest.mark.parametrize("numbers", [(0, 0, 0, 0), (1, 0, 0, 0), (0.5, 0, 0, 0.5)])
def test_a_matrix_that_turns_nothing_is_harmless(numbers: tuple[float, ...]) -> None:
    shown = VideoFrames(_turn(_write(_corners()), numbers))[0].numpy() * 255
    expected = _corners()
    assert shown[8, 8, 0] > 240
    assert shown[24].max() < 20
    assert shown.shape[0] * shown.shape[1] >= expected.shape[0] * expected.shape[1]


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "mpeg4"), ("mov", "libx264"), ("matroska", "libx264")]
)
@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(4, 3), (32, 64)), (Fraction(1, 2), (64, 48))]
)
def test_pixels_that_are_not_square_are_shown_in_shape(
    container: str, codec: str, aspect: Fraction, size: tuple[int, int]
) -> None:
    video = _write(_corners(), container=container, codec=codec, sample_aspect_ratio=aspect)
    frames = VideoFrames(BytesIO(video))
    assert frames[0].shape == (*size, 3)
    assert [picture_HWC.shape for picture_HWC in frames.play(0, 2)] == [(*size, 3)] * 2


def test_a_turned_video_is_stretched_before_it_is_turned() -> None:
    video = _write(_corners(), sample_aspect_ratio=Fraction(4, 3))
    assert VideoFrames(_turn(video, ORIENTATIONS[6]))[0].shape == (64, 32, 3)


def _with_aspect(wide: int, high: int) -> BytesIO:
    """Return a video whose header states any shape of pixels, also one that no encoder writes."""
    video = _write(_corners(), codec="mjpeg", layout="yuvj420p", sample_aspect_ratio=Fraction(4, 3))
    start = video.find(b"pasp") + 4
    return BytesIO(video[:start] + struct.pack(">II", wide, high) + video[start + 8 :])


@pytest.mark.parametrize(("wide", "high"), [(0, 0), (1, 1), (7, 7)])
def test_square_pixels_stay(wide: int, high: int) -> None:
    assert VideoFrames(BytesIO(_write(_corners())))[0].shape == (32, 48, 3)
    assert VideoFrames(_with_aspect(wide, high))[0].shape[0] == 32


@pytest.mark.parametrize(("wide", "high"), [(1000, 1), (1, 1000), (2**30, 1), (9, 1)])
def test_an_absurd_shape_of_pixels_is_refused(wide: int, high: int) -> None:
    with pytest.raises(ImageError, match="times as wide as high; at most 8 are allowed"):
        VideoFrames(_with_aspect(wide, high))


def test_a_stretched_frame_counts_all_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbotalk_core.video.reader.MAX_PIXELS", 32 * 96)
    assert VideoFrames(_with_aspect(2, 1))[0].shape == (32, 96, 3)
    with pytest.raises(ImageError, match=r"48x32 pixels, each 2\.5 times as wide"):
        VideoFrames(_with_aspect(5, 2))


@pytest.mark.parametrize(
    ("layout", "height", "rate", "aspect"),
    [
        ("yuv420p", 576, Fraction(25), Fraction(64, 45)),
        ("yuv411p", 480, Fraction(30_000, 1001), Fraction(32, 27)),
    ],
)
def test_wide_dv_is_shown_in_shape(
    layout: str, height: int, rate: Fraction, aspect: Fraction
) -> None:
    file = BytesIO()
    with av.open(file, "w", format="avi") as opened:
        stream = cast(VideoStream, opened.add_stream("dvvideo", rate=rate))
        stream.width, stream.height, stream.pix_fmt = 720, height, layout
        stream.codec_context.sample_aspect_ratio = aspect
        pixels_HWC = np.full((height, 720, 3), 90, dtype=np.uint8)
        opened.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC)))
        opened.mux(stream.encode(None))
    shown = VideoFrames(file)[0]
    assert shown.shape[0] == height
    assert shown.shape[1] / height == pytest.approx(16 / 9, rel=0.05)


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


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("mov", "libx264")],
)
@pytest.mark.parametrize("matrix", [1, 5, 9])  # ISO/IEC 23091-2 table 4
@pytest.mark.parametrize("color_range", [1, 2])  # limited, full
def test_colours_are_those_that_the_file_states(
    container: str, codec: str, matrix: int, color_range: int
) -> None:
    color = (200, 30, 10)
    of_red, of_blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    luma = (of_red * color[0] + (1 - of_red - of_blue) * color[1] + of_blue * color[2]) / 255
    blue, red = (
        (color[2] / 255 - luma) / (2 - 2 * of_blue),
        (color[0] / 255 - luma) / (2 - 2 * of_red),
    )
    is_full = color_range == 2
    levels = [255 * luma if is_full else 16 + 219 * luma]
    levels += [128 + (255 if is_full else 224) * chroma for chroma in (blue, red)]
    file = BytesIO()
    with av.open(file, "w", format=container) as opened:
        options = {"libvpx-vp9": {"lossless": "1"}, "libx264": {"crf": "0"}}[codec]
        stream = cast(VideoStream, opened.add_stream(codec, rate=25, options=options))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
        frame = av.VideoFrame(48, 32, "yuv420p")
        for plane, level in zip(frame.planes, levels, strict=True):
            plane.update(bytes([round(level)]) * plane.buffer_size)
        frame.colorspace, frame.color_range = matrix, color_range
        opened.mux(stream.encode(frame))
        opened.mux(stream.encode(None))
    expected = (torch.tensor(color) / 255).expand(32, 48, 3)
    torch.testing.assert_close(VideoFrames(file)[0], expected, rtol=0, atol=4 / 255)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_is_shown_in_standard_range(transfer: int) -> None:
    grey = np.full((32, 48, 3), 130, dtype=np.uint8)
    video = _write(
        grey,
        codec="libx264",
        layout="yuv420p10le",
        color_trc=transfer,
        color_primaries=9,
        colorspace=9,
        color_range=1,
    )
    expected = tone_map(torch.full((32, 48, 3), 130 / 255), transfer)
    torch.testing.assert_close(VideoFrames(BytesIO(video))[0], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("container", "codec", "layout"),
    [
        ("webm", "libvpx-vp9", "yuva420p"),
        ("webm", "libvpx", "yuva420p"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("mov", "qtrle", "argb"),
        ("mov", "png", "rgba"),
        ("matroska", "ffv1", "bgra"),
    ],
)
def test_what_is_transparent_is_on_white(container: str, codec: str, layout: str) -> None:
    pixels_HWC = np.zeros((32, 48, 4), dtype=np.uint8)
    pixels_HWC[:, :24] = (200, 60, 30, 255)
    video = _write(pixels_HWC, container=container, codec=codec, layout=layout)
    frames = VideoFrames(BytesIO(video))
    for picture_HWC in (*frames.play(0, 3), frames[1]):
        assert picture_HWC.shape == (32, 48, 3)
        assert picture_HWC[:, 32:].min() > 0.97
        opaque = picture_HWC[16, 8] * 255
        torch.testing.assert_close(opaque, torch.tensor([200.0, 60, 30]), rtol=0, atol=14)


def _write_reordered(container: str, codec: str = "libx264", *, first: int = 0) -> bytes:
    """Return a video of 50 frames that are stored in another order than shown.

    The n-th has grey level 4 n in its lower part, and is shown n + first frames after the start.
    """
    file = BytesIO()
    with av.open(file, "w", format=container) as opened:
        options = {"x264-params": "bframes=3:b-adapt=0:b-pyramid=normal:keyint=20:scenecut=0"}
        options = options if codec == "libx264" else {"bf": "2", "g": "12"}
        stream = cast(VideoStream, opened.add_stream(codec, rate=25, options=options))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(50):
            pixels_HWC = np.full((32, 48, 3), 4 * number, dtype=np.uint8)
            pixels_HWC[:4, number % 40 : number % 40 + 8] = 255
            frame = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
            frame.pts, frame.time_base = first + number, Fraction(1, 25)
            opened.mux(stream.encode(frame))
        opened.mux(stream.encode(None))
    return file.getvalue()


def _levels(pictures: Iterable[torch.Tensor]) -> list[int]:
    return [round(picture_HWC[16:].mean().item() * 255 / 4) for picture_HWC in pictures]


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("avi", "libx264"),
        ("avi", "mpeg4"),
        ("asf", "libx264"),
        ("flv", "libx264"),
        ("mov", "libx264"),
        ("mpegts", "libx264"),
        ("mpeg", "mpeg2video"),
        ("matroska", "libx264"),
    ],
)
def test_frames_are_in_the_order_in_which_they_are_shown(container: str, codec: str) -> None:
    frames = VideoFrames(BytesIO(_write_reordered(container, codec)))
    assert len(frames) == 50
    assert _levels(frames.play(0, 50)) == list(range(50))
    chosen = (0, 1, 7, 23, 24, 49)
    assert _levels(frames[index] for index in chosen) == list(chosen)
    assert _levels(frames.play(17, 33)) == list(range(17, 33))


@pytest.mark.parametrize("first", [-7, 12])
@pytest.mark.parametrize("container", ["mov", "matroska", "mpegts"])
def test_times_may_begin_anywhere(container: str, first: int) -> None:
    frames = VideoFrames(BytesIO(_write_reordered(container, first=first)))
    played = _levels(frames.play(0, len(frames)))
    assert played == [_levels([frames[index]])[0] for index in range(len(frames))]
    assert played[-1] == 49
    assert played == list(range(50 - len(frames), 50))


def test_an_edit_list_that_skips_frames_is_followed() -> None:
    video = _write_reordered("mp4")
    # ISO/IEC 14496-12, 8.6.6: version, number of entries, and of each its length and its start.
    start = video.find(b"elst") + 4
    num_entries, _, begin = struct.unpack_from(">IIi", video, start + 4)
    assert num_entries == 1
    (ticks_per_second,) = struct.unpack_from(">I", video, video.find(b"mdhd") + 16)
    later = struct.pack(">i", begin + 7 * ticks_per_second // 25)
    frames = VideoFrames(BytesIO(video[: start + 12] + later + video[start + 16 :]))
    played = _levels(frames.play(0, len(frames)))
    assert played == _levels(frames[index] for index in range(len(frames)))
    assert played[:5] == [7, 8, 9, 10, 11]


def test_the_clock_of_a_transport_stream_may_wrap() -> None:
    # Its times have 33 bits, at 90 kHz: they wrap after 26.5 hours, here after about a second.
    first = 2**33 * 25 // 90_000 - 60
    frames = VideoFrames(BytesIO(_write_reordered("mpegts", first=first)))
    assert _levels(frames.play(0, 50)) == list(range(50))
    assert _levels(frames[index] for index in range(0, 50, 7)) == list(range(0, 50, 7))


def _write_streams(container: str, defaults: Sequence[bool]) -> BytesIO:
    """Return a video of several streams, with grey levels 0, 60, 120; and which are default."""
    file = BytesIO()
    with av.open(file, "w", format=container) as opened:
        for is_default in defaults:
            stream = cast(VideoStream, opened.add_stream("mpeg4", rate=25))
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            stream.disposition = Disposition.default.value if is_default else 0  # pyright: ignore
        for number, stream in enumerate(opened.streams.video):
            pixels_HWC = np.full((32, 48, 3), 60 * number, dtype=np.uint8)
            for _ in range(3):
                opened.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC)))
            opened.mux(stream.encode(None))
    return file


@pytest.mark.parametrize("container", ["matroska", "mp4"])
@pytest.mark.parametrize(
    ("defaults", "shown"),
    [((True, False), 0), ((False, True), 1), ((True, True), 0), ((False, False, True), 2)],
)
def test_of_several_videos_the_default_is_shown(
    container: str, defaults: Sequence[bool], shown: int
) -> None:
    frames = VideoFrames(_write_streams(container, defaults))
    assert round(frames[1].mean().item() * 255 / 60) == shown
    assert round(next(frames.play(1, 2)).mean().item() * 255 / 60) == shown


def test_a_cover_is_no_video() -> None:
    file = BytesIO()
    with av.open(file, "w", format="mp4") as opened:
        cover = cast(VideoStream, opened.add_stream("mjpeg", rate=1))
        cover.width, cover.height, cover.pix_fmt = 48, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic.value  # pyright: ignore
        sound = cast(AudioStream, opened.add_stream("aac", rate=16_000, layout="mono"))
        opened.mux(cover.encode(av.VideoFrame.from_ndarray(_corners())))
        opened.mux(cover.encode(None))
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate, silence.pts = 16_000, 0
        opened.mux(sound.encode(silence))
        opened.mux(sound.encode(None))
    file.seek(0)
    with av.open(file) as opened:
        assert opened.streams.video[0].disposition & Disposition.attached_pic
    with pytest.raises(ImageError, match="has sound alone"):
        VideoFrames(file)


@pytest.mark.parametrize(("codec", "layout"), [("mjpeg", "yuvj420p"), ("png", "rgb24")])
def test_a_still_picture_in_a_video_is_a_video(codec: str, layout: str) -> None:
    video = _write(_corners(), codec=codec, layout=layout, num_frames=1)
    frames = VideoFrames(BytesIO(video))
    assert len(frames) == 1
    assert np.abs(frames[0].numpy() * 255 - _corners()).mean() < 8


@pytest.mark.parametrize(
    ("container", "name"), [("matroska", b"V_MPEG4/ISO/ASP"), ("avi", b"FMP4")]
)
def test_a_codec_that_nobody_knows_is_refused(container: str, name: bytes) -> None:
    video = _write(_corners(), container=container).replace(name, b"X" * len(name))
    with pytest.raises(ImageError, match=r"cannot be decoded; export it as H\.264"):
        VideoFrames(BytesIO(video))


def test_of_two_videos_the_one_that_can_be_decoded_is_shown() -> None:
    file = _write_streams("matroska", (True, True))
    name = b"V_MPEG4/ISO/ASP"
    video = file.getvalue().replace(name, b"X" * len(name), 1)
    assert round(VideoFrames(BytesIO(video))[1].mean().item() * 255) == 60


@pytest.mark.parametrize("has_thumbnail", [False, True])
def test_a_photo_of_one_picture_is_read(has_thumbnail: bool) -> None:
    photo = make_photo(_corners(), has_thumbnail=has_thumbnail)
    shown = VideoFrames(BytesIO(photo))[0].numpy() * 255
    assert shown.shape == (32, 48, 3)
    assert np.abs(shown - _corners()).mean() < 4


def test_a_photo_is_turned() -> None:
    photo = make_photo(_corners(), box(b"irot", b"\1"))  # a quarter anticlockwise
    shown = VideoFrames(BytesIO(photo))[0].numpy() * 255
    assert np.abs(shown - np.rot90(_corners())).mean() < 4


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg", "photo.mp4", "photo"])
@pytest.mark.parametrize("num_tiles", [1, 6])
def test_of_a_photo_in_tiles_none_is_shown(tmp_path: Path, name: str, num_tiles: int) -> None:
    path = tmp_path / name
    path.write_bytes(make_tiled_photo(num_tiles))
    with pytest.raises(ImageError, match=r"photo in tiles .*convert it to JPEG or PNG"):
        VideoFrames(path)
