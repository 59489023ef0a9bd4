"""Assembled videos: as long as their frames, with sound, complete or absent."""

import av
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.errors import RequestError
from turbotalk_core.types import Waveform
from turbotalk_core.video.mux import FRAME_RATES, assemble, quantize_frames
from turbotalk_core.video.reader import VideoFrames
from turbotalk_core.video.writer import VideoWriter


def moving_picture(num_frames=30, height=48, width=32):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = [
        torch.stack([rows * 5 + index, columns * 3, rows + columns + 3 * index], dim=-1)
        for index in range(num_frames)
    ]
    return torch.stack(frames).clamp(0, 255).to(torch.uint8)


def noise(seconds, sample_rate=16_000):
    return Waveform(
        samples_CS=0.1 * torch.randn(1, round(seconds * sample_rate)), sample_rate=sample_rate
    )


@pytest.mark.parametrize("seconds", [0.5, 1.2, 1.21, 5.0])
@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_video_and_sound_are_equally_long(tmp_path, seconds, codec):
    path = tmp_path / "a.mp4"
    assert assemble(path, moving_picture().split(7), noise(seconds), codec=codec) == 30
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert video.frames == 30
        assert float(video.duration * video.time_base) == pytest.approx(1.2)
        assert float(sound.duration * sound.time_base) == pytest.approx(1.2, abs=0.04)
        assert container.duration / 1e6 == pytest.approx(1.2, abs=0.04)
        assert sum(1 for _ in container.decode(video)) == 30


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le", "yuv444p"])
def test_pictures_are_those_given(tmp_path, pixel_format):
    path = tmp_path / "a.mp4"
    frames = moving_picture()
    assemble(path, [frames], None, crf=4, pixel_format=pixel_format)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == pixel_format
        assert not container.streams.audio
    decoded = torch.stack(list(VideoFrames(path))) * 255
    assert (decoded - frames.float()).abs().mean() < 2.5


def test_a_higher_crf_makes_a_smaller_file(tmp_path):
    frames = [torch.randint(0, 256, (10, 64, 64, 3), dtype=torch.uint8)]
    sizes = []
    for crf in (10, 40):
        assemble(tmp_path / "a.mp4", frames, None, crf=crf)
        sizes.append((tmp_path / "a.mp4").stat().st_size)
    assert sizes[1] < sizes[0] / 2


def test_a_player_can_start_before_the_whole_file_is_there(tmp_path):
    path = tmp_path / "a.mp4"
    assemble(path, [moving_picture()], None)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_tags_are_kept(tmp_path):
    path = tmp_path / "a.mp4"
    assemble(path, [moving_picture()], None, metadata={"workflow": '{"nodes": []}'})
    with av.open(str(path)) as container:
        assert container.metadata["workflow"] == '{"nodes": []}'


def test_frames_are_taken_one_batch_at_a_time(tmp_path):
    """The second batch is asked for only when the first is in the encoder's hands."""
    alive = []

    def batches():
        for batch in moving_picture().split(10):
            alive.append(len(list(tmp_path.glob(".a.part.mp4"))))
            yield batch

    assemble(tmp_path / "a.mp4", batches(), None)
    assert alive == [1, 1, 1]


def test_an_error_of_the_frames_passes_through_and_leaves_nothing(tmp_path):
    def batches():
        yield moving_picture()
        raise FileNotFoundError("frames of my own")

    with pytest.raises(FileNotFoundError, match="frames of my own"):
        assemble(tmp_path / "a.mp4", batches(), noise(1.2))
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_dies_ends_the_work_and_leaves_nothing(tmp_path, monkeypatch):
    """In its thread; the older file stays."""
    write, asked = VideoWriter.write, []
    (tmp_path / "a.mp4").write_text("older")

    def die(self, frames_THWC):
        if self.num_frames == 10:
            raise MemoryError
        write(self, frames_THWC)

    def batches():
        for batch in moving_picture(60).split(10):
            asked.append(1)
            yield batch

    monkeypatch.setattr(VideoWriter, "write", die)
    with pytest.raises(MemoryError):
        assemble(tmp_path / "a.mp4", batches(), noise(2.4))
    assert len(asked) == 3  # the third was made while the second was lost
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_text() == "older"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "vp9"}, "vp9.*h264, h265"),
        ({"fps": "12"}, "got fps '12'; choose one of 25, 24"),
        ({"crf": 52}, "52.*0 to 51"),
        ({"crf": -1}, "-1"),
        ({"pixel_format": "rgb24"}, "rgb24.*yuv420p"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(RequestError, match=message):
        assemble(tmp_path / "a.mp4", [moving_picture()], None, **settings)
    with pytest.raises(RequestError, match=r"a\.avi.*\.mp4"):
        assemble(tmp_path / "a.avi", [moving_picture()], None)
    assert list(tmp_path.iterdir()) == []


@given(st.integers(0, 255))
def test_every_byte_survives_the_models_range(value):
    frames_BCTHW = torch.full((1, 3, 1, 2, 2), value / 127.5 - 1)
    assert (quantize_frames(frames_BCTHW) == value).all()


def test_quantizing_clips_and_orders_the_axes():
    frames_BCTHW = torch.tensor([-1.5, 0.0, 7.0]).view(1, 3, 1, 1, 1).expand(1, 3, 4, 5, 6)
    frames_THWC = quantize_frames(frames_BCTHW)
    assert frames_THWC.shape == (4, 5, 6, 3)
    assert frames_THWC[0, 0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("fps", "num_frames"), [("24", 29), ("29.97", 36), ("50", 60), ("60", 72)])
def test_another_frame_rate_shows_each_frame_at_its_time(tmp_path, fps, num_frames):
    path = tmp_path / "a.mp4"
    grey = torch.arange(30, dtype=torch.uint8).mul(8).view(-1, 1, 1, 1).expand(-1, 32, 32, 3)
    sound = noise(1.2)
    assert assemble(path, grey.split(7), sound, crf=1, fps=fps) == num_frames
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == FRAME_RATES[fps]
        seconds = [(f.time, f.to_ndarray(format="rgb24").mean()) for f in container.decode(video=0)]
    assert len(seconds) == num_frames
    for time, level in seconds:
        assert level / 8 == pytest.approx(int(time * 25 + 1e-6), abs=0.5)
    with av.open(str(path)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert samples / sound.sample_rate == pytest.approx(num_frames / FRAME_RATES[fps], abs=0.07)
