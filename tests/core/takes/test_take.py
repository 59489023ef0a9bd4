"""Takes: exact bytes, exact samples, and resumption after any interruption."""

import errno
import os
import re
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace

import av
import filelock
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_sound import Chopped
from tests.forks import run_in_child, start_in_child
from turbotalk_core.audio.io import read_audio
from turbotalk_core.errors import ChunkError, MismatchError, OutputError
from turbotalk_core.sound import Sound
from turbotalk_core.takes import journal as journal_module
from turbotalk_core.takes import take as take_module
from turbotalk_core.takes.cache_key import CacheKey, describe_changes
from turbotalk_core.takes.journal import Journal
from turbotalk_core.takes.take import (
    Take,
    delete_take,
    is_in_use,
    lock_take,
    measure_size,
    open_take,
)
from turbotalk_core.types import Chunk, ChunkState, FrameChunk, Waveform
from turbotalk_core.video.writer import LOSSLESS, Encoding, open_video

SOUND = Waveform(samples_CS=torch.randn(2, 9_000), sample_rate=22_050)
SPANS = ((0, 21), (21, 29), (29, 33))
IDENTITY = {"seed": "3", "voice": "5b" * 16}
NO_KEY = CacheKey(fields={})


def noise(num_frames, height=34, width=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_frames, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def make_chunk(index, spans=SPANS):
    """Make chunk ``index`` of a clip, in the form that the pipeline returns."""
    start, stop = spans[index]
    frames_BCTHW = noise(stop - start, seed=index).permute(3, 0, 1, 2)[None] / 127.5 - 1
    first = start - 5 if index else 0
    last = first + 4 * -(-(stop - first - 1) // 4) + 1
    return FrameChunk(
        chunk=Chunk(index=index, start=first, stop=last, keep_start=start, keep_stop=stop),
        frames_BCTHW=frames_BCTHW,
        chunk_state=ChunkState(
            num_chunks=index + 1,
            motion_frames_BCTHW=torch.full((1, 3, 5, 34, 50), index / 7),
            noise_state_S=torch.full((99,), index, dtype=torch.uint8),
        ),
    )


def small_chunk(index):
    """Make a chunk of one frame, then one of fifty, with a small chunk state."""
    made = make_chunk(index, ((0, 1), (1, 51)))
    assert made.chunk_state is not None
    return replace(
        made, chunk_state=replace(made.chunk_state, motion_frames_BCTHW=torch.zeros(1, 3, 1, 1, 1))
    )


def opened(folder, sound: Sound = SOUND, cache_key=IDENTITY, length=33, *, is_locked=False):
    key = CacheKey(fields=cache_key)
    return open_take(
        folder, sound, height=34, width=50, length=length, cache_key=key, is_locked=is_locked
    )


def all_frames(spans=SPANS):
    return torch.cat([noise(stop - start, seed=i) for i, (start, stop) in enumerate(spans)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("takes") / "one"
    with opened(folder) as writer:
        for index in range(3):
            written = writer.write(make_chunk(index))
            assert torch.equal(written, noise(len(written), seed=index))
    return folder, all_frames()


def test_reading_back_is_exact(made):
    folder, frames = made
    take = Take.open(folder)
    assert (take.num_frames, take.height, take.width) == (33, 34, 50)
    assert torch.equal(take.read(), frames)
    assert torch.equal(torch.cat(list(take.iterate())), frames)


@pytest.mark.slow
@given(st.data())
def test_any_range_reads_as_a_slice(made, data):
    folder, frames = made
    start = data.draw(st.integers(0, 32))
    stop = data.draw(st.integers(start + 1, 33))
    assert torch.equal(Take.open(folder).read(start, stop), frames[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 34), (5, 5), (7, 6)])
def test_frames_it_does_not_have(made, start, stop):
    with pytest.raises(ChunkError, match=rf"\[{start}, {stop}\).*\[0, 33\)"):
        Take.open(made[0]).read(start, stop)


@pytest.mark.parametrize(
    ("num_channels", "num_samples", "sample_rate"),
    [(1, 1, 8_000), (2, 96_001, 48_000), (7, 50, 11)],
)
def test_the_sound_is_exact(tmp_path, num_channels, num_samples, sample_rate):
    sound = Waveform(samples_CS=3 * torch.randn(num_channels, num_samples), sample_rate=sample_rate)
    with opened(tmp_path / "take", sound) as writer:
        writer.write(make_chunk(0))
    again = read_audio(Take.open(tmp_path / "take").sound_file)
    assert again.sample_rate == sample_rate
    assert torch.equal(again.samples_CS, sound.samples_CS)


def test_a_sound_that_is_read_in_blocks_is_exact(tmp_path):
    sound = Chopped(3 * torch.randn(2, 70_001), (1, 3_000, 77), 48_000)
    with opened(tmp_path / "take", sound) as writer:
        writer.write(make_chunk(0))
    take = Take.open(tmp_path / "take")
    assert torch.equal(read_audio(take.sound_file).samples_CS, sound.samples_CS)
    assert sound.starts == [0]


def test_finished_chunks_can_be_read_while_the_next_is_made(tmp_path):
    with opened(tmp_path / "take") as writer:
        writer.write(make_chunk(0))
        writer.write(make_chunk(1))  # the first is written now
        assert torch.equal(Take.open(tmp_path / "take").read(0, 21), all_frames()[:21])
    assert not list((tmp_path / "take").glob(".*"))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_take_hands_nothing_on(made):
    assert names_in(made[0]) == [
        *(f"chunk_0000{index}.mkv" for index in range(3)),
        "sound.mka",
        "take.journal",
        "take.lock",
    ]
    assert Take.open(made[0]).is_whole
    with opened(made[0]) as writer:
        assert writer.take == Take.open(made[0])
        assert writer.chunk_state is None
        assert writer.changes == ()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("num_finished", [1, 2])
def test_whatever_is_raised_it_goes_on_after_the_last_whole_chunk(tmp_path, error, num_finished):
    folder = tmp_path / "take"
    with suppress(BaseException), opened(folder) as writer:
        for index in range(num_finished):
            writer.write(make_chunk(index))
        if error is not None:
            raise error
    take = Take.open(folder)
    assert not take.is_whole
    assert len(take.chunks) == num_finished
    with opened(folder) as writer:
        assert writer.changes == ()
        last = make_chunk(num_finished - 1).chunk_state
        assert writer.chunk_state is not None
        assert last is not None
        assert writer.chunk_state.num_chunks == num_finished
        assert torch.equal(writer.chunk_state.motion_frames_BCTHW, last.motion_frames_BCTHW)
        assert torch.equal(writer.chunk_state.noise_state_S, last.noise_state_S)
        for index in range(num_finished, 3):
            writer.write(make_chunk(index))
    assert torch.equal(Take.open(folder).read(), all_frames())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_without_a_finished_chunk_nothing_is_left(tmp_path, error):
    with pytest.raises(error), opened(tmp_path / "take"):
        raise error
    assert list(tmp_path.iterdir()) == []


def write_and_die(folder, module, name, calls):
    """Write the take, and kill this process, as a power cut would, at a call of a function."""
    place = {"journal": journal_module, "take": take_module}[module]
    called = getattr(place, name)

    def kill(*arguments, **settings):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return called(*arguments, **settings)

    setattr(place, name, kill)
    with opened(folder) as writer:
        for index in range(len(writer.take.chunks), 3):
            writer.write(make_chunk(index))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills by a signal")
@pytest.mark.parametrize(
    ("module", "name", "call", "num_finished"),
    [
        ("take", "_write_sound", 1, 0),
        ("take", "_write_chunk_state", 1, 0),  # the frames are there, what tells of them is not
        ("take", "open_video", 2, 1),
        ("journal", "crc32", 3, 1),  # 1 is of the header
        ("take", "_name_chunk_state", 3, 2),  # the old chunk state is about to be deleted
        ("take", "_clear", 3, 3),  # 1 and 2 were at the start
    ],
)
def test_killed_anywhere_it_goes_on(tmp_path, module, name, call, num_finished):
    folder = tmp_path / "take"
    assert run_in_child(write_and_die, folder, module, name, call) == -signal.SIGKILL
    with opened(folder) as writer:
        assert writer.changes == ()
        assert len(writer.take.chunks) == num_finished
        for index in range(num_finished, 3):
            writer.write(make_chunk(index))
    assert torch.equal(Take.open(folder).read(), all_frames())
    assert not list(folder.glob(".*"))
    assert not list(folder.glob("carry*"))


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])


def flip(path):
    """Change one byte in the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def begun(tmp_path):
    """Take in which two of three chunks are finished."""
    folder = tmp_path / "take"
    with opened(folder) as writer:
        writer.write(make_chunk(0))
        writer.write(make_chunk(1))
    return folder


@pytest.mark.slow
@given(st.data())
def test_a_torn_record_never_was(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("torn") / "take"
    with opened(folder) as writer:
        writer.write(make_chunk(0))
    before = (folder / "take.journal").read_bytes()
    chunk_state = (folder / "carry_00000.safetensors").read_bytes()
    with opened(folder) as writer:
        writer.write(make_chunk(1))
    after = (folder / "take.journal").read_bytes()
    kept = data.draw(st.integers(len(before), len(after) - 1))
    rubbish = data.draw(st.binary(max_size=40)).replace(b"\n", b"")
    (folder / "take.journal").write_bytes(after[:kept] + rubbish)
    (folder / "carry_00000.safetensors").write_bytes(chunk_state)
    with opened(folder) as writer:
        assert len(writer.take.chunks) == 1
        writer.write(make_chunk(1))
        writer.write(make_chunk(2))
    assert torch.equal(Take.open(folder).read(), all_frames())


def test_another_identity_begins_anew_and_says_why(begun):
    changed = {"seed": "4", "voice": "6c" * 16, "prompt": "a"}
    with opened(begun, cache_key=changed, length=29) as writer:
        assert not writer.take.chunks
        assert writer.chunk_state is None
        assert writer.changes == (
            "length was 33 and is 29",
            "prompt was none and is a",
            "seed was 3 and is 4",
            "voice is another",
        )
        writer.write(make_chunk(0))
    assert names_in(begun)[:2] == ["carry_00000.safetensors", "chunk_00000.mkv"]


def test_equal_identities_have_no_changes():
    assert describe_changes(CacheKey(fields=IDENTITY), CacheKey(fields=dict(IDENTITY))) == ()


def test_a_take_of_before_is_continued(begun):
    """Records as the version before cache keys wrote them."""
    header, *spans = Journal(begun / "take.journal").records
    assert header["identity"] == IDENTITY
    (begun / "take.journal").unlink()
    write_journal(begun, {**HEADER, "identity": dict(reversed(IDENTITY.items()))}, *spans)
    with opened(begun) as writer:
        assert writer.changes == ()
        assert len(writer.take.chunks) == 2


def test_a_take_whose_hearing_is_a_sentence_begins_anew_and_says_why(begun):
    before = {**IDENTITY, "hearing": f"whole, at -23 LUFS, by {'5b' * 16}"}
    _, *spans = Journal(begun / "take.journal").records
    (begun / "take.journal").unlink()
    write_journal(begun, {**HEADER, "identity": before}, *spans)
    with opened(begun, cache_key={**IDENTITY, "hearing": "7d" * 16}) as writer:
        (change,) = writer.changes
        assert "by an earlier version of this program" in change


def test_the_journal_is_read_once(begun, monkeypatch):
    read = []
    make = Journal.__init__

    def watch(self, path):
        read.append(path)
        make(self, path)

    monkeypatch.setattr(Journal, "__init__", watch)
    with opened(begun) as writer:
        assert len(writer.take.chunks) == 2
    assert len(read) == 1


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "chunk_00000.mkv").unlink(), r"chunk_00000\.mkv is missing"),
        (lambda folder: (folder / "carry_00001.safetensors").unlink(), "is missing"),
        (lambda folder: cut(folder / "carry_00001.safetensors", 50), "is damaged"),
        (lambda folder: flip(folder / "carry_00001.safetensors"), r"carry_00001.* is damaged"),
        (lambda folder: cut(folder / "chunk_00001.mkv", 3_000), r"chunk_00001\.mkv is damaged"),
        (lambda folder: cut(folder / "chunk_00000.mkv", 0), r"chunk_00000\.mkv is damaged"),
        (lambda folder: flip(folder / "chunk_00000.mkv"), r"chunk_00000\.mkv is damaged"),
        (lambda folder: flip(folder / "sound.mka"), r"sound\.mka is damaged"),
        (lambda folder: (folder / "sound.mka").unlink(), r"sound\.mka is missing"),
        (lambda folder: (folder / "take.journal").unlink(), r"take\.journal is missing or damaged"),
        (lambda folder: cut(folder / "take.journal", 20), r"take\.journal is missing or damaged"),
    ],
)
def test_what_cannot_be_gone_on_with_begins_anew(begun, damage, told):
    damage(begun)
    with opened(begun) as writer:
        (change,) = writer.changes
        assert re.search(told, change)
        for index in range(3):
            writer.write(make_chunk(index))
    assert torch.equal(Take.open(begun).read(), all_frames())


def test_two_at_a_time_are_refused(begun):
    with (
        opened(begun),
        pytest.raises(OutputError, match="another program is making the take"),
        opened(begun),
    ):
        pass
    with opened(begun) as writer:
        assert len(writer.take.chunks) == 2


def test_a_take_that_vanished_is_made_again(begun):
    shutil.rmtree(begun)
    with opened(begun) as writer:
        assert writer.changes == ()
        for index in range(3):
            writer.write(make_chunk(index))
    assert torch.equal(Take.open(begun).read(), all_frames())


def test_a_file_of_another_size_is_noticed_without_reading_it(copy):
    for name in ("sound.mka", "chunk_00001.mkv"):
        whole = (copy / name).read_bytes()
        cut(copy / name, 3_000)
        with pytest.raises(OutputError, match=f"{re.escape(name)} is damaged"):
            Take.open(copy)
        (copy / name).write_bytes(whole)
    assert Take.open(copy).num_frames == 33


def test_a_take_without_sizes_is_continued(begun):
    forget_contents(begun)
    with opened(begun) as writer:
        assert writer.changes == ()
        writer.write(make_chunk(2))
    assert torch.equal(Take.open(begun).read(), all_frames())


def hold(folder, is_held, is_done):
    with lock_take(folder):
        (folder / "take.journal").touch()
        (folder / ".video.part.mp4").touch()
        is_held.touch()
        while not is_done.exists():
            time.sleep(0.01)


@pytest.mark.slow
def test_a_take_of_another_process_is_not_touched(tmp_path):
    folder, is_held, is_done = tmp_path / "take", tmp_path / "held", tmp_path / "done"
    child = start_in_child(hold, folder, is_held, is_done)
    while not is_held.exists():
        assert child.is_alive()
        time.sleep(0.01)
    names = names_in(folder)
    assert is_in_use(folder)
    for use in (lambda: delete_take(folder), lambda: opened(folder).__enter__()):
        with pytest.raises(OutputError, match="another program is making the take"):
            use()
    assert names_in(folder) == names
    assert ".video.part.mp4" in names
    child.kill()
    child.join()
    assert not is_in_use(folder)  # the system has released the lock
    with lock_take(folder):
        assert ".video.part.mp4" not in names_in(folder)
    delete_take(folder)
    assert not folder.exists()


def test_a_lock_leaves_nothing(tmp_path):
    folder = tmp_path / "take"
    with lock_take(folder), opened(folder, is_locked=True), suppress(OutputError):
        assert is_in_use(folder)
    assert not folder.exists()
    assert not is_in_use(folder)
    delete_take(folder)
    assert not folder.exists()


def test_the_size_of_a_take_is_that_of_its_files(begun, tmp_path):
    assert measure_size(tmp_path / "nothing") == 0
    (begun / "mine").write_bytes(bytes(1000))
    assert measure_size(begun) == sum(path.stat().st_size for path in begun.iterdir()) - 1000


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")]
)
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(OutputError, match=r"cannot lock files .*choose a folder on another disk"):
        opened(tmp_path / "take").__enter__()


@pytest.mark.parametrize("name", ["take.journal", "chunk_00000.mkv", "take.lock"])
def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path, name):
    (tmp_path / "take" / name).mkdir(parents=True)
    with pytest.raises(OutputError), opened(tmp_path / "take"):
        pass
    assert (tmp_path / "take" / name).is_dir()


def test_a_chunk_that_does_not_follow(begun):
    with opened(begun) as writer:
        with pytest.raises(ChunkError, match=r"got chunk 1 from frame 21.*needs chunk 2 from"):
            writer.write(make_chunk(1))
        with pytest.raises(ChunkError, match="with what it hands on"):
            writer.write(replace(make_chunk(2), chunk_state=None))
        writer.write(make_chunk(2))
        with pytest.raises(ChunkError, match="needs chunk 3 from frame 33"):
            writer.write(make_chunk(0))


def test_each_chunk_gives_back_what_making_it_has_freed(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(take_module, "trim_host_memory", lambda: called.append(True))
    with opened(tmp_path / "take") as writer:
        for index in range(3):
            writer.write(make_chunk(index))
    assert len(called) == 3


def test_frames_of_another_size(tmp_path):
    with (
        pytest.raises(MismatchError, match="for a take of 50x36"),
        open_take(
            tmp_path / "take", SOUND, height=36, width=50, length=33, cache_key=NO_KEY
        ) as writer,
    ):
        writer.write(make_chunk(0))


def test_a_full_disk_keeps_what_is_finished(tmp_path, small_files_only):
    folder = tmp_path / "take"
    small = Waveform(samples_CS=torch.zeros(1, 100), sample_rate=8_000)

    def run():
        with open_take(folder, small, height=34, width=50, length=51, cache_key=NO_KEY) as writer:
            for index in range(2):
                writer.write(small_chunk(index))

    with pytest.raises(OutputError, match=r"File too large.*chunk_00001\.mkv"):
        run()
    assert len(Take.open(folder).chunks) == 1
    assert not list(folder.glob(".*"))


def test_a_thread_that_dies_ends_the_take(begun, monkeypatch):
    def die(*_arguments):
        raise MemoryError

    monkeypatch.setattr(take_module, "_write_chunk_state", die)
    with pytest.raises(MemoryError), opened(begun) as writer:
        writer.write(make_chunk(2))
    assert len(Take.open(begun).chunks) == 2


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Not a directory"), opened(tmp_path / "file" / "take"):
        pass


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="holds mine, which is of no take"), opened(tmp_path):
        pass
    assert names_in(tmp_path) == ["mine"]


def test_deleting_a_take_leaves_what_is_not_its_own(begun):
    (begun / "mine").touch()
    delete_take(begun)
    assert names_in(begun) == ["mine"]
    (begun / "mine").unlink()
    delete_take(begun)
    assert not begun.exists()


def test_a_folder_that_is_no_take(tmp_path):
    with pytest.raises(OutputError, match=r"there is no .*take\.journal"):
        Take.open(tmp_path)


def write_journal(folder, *records):
    journal = Journal(folder / "take.journal")
    for record in records:
        journal.append(record)


HEADER = {"version": 2, "height": 34, "width": 50, "length": 33, "identity": IDENTITY}


def span(start, stop):
    return {"start": start, "stop": stop}


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([], "damaged"),
        ([{**HEADER, "version": 99}], "version 99.*version 2"),
        ([{"version": 2}], "damaged.*height"),
        ([HEADER], "no finished chunk"),
        ([HEADER, span(0, 34)], "damaged"),
        ([HEADER, span(5, 9)], "damaged"),
        ([HEADER, span(0, 9), span(8, 9)], "damaged"),
        ([HEADER, span("x", 9)], "damaged"),
        ([HEADER, span(0, 0)], "damaged"),
        ([HEADER, span(0, -1)], "damaged"),
        ([HEADER, span(0, 21.0)], "damaged"),
        ([HEADER, span(False, 21)], "damaged"),
        ([HEADER, span(0, True)], "damaged"),
        ([HEADER, span(0, 2**63)], "damaged"),
        ([HEADER, {"start": 0}], "damaged"),
        ([HEADER, span(0, 21)], r"sound\.mka is missing"),
    ],
)
def test_a_journal_that_tells_nonsense(tmp_path, records, told):
    write_journal(tmp_path, *records)
    (tmp_path / "take.journal").touch()
    with pytest.raises(OutputError, match=told):
        Take.open(tmp_path)


@pytest.mark.parametrize(
    "size",
    [{"height": 0}, {"width": -1}, {"height": "34"}, {"height": 34.0}, {"width": None},
     {"height": 100_000, "width": 100_000}, {"length": 2**40}, {"length": True},
     {"identity": None}, {"identity": ["seed"]}],
)  # fmt: skip
def test_a_size_that_cannot_be_is_damage(tmp_path, size):
    write_journal(tmp_path, HEADER | size, span(0, 21))
    with pytest.raises(OutputError, match=r"take\.journal is damaged"):
        Take.open(tmp_path)


@pytest.fixture
def copy(made, tmp_path):
    """Copy of a take's files, to be changed."""
    return shutil.copytree(made[0], tmp_path / "copy")


def test_a_link_is_no_part_of_a_take(copy, made):
    for name in ("chunk_00001.mkv", "sound.mka", "take.journal"):
        (copy / name).unlink()
        (copy / name).symlink_to(made[0] / name)
        with pytest.raises(OutputError, match=rf"{name}"):
            Take.open(copy)
        (copy / name).unlink()
        shutil.copy(made[0] / name, copy / name)
        assert Take.open(copy).num_frames == 33


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
@pytest.mark.parametrize("name", ["take.journal", "sound.mka", "chunk_00000.mkv"])
def test_a_pipe_is_no_part_of_a_take(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(OutputError, match=name):
        Take.open(copy)


def test_a_chunk_state_behind_a_link_is_not_resumed(begun, tmp_path):
    chunk_state = begun / "carry_00001.safetensors"
    chunk_state.rename(tmp_path / "elsewhere")
    chunk_state.symlink_to(tmp_path / "elsewhere")
    with opened(begun) as writer:
        (change,) = writer.changes
        assert "carry_00001.safetensors is missing" in change
    assert (tmp_path / "elsewhere").exists()


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


def test_a_chunk_that_is_a_list_of_files_opens_none(copy):
    (copy / "chunk_00000.mkv").write_text("ffconcat version 1.0\nfile chunk_00001.mkv\n")
    with pytest.raises(OutputError, match=r"chunk_00000\.mkv"):
        Take.open(copy).read(0, 1)


def forget_contents(folder):
    """Rewrite the journal as earlier versions wrote it, without sizes and checksums."""
    records = Journal(folder / "take.journal").records
    (folder / "take.journal").unlink()
    contents = ("sound", "video", "state")
    write_journal(folder, *({k: v for k, v in r.items() if k not in contents} for r in records))


def test_sound_of_another_codec_is_refused(copy):
    forget_contents(copy)
    with av.open(str(copy / "sound.mka"), "w") as container:
        stream = container.add_stream("flac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 640), dtype=np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(OutputError, match=r"sound\.mka holds flac"):
        _ = Take.open(copy).sound_file


def test_a_file_without_its_stream_is_damage(copy):
    forget_contents(copy)
    sound, chunk = copy / "sound.mka", copy / "chunk_00000.mkv"
    pictures = chunk.read_bytes()
    chunk.write_bytes(sound.read_bytes())
    sound.write_bytes(pictures)
    take = Take.open(copy)
    for read in (take.read, lambda: take.sound_file):
        with pytest.raises(OutputError, match="is damaged"):
            read()


def test_a_damaged_chunk(made, tmp_path):
    for path in made[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cut(tmp_path / "chunk_00001.mkv", 3_000)
    with pytest.raises(OutputError, match=r"make the take again|Invalid data"):
        Take.open(tmp_path).read()
