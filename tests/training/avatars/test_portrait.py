"""Pictures: same seed same person, independent motion, and still pixels."""

from __future__ import annotations

import time
from dataclasses import fields

import pytest
import torch

from training.avatars import avatars
from training.avatars.avatars import draw_avatar
from training.avatars.motion import Motion, draw_motion
from training.avatars.mouth import MouthCurve
from training.avatars.portrait import paint, render
from turbotalk_core.errors import MismatchError, RequestError


def make_mouth(num_frames: int, opening: float = 0.5) -> MouthCurve:
    half_T = torch.full((num_frames,), 0.5)
    return MouthCurve(
        opening_T=torch.full((num_frames,), opening), width_T=half_T, rounding_T=half_T
    )


def make_motion(split: str, seed: int, num_frames: int) -> Motion:
    return draw_motion(
        draw_avatar(split, seed), split, seed, num_frames, make_mouth(num_frames).opening_T
    )


def test_same_seed_same_clip_and_other_split_other_person() -> None:
    assert draw_avatar("train", 5) == draw_avatar("train", 5)
    people = [draw_avatar(split, seed) for split in ("train", "heldout") for seed in range(50)]
    assert len({(p.centre, p.skin, p.face_width) for p in people}) == len(people)
    first = render(draw_avatar("train", 5), make_motion("train", 5, 4), make_mouth(4))
    second = render(draw_avatar("train", 5), make_motion("train", 5, 4), make_mouth(4))
    assert torch.equal(first, second)


def test_splits_move_differently() -> None:
    left, right = make_motion("train", 3, 30), make_motion("heldout", 3, 30)
    assert not torch.allclose(left.head_x_T, right.head_x_T)


def test_longer_motion_begins_with_the_shorter_one() -> None:
    short, long = make_motion("train", 9, 30), make_motion("train", 9, 300)
    for field in fields(Motion):
        torch.testing.assert_close(
            getattr(long, field.name)[:30], getattr(short, field.name), msg=field.name
        )


def test_frames_can_be_rendered_one_by_one() -> None:
    avatar, motion, mouth = draw_avatar("train", 2), make_motion("train", 2, 12), make_mouth(12)
    whole = render(avatar, motion, mouth)
    alone = render(avatar, motion.select(7, 8), mouth.select(7, 8))
    torch.testing.assert_close(alone[:, 0], whole[:, 7], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", [0, 1, 12])
def test_range_shape_and_stillness(seed: int) -> None:
    painting = paint(draw_avatar("train", seed), make_motion("train", seed, 40), make_mouth(40))
    frames = painting.frames_CTHW
    assert frames.shape == (3, 40, 128, 128)
    assert frames.dtype == torch.float32
    assert -1 <= frames.min() < frames.max() <= 1
    still = painting.still_mask_HW
    assert 0.2 < still.float().mean() < 0.8
    assert torch.equal(frames[:, 0, still], frames[:, -1, still])
    assert (frames - frames[:, :1]).abs()[..., still].max() == 0
    assert (frames[:, 0] - frames[:, 20]).abs()[:, ~still].max() > 0.1


def test_other_sizes_show_the_same_picture() -> None:
    avatar, motion, mouth = draw_avatar("train", 4), make_motion("train", 4, 2), make_mouth(2)
    small, large = render(avatar, motion, mouth, 64), render(avatar, motion, mouth, 128)
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert small.shape == (3, 2, 64, 64)
    assert (small - shrunk).abs().mean() < 0.03


def test_wider_mouth_opening_darkens_only_the_face() -> None:
    avatar, motion = draw_avatar("train", 4), make_motion("train", 4, 2)
    change = (
        (render(avatar, motion, make_mouth(2, 1.0)) - render(avatar, motion, make_mouth(2, 0.0)))
        .abs()
        .amax((0, 1))
    )
    rows, columns = torch.nonzero(change > 0.05, as_tuple=True)
    reach = avatar.scale * 1.6
    assert (rows - avatar.centre[1]).abs().max() < reach
    assert (columns - avatar.centre[0]).abs().max() < reach
    assert change.max() > 0.5


def test_no_palette_colour_could_be_taken_for_the_mouth() -> None:
    for palette in (
        avatars.SKINS, avatars.HAIRS, avatars.EYES, avatars.CLOTHES, avatars.BACKGROUNDS,
    ):  # fmt: skip
        for red, green, blue in palette:
            assert min(red, blue) - green < 0.02


def test_eighty_one_frames_are_fast() -> None:
    avatar, motion, mouth = draw_avatar("train", 1), make_motion("train", 1, 81), make_mouth(81)
    started = time.process_time()
    render(avatar, motion, mouth)
    assert time.process_time() - started < 5  # Usually 0.3 to 0.6 s; generous for busy machines.


def test_motion_and_mouth_must_agree() -> None:
    with pytest.raises(MismatchError):
        render(draw_avatar("train", 0), make_motion("train", 0, 3), make_mouth(4))


@pytest.mark.parametrize(("split", "seed"), [("test", 0), ("train", -1)])
def test_unknown_draws_are_refused(split: str, seed: int) -> None:
    with pytest.raises(RequestError):
        draw_avatar(split, seed)
