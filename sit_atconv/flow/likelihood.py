"""The log likelihood of data under a flow, by the change of variables along its ODE, run backwards from data to noise.

    log p(x(1)) = log N(x(0); 0, I) - integral of div v(x(t), t) dt

Hutchinson's estimate of the divergence is the mean of p . (dv/dx)^T p over probes p with covariance I.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sit_atconv.flow.path import Velocity
    from sit_atconv.flow.samplers import Sampler

LEVEL_8_BIT = 1 / 127.5  # between two neighbours of 256 levels that cover [-1, 1]


def log_likelihood(
    velocity: Velocity, data: torch.Tensor, times: torch.Tensor, probes: torch.Tensor, sampler: Sampler
) -> torch.Tensor:
    """log p of each item of data (B, ...), in nats: (B,).

    velocity: differentiable in x; an item of the batch must not depend on the others. times (N,): from t1, where the
    data lie, down to t0, where x is standard normal. probes (P, B, ...): their mean is the estimate; it is unbiased for
    independent signs, and exact for `exact_probes`. sampler: one of samplers.SAMPLERS, which integrates x and the
    divergence together: an evaluation of the network, and P products with its Jacobian, at each of its stages.
    """

    def joint(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = state[:, :-1].reshape(data.shape).requires_grad_()
            v = velocity(x, t)
        products = [torch.autograd.grad(v, x, p, retain_graph=True)[0] * p for p in probes]
        divergence = torch.stack(products).flatten(2).sum(2).mean(0)
        return torch.cat([v.detach().flatten(1), divergence[:, None]], 1)

    state = torch.cat([data.detach().flatten(1), data.new_zeros(len(data), 1)], 1)
    state = sampler(joint, state, times)
    noise, integral = state[:, :-1], state[:, -1]  # the integral from t1 to t0, so with its sign turned
    log_normal = -(noise.square() + math.log(2 * math.pi)).sum(1) / 2
    return log_normal + integral


def exact_probes(data: torch.Tensor) -> torch.Tensor:
    """The D probes (D, B, ...) that make the estimate the divergence itself; data (B, ...) has D numbers per item."""
    dimensions = data[0].numel()
    basis = torch.eye(dimensions, dtype=data.dtype, device=data.device) * math.sqrt(dimensions)
    return basis.reshape(dimensions, 1, *data.shape[1:]).expand(dimensions, *data.shape)


def bits_per_dim(log_likelihood: torch.Tensor, dimensions: int, level: float = LEVEL_8_BIT) -> torch.Tensor:
    """-log2 of the probability of one grey level of `dimensions`, from the log density in nats.

    level: the distance of two neighbouring levels in the units of the data; the density times it is the probability.
    Of data with noise uniform over a level (in [-level / 2, level / 2)) its mean is an upper bound of that of the
    levels themselves.
    """
    return -log_likelihood / (dimensions * math.log(2)) - math.log2(level)
