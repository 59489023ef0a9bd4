"""Contact sheets: generated clips beside the real ones of the same names.

Input: clips of both sides. Output: image files, so that numbers can be checked by eye.

Axes: C channels, T video frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from training.avatars.synthetic import make_sheet
from training.data.footage import open_video
from training.metrics.clips import Clip
from turbotalk_core.conditioning.reference import prepare_reference
from turbotalk_core.errors import ImageError
from turbotalk_core.safe_io.atomic import make_folder, reports_disk_errors, whole_file

SHEETS = "sheets"  # name of the folder
COLUMNS = 8  # frames per clip
PAIRS_PER_SHEET = 6
CELL_HEIGHT = 160  # pixels
CELL_WIDTH = 160  # pixels; wider frames are cropped at the sides


def pair_clips(generated: Sequence[Clip], real: Sequence[Clip]) -> list[tuple[Clip, Clip]]:
    """Pair the clips that have the same name.

    Args:
        generated: generated clips.
        real: real clips.

    Returns:
        Generated and real clip of each common name, sorted by name.
    """
    by_name = {clip.name: clip for clip in real}
    return [(clip, by_name[clip.name]) for clip in generated if clip.name in by_name]


def write_sheets(pairs: Sequence[tuple[Clip, Clip]], folder: Path) -> list[Path]:
    """Draw pairs: a row of frames for the real clip, and one for the generated clip below it.

    Args:
        pairs: generated and real clips; damaged ones are left out.
        folder: folder to write to; created if it does not exist.

    Returns:
        The files.

    Raises:
        OutputError: if a file cannot be written.
    """
    rows = [row for generated, real in pairs for row in _draw(generated, real)]
    step, files = 2 * PAIRS_PER_SHEET, []
    for first in range(0, len(rows), step):
        file = folder / f"{first // step:03d}.png"
        make_folder(folder)
        with whole_file(file) as part, reports_disk_errors(file):
            Image.fromarray(make_sheet(rows[first : first + step], COLUMNS)).save(part)
        files.append(file)
    return files


def _draw(generated: Clip, real: Clip) -> list[Tensor]:
    # The same times in both clips, because the same words are spoken then.
    num_frames = min(generated.num_frames, real.num_frames)
    moments = torch.linspace(0, num_frames - 1, COLUMNS).round().long().tolist()
    try:
        return [_draw_row(clip, moments) for clip in (real, generated)]
    except ImageError:
        return []  # the metrics report the damage


def _draw_row(clip: Clip, moments: Sequence[int]) -> Tensor:
    video = open_video(clip.path)
    return torch.stack(
        [prepare_reference(video[at], CELL_HEIGHT, CELL_WIDTH)[0] for at in moments], 1
    )
