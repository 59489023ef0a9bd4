"""Distances against closed forms, or against their definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from torch import Tensor

from training.metrics.distances import (
    KID_SUBSETS,
    choose_subset_size,
    frechet_distance,
    kernel_distance,
    subset_kernel_distances,
)
from turbotalk_core.errors import RequestError


def _draw(num_samples: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales_D = torch.rand(width, generator=generator) + 0.1
    samples_ND = torch.randn(num_samples, width, generator=generator, dtype=torch.float64)
    return samples_ND * scales_D + torch.randn(width, generator=generator)


SETS = st.builds(
    _draw,
    num_samples=st.integers(2, 40),
    width=st.just(5),
    seed=st.integers(0, 1000),
)


class TestFrechetDistance:
    """Gaussians with a distance of known closed form."""

    left_ND = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).double()

    def test_equal_sets_are_at_no_distance(self) -> None:
        assert frechet_distance(self.left_ND, self.left_ND) == pytest.approx(0, abs=1e-6)

    def test_a_shift_counts_its_square(self) -> None:
        shift_D = torch.tensor([3.0, 0.0, 0.0, 4.0, 0.0, 0.0])
        assert frechet_distance(self.left_ND, self.left_ND + shift_D) == pytest.approx(25)

    def test_a_stretch_counts_the_spread_it_adds(self) -> None:
        centred_ND = self.left_ND - self.left_ND.mean(0)
        # (3 s - s)^2 summed over the directions: four times the trace of the covariance.
        expected = 4 * float(centred_ND.var(0).sum())
        assert frechet_distance(centred_ND, 3 * centred_ND) == pytest.approx(expected)

    def test_a_turn_counts_by_the_square_root_of_the_product(self) -> None:
        # Variances 1 and 9 against 9 and 1: the sum over both axes of (3 - 1)^2.
        corners_ND = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        unit_ND = corners_ND * math.sqrt(3 / 4)
        left_ND = unit_ND * torch.tensor([1.0, 3.0])
        right_ND = unit_ND * torch.tensor([3.0, 1.0])
        assert frechet_distance(left_ND, right_ND) == pytest.approx(8)

    def test_fewer_samples_than_features_are_still_a_distance(self) -> None:
        few_ND = self.left_ND[:3]
        assert frechet_distance(few_ND, few_ND) == pytest.approx(0, abs=1e-5)
        assert frechet_distance(few_ND, few_ND + 1) == pytest.approx(6, abs=1e-4)

    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (2.0, 1.0), (0.0, 3.0), (-1.5, 0.2)])
    def test_one_dimension(self, mean: float, std: float) -> None:
        unit_N1 = self.left_ND[:, :1]
        unit_N1 = (unit_N1 - unit_N1.mean()) / unit_N1.std()
        expected = mean**2 + (std - 1) ** 2
        assert frechet_distance(unit_N1, std * unit_N1 + mean) == pytest.approx(expected, abs=1e-12)

    def test_more_features_than_samples_agree_with_the_definition(self) -> None:
        # 2048 features of few frames: the product of the covariances has hardly any rank.
        left_ND, right_ND = _draw(30, 120, 0), _draw(25, 120, 1)
        left_DD, right_DD = (np.cov(side.numpy(), rowvar=False) for side in (left_ND, right_ND))
        # The square root of the first, of rank 29; the product then has rank 24. What rounding
        # makes of the other eigenvalues is no part of the distance.
        values_D, axes_DD = linalg.eigh(left_DD)
        root_DD = axes_DD[:, -29:] * np.sqrt(values_D[-29:]) @ axes_DD[:, -29:].T
        eigenvalues = linalg.eigvalsh(root_DD @ right_DD @ root_DD)[-24:]
        shift = float((left_ND.mean(0) - right_ND.mean(0)).square().sum())
        expected = shift + np.trace(left_DD + right_DD) - 2 * np.sqrt(eigenvalues).sum()
        assert frechet_distance(left_ND, right_ND) == pytest.approx(expected, rel=1e-6)

    @given(SETS, SETS)
    def test_it_is_symmetric_and_never_negative(self, left_ND: Tensor, right_ND: Tensor) -> None:
        distance = frechet_distance(left_ND, right_ND)
        assert distance > -1e-9
        assert frechet_distance(right_ND, left_ND) == pytest.approx(distance, abs=1e-9)
        assert frechet_distance(left_ND, left_ND) == pytest.approx(0, abs=1e-9)

    @given(SETS, SETS, st.integers(0, 100))
    def test_it_does_not_see_turns_and_moves_of_both(
        self, left_ND: Tensor, right_ND: Tensor, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        turn_DD = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
        moved = [side @ turn_DD + 3 for side in (left_ND, right_ND)]
        assert frechet_distance(*moved) == pytest.approx(
            frechet_distance(left_ND, right_ND), abs=1e-8
        )


class TestKernelDistance:
    def test_it_is_what_its_definition_says(self) -> None:
        left, right = _draw(5, 3, 0), _draw(7, 3, 1)

        def kernel(x: Tensor, y: Tensor) -> float:
            return (float(x @ y) / 3 + 1) ** 3

        def within(side: Tensor) -> float:
            pairs = [(i, j) for i in range(len(side)) for j in range(len(side)) if i != j]
            return sum(kernel(side[i], side[j]) for i, j in pairs) / len(pairs)

        across = sum(kernel(x, y) for x in left for y in right) / (5 * 7)
        expected = within(left) + within(right) - 2 * across
        assert kernel_distance(left, right) == pytest.approx(expected)

    def test_it_is_unbiased_where_the_fréchet_distance_is_not(self) -> None:
        draws = [(_normal(6, 2 * seed), _normal(6, 2 * seed + 1)) for seed in range(600)]
        estimates = torch.tensor([kernel_distance(*sides) for sides in draws])
        error = estimates.std() / math.sqrt(len(draws))
        assert abs(estimates.mean()) < 3 * error
        assert min(frechet_distance(*sides) for sides in draws) > 0

    def test_sets_of_two_kinds_are_apart(self) -> None:
        near = kernel_distance(_normal(50, 0), _normal(50, 1))
        assert kernel_distance(_normal(50, 0), _normal(50, 1) + 1) > 10 * abs(near)

    def test_subsets_follow_from_the_seed(self) -> None:
        sides = _normal(40, 0), _normal(30, 1)
        estimates = subset_kernel_distances(*sides, seed=3)
        assert estimates.shape == (KID_SUBSETS,)
        assert estimates.std() > 0
        assert torch.equal(estimates, subset_kernel_distances(*sides, seed=3))
        assert not torch.equal(estimates, subset_kernel_distances(*sides, seed=4))
        error = float(estimates.std()) / math.sqrt(KID_SUBSETS)
        assert float(estimates.mean()) == pytest.approx(kernel_distance(*sides), abs=4 * error)

    @pytest.mark.parametrize(
        ("numbers", "size"), [((9000, 2000), 1000), ((300, 9000), 150), ((3, 2), 2)]
    )
    def test_subsets_are_half_of_the_smaller_set_at_most(
        self, numbers: tuple[int, int], size: int
    ) -> None:
        assert choose_subset_size(*numbers) == size


def _normal(num_samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)


def test_the_library_gives_the_same_kernel_distance() -> None:
    from torch_fidelity.metric_kid import mmd2, polynomial_kernel

    left, right = _draw(40, 8, 0), _draw(40, 8, 1)
    pairs = ((left, left), (left, right), (right, right))
    kernels = [polynomial_kernel(one.numpy(), other.numpy()) for one, other in pairs]
    assert kernel_distance(left, right) == pytest.approx(mmd2(*kernels))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_too_few_samples_and_unequal_widths_are_refused(
    distance: Callable[[Tensor, Tensor], float],
) -> None:
    with pytest.raises(RequestError, match=r"\(1, 4\) and \(9, 4\); both sets need at least two"):
        distance(_normal(1, 0), _normal(9, 0))
    with pytest.raises(RequestError, match="one width"):
        distance(_normal(9, 0), _normal(9, 0)[:, :3])
