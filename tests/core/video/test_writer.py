"""Video writer: sound that AAC can and cannot contain, colours, and complete or absent files."""

import math

import av
import pytest
import torch

from tests.core.test_sound import Chopped
from turbotalk_core.errors import GeometryError, OutputError
from turbotalk_core.types import Waveform
from turbotalk_core.video.reader import VideoFrames
from turbotalk_core.video.writer import LOSSLESS, Encoding, open_video

H264 = Encoding(encoder="libx264", pixel_format="yuv420p", options={"crf": "1"})


def tone(num_channels=1, sample_rate=16_000, seconds=1.0):
    time_S = torch.arange(round(sample_rate * seconds)) / sample_rate
    wave_S = 0.5 * torch.sin(2 * math.pi * 440 * time_S)
    return Waveform(samples_CS=wave_S.repeat(num_channels, 1), sample_rate=sample_rate)


def grey(num_frames=25, height=32, width=32):
    return torch.full((num_frames, height, width, 3), 128, dtype=torch.uint8)


def write(path, *batches, encoding=H264, sound=None):
    with open_video(path, encoding, waveform=sound) as writer:
        for batch in batches:
            writer.write(batch)


def read_sound(path):
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        blocks = [torch.from_numpy(frame.to_ndarray()) for frame in container.decode(stream)]
        return torch.cat(blocks, dim=1), stream.rate


@pytest.mark.parametrize(
    ("num_channels", "sample_rate"), [(1, 8_000), (2, 44_100), (3, 48_000), (1, 96_000)]
)
def test_sound_keeps_its_rate_and_channels(tmp_path, num_channels, sample_rate, caplog):
    sound = tone(num_channels, sample_rate)
    path = tmp_path / "a.mp4"
    write(path, grey(), sound=sound)
    samples_CS, rate = read_sound(path)
    assert (rate, samples_CS.shape[0]) == (sample_rate, num_channels)
    assert not caplog.records
    # at the start the encoder fades in, at the end it holds a last block of 1024 samples
    inside = slice(2048, sample_rate - 2048)
    error = samples_CS[:, inside] - sound.samples_CS[:, inside]
    assert error.abs().mean() < 0.02


@pytest.mark.parametrize(
    ("num_channels", "sample_rate"), [(1, 8_000), (6, 96_000), (2, 44_101), (9, 16_000)]
)
@pytest.mark.parametrize("num_frames", [1, 24, 40])  # the sound is longer or shorter
def test_a_sound_that_is_read_along_makes_the_same_file(
    tmp_path, num_channels, sample_rate, num_frames
):
    sound = tone(num_channels, sample_rate)
    chopped = Chopped(sound.samples_CS, (1, 3_000, 77), sample_rate)
    batches = grey(num_frames).split(7)
    write(tmp_path / "a.mp4", *batches, sound=sound)
    write(tmp_path / "b.mp4", *batches, sound=chopped)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert chopped.starts == [0]  # once


@pytest.mark.parametrize(
    ("num_channels", "sample_rate", "fitting_channels", "fitting_rate"),
    [(1, 44_101, 1, 48_000), (1, 6_000, 1, 7_350), (2, 192_000, 2, 96_000), (9, 16_000, 1, 16_000)],
)
def test_what_aac_cannot_hold_is_converted_with_a_warning(
    tmp_path, num_channels, sample_rate, fitting_channels, fitting_rate, caplog
):
    path = tmp_path / "a.mp4"
    write(path, grey(), sound=tone(num_channels, sample_rate))
    samples_CS, rate = read_sound(path)
    assert (rate, samples_CS.shape[0]) == (fitting_rate, fitting_channels)
    time_S = torch.arange(2048, rate - 2048) / rate
    wave_S = 0.5 * torch.sin(2 * math.pi * 440 * time_S)
    assert (samples_CS[:, 2048 : rate - 2048] - wave_S).abs().mean() < 0.02
    assert f"{num_channels} channels at {sample_rate} Hz" in caplog.text


def test_colours_survive_the_conversion(tmp_path):
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [40, 90, 200], [200, 200, 30]])
    frames = colours.to(torch.uint8)[:, None, None].expand(-1, 32, 32, -1)
    path = tmp_path / "a.mp4"
    write(path, frames)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, limited
        assert (context.color_primaries, context.color_trc) == (1, 1)
    decoded = torch.stack(list(VideoFrames(path))) * 255
    assert (decoded.round().int() - frames.int()).abs().max() <= 4


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    def run():
        with open_video(tmp_path / "a.mp4", H264) as writer:
            writer.write(grey())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_older_file(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("older")
    with pytest.raises(GeometryError, match="no frames"):
        write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_text() == "older"


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 32, 32, 3), "torch.float32"),
        (torch.zeros(2, 32, 32, 4, dtype=torch.uint8), r"\(2, 32, 32, 4\)"),
        (torch.zeros(0, 32, 32, 3, dtype=torch.uint8), "at least one"),
        (torch.zeros(2, 31, 32, 3, dtype=torch.uint8), r"32x31.*even"),
    ],
)
def test_frames_that_cannot_be_written(tmp_path, frames, message):
    with pytest.raises(GeometryError, match=message):
        write(tmp_path / "a.mp4", frames)
    assert list(tmp_path.iterdir()) == []


def test_frames_of_two_sizes(tmp_path):
    with pytest.raises(GeometryError, match="48x32 after frames of 32x32"):
        write(tmp_path / "a.mkv", grey(), grey(width=48), encoding=LOSSLESS)


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "missing" / "a.mp4"
    with pytest.raises(OutputError, match=r"No such file.*missing/a\.mp4.*existing folder"):
        write(path, grey())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, small_files_only):
    noise = torch.randint(0, 256, (50, 64, 64, 3), dtype=torch.uint8)
    with pytest.raises(OutputError, match=r"File too large.*a\.mp4"):
        write(tmp_path / "a.mp4", *noise.split(10), sound=tone(seconds=2))
    assert list(tmp_path.iterdir()) == []
