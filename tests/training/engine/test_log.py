"""The log contains every step once."""

from pathlib import Path

import pytest

from training.engine.log import LOG, append_log, read_log, trim_log
from turbotalk_core.errors import OutputError


def test_lines_after_a_step_are_taken_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trim_log(folder, 0)
    for step in (1, 2, 3):
        append_log(folder, {"step": step, "loss": step / 3})
    with (folder / LOG).open("a") as file:
        file.write('{"step": 4')  # the process was killed here
    assert [line["step"] for line in read_log(folder)] == [1, 2, 3]
    trim_log(folder, 2)
    assert read_log(folder) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}]
    assert [path.name for path in folder.iterdir()] == [LOG]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []


@pytest.mark.parametrize("line", [b"{", b"[]", b"{}", b'{"step": null}', b"\xff", b"\0\0"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    append_log(tmp_path, {"step": 1})
    with (tmp_path / LOG).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(OutputError, match=r"line 2 of .*log\.jsonl is damaged"):
        read_log(tmp_path)


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / LOG).symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"No space left on device.*log\.jsonl"):
        append_log(tmp_path, {"step": 1})
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutputError, match="run"):
        trim_log(tmp_path / "run", 0)
