"""The file to write is checked before any work."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from turbotalk_core.cli.output import check_output, take_folder
from turbotalk_core.errors import OutputError, RequestError, TurboTalkError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Folder with an input, links to it, a folder, a file, a pipe and an unfinished take."""
    (tmp_path / "input.mp4").write_bytes(b"input")
    (tmp_path / "link.mp4").symlink_to("input.mp4")
    os.link(tmp_path / "input.mp4", tmp_path / "hard.mp4")
    (tmp_path / "same").symlink_to(".")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "nowhere.mp4").symlink_to("missing/talk.mp4")
    (tmp_path / "other.mp4").symlink_to("talk.avi")
    (tmp_path / "made.mp4.take").mkdir()
    (tmp_path / "made.mp4.take" / "take.lock").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "must be one that ends in .mp4"),
        ("..", "must be one that ends in .mp4"),
        (".mp4", "must be one that ends in .mp4"),
        ("talk.avi", "'talk.avi'; it must be one that ends in .mp4"),
        ("other.mp4", "'talk.avi'; it must be one that ends in .mp4"),
        ("folder.mp4", "folder.mp4 is a folder; name a file in it, as in .*folder.mp4/talk.mp4"),
        ("file/talk.mp4", "'Not a directory'.*existing folder"),
        ("missing/talk.mp4", "'No such file or directory'.*existing folder"),
        ("nowhere.mp4", "'No such file or directory'.*existing folder"),
        ("pipe.mp4", "is no file but a device"),
        ("loop.mp4", "[Ll]oop"),
        ("x" * 300 + ".mp4", "'File name too long'"),
        ("a\0.mp4", "no file can have this name"),
        ("\ud800.mp4", "no file can have this name"),
        ("made.mp4.take/talk.mp4", "lies inside of .*made.mp4.take, the unfinished video"),
        ("input.mp4", "also an input .*would be replaced"),
        ("./input.mp4", "also an input"),
        ("same/input.mp4", "also an input"),
        ("folder.mp4/../input.mp4", "also an input"),
        ("link.mp4", "also an input"),
        ("hard.mp4", "also an input"),
    ],
)
def test_what_cannot_be_written_is_refused(place: Path, name: str, message: str) -> None:
    before = sorted(place.rglob("*"))
    path = place / name if name else Path(name)
    with pytest.raises(TurboTalkError, match=message):
        check_output(path, [place / "missing.png", place / "input.mp4"])
    assert sorted(place.rglob("*")) == before
    assert (place / "input.mp4").read_bytes() == b"input"


def test_an_input_inside_of_the_take_is_refused(place: Path) -> None:
    for folder in ("made.mp4.take", "same/made.mp4.take"):
        with pytest.raises(RequestError, match=r"take.lock, which lies inside .*would be deleted"):
            check_output(place / "made.mp4", [place / folder / "take.lock"])


def test_a_folder_without_access_is_refused(
    place: Path, read_only: Callable[[Path], AbstractContextManager[None]]
) -> None:
    take_folder(place / "talk.mp4").mkdir()  # of an earlier run
    with (
        read_only(place),
        pytest.raises(OutputError, match=r"Permission denied' at .*/talk.mp4"),
    ):
        check_output(place / "talk.mp4", [])


@pytest.mark.parametrize("name", ["talk.mp4", "g\udcc4\udce3.mp4", "模型.mp4", "a b'.mp4"])
def test_a_file_that_can_be_written_is_named(place: Path, name: str) -> None:
    inputs = [place / "input.mp4", Path("-"), Path("1,2,3,4"), Path("a\0b"), Path("\ud800")]
    for path in (place / name, place / "same" / name):
        assert check_output(path, inputs) == place.resolve() / name
    (place / name).write_bytes(b"old")
    (place / "new.mp4").symlink_to(name)
    assert check_output(place / "new.mp4", inputs) == place.resolve() / name
    assert take_folder(place / name).name == f"{name}.take"
