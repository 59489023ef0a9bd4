"""Two processes never hold the same outputs, and a killed one blocks nobody."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from tests.forks import run_in_child
from training.outputs import hold, hold_files, is_held, write_picture
from turbotalk_core.errors import OutputError, RequestError


def _try_to_hold(path: Path) -> None:
    with hold(path, "does the same"):
        pass


def _hold_and_die(path: Path) -> None:
    with hold(path, "dies"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with hold(path, "does the same"):
        assert is_held(path)
        assert run_in_child(_try_to_hold, path) == 1
        with pytest.raises(OutputError, match="another process does the same; wait until it ends"):
            _try_to_hold(path)
    assert not is_held(path)
    assert run_in_child(_try_to_hold, path) == 0


def test_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    assert run_in_child(_hold_and_die, path) == -signal.SIGKILL
    assert path.exists()
    _try_to_hold(path)


def test_files_are_held_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    report, sheet = tmp_path / "deep" / "a.json", tmp_path / "deep" / "a.png"
    with hold_files(report, None, report, picture=sheet):
        with pytest.raises(OutputError, match=r"is making .*a\.png"), hold_files(sheet):
            pass
        with hold_files(tmp_path / "deep" / "b.json"):
            pass
    assert list(report.parent.iterdir()) == []
    with hold_files(report, sheet):
        pass


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the user")
    for path in (tmp_path, tmp_path / "file" / "a.json"):
        with pytest.raises(OutputError, match=tmp_path.name), hold_files(path):
            pytest.fail("it began to work")
    with pytest.raises(RequestError, match=r"\.png or \.webp"), hold_files(picture=Path("a.doc")):
        pytest.fail("it began to work")


def test_a_picture_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, picture = tmp_path / "new" / "a.png", Image.new("RGB", (4, 4))
    write_picture(path, picture)
    before = path.read_bytes()

    def fill_the_disk(_: object, part: Path, **options: object) -> None:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(OutputError, match="No space left"):
        write_picture(path, picture)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["a.png"]
