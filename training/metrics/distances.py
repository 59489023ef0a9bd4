"""Distances between two sets of features.

Input: features of two sets, a sample per row. Output: numbers. Several metrics share these
formulas and differ in the network of the features alone.

Axes: N samples, D feature width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from turbotalk_core.errors import RequestError

KID_SUBSETS = 100  # Binkowski et al., 2018
KID_SUBSET_SIZE = 1000  # the same; smaller if a set has less than twice as many samples
KID_DEGREE = 3  # of the polynomial kernel


def frechet_distance(left_ND: Tensor, right_ND: Tensor) -> float:
    """Compute the Fréchet distance of two sets of features, each modelled as a Gaussian.

    It is |mean difference|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2)), with covariances S1 and S2.

    Args:
        left_ND: one set, at least two samples.
        right_ND: the other set.

    Returns:
        The squared distance, 0 for equal sets. It is biased: larger for fewer samples.

    Raises:
        RequestError: if a set has fewer than two samples, or the feature widths differ.

    Source: Dowson and Landau, 1982, Eq. 5.
    """
    _check(left_ND, right_ND)
    left, right = left_ND.double().cpu().numpy(), right_ND.double().cpu().numpy()
    left_root, right_root = _root(left), _root(right)
    # With S1 = A^T A and S2 = B^T B, the non-zero eigenvalues of S1 S2 are the squared singular
    # values of A B^T, so the trace of the square root is the sum of these singular values. This
    # needs no D x D matrix square root, which is inaccurate for eigenvalues near zero.
    shared = np.linalg.svd(left_root @ right_root.T, compute_uv=False).sum()
    shift = left.mean(0) - right.mean(0)
    spread = np.square(left_root).sum() + np.square(right_root).sum() - 2 * shared
    return float(shift @ shift + spread)


def _root(samples_ND: np.ndarray) -> np.ndarray:
    """Return a matrix A with A^T A = the covariance and at most as many rows as columns."""
    deviations_ND = (samples_ND - samples_ND.mean(0)) / np.sqrt(len(samples_ND) - 1)
    if len(deviations_ND) <= deviations_ND.shape[1]:
        return deviations_ND
    return np.asarray(np.linalg.qr(deviations_ND, mode="r"))


def kernel_distance(left_ND: Tensor, right_ND: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy with the kernel (x·y / D + 1)^3, unbiased.

    Args:
        left_ND: one set, at least two samples.
        right_ND: the other set.

    Returns:
        The estimate. For two sets of one distribution its mean is 0, so it may be negative.

    Raises:
        RequestError: if a set has fewer than two samples, or the feature widths differ.

    Source: Gretton et al., 2012, Eq. 3; Binkowski et al., Demystifying MMD GANs, 2018.
    """
    _check(left_ND, right_ND)
    left, right = left_ND.double(), right_ND.double()
    return float(_average_pairs(left) + _average_pairs(right) - 2 * _kernel(left, right).mean())


def subset_kernel_distances(left_ND: Tensor, right_ND: Tensor, seed: int) -> Tensor:
    """Estimate the kernel distance on random subsets, whose spread shows its uncertainty.

    Args:
        left_ND: one set, at least two samples.
        right_ND: the other set.
        seed: seed of the subsets.

    Returns:
        An estimate per subset, [KID_SUBSETS]; their mean is the kernel inception distance.

    Raises:
        RequestError: if a set has fewer than two samples, or the feature widths differ.
    """
    _check(left_ND, right_ND)
    size = choose_subset_size(len(left_ND), len(right_ND))
    generator = torch.Generator().manual_seed(seed)

    def draw(samples_ND: Tensor) -> Tensor:
        return samples_ND[torch.randperm(len(samples_ND), generator=generator)[:size]]

    estimates = [kernel_distance(draw(left_ND), draw(right_ND)) for _ in range(KID_SUBSETS)]
    return torch.tensor(estimates, dtype=torch.float64)


def choose_subset_size(num_left: int, num_right: int) -> int:
    """Return the samples per subset: at most half the smaller set, so that subsets differ."""
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
