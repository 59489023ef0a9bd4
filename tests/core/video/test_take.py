"""Takes: exact bytes, exact samples, and nothing half-written."""

import json
import os
import shutil

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.errors import ChunkError, OutputError
from turbotalk_core.types import Waveform
from turbotalk_core.video.take import Take, new_take
from turbotalk_core.video.writer import LOSSLESS, Encoding, open_video

SOUND = Waveform(samples_CS=torch.randn(2, 9_000), sample_rate=22_050)


def noise(num_frames, height=34, width=50):
    return torch.randint(0, 256, (num_frames, height, width, 3), dtype=torch.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("takes") / "one"
    chunks = [noise(21), noise(8), noise(1)]
    with new_take(folder, SOUND) as writer:
        for chunk in chunks:
            writer.write(chunk)
    return folder, torch.cat(chunks)


def test_reading_back_is_exact(made):
    folder, frames = made
    take = Take.open(folder)
    assert (take.num_frames, take.height, take.width) == (30, 34, 50)
    assert torch.equal(take.read(), frames)
    assert torch.equal(torch.cat(list(take.iterate())), frames)


@given(st.data())
def test_any_range_reads_as_a_slice(made, data):
    folder, frames = made
    start = data.draw(st.integers(0, 29))
    stop = data.draw(st.integers(start + 1, 30))
    assert torch.equal(Take.open(folder).read(start, stop), frames[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 31), (5, 5), (7, 6)])
def test_frames_it_does_not_have(made, start, stop):
    with pytest.raises(ChunkError, match=rf"\[{start}, {stop}\).*\[0, 30\)"):
        Take.open(made[0]).read(start, stop)


@pytest.mark.parametrize(
    ("num_channels", "num_samples", "sample_rate"),
    [(1, 1, 8_000), (2, 96_001, 48_000), (7, 50, 11)],
)
def test_the_sound_is_exact(tmp_path, num_channels, num_samples, sample_rate):
    sound = Waveform(samples_CS=3 * torch.randn(num_channels, num_samples), sample_rate=sample_rate)
    with new_take(tmp_path / "take", sound) as writer:
        writer.write(noise(1))
    again = Take.open(tmp_path / "take").read_waveform()
    assert again.sample_rate == sample_rate
    assert torch.equal(again.samples_CS, sound.samples_CS)


def test_finished_chunks_can_be_read_while_the_next_is_made(tmp_path):
    first = noise(5)
    with new_take(tmp_path / "take", SOUND) as writer:
        writer.write(first)
        assert torch.equal(Take.open(tmp_path / "take").read(), first)
        writer.write(noise(5))
    assert not list((tmp_path / "take").glob(".*"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_is_raised_leaves_nothing(tmp_path, error):
    def run():
        with new_take(tmp_path / "take", SOUND) as writer:
            writer.write(noise(5))
            raise error

    with pytest.raises(error):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, small_files_only):
    def run():
        small = Waveform(samples_CS=torch.zeros(1, 100), sample_rate=8_000)
        with new_take(tmp_path / "take", small) as writer:
            writer.write(noise(1))
            writer.write(noise(50))

    with pytest.raises(OutputError, match=r"File too large.*chunk_00001\.mkv"):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="File exists"), new_take(tmp_path, SOUND):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_that_is_no_take(tmp_path):
    with pytest.raises(OutputError, match=r"No such file.*take\.json"):
        Take.open(tmp_path)


def test_a_damaged_take(made, tmp_path):
    folder, _ = made
    (tmp_path / "take.json").write_text('{"version": 1, "height": 3}')
    with pytest.raises(OutputError, match=r"take\.json is damaged.*width"):
        Take.open(tmp_path)
    text = (folder / "take.json").read_text()
    (tmp_path / "take.json").write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(OutputError, match=r"version 99.*version 1"):
        Take.open(tmp_path)
    (tmp_path / "take.json").write_text(text)
    with pytest.raises(OutputError, match=r"sound\.mka is missing"):
        Take.open(tmp_path)
    (tmp_path / "sound.mka").touch()
    for chunk in ("chunk_00000.mkv", "chunk_00001.mkv", "chunk_00002.mkv"):
        (tmp_path / chunk).write_bytes((folder / chunk).read_bytes()[:3_000])
    with pytest.raises(OutputError, match=r"make the take again|Invalid data"):
        Take.open(tmp_path).read()


GOOD = {"version": 1, "height": 34, "width": 50}


