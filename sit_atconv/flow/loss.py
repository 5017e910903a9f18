"""Flow-matching losses."""

import torch

from sit_atconv.flow.path import LinearPath, Velocity


def velocity_loss(
    velocity: Velocity, path: LinearPath, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """|v(x_t, t) - v*|^2, the mean over all but the batch: (B,).

    velocity: called with x_t (B, ...) and t (B,), gives (B, ...). data, noise (B, ...), t (B,) in [0, 1].
    """
    error = velocity(path.interpolate(data, noise, t), t) - path.velocity(data, noise, t)
    return error.square().flatten(1).mean(1)
