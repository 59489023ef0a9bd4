"""Regions: conversion of a user's drawing to latent cells of the video."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.conditioning.regions import (
    COLORS,
    box_mask,
    draw_regions,
    find_masks,
    fit_regions,
    halve_picture,
    parse_box,
)
from turbotalk_core.errors import ImageError, RequestError
from turbotalk_core.types import Speaker, Waveform

VOICE = Waveform(samples_CS=torch.zeros(1, 640), sample_rate=16_000)
SIZE = (40, 60)


def test_a_box_holds_its_pixels() -> None:
    mask_HW = box_mask((10, 20), 2, 5, 4, 9)
    assert mask_HW.sum() == 2 * 4
    assert mask_HW[2:4, 5:9].all()


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (3, 5, 2, 9), (0, 0, 11, 5), (0, -1, 5, 5)])
def test_a_box_that_is_none_is_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ImageError, match="20x10 picture"):
        box_mask((10, 20), *box)


@pytest.mark.parametrize("size", [(50, 60), (40, 80), (160, 320)])
def test_halves_are_apart_and_leave_a_margin(size: tuple[int, int]) -> None:
    left, right = halve_picture(size)
    half = size[1] // 2
    assert not left[:, half:].any()
    assert not right[:, :half].any()
    for mask_HW in (left, right):
        assert 0.8 * size[0] * half <= mask_HW.sum() <= 0.85 * size[0] * half


def test_regions_follow_the_cut_of_the_picture() -> None:
    # A 64 x 128 picture becomes 64 x 64: a quarter is cut off on each side.
    masks = [box_mask((64, 128), 0, 0, 64, 64), box_mask((64, 128), 0, 64, 32, 128)]
    regions_PHW = fit_regions(masks, 64, 64)
    assert regions_PHW.shape == (3, 8, 8)
    first, second, background = regions_PHW
    assert first[:, :4].all()
    assert not first[:, 4:].any()
    assert second[:4, 4:].all()
    assert torch.equal(background, 1 - first - second)


def test_what_is_cut_off_is_named() -> None:
    masks = [box_mask((64, 128), 0, 40, 64, 64), box_mask((64, 128), 0, 100, 64, 128)]
    with pytest.raises(ImageError, match="region of speaker 2 is left in the 64x64 video"):
        fit_regions(masks, 64, 64)
    with pytest.raises(ImageError, match="region of Bob is left in the 64x64 video"):
        fit_regions(masks, 64, 64, ["Anna", "Bob"])


def test_masks_must_be_several_and_of_one_size() -> None:
    mask_HW = torch.ones(20, 20)
    with pytest.raises(ImageError, match="got 1 masks"):
        fit_regions([mask_HW], 16, 16)
    with pytest.raises(ImageError, match=r"\(20, 20\), \(20, 21\)"):
        fit_regions([mask_HW, torch.ones(20, 21)], 16, 16)


def _speak(*regions: torch.Tensor | tuple[int, int, int, int] | None) -> list[Speaker]:
    names = ("Anna", "Bob", "Carl")
    return [Speaker(name=n, region=r) for n, r in zip(names, regions, strict=False)]


def test_a_box_and_the_same_box_painted_are_one() -> None:
    painted = box_mask(SIZE, 5, 30, 25, 40) * 0.9 + 0.1
    masks = find_masks(_speak((30, 5, 10, 20), (0, 0, 30, 40)), SIZE)
    assert masks is not None
    assert torch.equal(masks[0], box_mask(SIZE, 5, 30, 25, 40))
    assert torch.equal(masks[1], box_mask(SIZE, 0, 0, 40, 30))
    as_painted = find_masks(_speak(painted, (0, 0, 30, 40)), SIZE)
    assert as_painted is not None
    assert torch.equal(as_painted[0], masks[0])
    as_bits = find_masks(_speak(painted > 0.5, (0, 0, 30, 40)), SIZE)
    assert as_bits is not None
    assert torch.equal(as_bits[0], masks[0])


def test_one_needs_no_region_and_two_share_the_picture() -> None:
    assert find_masks(_speak(None), SIZE) is None
    masks = find_masks(_speak(None, None), SIZE)
    assert masks is not None
    for mask_HW, half_HW in zip(masks, halve_picture(SIZE), strict=True):
        assert torch.equal(mask_HW, half_HW)


BOX = (0, 0, 20, 20)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([BOX], "region for Anna alone, .*add a silent speaker with a region for each bystander"),
        ([None] * 3, "got 3 speakers and no region for Anna, Bob, Carl"),
        ([BOX, None], "no region for Bob; give each a mask or a box"),
        ([None, BOX, None], "no region for Anna, Carl"),
        ([BOX, torch.ones(40, 61)], "mask of 61x40 pixels for Bob on a 60x40 picture"),
        ([BOX, torch.full(SIZE, 0.5)], "mask of Bob is empty"),
        ([BOX, torch.full(SIZE, float("nan"))], "mask of Bob is empty"),
        ([BOX, (50, 0, 11, 5)], "region of Bob: got a box from row 0, column 50 .* 60x40 picture"),
        ([BOX, (50, 0, 0, 5)], "region of Bob: got a box"),
        ([(50, 0, 0, 5), None], "region of Anna: got a box of width 0"),
        ([None, (50, 0, 0, 5)], "region of Bob: got a box of width 0"),
        ([None, BOX, (50, 0, 5, 0)], "region of Carl: got a box of height 0"),
        ([(20, 20, -5, 5), None], "region of Anna: got a box of width -5"),
        ([(20, 20, 5, -5), None], "region of Anna: got a box of height -5"),
        ([(-1, 0, 5, 5), None], "region of Anna: got a box from row 0, column -1 .*two corners"),
        ([(0, 0, 0, 0)], "region of Anna: got a box of width 0"),
        ([BOX, BOX], "Anna and Bob share 400 pixels"),
        ([None, torch.zeros(SIZE)], "mask of Bob is empty: white marks the region"),
        ([BOX, (40, 0, 5, 5), (19, 18, 5, 5)], "Anna and Carl share 2 pixels; draw them apart"),
    ],
)
def test_regions_that_cannot_be_are_refused_by_name(
    regions: list[torch.Tensor | tuple[int, int, int, int] | None], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        find_masks(_speak(*regions), SIZE)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_regions_are_drawn_in_colours_of_their_own(channels: int) -> None:
    speakers = _speak((10, 100, 80, 90), (110, 100, 80, 90))
    image_HWC = torch.full((200, 200, channels), 0.5)
    drawn_HWC = draw_regions(image_HWC, speakers)
    assert drawn_HWC.shape == (200, 200, 3)
    assert (drawn_HWC[:90] == drawn_HWC[0, 0]).all()  # above both
    torch.testing.assert_close(drawn_HWC[0, 0], torch.full((3,), 0.5), rtol=0, atol=1 / 255)
    for color, left in zip(COLORS, (10, 110), strict=False):
        color_C = torch.tensor(color) / 255
        outline_C, inside_C = drawn_HWC[180, left], drawn_HWC[150, left + 40]
        torch.testing.assert_close(outline_C, color_C, rtol=0, atol=1 / 255)
        torch.testing.assert_close(inside_C, 0.35 * color_C + 0.65 * 0.5, rtol=0, atol=1 / 255)
    assert image_HWC.eq(0.5).all()


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (300, 120), (270, 480)])
def test_labels_are_white_on_black_and_whole(size: tuple[int, int], level: float) -> None:
    lone = draw_regions(torch.full((*size, 3), level), [Speaker(name="An", waveform=VOICE)])
    grey = lone.mean(2)
    label = (grey - grey[-1, -1]).abs() > 0
    rows, columns = label.any(1).nonzero(), label.any(0).nonzero()
    assert rows[-1] - rows[0] >= 5  # capitals, on black nothing else is seen
    assert columns[0] > 0
    assert columns[-1] < size[1] - 1
    text = lone[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert text.min() < 0.1
    assert text.max() > 0.7


def _count_black_rows(*speakers: Speaker) -> int:
    drawn_HWC = draw_regions(torch.full((240, 320, 3), 0.5), speakers)
    return int((drawn_HWC[:, :160] == 0).all(2).any(1).sum())


def test_labels_of_neighbours_cover_no_other() -> None:
    first, near, far = (
        Speaker(name="Anna", region=(x, 0, 4, 240), waveform=VOICE) for x in (0, 4, 300)
    )
    assert _count_black_rows(first, near) == pytest.approx(2 * _count_black_rows(first, far), abs=2)


def test_who_is_silent_is_said() -> None:
    image_HWC = torch.full((240, 320, 3), 0.5)
    widths = []
    for voice in (VOICE, None):
        drawn_HWC = draw_regions(image_HWC, [Speaker(name="Anna", waveform=voice)])
        widths.append(int((drawn_HWC == 0).all(2).any(0).sum()))
    assert widths[1] > 1.5 * widths[0]


def test_what_cannot_be_is_not_drawn() -> None:
    with pytest.raises(ImageError, match="share"):
        draw_regions(torch.zeros(*SIZE, 3), _speak(BOX, BOX))


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("1,2,30,40", (1, 2, 30, 40)),
        (" 1 , -2,\t30,40 ", (1, -2, 30, 40)),
        ("1,2,3\x1c,4", None),
        ("1,2,3,4\n", None),
        ("999999999,0,0,0", (999_999_999, 0, 0, 0)),
        ("1,2,3", None),
        ("1,2,3,4,5", None),
        ("--1,2,3,4", None),
        ("1.0,2,3,4", None),
        ("\ufeff1,2,3,4", (1, 2, 3, 4)),
        ("1,2,3,4\r\n", None),
        ("1e9,2,3,4", None),
        ("0x1,2,3,4", None),
        ("1_0,2,3,4", None),
        ("\u0661,2,3,4", None),
        ("1000000000,0,0,0", None),
        ("9" * 5_000 + ",0,0,0", None),
        ("," * 10**6, None),
        ("face.png", None),
        ("", None),
    ],
)
def test_a_box_is_read_as_it_is_typed(text: str, box: tuple[int, int, int, int] | None) -> None:
    assert parse_box(text) == box


@given(st.text(alphabet="0123456789,- ") | st.text())
def test_any_text_is_a_box_in_the_picture_or_is_refused(text: str) -> None:
    box = parse_box(text)
    if box is None:
        return
    speakers = [Speaker(name="Anna", region=box), Speaker(name="Ben", region=(59, 39, 1, 1))]
    try:
        masks = find_masks(speakers, SIZE)
    except ImageError:
        return
    assert masks is not None
    assert masks[0].sum() == box[2] * box[3]


@given(st.text(min_size=1, max_size=100))
def test_any_name_is_drawn_or_refused(name: str) -> None:
    try:
        speaker = Speaker(name=name)
    except RequestError:
        return
    assert draw_regions(torch.zeros(30, 40, 3), [speaker]).shape == (30, 40, 3)
