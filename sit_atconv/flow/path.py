"""The path from noise to data, and the only owner of the time convention: t = 0 is noise, t = 1 is data."""

from collections.abc import Callable

import torch

# A velocity takes x (B, ...) and t, (B,) in training and 0-d in sampling, and gives (B, ...).
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def expand_time(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t (B,) -> (B, 1, 1, ...) with as many dimensions as `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


class LinearPath:
    """x_t = t * data + (1 - t) * noise, with velocity d x_t / dt = data - noise."""

    def interpolate(self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """data and noise (B, ...), t (B,) in [0, 1] -> x_t (B, ...)."""
        t = expand_time(t, data)
        return t * data + (1 - t) * noise

    def velocity(self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The target of velocity prediction: (B, ...). On this path it does not depend on t."""
        return data - noise


PATHS = {"linear": LinearPath}