def describe(folder, text_or_data):
    text = text_or_data if isinstance(text_or_data, str) else json.dumps(text_or_data)
    (folder / "take.json").write_text(text)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A take of the same files, to be changed."""
    return shutil.copytree(made[0], tmp_path / "copy")


@pytest.mark.parametrize(
    "name",
    ["../one/chunk_00000.mkv", "/etc/passwd", "chunk_00000.mkv/..", "..", "", "take.json",
     "sound.mka", "chunk_00000.mkv\0", "chunk_00000.MKV", "chunk_0.mkv", "CON", "C:chunk_00000.mkv",
     "..\\chunk_00000.mkv", "\u202echunk_00000.mkv", "chunk_\uff10\uff10\uff10\uff10\uff10.mkv",
     "chunk_\u0660\u0660\u0660\u0660\u0660.mkv", "x" * 5_000, "chunk_" + "0" * 300 + ".mkv", 0,
     None, ["chunk_00000.mkv"]],
)  # fmt: skip
def test_a_take_names_no_other_file(copy, name):
    describe(copy, GOOD | {"chunks": [{"file": name, "start": 0, "stop": 21}]})
    with pytest.raises(OutputError, match=r"take\.json is damaged \(at TakeChunk"):
        Take.open(copy)


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [{"file": "chunk_00000.mkv", "start": 1, "stop": 21}],
        [{"file": "chunk_00000.mkv", "start": 0, "stop": 0}],
        [{"file": "chunk_00000.mkv", "start": 0, "stop": -1}],
        [{"file": "chunk_00000.mkv", "start": 0, "stop": 21.5}],
        [{"file": "chunk_00000.mkv", "start": 0, "stop": True}],
        [{"file": "chunk_00000.mkv", "start": 0, "stop": 2**63}],
        [{"file": "chunk_00000.mkv", "start": 0, "stop": 21}] * 2,
        [{"file": "chunk_00000.mkv"}],
        [["chunk_00000.mkv", 0, 21]],
        {"file": "chunk_00000.mkv", "start": 0, "stop": 21},
        3,
    ],
)
def test_frames_that_do_not_follow_each_other_are_damage(copy, chunks):
    with pytest.raises(OutputError, match=r"take\.json is damaged"):
        Take.open(describe(copy, GOOD | {"chunks": chunks}))


@pytest.mark.parametrize(
    "size",
    [{"height": 0}, {"width": -1}, {"height": "34"}, {"height": 34.0}, {"width": None},
     {"height": 100_000, "width": 100_000}],
)  # fmt: skip
def test_a_size_that_cannot_be_is_damage(copy, size):
    chunks = [{"file": "chunk_00000.mkv", "start": 0, "stop": 21}]
    with pytest.raises(OutputError, match=r"take\.json is damaged"):
        Take.open(describe(copy, GOOD | {"chunks": chunks} | size))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "3", '{"version": 1, "version": 1}', '{"a": ' * 100_000, "NaN", "9" * 5_000],
)
def test_a_description_that_is_none_is_damage(copy, text):
    with pytest.raises(OutputError, match=r"take\.json is damaged"):
        Take.open(describe(copy, text))


def test_a_link_is_no_part_of_a_take(copy, made):
    for name in ("chunk_00001.mkv", "sound.mka"):
        (copy / name).unlink()
        (copy / name).symlink_to(made[0] / name)
        with pytest.raises(OutputError, match=rf"{name} is missing"):
            Take.open(copy)
        (copy / name).unlink()
        shutil.copy(made[0] / name, copy / name)
        assert Take.open(copy).num_frames == 30


def test_a_pipe_is_no_take(tmp_path):
    os.mkfifo(tmp_path / "take.json")
    with pytest.raises(OutputError, match=r"No such file.*take\.json"):
        Take.open(tmp_path)


def test_a_chunk_of_another_size_or_codec_is_refused(copy):
    take = Take.open(copy)
    with open_video(copy / "chunk_00001.mkv", LOSSLESS) as writer:
        writer.write(noise(8, height=36))
    with pytest.raises(OutputError, match="holds ffv1 of 50x36, the take is ffv1 of 50x34"):
        take.read()
    lossy = Encoding(encoder="libx264", pixel_format="yuv444p")
    with open_video(copy / "chunk_00001.mkv", lossy) as writer:
        writer.write(noise(8))
    with pytest.raises(OutputError, match="holds h264 of 50x34"):
        take.read()


def test_a_chunk_that_is_a_list_of_files_opens_none(copy, made):
    (copy / "chunk_00000.mkv").write_text("ffconcat version 1.0\nfile chunk_00001.mkv\n")
    with pytest.raises(OutputError, match=r"chunk_00000\.mkv"):
        Take.open(copy).read(0, 1)


def test_sound_of_another_codec_is_refused(copy):
    with av.open(str(copy / "sound.mka"), "w") as container:
        stream = container.add_stream("flac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 640), dtype=np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(OutputError, match=r"sound\.mka holds flac"):
        Take.open(copy).read_waveform()


def test_a_file_without_its_stream_is_damage(copy):
    sound, chunk = copy / "sound.mka", copy / "chunk_00000.mkv"
    pictures = chunk.read_bytes()
    chunk.write_bytes(sound.read_bytes())
    sound.write_bytes(pictures)
    for read in (Take.open(copy).read, Take.open(copy).read_waveform):
        with pytest.raises(OutputError, match="is damaged"):
            read()


def test_sound_that_unpacks_to_more_than_its_file_is_refused(made, monkeypatch):
    monkeypatch.setattr("turbotalk_core.video.take._SAMPLE_BYTES", 5)
    with pytest.raises(OutputError, match="unpacks to more than it is"):
        Take.open(made[0]).read_waveform()
