"""Regions of several speakers in the picture, from masks or boxes to latent cells.

Masks and boxes are given in pixels of the source picture; two speakers side by side need none. The
results are regions on latent cells, with the background last, and a drawing of them for users.

Axes: H height, W width, C channels, P speakers and last the background.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import ImageError
from ..geometry import PATCH, SPATIAL_STRIDE, cover_size
from ..types import Speaker

MARGIN = 0.05  # share of a half's side left free on each side; InfiniteTalk, face_scale
# Okabe and Ito (2008): eight colours that colour-blind people can distinguish, here without black.
COLORS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167),
)  # fmt: skip
TINT = 0.35  # opacity of the colour inside a drawn region
OUTLINES_PER_SIDE = 200  # length of the shorter side divided by the thickness of an outline
LETTERS_PER_SIDE = 20  # length of the shorter side divided by the height of letters
MIN_LETTERS = 9  # pixels; smaller letters are not legible
_NUMBER = re.compile(r"[ \t]*-?[0-9]{1,9}[ \t]*")


def parse_box(text: str) -> tuple[int, int, int, int] | None:
    """Parse a box written as text.

    Args:
        text: "x,y,width,height" in pixels, each of at most nine digits.

    Returns:
        The four numbers; None if the text is no box.
    """
    numbers = text.removeprefix("\ufeff").split(",", 4)  # some editors write a byte order mark
    if len(numbers) != 4 or not all(_NUMBER.fullmatch(number) for number in numbers):
        return None
    x, y, width, height = (int(number) for number in numbers)
    return x, y, width, height


def box_mask(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> Tensor:
    """Return the mask of a box.

    Args:
        size: height and width of the source picture, pixels.
        top: first row inside.
        left: first column inside.
        bottom: first row below.
        right: first column to the right.

    Returns:
        [H, W], 1 inside, else 0.

    Raises:
        ImageError: if the box is empty or not inside the picture.
    """
    height, width = size
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ImageError(
            f"got a box from row {top}, column {left} to row {bottom}, column {right} in a "
            f"{width}x{height} picture; it must lie inside and hold at least one pixel (a box is "
            "x, y, width, height, not two corners)"
        )
    mask_HW = torch.zeros(size)
    mask_HW[top:bottom, left:right] = 1
    return mask_HW


def halve_picture(size: tuple[int, int]) -> list[Tensor]:
    """Return the masks of two speakers side by side: the halves of the picture, less a margin.

    Args:
        size: height and width of the source picture, pixels.

    Returns:
        Masks [H, W] of the left and of the right speaker, 1 inside, else 0.

    Source: InfiniteTalk, wan/multitalk.py (masks without boxes).
    """
    height, width = size
    half = width // 2
    top, bottom = int(height * MARGIN), int(height * (1 - MARGIN))
    left, right = half * MARGIN, half * (1 - MARGIN)
    return [
        box_mask(size, top, int(start + left), bottom, int(start + right)) for start in (0, half)
    ]


def find_masks(speakers: Sequence[Speaker], size: tuple[int, int]) -> list[Tensor] | None:
    """Return the mask of each speaker in the source picture.

    Args:
        speakers: speakers who all have a region; or two without one, who are side by side, the
            first on the left; or one without, who may be anywhere.
        size: height and width of the source picture, pixels.

    Returns:
        One mask [H, W] per speaker, 1 inside, else 0; None for a single speaker.

    Raises:
        ImageError: if a single speaker has a region, some speakers have one and others not, three
            or more have none, a mask differs in size from the picture, a region is empty or not
            inside the picture, or regions overlap.
    """
    # The regions that are given come first: what is wrong with one is no matter of the others.
    given = [
        (speaker, _find_mask(speaker, size)) for speaker in speakers if speaker.region is not None
    ]
    lacking = [speaker.name for speaker in speakers if speaker.region is None]
    if len(speakers) == 1:
        if lacking:
            return None
        raise ImageError(
            f"got a region for {speakers[0].name} alone, who is heard in the whole picture; add a "
            "silent speaker with a region for each bystander, or leave the region out"
        )
    if len(speakers) == len(lacking) == 2:
        return halve_picture(size)
    if lacking:
        raise ImageError(
            f"got {len(speakers)} speakers and no region for {', '.join(lacking)}; give each a "
            "mask or a box (two speakers side by side need none)"
        )
    for (one, one_HW), (other, other_HW) in combinations(given, 2):
        if shared := int((one_HW * other_HW).sum()):
            raise ImageError(
                f"the regions of {one.name} and {other.name} share {shared} pixels; draw them apart"
            )
    return [mask_HW for _, mask_HW in given]


def _find_mask(speaker: Speaker, size: tuple[int, int]) -> Tensor:
    height, width = size
    if not isinstance(speaker.region, Tensor):
        assert speaker.region is not None  # find_masks has checked it
        x, y, columns, rows = speaker.region
        for side, length in (("width", columns), ("height", rows)):
            if length < 1:
                raise ImageError(
                    f"the region of {speaker.name}: got a box of {side} {length}; a box is x, y, "
                    "width, height in pixels, and the last two are at least 1"
                )
        try:
            return box_mask(size, y, x, y + rows, x + columns)
        except ImageError as error:
            raise ImageError(f"the region of {speaker.name}: {error}") from error
    if tuple(speaker.region.shape) != size:
        rows, columns = speaker.region.shape
        raise ImageError(
            f"got a mask of {columns}x{rows} pixels for {speaker.name} on a {width}x{height} "
            "picture; draw it on the picture itself"
        )
    mask_HW = (speaker.region > 0.5).to("cpu", torch.float32)
    if not mask_HW.any():
        raise ImageError(
            f"the mask of {speaker.name} is empty: white marks the region, and no pixel is nearly "
            f"white; paint {speaker.name} white, and all else black"
        )
    return mask_HW


def fit_regions(
    masks: list[Tensor], height: int, width: int, names: Sequence[str] | None = None
) -> Tensor:
    """Resample masks of the source picture to the latent cells of the video.

    They are resized and cropped as the picture is, with nearest-neighbour sampling.

    Args:
        masks: one per speaker, [H, W] of the source picture, above 0 inside.
        height: height of the video, pixels.
        width: width of the video, pixels.
        names: names of the speakers for error messages; None numbers them.

    Returns:
        [P, height / 8, width / 8], 1 inside, else 0; the last is the background, where no speaker
        is.

    Raises:
        ImageError: if there are fewer than two masks, they differ in size, or one of them covers no
            token of the video.
    """
    shapes = {tuple(mask.shape) for mask in masks}
    if len(masks) < 2 or len(shapes) > 1:
        raise ImageError(
            f"got {len(masks)} masks of sizes {sorted(shapes)}; give each of at least two speakers "
            "a mask of the picture's size"
        )
    speakers_PHW = (torch.stack(masks) > 0).float()
    rows, columns = speakers_PHW.shape[1:]
    covered = cover_size(rows, columns, height, width)
    resized = F.interpolate(speakers_PHW.unsqueeze(0), covered, mode="nearest")
    top, left = (covered[0] - height) // 2, (covered[1] - width) // 2
    cut = resized[:, :, top : top + height, left : left + width]
    cells = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
    speakers_PHW = F.interpolate(cut, cells, mode="nearest")[0]
    names = names or [f"speaker {number}" for number in range(1, len(masks) + 1)]
    for name, region_HW in zip(names, speakers_PHW, strict=True):
        if not region_HW[::PATCH, ::PATCH].any():
            raise ImageError(
                f"nothing of the region of {name} is left in the {width}x{height} video; "
                "draw it larger, or further from the edges that are cut"
            )
    background_HW = (speakers_PHW.sum(0) == 0).float()
    return torch.cat((speakers_PHW, background_HW.unsqueeze(0)))


def draw_regions(image_HWC: Tensor, speakers: Sequence[Speaker]) -> Tensor:
    """Draw the regions of the speakers on a picture, each tinted and outlined in its own colour.

    The label of a region is the speaker's number and name, and whether the speaker is silent, as
    in "3 Carl (silent)", in white on black. The label of a single speaker is at the top of the
    picture.

    Args:
        image_HWC: the source picture, float in [0, 1]; a fourth channel is ignored.
        speakers: speakers, a valid input of ``find_masks``.

    Returns:
        [H, W, 3], float32 in [0, 1], on the CPU.

    Raises:
        ImageError: as for ``find_masks``.
    """
    height, width = image_HWC.shape[:2]
    masks = find_masks(speakers, (height, width))
    drawn_HWC = image_HWC[..., :3].to("cpu", torch.float32).clamp(0, 1).expand(-1, -1, 3).clone()
    thickness = 1 + min(height, width) // OUTLINES_PER_SIDE
    for index, mask_HW in enumerate(masks or []):
        color_C = torch.tensor(COLORS[index % len(COLORS)]) / 255
        opacity_HW1 = _blend(mask_HW, thickness).unsqueeze(2)
        drawn_HWC += opacity_HW1 * (color_C - drawn_HWC)
    labels = [
        f"{number} {speaker.name}" + " (silent)" * (speaker.waveform is None)
        for number, speaker in enumerate(speakers, 1)
    ]
    return _write_labels(drawn_HWC, labels, masks or [torch.ones(height, width)])


def _blend(mask_HW: Tensor, thickness: int) -> Tensor:
    """Return the opacity of a drawn region: ``TINT`` inside, 1 along its edge, 0 outside."""
    # A pixel is on the edge if the window around it contains outside pixels; the surroundings of
    # the picture count as outside.
    outside_HW = F.pad(1 - mask_HW, [thickness] * 4, value=1.0)
    near_HW = F.max_pool2d(outside_HW[None], 2 * thickness + 1, stride=1)[0]
    return mask_HW * torch.where(near_HW > 0, 1.0, TINT)


def _write_labels(image_HWC: Tensor, labels: Sequence[str], masks: Sequence[Tensor]) -> Tensor:
    """Write each label at the top of its mask, moved to fit the picture and to cover no other."""
    image = Image.fromarray((image_HWC * 255).round().byte().numpy())
    draw = ImageDraw.Draw(image)
    taken: list[tuple[float, float, float]] = []  # left, right and bottom, from top to bottom
    for label, mask_HW in zip(labels, masks, strict=True):
        font = _fit_font(label, image.size)
        _, _, width, height = draw.textbbox((0, 0), label, font=font)
        columns, rows = mask_HW.any(0).nonzero(), mask_HW.any(1).nonzero()
        middle = (columns[0] + columns[-1] + 1).item() / 2
        left = max(0, min(middle - width / 2, image.width - width))
        top = rows[0].item()
        for other_left, other_right, other_bottom in taken:
            if left < other_right and other_left < left + width:
                top = max(top, other_bottom)
        top = max(0, min(top, image.height - height))
        draw.rectangle((left, top, left + width, top + height), fill="black")
        draw.text((left, top), label, font=font, fill="white")
        taken.append((left, left + width, top + height))
    return torch.from_numpy(np.array(image)).float() / 255


def _fit_font(label: str, size: tuple[int, int]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font that suits the picture (width, height), smaller if the label is too long."""
    wanted = max(MIN_LETTERS, min(size) // LETTERS_PER_SIDE)
    length = ImageFont.load_default(wanted).getlength(label)
    return ImageFont.load_default(max(MIN_LETTERS, int(min(1.0, size[0] / length) * wanted)))
