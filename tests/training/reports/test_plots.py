"""Plots contain the given values and are small files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.reports import page as results_page
from training.reports import plots
from training.reports.plots import LABEL_WIDTH, draw_sheet, plot_log, plot_steps, require_matplotlib
from turbotalk_core.errors import MissingToolError, OutputError


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_sheet_has_a_row_for_each_strip(tmp_path: Path) -> None:
    path = tmp_path / "sheet.webp"
    colours = {"λ = 50": (200, 40, 40), "Fréchet": (40, 40, 200)}
    draw_sheet({name: np.full((32, 64, 3), c, np.uint8) for name, c in colours.items()}, path)
    sheet = _read(path)
    assert sheet.shape == (64, LABEL_WIDTH + 64, 3)
    for number, colour in enumerate(colours.values()):
        middle = sheet[32 * number + 16]
        assert np.abs(middle[LABEL_WIDTH + 32] - colour).max() < 12
        assert (middle[:LABEL_WIDTH] < 128).any()  # its label, black on white
        assert (middle[LABEL_WIDTH - 20 : LABEL_WIDTH - 4] > 240).all()


def test_a_sheet_that_is_large_loses_quality_and_at_last_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 256, 3), dtype=np.uint8)
    path = tmp_path / "sheet.webp"
    draw_sheet({"noise": noise}, path)
    full = path.stat().st_size
    monkeypatch.setattr(plots, "MAX_BYTES", full // 2)
    draw_sheet({"noise": noise}, path)
    assert path.stat().st_size < full // 2
    monkeypatch.setattr(plots, "MAX_BYTES", 100)
    with pytest.raises(OutputError, match="take fewer columns or rows"):
        draw_sheet({"noise": noise}, path)


def test_plots_of_steps_follow_from_their_numbers(tmp_path: Path) -> None:
    def plot(name: str, values: list[float]) -> np.ndarray:
        panels = {metric: {"one": {1: values, 4: [2.0]}} for metric in ("first", "second")}
        plot_steps(panels, {"first": 1.0}, "teacher", tmp_path / name)
        return _read(tmp_path / name)

    once = plot("a.png", [1.0, 3.0])
    assert np.array_equal(once, plot("b.png", [1.0, 3.0]))
    assert not np.array_equal(once, plot("c.png", [1.0, 2.0]))


@pytest.mark.slow
def test_a_log_has_a_column_per_phase(tmp_path: Path) -> None:
    curves = {
        "step": [1.0, 2.0, 3.0],
        "student/loss": [3.0, None, 1.0],
        "discriminator/logit_gap": [0.1, -0.2, 0.3],
    }
    widths = []
    for number in (1, 3):
        path = tmp_path / f"{number}.png"
        plot_log({f"phase {column}": curves for column in range(number)}, path)
        widths.append(_read(path).shape[1])
    assert widths[1] == 3 * widths[0]


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_matplotlib()
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match="pip install"):
        require_matplotlib()


def test_matplotlib_is_imported_when_used() -> None:
    assert "matplotlib" not in vars(plots)
    assert "matplotlib" not in vars(results_page)
