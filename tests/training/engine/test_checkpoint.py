"""Checkpoints are complete or absent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from training.engine import checkpoint
from training.engine.checkpoint import (
    COMPLETE,
    STATE,
    Checkpoints,
    RunState,
    is_complete,
    mark_complete,
    read_weights,
    write_weights,
)
from training.engine.engine import EngineSettings, PlainEngine
from turbotalk_core.errors import CheckpointError, OutputError


def _state(step: int) -> RunState:
    return RunState(step=step, phase=1, phase_step=step - 1, recipe="r", streaks={"loss": 2})


@pytest.fixture
def engines() -> dict[str, PlainEngine]:
    return {"student": PlainEngine(nn.Linear(2, 2), EngineSettings())}


def test_the_newest_is_found_and_only_so_many_are_kept(
    tmp_path: Path, engines: dict[str, PlainEngine]
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.find_newest() is None
    for step in (2, 4, 10):
        path = checkpoints.save(_state(step), engines)
    assert checkpoints.find_newest() == (_state(10), path)
    assert [p.name for p in checkpoints.list_complete()] == ["00000004", "00000010"]
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["00000004", "00000010"]


@pytest.mark.parametrize("damage", ["no marker", "no file", "short file", "half marker"])
def test_what_is_not_whole_is_passed_over_and_removed(
    tmp_path: Path, engines: dict[str, PlainEngine], damage: str
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    whole = checkpoints.save(_state(2), engines)
    broken = checkpoints.save(_state(4), engines)
    weights = broken / "student" / PlainEngine.FILE
    if damage == "no marker":
        (broken / COMPLETE).unlink()
    elif damage == "no file":
        weights.unlink()
    elif damage == "short file":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        (broken / COMPLETE).rename(broken / f"{COMPLETE}.part")
    assert is_complete(whole)
    assert not is_complete(broken)
    assert checkpoints.find_newest() == (_state(2), whole)
    assert not broken.exists()


def test_the_marker_is_written_last(
    tmp_path: Path, engines: dict[str, PlainEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def check(folder: Path) -> None:
        seen.append({path.name for path in folder.rglob("*")})
        assert not is_complete(folder)

    monkeypatch.setattr(checkpoint, "mark_complete", check)
    Checkpoints(tmp_path, keep=1).save(_state(1), engines)
    assert seen == [{"student", PlainEngine.FILE, STATE}]


def test_one_of_the_same_step_takes_the_place_of_the_other(
    tmp_path: Path, engines: dict[str, PlainEngine]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = checkpoints.save(_state(1), engines)
    (path / "left").write_text("over")
    (tmp_path / "notes").write_text("of somebody")
    assert checkpoints.save(_state(1), engines) == path
    assert not (path / "left").exists()
    assert is_complete(path)
    checkpoints.find_newest()
    assert (tmp_path / "notes").exists()


def test_weights_come_back_bit_by_bit(tmp_path: Path) -> None:
    weights = {"a.b": torch.randn(3, 2).t(), "c": torch.tensor(2.5)}
    path = tmp_path / "deep" / "weights.safetensors"
    write_weights(path, weights, {"phase": 1})
    read = read_weights(path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [None, b"", b"12345678rubbish"])
def test_missing_and_damaged_weights_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="a phase begins where an earlier one ended"):
        read_weights(path)


def test_a_full_disk_ends_in_a_sentence_and_the_earlier_checkpoint_stays(
    tmp_path: Path, engines: dict[str, PlainEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    whole = checkpoints.save(_state(1), engines)
    with monkeypatch.context() as patched:
        # torch's own error, of a device that is always full.
        patched.setattr(torch, "save", partial(_save_elsewhere, torch.save))
        with pytest.raises(OutputError, match=r"00000002: the disk is full .*free some space"):
            checkpoints.save(_state(2), engines)
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]
    assert checkpoints.find_newest() == (_state(1), whole)
    after = checkpoints.save(_state(2), engines)
    assert checkpoints.find_newest() == (_state(2), after)


def _save_elsewhere(save: Callable[..., None], state: object, path: Path) -> None:
    path.write_bytes(b"half of it")
    save(state, "/dev/full")


@pytest.mark.parametrize("call", ["write_text", "mkdir"])
def test_other_errors_of_the_disk_end_in_a_sentence(
    tmp_path: Path, engines: dict[str, PlainEngine], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(_state(1), engines)

    def fail(path: Path, *_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, call, fail)
    with pytest.raises(OutputError, match="Input/output error"):
        checkpoints.save(_state(2), engines)
    assert [path.name for path in checkpoints.list_complete()] == ["00000001"]


def test_an_error_that_is_none_of_the_disk_is_raised(
    tmp_path: Path, engines: dict[str, PlainEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the ranks lost each other")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="the ranks lost each other"):
        Checkpoints(tmp_path, keep=1).save(_state(1), engines)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": 1}', b"\xff"])
def test_a_damaged_state_is_refused(
    tmp_path: Path, engines: dict[str, PlainEngine], content: bytes
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = checkpoints.save(_state(1), engines)
    (path / COMPLETE).unlink()
    (path / STATE).write_bytes(content)
    mark_complete(path)
    with pytest.raises(CheckpointError, match=r"delete .*00000001, and the run goes on"):
        checkpoints.find_newest()


@pytest.mark.parametrize("marker", ["", "{", "[1]", "null"])
def test_a_damaged_marker_marks_nothing(
    tmp_path: Path, engines: dict[str, PlainEngine], marker: str
) -> None:
    path = Checkpoints(tmp_path, keep=1).save(_state(1), engines)
    (path / COMPLETE).write_text(marker)
    assert not is_complete(path)


@pytest.mark.parametrize("damage", ["flipped", "zeros", "another file"])
def test_damaged_weights_of_an_engine_are_refused(
    tmp_path: Path, engines: dict[str, PlainEngine], damage: str
) -> None:
    path = Checkpoints(tmp_path, keep=1).save(_state(1), engines) / "student" / PlainEngine.FILE
    data = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(data[: len(data) // 2] + b"\xff" * 64 + data[len(data) // 2 + 64 :])
    elif damage == "zeros":  # as after a power cut
        path.write_bytes(bytes(len(data)))
    else:
        torch.save({"weights": 3}, path)
    with pytest.raises(CheckpointError, match=r"plain\.pt is damaged .*delete .*00000001"):
        engines["student"].load(path.parent)
