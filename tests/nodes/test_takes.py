"""Takes on a server that runs for weeks: what is tidied, what is kept, and what was lost."""

import os

import pytest
import torch

from turbotalk_core.takes.take import lock_take

NOW = 1_800_000_000.0  # seconds since 1970
HOUR, DAY = 3_600.0, 86_400.0


@pytest.fixture
def takes(part, monkeypatch):
    module = part("nodes.host.takes")
    monkeypatch.setattr(module, "_last_tidied", {})
    for name in (module.HOURS_VARIABLE, module.GB_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def make_take(part, tmp_path):
    """Write a take of some bytes, last used some time ago; gives its folder."""
    core, keys = part("turbotalk_core.takes.take"), part("turbotalk_core.takes.cache_key")
    types = part("turbotalk_core.types")

    def make(number, age, *, num_chunks=2, graph="other"):
        folder = tmp_path / f"{number:020x}"
        with core.open_take(
            folder,
            types.Waveform(samples_CS=torch.zeros(1, 16_000), sample_rate=16_000),
            height=16,
            width=16,
            length=2,
            cache_key=keys.CacheKey(fields={"nodes before it": graph}),
        ) as writer:
            for index in range(num_chunks):
                chunk = types.Chunk(
                    index=index, start=index, stop=index + 1, keep_start=index, keep_stop=index + 1
                )
                state = types.ChunkState(
                    num_chunks=index + 1,
                    motion_frames_BCTHW=torch.zeros(1, 3, 1, 16, 16),
                    noise_state_S=torch.Generator().get_state(),
                )
                writer.write(
                    types.FrameChunk(
                        chunk=chunk,
                        frames_BCTHW=torch.zeros(1, 3, 1, 16, 16),
                        chunk_state=state,
                    )
                )
        os.utime(folder / "take.journal", (NOW - age, NOW - age))
        return folder

    return make


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestTidying:
    def test_by_age_and_at_most_hourly(self, takes, make_take, tmp_path):
        whole, unfinished = make_take(1, 25 * HOUR), make_take(2, 25 * HOUR, num_chunks=1)
        forgotten, young = make_take(3, 15 * DAY, num_chunks=1), make_take(4, 23 * HOUR)
        takes.tidy_takes(tmp_path, now=NOW)
        assert list_names(tmp_path) == [unfinished.name, young.name]
        assert not whole.exists()
        assert not forgotten.exists()
        takes.tidy_takes(tmp_path, now=NOW + 0.9 * HOUR)
        assert young.exists()  # by its age it could stay 6 minutes more anyway
        takes.tidy_takes(tmp_path, now=NOW + 2 * HOUR)
        assert list_names(tmp_path) == [unfinished.name]

    def test_within_the_hour_nothing_is_done(self, takes, make_take, tmp_path):
        takes.tidy_takes(tmp_path, now=NOW)
        old = make_take(1, 9 * DAY)
        takes.tidy_takes(tmp_path, now=NOW + 0.99 * HOUR)
        assert old.exists()
        takes.tidy_takes(tmp_path, now=NOW + HOUR)
        assert not old.exists()

    def test_a_clock_that_is_set_back(self, takes, make_take, tmp_path):
        takes.tidy_takes(tmp_path, now=NOW + 90 * DAY)
        old = make_take(1, 9 * DAY)
        takes.tidy_takes(tmp_path, now=NOW)
        assert not old.exists()

    def test_by_size_the_oldest_whole_ones_first(self, takes, make_take, tmp_path, monkeypatch):
        unfinished = make_take(1, 9 * HOUR, num_chunks=1)
        old, young = make_take(2, 4 * HOUR), make_take(3, 2 * HOUR)
        sizes = [
            sum(file.stat().st_size for file in path.iterdir()) for path in (unfinished, young)
        ]
        monkeypatch.setenv("TURBOTALK_TAKES_GB", str((sum(sizes) + 1) / 1e9))
        takes.tidy_takes(tmp_path, now=NOW)
        assert list_names(tmp_path) == [unfinished.name, young.name]
        assert not old.exists()
        monkeypatch.setenv("TURBOTALK_TAKES_GB", "0")
        takes.tidy_takes(tmp_path, now=NOW + HOUR)
        assert list_names(tmp_path) == []

    def test_what_is_in_use_stays(self, takes, make_take, tmp_path, monkeypatch):
        monkeypatch.setenv("TURBOTALK_TAKES_GB", "0")
        monkeypatch.setenv("TURBOTALK_TAKES_HOURS", "0")
        in_prompt, written = make_take(1, 30 * DAY, graph="mine"), make_take(2, 30 * DAY)
        read, unused = make_take(3, 0.5 * HOUR), make_take(4, 1.5 * HOUR)
        with lock_take(written):
            takes.tidy_takes(tmp_path, {"mine"}, now=NOW)
        assert list_names(tmp_path) == [in_prompt.name, written.name, read.name]
        assert not unused.exists()

    def test_reading_is_use(self, takes, make_take, tmp_path, part):
        folder = make_take(1, 30 * DAY)
        take = part("turbotalk_core.takes.take").Take.open(folder)
        assert sum(len(frames) for frames in takes.read_take(take, 0, 2)) == 2
        used = (folder / "take.journal").stat().st_mtime
        takes.tidy_takes(tmp_path, now=used + 10)
        assert folder.exists()

    def test_other_folders_and_files_stay(self, takes, make_take, tmp_path):
        mine = make_take(1, 30 * DAY)
        mine.rename(tmp_path / "of somebody else")
        (tmp_path / "a file").touch()
        (tmp_path / f"{2:020x}").mkdir()
        (tmp_path / f"{2:020x}" / "notes.txt").touch()
        outside = make_take(3, 30 * DAY)
        elsewhere = outside.rename(tmp_path.parent / "elsewhere")
        (tmp_path / f"{3:020x}").symlink_to(elsewhere, target_is_directory=True)
        before = list_names(tmp_path)
        takes.tidy_takes(tmp_path, now=NOW)
        assert list_names(tmp_path) == before
        assert len(list_names(elsewhere)) > 3

    @pytest.mark.parametrize("damage", ["journal", "sound.mka", "chunk_00000.mkv", "take.journal"])
    def test_damaged_takes_go_as_whole_ones_do(self, takes, make_take, tmp_path, damage):
        folder = make_take(1, 25 * HOUR, num_chunks=1)
        if damage == "journal":
            (folder / "take.journal").write_bytes(b"nonsense")
            os.utime(folder / "take.journal", (NOW - 25 * HOUR, NOW - 25 * HOUR))
        else:
            (folder / damage).unlink()
        (folder / "take.lock").touch()  # as a killed program leaves it
        os.utime(folder, (NOW - 25 * HOUR, NOW - 25 * HOUR))
        takes.tidy_takes(tmp_path, now=NOW)
        assert list_names(tmp_path) == []

    @pytest.mark.parametrize("text", ["much", "-1", "nan"])
    def test_a_limit_that_is_none_is_said_and_not_used(
        self, takes, make_take, tmp_path, monkeypatch, caplog, text
    ):
        monkeypatch.setenv("TURBOTALK_TAKES_GB", text)
        kept = make_take(1, 2 * HOUR)
        takes.tidy_takes(tmp_path, now=NOW)
        assert kept.exists()
        assert f"TURBOTALK_TAKES_GB is '{text}'; use a number" in caplog.text

    def test_the_sampler_tidies(self, takes, sample, host, monkeypatch):
        graph = {"7": {"class_type": "TurboTalkSampler", "inputs": {"name": "tidies"}}}
        other = {"7": {"class_type": "TurboTalkSampler", "inputs": {"name": "is tidied"}}}
        old = sample(graph=other, max_seconds=0.2)
        later = (old.folder / "take.journal").stat().st_mtime + 2 * DAY
        monkeypatch.setattr(takes.time, "time", lambda: later)
        assert old.folder.exists()
        takes._last_tidied.clear()
        assert sample(graph=graph, max_seconds=0.2).folder.exists()
        assert not old.folder.exists()


class TestLosses:
    """The host runs a sampler again if its fingerprint changed."""

    GRAPH = {  # noqa: RUF012
        "2": {"class_type": "Patch", "inputs": {"name": "lost"}},
        "7": {"class_type": "TurboTalkSampler", "inputs": {"model": ["2", 0], "seed": 3}},
    }

    @pytest.fixture
    def fingerprint(self, host, part, monkeypatch):
        results = part("nodes.host.results")
        monkeypatch.setattr(results, "_made", {})
        monkeypatch.setattr(results, "_lost", {})
        node = host.nodes.NODE_CLASS_MAPPINGS["TurboTalkSampler"]

        def compute(**widgets):
            clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {host.io.Hidden.unique_id: "7"}})
            return clone.fingerprint_inputs(**({"model": None, "seed": 3} | widgets))

        return compute

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: [path.unlink() for path in folder.iterdir()],
            lambda folder: folder.rename(folder.with_name("renamed")),
            lambda folder: (folder / "sound.mka").unlink(),
            lambda folder: (folder / "chunk_00000.mkv").unlink(),
            lambda folder: (folder / "chunk_00000.mkv").write_bytes(b"short"),
            lambda folder: (folder / "take.journal").unlink(),
            lambda folder: (folder / "take.journal").write_bytes(b"nonsense"),
        ],
    )
    def test_a_lost_take_is_made_again(self, sample, fingerprint, run_node, errors, damage):
        first = sample(graph=self.GRAPH, max_seconds=0.2)
        frames, before = first.read(), fingerprint()
        assert fingerprint() == before
        damage(first.folder)
        after = fingerprint()
        assert after != before
        assert fingerprint(seed=4) == 0  # other work
        again = sample(graph=self.GRAPH, max_seconds=0.2)
        assert torch.equal(again.read(), frames)
        assert fingerprint() == after

    @pytest.mark.parametrize("node", ["TurboTalkTakeFrames", "TurboTalkAssembleVideo"])
    @pytest.mark.parametrize("name", ["sound.mka", "chunk_00000.mkv", "take.journal"])
    def test_a_take_that_vanishes_before_it_is_read(
        self, sample, run_node, errors, host, node, name
    ):
        take = sample(max_seconds=0.2)
        for path in take.folder.iterdir() if name == "take.journal" else [take.folder / name]:
            path.unlink()
        settings = {"take": take, "start_frame": 0, "num_frames": 0}
        if node == "TurboTalkAssembleVideo":
            settings |= {"codec": "h264", "crf": 18, "pixel_format": "yuv420p"}
        elif name == "sound.mka":
            return  # not needed for the frames
        with pytest.raises(errors.OutputError, match=r"again|needs an existing") as refused:
            run_node(node, **settings)
        assert str(host.base) not in str(refused.value)
