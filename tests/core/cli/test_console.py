"""What a finished job prints never makes it fail."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from turbotalk_core.cli.arguments import INTERRUPTED, REFUSED, refuse, run
from turbotalk_core.cli.console import MESSAGES, note, say
from turbotalk_core.errors import OutputError


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TextIO]]:
    """Connect standard output or error to a file of the system, in an encoding."""
    opened: list[TextIO] = []

    def connect_to(name: str, file: int | Path, encoding: str = "utf-8") -> TextIO:
        stream = open(file, "w", encoding=encoding)  # noqa: PTH123, SIM115 (a number or a path)
        opened.append(stream)
        monkeypatch.setattr(sys, name, stream)
        return stream

    yield connect_to
    monkeypatch.undo()
    for stream in opened:
        stream.close()  # writes the rest; fails if the stream was not discarded


def _open_broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_letters_that_a_stream_cannot_print_are_escaped(
    connect: Callable[..., TextIO], tmp_path: Path, encoding: str
) -> None:
    connect("stdout", tmp_path / "out", encoding)
    connect("stderr", tmp_path / "err", encoding)

    def work() -> None:
        say("模型 g\udcc4.mp4\n")
        note("模型 g\udcc4.mp4")

    assert run(work) == 0
    letters = "模型" if encoding == "utf-8" else r"\u6a21\u578b"
    sys.stderr.flush()
    assert (tmp_path / "out").read_bytes() == f"{letters} g\\udcc4.mp4\n".encode()
    assert (tmp_path / "err").read_bytes() == f"note: {letters} g\\udcc4.mp4\n".encode()


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_reader_that_has_ended_is_no_error(connect: Callable[..., TextIO], size: int) -> None:
    connect("stdout", _open_broken_pipe())
    connect("stderr", _open_broken_pipe())

    def work() -> None:
        for _ in range(3):
            say("x" * size + "\n")
            note("x" * size)
            MESSAGES.flush()
        sys.stdout.write("rest")

    assert run(work) == 0


def test_closed_streams_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def work() -> None:
        say("out\n")
        note("err")
        print("out")  # noqa: T201 (as libraries do)
        sys.stderr.write("err")

    assert run(work) == 0
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()
    monkeypatch.setattr(sys, "stderr", None)
    assert refuse(OutputError("no")) == REFUSED


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_result_that_cannot_be_written_is_an_error(
    connect: Callable[..., TextIO], capsys: pytest.CaptureFixture[str]
) -> None:
    connect("stdout", Path("/dev/full"))
    assert run(lambda: say("the plan\n")) == REFUSED
    assert "got 'No space left on device' at standard output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(5, "Input/output error", "a.mp4"), REFUSED, "'Input/output error' at a.mp4; "),
        (OSError(122, "Disk quota exceeded"), REFUSED, "got 'Disk quota exceeded'; check"),
        (OSError("plain words"), REFUSED, "got 'plain words'; check"),
        (BrokenPipeError(32, "Broken pipe"), REFUSED, "got 'Broken pipe'; check"),
        (OutputError("several\nlines \x1b[2J"), REFUSED, r"error: several lines \x1b[2J"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
    ],
)
def test_errors_of_the_system_are_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    def work() -> None:
        raise error

    assert run(work) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_bug_is_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_messages_are_a_stream_for_others(capsys: pytest.CaptureFixture[str]) -> None:
    logging.StreamHandler(MESSAGES).emit(logging.makeLogRecord({"msg": "hello"}))
    assert capsys.readouterr().err == "hello\n"
    assert MESSAGES.encoding == sys.stderr.encoding
