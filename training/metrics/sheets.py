"""Contact sheets: generated clips beside the real ones of the same names.

In: clips of both sides. Out: pictures. Separate because no number is to be believed unseen.

Axes: C channels, T video frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from training.data.footage import open_video
from training.data.synthetic import make_sheet
from training.metrics.clips import Clip
from turbotalk_core.errors import ImageError
from turbotalk_core.image import prepare_reference
from turbotalk_core.video.files import make_folder, reports_disk_errors, whole_file

SHEETS = "sheets"  # folder
COLUMNS = 8  # moments of a clip
PAIRS_PER_SHEET = 6
CELL_HEIGHT = 160  # pixels
CELL_WIDTH = 160  # pixels; wider pictures are cut at their sides


def pair_clips(generated: Sequence[Clip], real: Sequence[Clip]) -> list[tuple[Clip, Clip]]:
    """Find the clips of one name.

    Args:
        generated: of one side.
        real: of the other.

    Returns:
        Generated and real clip of each name that both have, in the order of the names.
    """
    by_name = {clip.name: clip for clip in real}
    return [(clip, by_name[clip.name]) for clip in generated if clip.name in by_name]


def write_sheets(pairs: Sequence[tuple[Clip, Clip]], folder: Path) -> list[Path]:
    """Draw pairs, a row of moments for the real clip and one for the generated below it.

    Args:
        pairs: generated and real clips; those that are damaged are left out.
        folder: made where it is missing.

    Returns:
        The files.

    Raises:
        OutputError: the disk refused.
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
    # The same moments of both, as the same words are said at them.
    num_frames = min(generated.num_frames, real.num_frames)
    moments = torch.linspace(0, num_frames - 1, COLUMNS).round().long().tolist()
    try:
        return [_draw_row(clip, moments) for clip in (real, generated)]
    except ImageError:
        return []  # what is wrong with it is told where it is measured


def _draw_row(clip: Clip, moments: Sequence[int]) -> Tensor:
    video = open_video(clip.path)
    return torch.stack(
        [prepare_reference(video[at], CELL_HEIGHT, CELL_WIDTH)[0] for at in moments], 1
    )
