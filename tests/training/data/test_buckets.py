"""Small buckets: whom they join, at which size, and who is left out."""

from __future__ import annotations

import torch

from training.data.buckets import crop_to, merge_small


def test_large_buckets_stay_as_they_are() -> None:
    buckets = {(64, 96, 1): [1, 2, 3], (96, 64, 1): [4, 5, 6]}
    merged, notes = merge_small(buckets, 3)
    assert merged == buckets
    assert notes == []


def test_a_small_one_joins_the_nearest_that_lies_inside_it() -> None:
    buckets = {(64, 96, 1): [1, 2, 3], (64, 64, 1): [4, 5, 6], (80, 96, 1): [7]}
    merged, (note,) = merge_small(buckets, 3)
    assert merged == {(64, 96, 1): [7, 1, 2, 3], (64, 64, 1): [4, 5, 6]}
    assert note == "1 samples of 96x80 with 1 voices are cropped to 96x64, as a step takes 3"


def test_two_small_ones_meet_at_their_common_size() -> None:
    buckets = {(80, 96, 1): [1], (96, 80, 1): [2, 3]}
    merged, _ = merge_small(buckets, 3)
    assert merged == {(80, 80, 1): [1, 2, 3]}
    # A large bucket is never cropped for a small one.
    buckets = {(80, 96, 1): [1], (96, 80, 1): [2, 3, 4]}
    merged, (note,) = merge_small(buckets, 3)
    assert merged == {(96, 80, 1): [2, 3, 4]}
    assert "left out" in note


def test_no_face_is_cut_off_and_voices_do_not_mix() -> None:
    buckets = {(64, 64, 1): [1, 2], (64, 128, 1): [3], (64, 64, 2): [4]}
    merged, notes = merge_small(buckets, 2)
    assert merged == {(64, 64, 1): [1, 2]}
    assert len(notes) == 2


def test_nothing_may_be_left() -> None:
    assert merge_small({(64, 64, 1): [1]}, 2)[0] == {}


def test_the_middle_is_cut_out() -> None:
    picture = torch.arange(24).view(4, 6)
    assert crop_to(picture, 2, 4).tolist() == [[7, 8, 9, 10], [13, 14, 15, 16]]
    assert crop_to(picture, 4, 6).equal(picture)
