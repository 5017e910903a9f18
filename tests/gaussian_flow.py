"""A Gaussian flow, of which everything is known: data with independent N(MEAN, STD^2) numbers."""

import torch

from sit_atconv.flow.path import Path, expand_time

MEAN, STD = 0.7, 0.4


def variance(path: Path, t: torch.Tensor) -> torch.Tensor:
    """Of x_t, which has mean alpha MEAN."""
    return (path.alpha(t) * STD).square() + path.sigma(t).square()


def velocity(path: Path, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[alpha' data + sigma' noise | x_t = x], by the regression of two Gaussians."""
    t = expand_time(t, x)
    covariance = path.d_alpha(t) * path.alpha(t) * STD**2 + path.d_sigma(t) * path.sigma(t)
    return path.d_alpha(t) * MEAN + covariance / variance(path, t) * (x - path.alpha(t) * MEAN)


def score(path: Path, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The gradient of the log density of x_t."""
    t = expand_time(t, x)
    return -(x - path.alpha(t) * MEAN) / variance(path, t)


def noise(path: Path, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[noise | x_t = x]."""
    return -path.sigma(expand_time(t, x)) * score(path, x, t)


def data(path: Path, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[data | x_t = x]."""
    t = expand_time(t, x)
    return MEAN + path.alpha(t) * STD**2 / variance(path, t) * (x - path.alpha(t) * MEAN)
