"""Weight files: the public one, or another one that the report identifies."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from training.metrics import weights
from training.metrics.weights import I3D, KNOWN_FILES, SYNCNET, find_weights
from turbotalk_core.errors import CheckpointError


@pytest.mark.parametrize("name", KNOWN_FILES)
def test_a_missing_file_is_named_with_its_source(name: str, tmp_path: Path) -> None:
    known = KNOWN_FILES[name]
    with pytest.raises(CheckpointError) as caught:
        find_weights(tmp_path, name)
    for part in (name, str(tmp_path), known.what, known.source, "not ours to ship"):
        assert part in str(caught.value)


def test_a_file_of_no_known_checksum_is_recorded(tmp_path: Path) -> None:
    (tmp_path / I3D).write_bytes(b"network")
    path, used = find_weights(tmp_path, I3D)
    assert path == tmp_path / I3D
    assert (used.file, used.bytes, used.is_public) == (I3D, 7, False)
    assert used.sha256 == hashlib.sha256(b"network").hexdigest()


def test_another_file_than_the_public_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / SYNCNET).write_bytes(b"network")
    with pytest.raises(CheckpointError, match=r"not 961e8696.*cannot be compared"):
        find_weights(tmp_path, SYNCNET)
    digest = hashlib.sha256(b"network").hexdigest()
    known = {SYNCNET: replace(KNOWN_FILES[SYNCNET], sha256=digest)}
    monkeypatch.setattr(weights, "KNOWN_FILES", known)
    assert find_weights(tmp_path, SYNCNET)[1].is_public
