"""Distances between two sets of features: Fréchet (FVD, FAD) and kernel (KVD, KID).

Both need features of clips, from an extractor or from a file; see docs/evaluation.md. Fréchet
distances of few clips are biased upwards, the more so the more features there are, so compare only
sets of equal size; kernel distances are not biased.
"""

import numpy as np


def gaussian_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """|m - m'|² + Tr(S + S' - 2 (S S')^½): squared 2-Wasserstein distance of two Gaussians.

    (Olkin and Pukelsheim, 1982.) S S' has the eigenvalues of S^½ S' S^½, which is symmetric.
    """
    root = matrix_root(covariance)
    values = np.linalg.eigvalsh(root @ other_covariance @ root)
    overlap = np.sqrt(np.maximum(values, 0.0)).sum()
    spread = np.trace(covariance) + np.trace(other_covariance) - 2 * overlap
    return float(np.sum((mean - other_mean) ** 2) + max(0.0, spread))


def matrix_root(matrix: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix whose eigenvalues are not negative, but for rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def frechet_distance(reference: np.ndarray, other: np.ndarray) -> float:
    """`gaussian_distance` of the Gaussians with the sets' means and covariances.

    Args:
      reference, other: [clips, features], two clips or more; the numbers of clips may differ.

    Raises:
      ValueError: fewer than two clips in a set, or other features.
    """
    _check(reference, other)
    moments = [(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (reference, other)]
    return gaussian_distance(*moments[0], *moments[1])


def kernel_distance(reference: np.ndarray, other: np.ndarray) -> float:
    """Squared maximum mean discrepancy with k(x, y) = (x·y / D + 1)³, unbiased: may be below 0.

    (Binkowski et al., 2018, with all clips at once instead of means over random subsets.)

    Args:
      reference, other: [clips, D].

    Raises:
      ValueError: as `frechet_distance`.
    """
    _check(reference, other)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        values, n = kernel(x, x), len(x)
        return (values.sum() - np.trace(values)) / (n * (n - 1))

    cross = kernel(reference, other).mean()
    return float(within(reference) + within(other) - 2 * cross)


def _check(reference: np.ndarray, other: np.ndarray) -> None:
    if min(len(reference), len(other)) < 2:
        raise ValueError(
            f"sets of {len(reference)} and {len(other)} clips have no spread; take 2 or more each"
        )
    if reference.shape[1:] != other.shape[1:] or reference.ndim != 2:
        raise ValueError(
            "features of one kind are needed, [clips, features], not of shapes "
            f"{list(reference.shape)} and {list(other.shape)}"
        )
