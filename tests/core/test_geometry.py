"""Strides, counts and sizes against plain arithmetic."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from turbotalk_core.errors import GeometryError
from turbotalk_core.geometry import (
    FPS,
    MAX_SIDE,
    SIZE_MULTIPLE,
    check_size,
    count_decoded_frames,
    count_frames,
    count_latent_frames,
    count_samples,
    count_video_tokens,
    cover_size,
    fit_size,
    retime,
)

RATES = st.integers(8_000, 192_000)


@given(num_samples=st.integers(0, 10**12), sample_rate=RATES)
def test_frames_are_the_floor_of_exact_seconds(num_samples: int, sample_rate: int) -> None:
    assert count_frames(num_samples, sample_rate) == int(Fraction(num_samples, sample_rate) * FPS)


def test_one_sample_less_is_one_frame_less() -> None:
    assert count_frames(16_000, 16_000) == 25
    assert count_frames(15_999, 16_000) == 24
    assert count_frames(639, 16_000) == 0


@given(num_frames=st.integers(0, 10**7), sample_rate=RATES)
def test_samples_of_frames_are_nearest_and_never_a_frame_off(
    num_frames: int, sample_rate: int
) -> None:
    exact = Fraction(num_frames * sample_rate, FPS)
    assert abs(count_samples(num_frames, sample_rate) - exact) <= Fraction(1, 2)


@given(num_latents=st.integers(1, 10**6))
def test_latent_and_decoded_frames_are_inverse(num_latents: int) -> None:
    assert count_latent_frames(count_decoded_frames(num_latents)) == num_latents


def test_known_token_counts() -> None:
    assert count_video_tokens(81, 480, 832) == 32_760  # Wan 2.1 at 480p
    assert count_video_tokens(9, 64, 96) == 3 * 4 * 6


def test_known_latent_counts() -> None:
    assert [count_latent_frames(n) for n in (1, 5, 9, 81)] == [1, 2, 3, 21]


@given(num_frames=st.integers(-10, 10**6))
def test_other_counts_are_refused_with_usable_ones(num_frames: int) -> None:
    assume(num_frames < 1 or num_frames % 4 != 1)
    with pytest.raises(GeometryError, match=f"got {num_frames} frames") as caught:
        count_latent_frames(num_frames)
    lower, upper = (int(word) for word in str(caught.value).split("use ")[1].split(" or "))
    assert upper == lower + 4
    assert count_latent_frames(lower) + 1 == count_latent_frames(upper)
    assert num_frames < upper


@pytest.mark.parametrize(
    ("height", "width", "named"),
    [
        (130, 128, "height 130"),
        (128, 120, "width 120"),
        (0, 128, "height 0"),
        (-16, 16, "-16"),
        (MAX_SIDE + 16, 16, f"height {MAX_SIDE + 16}"),
        (16, 16 * 10**400, "width 1"),
    ],
)
def test_sizes_off_the_grid_are_refused(height: int, width: int, named: str) -> None:
    with pytest.raises(GeometryError, match=f"{named}.*multiples of 16.*use"):
        check_size(height, width)


def test_frames_of_more_pixels_than_any_are_refused() -> None:
    check_size(8192, 8192)
    check_size(4096, MAX_SIDE)
    with pytest.raises(GeometryError, match="got 16384x4112; frames have at most"):
        check_size(4112, MAX_SIDE)


@given(height=st.integers(1, 8000), width=st.integers(1, 8000), area=st.integers(1, 4_000_000))
def test_a_fitted_size_is_taken_and_near(height: int, width: int, area: int) -> None:
    fitted_height, fitted_width = fit_size(height, width, area)
    check_size(fitted_height, fitted_width)
    scale = (area / (height * width)) ** 0.5
    for fitted, side in ((fitted_height, height), (fitted_width, width)):
        wanted = min(side * scale, MAX_SIDE)
        assert fitted == SIZE_MULTIPLE or abs(fitted - wanted) <= SIZE_MULTIPLE / 2 + 1e-6


def test_a_size_that_fits_stays() -> None:
    assert fit_size(480, 832, 480 * 832) == (480, 832)
    assert fit_size(1000, 1000, 128 * 128) == (128, 128)


@pytest.mark.parametrize("sides", [(0, 5, 100), (5, 0, 100), (5, 5, 0)])
def test_no_size_fits_nothing(sides: tuple[int, int, int]) -> None:
    with pytest.raises(GeometryError, match="must be positive"):
        fit_size(*sides)


@given(
    st.integers(0, 200_000),
    st.integers(0, 300),
    st.fractions(Fraction(1), Fraction(240), max_denominator=1001),
)
def test_a_frame_of_another_rate_is_the_one_on_the_screen(
    start: int, length: int, fps: Fraction
) -> None:
    shown = retime(start, start + length, fps)
    first = math.ceil(start * fps / FPS)
    for index, frame in enumerate(shown, first):
        assert 0 <= index / fps - Fraction(frame, FPS) < Fraction(1, FPS)
        assert start <= frame < start + length
    middle = start + length // 3
    assert retime(start, middle, fps) + retime(middle, start + length, fps) == shown


@given(st.integers(0, 10**7), st.integers(1, 200_000))
def test_samples_of_frames_are_rounded_halves_upwards(num_frames: int, sample_rate: int) -> None:
    assert count_samples(num_frames, sample_rate) == (2 * num_frames * sample_rate + 25) // 50
    ntsc = Fraction(30_000, 1001)
    error = count_samples(num_frames, sample_rate, ntsc) - num_frames * sample_rate / ntsc
    assert abs(error) <= Fraction(1, 2)


def test_a_strip_covers_no_video() -> None:
    assert cover_size(16, 16 * 25, 640, 640) == (640, 16_000)
    with pytest.raises(GeometryError, match="which it would cover at 640x17600, over 16384; cut"):
        cover_size(440, 16, 640, 640)
    with pytest.raises(GeometryError, match="cut it to the shape"):
        cover_size(2, 2**25, 32, 32)
