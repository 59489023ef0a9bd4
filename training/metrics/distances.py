"""How far one set of features is from another.

In: features of two sets, a sample per row. Out: numbers. Separate because it is arithmetic, and
because several metrics differ in nothing but where their features come from.

Axes: N samples, D feature width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from turbotalk_core.errors import RequestError

KID_SUBSETS = 100  # Binkowski et al., 2018
KID_SUBSET_SIZE = 1000  # the same; smaller where a set has not twice as many samples
KID_DEGREE = 3  # of the polynomial kernel


def frechet_distance(left_ND: Tensor, right_ND: Tensor) -> float:
    """Fréchet distance of two sets of features, each taken as a Gaussian.

    |mean difference|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2)).

    Args:
        left_ND: one set, at least two samples.
        right_ND: the other.

    Returns:
        The squared distance, 0 for equal sets. The fewer samples, the larger: it is biased.

    Raises:
        RequestError: fewer than two samples, or features of different widths.

    Source: Dowson and Landau, 1982, Eq. 5.
    """
    _check(left_ND, right_ND)
    left, right = left_ND.double().cpu().numpy(), right_ND.double().cpu().numpy()
    left_root, right_root = _root(left), _root(right)
    # With S1 = A^T A and S2 = B^T B, the eigenvalues of S1 S2 other than 0 are the squares of the
    # singular values of A B^T. So no covariance is multiplied out, nor any root taken of what
    # rounding left of a zero.
    shared = np.linalg.svd(left_root @ right_root.T, compute_uv=False).sum()
    shift = left.mean(0) - right.mean(0)
    spread = np.square(left_root).sum() + np.square(right_root).sum() - 2 * shared
    return float(shift @ shift + spread)


def _root(samples_ND: np.ndarray) -> np.ndarray:
    """Give a matrix A with A^T A = the covariance, of no more rows than columns."""
    deviations_ND = (samples_ND - samples_ND.mean(0)) / np.sqrt(len(samples_ND) - 1)
    if len(deviations_ND) <= deviations_ND.shape[1]:
        return deviations_ND
    return np.asarray(np.linalg.qr(deviations_ND, mode="r"))


def kernel_distance(left_ND: Tensor, right_ND: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets by the kernel (x·y / D + 1)^3, unbiased.

    Args:
        left_ND: one set, at least two samples.
        right_ND: the other.

    Returns:
        The estimate; around 0, and so negative as often as not, where both sets are of one
        distribution.

    Raises:
        RequestError: fewer than two samples, or features of different widths.

    Source: Gretton et al., 2012, Eq. 3; Binkowski et al., Demystifying MMD GANs, 2018.
    """
    _check(left_ND, right_ND)
    left, right = left_ND.double(), right_ND.double()
    return float(_average_pairs(left) + _average_pairs(right) - 2 * _kernel(left, right).mean())


def subset_kernel_distances(left_ND: Tensor, right_ND: Tensor, seed: int) -> Tensor:
    """Estimate the kernel distance on random subsets, which shows how sure it is.

    Args:
        left_ND: one set, at least two samples.
        right_ND: the other.
        seed: of the subsets.

    Returns:
        An estimate per subset, [KID_SUBSETS]; their mean is the kernel inception distance.

    Raises:
        RequestError: fewer than two samples, or features of different widths.
    """
    _check(left_ND, right_ND)
    size = choose_subset_size(len(left_ND), len(right_ND))
    generator = torch.Generator().manual_seed(seed)

    def draw(samples_ND: Tensor) -> Tensor:
        return samples_ND[torch.randperm(len(samples_ND), generator=generator)[:size]]

    estimates = [kernel_distance(draw(left_ND), draw(right_ND)) for _ in range(KID_SUBSETS)]
    return torch.tensor(estimates, dtype=torch.float64)


def choose_subset_size(num_left: int, num_right: int) -> int:
    """Tell how many samples a subset has: half of the smaller set at most, or all were alike."""
    return max(2, min(KID_SUBSET_SIZE, num_left // 2, num_right // 2))


def _kernel(left_ND: Tensor, right_ND: Tensor) -> Tensor:
    return (left_ND @ right_ND.T / left_ND.shape[1] + 1) ** KID_DEGREE


def _average_pairs(samples_ND: Tensor) -> Tensor:
    kernel_NN, num_samples = _kernel(samples_ND, samples_ND), len(samples_ND)
    return (kernel_NN.sum() - kernel_NN.trace()) / (num_samples * (num_samples - 1))


def _check(left_ND: Tensor, right_ND: Tensor) -> None:
    if min(len(left_ND), len(right_ND)) < 2 or left_ND.shape[1:] != right_ND.shape[1:]:
        raise RequestError(
            f"got features of shapes {tuple(left_ND.shape)} and {tuple(right_ND.shape)}; both sets "
            "need at least two samples, and one width"
        )
