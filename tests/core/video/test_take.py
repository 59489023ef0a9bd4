"""Takes: exact bytes, exact samples, and nothing half-written."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_sound import Chopped
from turbotalk_core.audio.io import read_audio
from turbotalk_core.errors import ChunkError, OutputError
from turbotalk_core.types import Waveform
from turbotalk_core.video.take import Take, new_take

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


def test_a_sound_that_is_read_in_blocks_is_exact(tmp_path):
    sound = Chopped(3 * torch.randn(2, 70_001), (1, 3_000, 77), 48_000)
    with new_take(tmp_path / "take", sound) as writer:
        writer.write(noise(1))
    take = Take.open(tmp_path / "take")
    assert torch.equal(take.read_waveform().samples_CS, sound.samples_CS)
    assert torch.equal(read_audio(take.sound_file).samples_CS, sound.samples_CS)
    assert sound.starts == [0]


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
