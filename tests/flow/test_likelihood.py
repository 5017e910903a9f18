"""The likelihood against exact log densities."""

import math

import gaussian_flow
import pytest
import torch

from sit_atconv.flow.likelihood import bits_per_dim, exact_probes, log_likelihood
from sit_atconv.flow.path import PATHS
from sit_atconv.flow.samplers import SAMPLERS
from sit_atconv.flow.times import time_grid

GENERATOR = torch.Generator().manual_seed(0)
COVARIANCE = torch.tensor([[1.0, 0.6, 0.2], [0.6, 0.7, -0.1], [0.2, -0.1, 0.4]], dtype=torch.float64)
DATA = torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64) @ torch.linalg.cholesky(COVARIANCE).T


def correlated(x, t):
    """The velocity of the linear path to N(0, COVARIANCE): its Jacobian is not diagonal."""
    eye = torch.eye(3, dtype=torch.float64)
    marginal = t**2 * COVARIANCE + (1 - t) ** 2 * eye
    return x @ torch.linalg.solve(marginal, t * COVARIANCE - (1 - t) * eye)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampler", ["rk4", "dopri5"])
def test_a_gaussian_has_its_log_density(name, sampler):
    path, data = PATHS[name](), torch.randn(4, 1, 2, 2, generator=GENERATOR, dtype=torch.float64)
    end = 1 if not path.d_sigma_diverges else 0.999
    actual = log_likelihood(
        lambda x, t: gaussian_flow.velocity(path, x, t),
        data, time_grid(end, 0, 200, torch.float64), exact_probes(data), SAMPLERS[sampler],
    )  # fmt: skip
    # (x - mean) / std stays what it is along the flow of a Gaussian. On the linear and GVP paths the noise is standard
    # and the data has its own density; the VP path begins and ends a little off, by ratios that are known.
    t = torch.tensor([0, end], dtype=torch.float64)
    (mean0, mean1), (std0, std1) = path.alpha(t) * gaussian_flow.MEAN, gaussian_flow.variance(path, t).sqrt()
    noise = mean0 + std0 / std1 * (data - mean1)
    expected = (torch.distributions.Normal(0, 1).log_prob(noise) + (std0 / std1).log()).flatten(1).sum(1)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=5e-3)
    if name != "vp":
        own = torch.distributions.Normal(gaussian_flow.MEAN, gaussian_flow.STD).log_prob(data).flatten(1).sum(1)
        torch.testing.assert_close(actual, own, rtol=1e-3, atol=5e-3)


def test_hutchinsons_estimate_is_unbiased_and_its_exact_probes_are_exact():
    times = time_grid(1, 0, 20, torch.float64)
    expected = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), COVARIANCE).log_prob(DATA)
    exact = log_likelihood(correlated, DATA, times, exact_probes(DATA), SAMPLERS["rk4"])
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-4)
    signs = torch.randint(2, (100, 5, 3), generator=GENERATOR).double() * 2 - 1
    singles = torch.stack([log_likelihood(correlated, DATA, times, p[None], SAMPLERS["heun"]) for p in signs])
    assert (singles.std(0) > 0.1).all()
    error = (singles.mean(0) - expected).abs()
    assert (error < 4 * singles.std(0) / 100**0.5 + 1e-2).all()
    together = log_likelihood(correlated, DATA, times, signs, SAMPLERS["heun"])
    torch.testing.assert_close(together, singles.mean(0))


def test_evaluations_and_no_graph_is_left():
    calls = []
    weight = torch.nn.Parameter(torch.tensor(2.0))

    def velocity(x, t):
        calls.append(t)
        return weight * x

    with torch.no_grad():
        result = log_likelihood(velocity, torch.ones(2, 3), time_grid(1, 0, 5), torch.ones(4, 2, 3), SAMPLERS["heun"])
    assert len(calls) == 10
    assert not result.requires_grad
    assert weight.grad is None


def test_bits_per_dim_of_an_even_spread_over_the_levels():
    # 256 levels, 1 / 127.5 apart, each the middle of an interval of that width: the density is even over all of them.
    log_density = torch.tensor([-12 * math.log(256 / 127.5)])
    torch.testing.assert_close(bits_per_dim(log_density, 12), torch.tensor([8.0]))
    log_density = torch.tensor([-12 * math.log(17 / 8)])
    torch.testing.assert_close(bits_per_dim(log_density, 12, 1 / 8), torch.tensor([math.log2(17)]))
    assert bits_per_dim(torch.tensor([1.0]), 12) < bits_per_dim(torch.tensor([0.0]), 12)
