"""Stages resume after an interruption, share the work, and detect other settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.forks import run_in_child
from training.data.resumable_stage import (
    SETTINGS,
    SKIPPED,
    ItemLog,
    Work,
    attempt,
    draw_number,
    fingerprint,
    fingerprint_files,
    hold_stage,
    list_missing,
    open_stage,
    read_records,
    read_settings,
    summarize,
)
from turbotalk_core.errors import (
    AudioError,
    CheckpointError,
    ImageError,
    MissingToolError,
    OutputError,
    RequestError,
)

KEYS = [f"video_{number}.mp4" for number in range(40)]


@pytest.mark.parametrize(("part", "parts"), [(1, 1), (-1, 2), (0, 0)])
def test_a_part_is_one_of_the_parts(part: int, parts: int) -> None:
    with pytest.raises(RequestError, match="parts count from 0"):
        Work(part=part, parts=parts)


class TestSettings:
    def test_the_same_settings_go_on(self, tmp_path: Path) -> None:
        open_stage(tmp_path / "s", {"a": 1, "b": [1.5, None]}, Work())
        open_stage(tmp_path / "s", {"b": [1.5, None], "a": 1}, Work())
        stored = read_settings(tmp_path / "s")
        assert stored["settings"] == {"a": 1, "b": [1.5, None]}
        assert stored["fingerprint"] == fingerprint(stored["settings"])
        assert fingerprint({"a": 1}) != fingerprint({"a": 2})

    def test_other_settings_are_refused_and_named(self, tmp_path: Path) -> None:
        open_stage(tmp_path, {"size": 480, "frames": 81}, Work())
        with pytest.raises(RequestError, match=r"size 480, now 640; .*--overwrite") as stored:
            open_stage(tmp_path, {"size": 640, "frames": 81}, Work())
        assert "frames" not in str(stored.value).split("settings:")[1].split(";")[0]
        assert read_settings(tmp_path)["settings"]["size"] == 480

    def test_overwriting_throws_away_what_was_made_otherwise(self, tmp_path: Path) -> None:
        folder = tmp_path / "stage"
        open_stage(folder, {"size": 480}, Work())
        ItemLog(folder, Work()).append([{"key": "a"}])
        for name in ("product.bin", "of the user.txt"):
            (folder / name).write_text("")
        open_stage(folder, {"size": 480}, Work(overwrites=True))
        assert list(read_records(folder)) == ["a"]
        with pytest.raises(RequestError, match="only part 0 throws it away"):
            open_stage(folder, {"size": 640}, Work(part=1, parts=2, overwrites=True))
        open_stage(folder, {"size": 640}, Work(part=0, parts=2, overwrites=True), ["*.bin"])
        assert read_records(folder) == {}
        assert {path.name for path in folder.iterdir()} == {SETTINGS, "of the user.txt"}
        open_stage(folder, {"size": 640}, Work(part=1, parts=2, overwrites=True))

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}'])
    def test_damaged_settings_are_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / SETTINGS).write_text(text)
        with pytest.raises(RequestError, match=r"cannot read .*settings\.json"):
            open_stage(tmp_path, {}, Work())

    def test_a_folder_that_cannot_be_made_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="file"):
            open_stage(tmp_path / "file" / "stage", {}, Work())


class TestFingerprint:
    def test_it_tells_files_apart_by_their_bytes(self, tmp_path: Path) -> None:
        one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
        save_file({"a": torch.zeros(3)}, one)
        save_file({"a": torch.zeros(3)}, other)
        assert fingerprint_files(one)["sha256"] == fingerprint_files(other)["sha256"]
        save_file({"a": torch.ones(3)}, other)
        assert fingerprint_files(one)["sha256"] != fingerprint_files(other)["sha256"]
        assert fingerprint_files(one)["bytes"] == one.stat().st_size

    @pytest.mark.parametrize("name", ["gone.safetensors", "gone.pt2"])
    def test_a_missing_file_is_told(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(CheckpointError, match="gone"):
            fingerprint_files(tmp_path / name)


class TestItemLog:
    def test_all_parts_are_read_and_sorted(self, tmp_path: Path) -> None:
        ItemLog(tmp_path, Work(part=1, parts=2)).append([{"key": "b", "n": 1}])
        item_log = ItemLog(tmp_path, Work(part=0, parts=2))
        item_log.append([{"key": "c", "n": 1}, {"key": "a", "n": 1}])
        expected = {key: {"key": key, "n": 1} for key in "abc"}
        assert read_records(tmp_path) == expected
        assert list(read_records(tmp_path)) == list("abc")
        assert ItemLog(tmp_path, Work()).before == expected

    def test_the_last_attempt_counts_whoever_made_it(self, tmp_path: Path) -> None:
        ItemLog(tmp_path, Work(part=1, parts=2)).append([{"key": "a", SKIPPED: "damaged"}])
        # The file of the only part is read before that of part 1 of 2.
        ItemLog(tmp_path, Work()).append([{"key": "a", "n": 2}])
        assert read_records(tmp_path)["a"]["n"] == 2
        ItemLog(tmp_path, Work(part=1, parts=2)).append([{"key": "a", "n": 3}])
        ItemLog(tmp_path, Work()).append([{"key": "a", "n": 4}])
        assert read_records(tmp_path)["a"]["n"] == 4

    @given(cut=st.integers(0, 60))
    def test_a_process_that_dies_while_writing_loses_one_line_at_most(
        self, tmp_path_factory: pytest.TempPathFactory, cut: int
    ) -> None:
        folder = tmp_path_factory.mktemp("log")
        item_log = ItemLog(folder, Work())
        item_log.append([{"key": name, "text": "Zoë"} for name in "ab"])
        (path,) = folder.iterdir()
        whole = path.read_bytes()
        path.write_bytes(whole[: max(0, len(whole) - cut)])
        before = list(read_records(folder))
        assert before == ["a", "b"][: path.read_bytes().count(b"\n")]
        ItemLog(folder, Work()).append([{"key": "c"}])
        assert list(read_records(folder)) == [*before, "c"]

    def test_a_damaged_line_is_told_by_its_number(self, tmp_path: Path) -> None:
        item_log = ItemLog(tmp_path, Work())
        item_log.append([{"key": "a"}])
        (path,) = tmp_path.iterdir()
        path.write_text(path.read_text() + '{"no key": 1}\n')
        with pytest.raises(OutputError, match=r"line 2 of .*items-00-of-01\.jsonl is damaged"):
            read_records(tmp_path)
        path.write_bytes(b'{"key": "\xff"}\n')
        with pytest.raises(OutputError, match="line 1 of"):
            read_records(tmp_path)


def _hold(folder: Path, work: Work, *, overwrites: bool = False) -> None:
    settings = {"size": 640 if overwrites else 480}
    with hold_stage(folder, settings, replace(work, overwrites=overwrites)):
        pass


class TestProcesses:
    HALF = Work(part=0, parts=2)

    @pytest.mark.slow
    def test_the_same_part_is_refused_and_another_is_not(self, tmp_path: Path) -> None:
        with hold_stage(tmp_path, {"size": 480}, self.HALF) as item_log:
            item_log.append([{"key": "a"}])
            before = item_log.before
            assert run_in_child(_hold, tmp_path, self.HALF) == 1
            assert run_in_child(_hold, tmp_path, Work(part=1, parts=2)) == 0
            with pytest.raises(OutputError, match="works on part 0 of 2 in"):
                _hold(tmp_path, self.HALF)
            item_log.append([{"key": "b"}])
            assert before == {}
        assert list(read_records(tmp_path)) == ["a", "b"]
        assert run_in_child(_hold, tmp_path, self.HALF) == 0

    @pytest.mark.parametrize("other", [Work(), Work(part=1, parts=3)])
    def test_another_division_of_the_work_is_refused(self, tmp_path: Path, other: Work) -> None:
        with (
            hold_stage(tmp_path, {"size": 480}, self.HALF),
            pytest.raises(OutputError, match=r"on part 00-of-02 .* the same --parts"),
        ):
            _hold(tmp_path, other)
        _hold(tmp_path, other)

    def test_nothing_is_thrown_away_while_others_write_it(self, tmp_path: Path) -> None:
        with hold_stage(tmp_path, {"size": 480}, Work(part=1, parts=2)) as item_log:
            item_log.append([{"key": "a"}])
            with pytest.raises(OutputError, match=r"on part 01-of-02 .* or stop it"):
                _hold(tmp_path, self.HALF, overwrites=True)
            assert list(read_records(tmp_path)) == ["a"]
        _hold(tmp_path, self.HALF, overwrites=True)
        assert read_records(tmp_path) == {}


def test_names_of_any_bytes_are_keys(tmp_path: Path) -> None:
    keys = [b"g\xc4\xe3.mp4".decode(errors="surrogateescape"), "a\nb.mp4", "-a.mp4", "\u2028"]
    item_log = ItemLog(tmp_path, Work())
    item_log.append({"key": key} for key in keys)
    assert set(read_records(tmp_path)) == set(keys)
    shares = [list_missing(keys, {}, Work(part=part, parts=2)) for part in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(keys)
    assert draw_number("a.mp4", "part") == 8432217690153293098


class TestShares:
    @given(parts=st.integers(1, 9))
    def test_parts_share_everything_once(self, parts: int) -> None:
        shares = [list_missing(KEYS, {}, Work(part=p, parts=parts)) for p in range(parts)]
        assert sorted(key for share in shares for key in share) == sorted(KEYS)

    def test_a_share_does_not_depend_on_what_else_there_is(self) -> None:
        work = Work(part=1, parts=3)
        few = KEYS[::2]
        assert list_missing(few, {}, work) == [k for k in list_missing(KEYS, {}, work) if k in few]

    def test_what_is_done_is_left_out_and_what_was_skipped_may_be_tried_again(self) -> None:
        done = {"a": {"key": "a"}, "b": {"key": "b", SKIPPED: "it is damaged"}}
        assert list_missing("abc", done, Work()) == ["c"]
        assert list_missing("abc", done, Work(retries=True)) == ["b", "c"]


class TestAttempts:
    def test_what_is_wrong_with_an_item_is_recorded(self) -> None:
        def fail() -> dict[str, object]:
            raise AudioError("it has no sound")

        assert attempt("a", lambda: {"n": 1}) == {"key": "a", "n": 1}
        assert attempt("a", fail) == {"key": "a", SKIPPED: "it has no sound", "kind": "AudioError"}

    @pytest.mark.parametrize("kind", [CheckpointError, OutputError, MissingToolError, ValueError])
    def test_what_is_wrong_with_the_run_is_raised(self, kind: type[Exception]) -> None:
        def fail() -> dict[str, object]:
            raise kind("everything would fail")

        with pytest.raises(kind):
            attempt("a", fail)

    def test_skips_are_counted_by_their_kind(self, tmp_path: Path) -> None:
        def fail() -> dict[str, object]:
            raise ImageError("it is damaged")

        ItemLog(tmp_path, Work()).append(
            [attempt("a", fail), attempt("b", fail), attempt("c", dict), attempt("d", dict)]
        )
        summary = summarize(tmp_path, num_made=1)
        assert (summary.num_made, summary.num_kept) == (1, 1)
        assert summary.lines() == ["1 made, 1 were there", "2 skipped:", "  2 x ImageError"]
        assert json.loads(json.dumps(summary.skips)) == {"ImageError": 2}
