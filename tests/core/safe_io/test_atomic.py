"""A file is written whole or not at all, and an error of the disk names the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread

import pytest
from av.error import InvalidDataError

from turbotalk_core.errors import GeometryError, OutputError
from turbotalk_core.safe_io.atomic import (
    make_folder,
    reports_disk_errors,
    sync_folder,
    whole_file,
    write_bytes,
    write_text,
)

NAMES = ["a.bin", "COMPLETE", "a.b.safetensors", ".hidden", "a b.md"]


def _list(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def _fail_half_way(path: Path, error: BaseException) -> None:
    with whole_file(path) as part:
        part.write_bytes(b"half")
        raise error


@pytest.mark.parametrize("name", NAMES)
def test_content_is_written_and_nothing_else_stays(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for data in (b"first", b"second, longer", b""):
        write_bytes(path, data)
        assert path.read_bytes() == data
    assert _list(tmp_path) == [name]


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "Zoë 模型\n")
    assert (tmp_path / "a.txt").read_bytes() == "Zoë 模型\n".encode()


@pytest.mark.parametrize("name", NAMES)
def test_the_old_file_stays_until_the_block_ends(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    with whole_file(path) as part:
        assert part.parent == path.parent
        assert part.name.endswith(path.suffix)
        part.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert _list(tmp_path) == [name]


@pytest.mark.parametrize("error", [ValueError, OSError, GeometryError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_old_file_alone(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error, match="in the block"):
        _fail_half_way(path, error("in the block"))
    assert path.read_bytes() == b"old"
    assert _list(tmp_path) == ["a.bin"]


def test_a_failed_block_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in the block"):
        _fail_half_way(tmp_path / "a.bin", ValueError("in the block"))
    assert _list(tmp_path) == []


@pytest.mark.parametrize("write", [lambda p: write_bytes(p, b"new"), lambda p: write_text(p, "x")])
@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_a_disk_that_refuses_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, write: Callable[[Path], None]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", refuse)
        elif step == "replace":
            patch.setattr(Path, "replace", refuse)
        else:
            patch.setattr(Path, "write_bytes", refuse)
            patch.setattr(Path, "write_text", refuse)
        with pytest.raises(OutputError, match=f"No space left on device' at {path};"):
            write(path)
    assert path.read_bytes() == b"old"
    assert _list(tmp_path) == ["a.bin"]


def test_a_real_full_disk_leaves_the_old_file(tmp_path: Path, small_files_only: None) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match=f"at {path};"):
        write_bytes(path, bytes(50_000))
    assert path.read_bytes() == b"old"
    assert _list(tmp_path) == ["a.bin"]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for path in (
        tmp_path / "folder",
        tmp_path / "file" / "a.bin",
        tmp_path / "missing" / "a.bin",
        tmp_path / ("a" * 300),
    ):
        with pytest.raises(OutputError, match=f"at {path};"):
            write_bytes(path, b"new")
    assert _list(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_user(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "a.bin", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == mode


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with whole_file(path) as part:
        left = part
    left.write_bytes(b"left by a process that was killed")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert _list(tmp_path) == ["a.bin"]


def test_writers_of_one_file_at_the_same_time_share_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    all_open = Barrier(4)

    def write(name: str) -> None:
        with whole_file(path, writer=name) as part:
            part.write_bytes(name.encode() * 1000)
            all_open.wait(10)

    threads = [Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in {name.encode() * 1000 for name in "abcd"}
    assert _list(tmp_path) == ["a.bin"]


def test_the_data_are_on_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{handle}")  # noqa: PTH112 (a link to a path)
        order.append("folder" if is_folder else "file")
        fsync(handle)

    def note_replace(path: Path, target: Path) -> Path:
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_bytes(tmp_path / "a.bin", b"new")
    assert order == ["file", "rename", "folder"]


def test_folders_are_created_with_their_parents(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert _list(tmp_path) == ["a", "b"]
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(OutputError, match=f"at {folder};"):
            make_folder(folder)


def test_errors_of_the_system_name_the_file_and_others_pass() -> None:
    path = Path("film")
    with pytest.raises(OutputError, match="got 'No space' at film;"), reports_disk_errors(path):
        raise OSError(28, "No space")
    with pytest.raises(OutputError, match="got 'plain words' at film;"), reports_disk_errors(path):
        raise OSError("plain words")
    with pytest.raises(GeometryError, match="as it was"), reports_disk_errors(path):
        raise GeometryError("as it was")
    with pytest.raises(ValueError, match="as it was"), reports_disk_errors(path):
        raise ValueError("as it was")


def test_further_kinds_of_error_are_reported_where_they_are_given() -> None:
    path = Path("film")
    error = InvalidDataError(1, "Invalid data", "part")
    with pytest.raises(InvalidDataError), reports_disk_errors(path):
        raise error
    with (
        pytest.raises(OutputError, match="got 'Invalid data' at film;"),
        reports_disk_errors(path, InvalidDataError),
    ):
        raise error
    with (
        pytest.raises(OutputError, match="got 'no strerror' at film;"),
        reports_disk_errors(path, KeyError, ValueError),
    ):
        raise ValueError("no strerror")


def test_a_folder_can_be_synced(tmp_path: Path) -> None:
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")
