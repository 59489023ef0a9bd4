"""The log contains every step once."""

from pathlib import Path

from training.engine.log import LOG, append_log, read_log, trim_log


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
