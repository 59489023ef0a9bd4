"""Contact sheets: pairs below each other, the real clip first, at the same times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.metrics.clips import Clip
from training.metrics.sheets import (
    CELL_HEIGHT,
    CELL_WIDTH,
    COLUMNS,
    PAIRS_PER_SHEET,
    pair_clips,
    write_sheets,
)

from .conftest import MakeVideo


def _clip(name: str, path: Path, num_frames: int = 20) -> Clip:
    return Clip(name=name, path=path, num_frames=num_frames)


def _read(file: Path) -> np.ndarray:
    with Image.open(file) as sheet:
        return np.asarray(sheet, dtype=float) / 255


def test_pairs_have_one_name(tmp_path: Path) -> None:
    generated = [_clip(name, tmp_path / "generated") for name in ("a", "b", "d")]
    real = [_clip(name, tmp_path / "real") for name in ("b", "c", "d")]
    pairs = pair_clips(generated, real)
    assert [(one.name, other.name) for one, other in pairs] == [("b", "b"), ("d", "d")]
    assert all(one.path.name == "generated" for one, _ in pairs)


@pytest.mark.slow
def test_rows_are_real_and_generated_at_the_same_moments(
    tmp_path: Path, make_video: MakeVideo
) -> None:
    dark = make_video(tmp_path / "dark.mp4", [(20, 0.2)], size=(64, 48))
    light = make_video(tmp_path / "light.mp4", [(10, 0.8), (30, 0.5)])
    pair = (_clip("x", dark, 20), _clip("x", light, 40))
    files = write_sheets([pair] * (PAIRS_PER_SHEET + 1), tmp_path / "sheets")
    assert [file.name for file in files] == ["000.png", "001.png"]
    full_HWC, pixels_HWC = (_read(file) for file in files)
    assert pixels_HWC.shape == (2 * CELL_HEIGHT, COLUMNS * CELL_WIDTH, 3)
    # Below the square that moves; the real clip's second scene begins at frame 10 of 20.
    row_of_real, row_of_generated = pixels_HWC[CELL_HEIGHT - 8], pixels_HWC[-8]
    middles = [CELL_WIDTH * column + CELL_WIDTH // 2 for column in range(COLUMNS)]
    assert np.abs(row_of_generated[middles] - 0.2).max() < 0.02
    assert np.abs(row_of_real[middles[:4]] - 0.8).max() < 0.02
    assert np.abs(row_of_real[middles[4:]] - 0.5).max() < 0.02
    assert len(full_HWC) == PAIRS_PER_SHEET * 2 * CELL_HEIGHT


def test_damaged_pairs_are_left_out(tmp_path: Path, make_video: MakeVideo) -> None:
    whole = _clip("x", make_video(tmp_path / "whole.mp4", [(20, 0.2)]))
    assert write_sheets([(whole, _clip("x", tmp_path / "gone.mp4"))], tmp_path / "sheets") == []
    assert write_sheets([], tmp_path / "sheets") == []
    assert not (tmp_path / "sheets").exists()
