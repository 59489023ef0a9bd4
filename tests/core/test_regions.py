"""Regions: from what a user draws on the picture to cells of the video."""

import pytest
import torch

from turbotalk_core.errors import ImageError
from turbotalk_core.regions import box_mask, fit_regions, halve_picture


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


def test_masks_must_be_several_and_of_one_size() -> None:
    mask_HW = torch.ones(20, 20)
    with pytest.raises(ImageError, match="got 1 masks"):
        fit_regions([mask_HW], 16, 16)
    with pytest.raises(ImageError, match=r"\(20, 20\), \(20, 21\)"):
        fit_regions([mask_HW, torch.ones(20, 21)], 16, 16)
