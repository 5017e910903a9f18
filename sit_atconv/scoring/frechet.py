"""The Fréchet distance between two Gaussians."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sit_atconv.runtime.console import Progress


class Moments(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


FRECHET = ("fid", "sfid", "fdd", "frechet_distance")  # the metrics that are such a distance
# Images; with fewer the bias is more than its part proportional to 1/N, which the jackknife takes away.
PER_FEATURE = 10


def correction_needs(features: int) -> int:
    """Images from which on the jackknife's corrected distance is sound: 10 a feature.

    With fewer than about one a feature the covariance is singular, and what the jackknife leaves of the bias is many
    times the error that it states.
    """
    return PER_FEATURE * features


def too_few(features: int, samples: int, reference: int | None) -> str | None:
    """What is to be said of a Fréchet distance in so many features where a side has less than 10 images a feature, with
    which it is biased; None where both have as many. reference: images, None where nobody says how many."""
    needed, sides = correction_needs(features), ((samples, "samples"), (reference, "reference images"))
    few = [f"{n:,} {what}" for n, what in sides if n is not None and n < needed]
    if not few:
        return None
    return f"{features:,} features of {' and '.join(few)}: at least {needed:,} are needed; the distance is biased"


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of means (D,) and covariances (D, D) (Dowson and Landau 1982).

    The trace of the root is taken from the eigenvalues of the symmetric A S1 A with A = S2^(1/2), clipped at zero, in
    float64: no complex numbers and no epsilon, also for singular covariances.

    Raises ValueError for shapes that do not go together and for numbers that are not finite.
    """
    return frechet_distances([Moments(mu1, sigma1)], Moments(mu2, sigma2))[0]


def frechet_distances(samples: Iterable[Moments], reference: Moments, total: int | None = None) -> list[float]:
    """`frechet_distance` of each of several to one reference, whose root is taken once. total: how many they are, for
    the progress: in 2,048 dimensions each takes seconds."""
    from sit_atconv.runtime.processes import is_main  # which loads torch, and `score --help` does without

    reference = _checked(reference, len(reference.mu))
    values, vectors = np.linalg.eigh(reference.sigma)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    result = []
    for given in Progress(samples, "distances", total, unit="distance", delay=1, leave=False, disable=not is_main()):
        mu, sigma = _checked(given, len(reference.mu))
        trace = np.sqrt(np.linalg.eigvalsh(root @ sigma @ root).clip(0)).sum()
        difference = mu - reference.mu
        result.append(float(difference @ difference + np.trace(sigma) + np.trace(reference.sigma) - 2 * trace))
    return result


def _checked(given: Moments, dim: int) -> Moments:
    mu, sigma = (np.asarray(part, np.float64) for part in given)
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} do not go with {dim} features")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("mu or sigma is not finite; take the statistics again")
    return Moments(mu, sigma)
