"""The Fréchet distance between two Gaussians."""

from typing import NamedTuple

import numpy as np
import scipy.linalg


class Moments(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Moments of features (N, D). Raises ValueError for fewer than two rows or non-finite numbers."""
    features = np.asarray(features, dtype=np.float64)
    if len(features) < 2:
        raise ValueError(f"{len(features)} images have no covariance; give at least two")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite; check the images and the extractor's weights")
    return Moments(features.mean(0), np.cov(features, rowvar=False, ddof=1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    The trace of the root is taken from the eigenvalues of the symmetric A S_b A with A = S_a^(1/2), clipped at zero:
    no complex numbers and no epsilon, also for singular covariances.
    """
    values, vectors = scipy.linalg.eigh(a.sigma)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = scipy.linalg.eigvalsh(root @ b.sigma @ root)
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.sqrt(product.clip(0)).sum())
