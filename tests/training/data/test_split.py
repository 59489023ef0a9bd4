"""Splitting: scenes end at cuts alone; each video becomes pieces or a reason for its absence."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.data.resumable_stage import SKIPPED, Work, read_records
from training.data.split import (
    SCENES,
    SplitSettings,
    cut_pieces,
    find_cuts,
    find_scenes,
    run_split,
)
from turbotalk_core.errors import RequestError

from .conftest import MakeVideo

SETTINGS = SplitSettings(min_frames=9, max_frames=20)


class TestCuts:
    def test_a_jump_is_a_cut(self) -> None:
        differences_T = torch.full((30,), 0.01)
        differences_T[12] = 0.3
        assert find_cuts(differences_T) == [12]

    def test_a_moving_camera_is_none(self) -> None:
        differences_T = 0.12 + 0.04 * torch.sin(torch.arange(30.0))
        assert find_cuts(differences_T) == []

    def test_a_small_jump_in_a_still_picture_is_none(self) -> None:
        differences_T = torch.zeros(30)
        differences_T[12] = 0.05
        assert find_cuts(differences_T) == []

    def test_the_first_picture_is_none_and_the_last_may_be(self) -> None:
        assert find_cuts(torch.tensor([0.0])) == []
        assert find_cuts(torch.tensor([0.0, 0.5])) == [1]
        assert find_cuts(torch.tensor([0.0, 0.01, 0.01, 0.5])) == [3]

    def test_scenes_tile_the_pictures(self) -> None:
        pictures = [torch.full((20, 30, 3), level) for level in [0.1] * 5 + [0.9] * 3 + [0.5] * 4]
        assert find_scenes(pictures) == [(0, 5), (5, 8), (8, 12)]


@given(start=st.integers(0, 50), length=st.integers(1, 500))
def test_pieces_are_equal_and_tile_the_scene(start: int, length: int) -> None:
    pieces = cut_pieces(start, start + length, SETTINGS)
    if length < SETTINGS.min_frames:
        assert pieces == []
        return
    edges = [piece[0] for piece in pieces] + [pieces[-1][1]]
    assert (edges[0], edges[-1]) == (start, start + length)
    assert all(left[1] == right[0] for left, right in pairwise(pieces))
    sizes = [stop - begin for begin, stop in pieces]
    assert max(sizes) <= SETTINGS.max_frames
    assert max(sizes) - min(sizes) <= 1


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(RequestError, match="10 to 9 frames"):
        SplitSettings(min_frames=10, max_frames=9)


class TestRun:
    @pytest.fixture
    def videos(self, tmp_path: Path, make_video: MakeVideo) -> Path:
        folder = tmp_path / "videos"
        make_video(folder / "cut.mp4", [(30, 0.2), (12, 0.8)])
        make_video(folder / "inside" / "short.mp4", [(5, 0.2), (4, 0.9)])
        make_video(folder / "mute.mp4", [(12, 0.2)], is_mute=True)
        (folder / "broken.mkv").write_bytes(b"no video at all")
        (folder / "notes.md").write_text("not looked at")
        (folder / "cut.txt").write_text("A square moves.\n")
        return folder

    def test_each_video_gets_a_line(self, videos: Path, tmp_path: Path) -> None:
        summary = run_split(videos, tmp_path / "set", SETTINGS, Work())
        records = read_records(tmp_path / "set" / SCENES)
        assert list(records) == ["broken.mkv", "cut.mp4", "inside/short.mp4", "mute.mp4"]
        assert records["cut.mp4"] == {
            "key": "cut.mp4",
            "height": 32,
            "width": 48,
            "num_frames": 42,
            "num_scenes": 2,
            "pieces": [[0, 15], [15, 30], [30, 42]],
            "caption": "A square moves.",
        }
        assert "no scene of 9 frames, the longest has 5" in records["inside/short.mp4"][SKIPPED]
        assert "no audio stream" in records["mute.mp4"][SKIPPED]
        assert "cannot read a video" in records["broken.mkv"][SKIPPED]
        assert (summary.num_made, summary.num_kept) == (1, 0)
        assert summary.skips == {"AudioError": 1, "GeometryError": 1, "ImageError": 1}

    def test_a_second_run_makes_only_what_is_new(
        self,
        videos: Path,
        tmp_path: Path,
        make_video: MakeVideo,
        count_lines: Callable[[Path], int],
    ) -> None:
        run_split(videos, tmp_path / "set", SETTINGS, Work())
        assert count_lines(tmp_path / "set" / SCENES) == 4
        make_video(videos / "new.mp4", [(10, 0.4)])
        make_video(videos / "mute.mp4", [(12, 0.2)])
        summary = run_split(videos, tmp_path / "set", SETTINGS, Work())
        assert (summary.num_made, summary.num_kept) == (1, 1)
        assert count_lines(tmp_path / "set" / SCENES) == 5
        summary = run_split(videos, tmp_path / "set", SETTINGS, Work(retries=True))
        assert summary.skips == {"GeometryError": 1, "ImageError": 1}
        assert read_records(tmp_path / "set" / SCENES)["mute.mp4"]["pieces"] == [[0, 12]]

    def test_parts_together_are_the_whole(self, videos: Path, tmp_path: Path) -> None:
        run_split(videos, tmp_path / "whole", SETTINGS, Work())
        for part in range(3):
            run_split(videos, tmp_path / "parts", SETTINGS, Work(part=part, parts=3))
        whole, parts = (read_records(tmp_path / name / SCENES) for name in ("whole", "parts"))
        assert whole == parts

    def test_a_table_of_captions_names_videos_of_the_folder(
        self, videos: Path, tmp_path: Path
    ) -> None:
        table = tmp_path / "captions.csv"
        table.write_text("file,caption\ncut.mp4,From the table\n")
        run_split(videos, tmp_path / "set", SETTINGS, Work(), table)
        assert read_records(tmp_path / "set" / SCENES)["cut.mp4"]["caption"] == "From the table"
        table.write_text("file,caption\nelsewhere.mp4,Nobody\n")
        with pytest.raises(RequestError, match=r"1 files that are not in .*elsewhere\.mp4"):
            run_split(videos, tmp_path / "other", SETTINGS, Work(), table)

    def test_a_folder_without_videos_is_refused(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(RequestError, match="no mp4, mkv or webm file"):
                run_split(folder, tmp_path / "set", SETTINGS, Work())

    def test_what_is_no_video_is_named(self, tmp_path: Path, make_video: MakeVideo) -> None:
        folder = tmp_path / "videos"
        make_video(folder / "one.mp4", [(12, 0.2)])
        for name in ("one.txt", "a.srt", "b.SRT", "x\n.jpg", "README"):
            (folder / name).write_text("no video")
        (folder / "gone.mp4").symlink_to("nowhere")
        (folder / "loop").symlink_to(".")
        (folder / "link.mp4").symlink_to("one.mp4")
        os.mkfifo(folder / "pipe.mov")
        summary = run_split(folder, tmp_path / "set", SETTINGS, Work())
        assert list(read_records(tmp_path / "set" / SCENES)) == ["link.mp4", "one.mp4"]
        assert summary.lines() == [
            "2 made, 0 were there",
            "not taken:",
            "  1 x .jpg, which is not read as a video (first: x\\n.jpg)",
            "  2 x .srt, which is not read as a video (first: a.srt)",
            "  1 x links to folders (first: loop)",
            "  1 x links to nothing (first: gone.mp4)",
            "  1 x no suffix, which is not read as a video (first: README)",
            "  1 x pipes or devices (first: pipe.mov)",
        ]
        (folder / "one.mp4").unlink()
        with pytest.raises(RequestError, match=r"no mp4, mkv or webm file .*2 x \.srt"):
            run_split(folder, tmp_path / "set", SETTINGS, Work())

    def test_other_suffixes_are_taken(self, tmp_path: Path, make_video: MakeVideo) -> None:
        for name in ("a.mov", "b.M4V", "c.avi", "d.ts", "e.MP4"):
            made = make_video(tmp_path / "one.mp4", [(12, 0.2)])  # read by content, not by suffix
            (tmp_path / "videos").mkdir(exist_ok=True)
            made.rename(tmp_path / "videos" / name)
        summary = run_split(tmp_path / "videos", tmp_path / "set", SETTINGS, Work())
        assert (summary.num_made, summary.skips, summary.left_out) == (5, {}, {})

    def test_an_empty_caption_of_the_table_is_none(self, videos: Path, tmp_path: Path) -> None:
        table = tmp_path / "captions.csv"
        table.write_bytes(b"\xef\xbb\xbffile,caption\ncut.mp4\n")
        run_split(videos, tmp_path / "set", SETTINGS, Work(), table)
        assert read_records(tmp_path / "set" / SCENES)["cut.mp4"]["caption"] is None
