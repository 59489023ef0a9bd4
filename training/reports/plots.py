"""Plots and contact sheets of a report, small enough to be committed.

Matplotlib is imported when used, because no other module needs it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.outputs import write_picture
from turbotalk_core.errors import MissingToolError, OutputError
from turbotalk_core.safe_io.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[float | None]

MAX_BYTES = 300_000  # per image file
DPI = 80
LABEL_WIDTH = 220  # pixels, at the left of a contact sheet
QUALITIES = (85, 75, 65, 50, 35, 20)  # of WebP, tried in order until a sheet is small enough
LOG_PANELS = {"loss": ("loss",), "logits": ("gap", "accuracy"), "motion": ("motion",)}


def require_matplotlib() -> None:
    """Check that plots can be drawn, before anything is measured.

    Raises:
        MissingToolError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingToolError(
            "plots need matplotlib, which is not installed: pip install -e '.[train]'"
        )


def plot_steps(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    levels: Mapping[str, float],
    level_name: str,
    path: Path,
) -> None:
    """Plot metrics by number of steps: medians as lines, all values as dots.

    Args:
        panels: values at each number of steps, by metric and series.
        levels: height of a dashed line by metric, for metrics that have one.
        level_name: label of that line.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    columns = 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.4 * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (metric, series) in zip(axes, panels.items(), strict=False):
        for name, by_steps in series.items():
            steps = sorted(by_steps)
            medians = [float(np.median(by_steps[step])) for step in steps]
            (line,) = axis.plot(steps, medians, marker="o", label=name)
            for step in steps:
                values = by_steps[step]
                axis.plot([step] * len(values), values, ".", color=line.get_color(), alpha=0.4)
        if metric in levels:
            axis.axhline(levels[metric], color="0.4", linestyle="--", label=level_name)
        axis.set(title=metric, xlabel="steps", xticks=range(1, 5), xlim=(0.8, 4.2))
        axis.grid(alpha=0.3)
    figure.legend(*axes.base[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    _save(figure, path)


def plot_log(phases: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Plot the curves of a run: a column per phase; rows of losses, logits and motion.

    Args:
        phases: for each phase the step numbers under ``step``, and the values of each term at these
            steps; None where a term has no value.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    size = (3.6 * len(phases), 2.8 * len(LOG_PANELS))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(LOG_PANELS), len(phases), squeeze=False)
    for column, (phase, curves) in enumerate(phases.items()):
        for row, (title, endings) in enumerate(LOG_PANELS.items()):
            axis = axes[row, column]
            shown = {name: curve for name, curve in curves.items() if name.endswith(endings)}
            if not shown:
                axis.set_axis_off()
                continue
            for name, curve in shown.items():
                there = [
                    (x, y) for x, y in zip(curves["step"], curve, strict=True) if y is not None
                ]
                axis.plot(*zip(*there, strict=True), label=name, linewidth=1)
            if title == "loss" and all(y is None or y > 0 for c in shown.values() for y in c):
                axis.set_yscale("log")
            axis.set_title(f"{phase}: {title}", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6)
    _save(figure, path)


def draw_sheet(rows: Mapping[str, np.ndarray], path: Path) -> None:
    """Write strips of frames below each other, each with its label.

    Args:
        rows: strips [H, W, 3], uint8, all of one size, by label.
        path: WebP file to write, with the best quality that fits into ``MAX_BYTES``.

    Raises:
        OutputError: if the file is too large even at the lowest quality.
    """
    import matplotlib

    # This font ships with matplotlib, so it exists wherever this runs; it has λ and é.
    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(font_file, 13)
    strips = list(rows.values())
    height, width = strips[0].shape[:2]
    sheet = Image.new("RGB", (LABEL_WIDTH + width, height * len(strips)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, strip) in enumerate(rows.items()):
        sheet.paste(Image.fromarray(strip), (LABEL_WIDTH, number * height))
        draw.text((6, (number + 0.5) * height), label, fill="black", font=font, anchor="lm")
    for quality in QUALITIES:
        memory = io.BytesIO()
        sheet.save(memory, "WEBP", quality=quality, method=6)
        if memory.tell() < MAX_BYTES:
            write_bytes(path, memory.getvalue())
            return
    raise OutputError(
        f"{path.name} is larger than {MAX_BYTES} bytes at any quality; take fewer columns or rows"
    )


def _save(figure: Figure, path: Path) -> None:
    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    with Image.open(memory) as picture:  # lines need few colours
        write_picture(path, picture.convert("RGB").quantize(64))
