"""Average velocities against those of a Gaussian flow, which are known in closed form."""

import math
from functools import partial

import pytest
import torch
from gaussian_flow import MEAN, STD, variance, velocity
from tangents import differences
from torch import nn

from sit_atconv.flow.meanflow import Guidance, change, jump, meanflow_errors, weigh
from sit_atconv.flow.path import PATHS, expand_time
from sit_atconv.flow.times import time_grid

paths = pytest.mark.parametrize("name", ["linear", "gvp"])


def led_to(path, x, t, s):
    """x_s on the flow through x at t: the same number of deviations from the mean."""
    t, s = expand_time(t, x), expand_time(s, x)
    return path.alpha(s) * MEAN + (variance(path, s) / variance(path, t)).sqrt() * (x - path.alpha(t) * MEAN)


def average(path):
    def u(x, t, s):
        apart = expand_time(s - t, x)
        jumped = (led_to(path, x, t, s) - x) / torch.where(apart == 0, 1.0, apart)
        return torch.where(apart == 0, velocity(path, x, t), jumped)

    return u


def batch(path, count=64, seed=0):
    """x_t, t < s but s = t for every fourth, the sample's velocity, and the others' places."""
    generator = torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, count, 3, dtype=torch.float64, generator=generator)
    data = MEAN + STD * data
    t, s = torch.rand(2, count, dtype=torch.float64, generator=generator).sort(0).values
    s[::4] = t[::4]
    return path.interpolate(data, noise, t), t, s, path.velocity(data, noise, t), (s > t).nonzero()[:, 0]


def errors(learned, path, x, t, s, v, apart):
    """As training computes them."""
    truth = average(path)
    return meanflow_errors(learned, lambda some: change(truth, x[some], t[some], s[some], v[some]), x, t, s, v, apart)


@paths
def test_the_truth_has_no_error_against_the_marginal_velocity(name):
    path = PATHS[name]()
    x, t, s, _, apart = batch(path)
    v = velocity(path, x, t)
    assert errors(average(path), path, x, t, s, v, apart).max() < 1e-8
    # The identity is no matter of course: of a target without the change, or with it the wrong way, this is no truth.
    still = meanflow_errors(average(path), lambda some: torch.zeros_like(x[some]), x, t, s, v, apart)
    assert still[apart].mean() > 1e-2
    assert still[::4].max() < 1e-8


@paths
def test_the_gradient_at_the_truth_is_zero_on_average_with_the_velocities_of_samples(name):
    path, truth = PATHS[name](), average(PATHS[name]())
    x, t, s, v, apart = batch(path, 200_000)
    # A step from the truth along each of these functions.
    along = torch.stack([torch.ones_like(x), x, expand_time(t, x) * x, expand_time(s, x).expand_as(x)])
    target = v.index_add(0, apart, expand_time(s - t, x)[apart] * change(truth, x[apart], t[apart], s[apart], v[apart]))
    gradients = (2 * (truth(x, t, s) - target) * along).sum(-1)
    means, ses = gradients.mean(1), gradients.std(1) / math.sqrt(len(x))
    assert (means.abs() < 4 * ses).all()
    # And that is the gradient of what is minimised.
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    learned = errors(lambda x, t, s: truth(x, t, s) + (weight[:, None, None] * along).sum(0), path, x, t, s, v, apart)
    learned.mean().backward()
    torch.testing.assert_close(weight.grad, means)


def test_the_change_is_that_of_central_differences():
    generator = torch.Generator().manual_seed(3)
    x, v = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    t, s = torch.rand(2, 5, dtype=torch.float64, generator=generator).sort(0).values

    def u(x, t, s):
        return (x * expand_time(t, x)).sin() + x.roll(1, 1) * expand_time(s - t, x).exp()

    expected = differences(lambda x, t: u(x, t, s), (x, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(change(u, x, t, s, v), expected, rtol=0, atol=1e-8)
    leaf = x.clone().requires_grad_()
    assert not change(u, leaf, t, s, v).requires_grad


@paths
@pytest.mark.parametrize("steps", [1, 3])
def test_any_number_of_jumps_of_the_truth_ends_at_the_data(name, steps):
    path = PATHS[name]()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    seen = []

    def u(x, t, s):
        seen.extend((float(t), float(s)))
        return average(path)(x, t, s)

    end = jump(u, x, time_grid(0, 1, steps, torch.float64))
    torch.testing.assert_close(end, MEAN + STD * x)
    assert seen == pytest.approx([at / steps for i in range(steps) for at in (i, i + 1)])


@pytest.mark.slow
def test_a_small_network_learns_to_lead_to_the_data_by_one_step():
    torch.manual_seed(0)
    path, steps, count = PATHS["linear"](), 800, 256
    net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))

    def u(x, t, s):
        slope, offset = net(torch.stack([t, s - t], 1)).chunk(2, 1)
        return slope * x + offset

    for index in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - index / steps)
        data, noise = MEAN + STD * torch.randn(count, 1), torch.randn(count, 1)
        t, s = torch.rand(2, count).sort(0).values
        s[::2] = t[::2]
        x, v, apart = path.interpolate(data, noise, t), path.velocity(data, noise, t), torch.arange(1, count, 2)
        rate = partial(lambda some, x, t, s, v: change(u, x[some], t[some], s[some], v[some]), x=x, t=t, s=s, v=v)
        optimizer.zero_grad()
        meanflow_errors(u, rate, x, t, s, v, apart).mean().backward()
        optimizer.step()
    noise = torch.randn(4096, 1)
    with torch.no_grad():
        data = noise + u(noise, torch.zeros(4096), torch.ones(4096))
    assert (data - (MEAN + STD * noise)).square().mean().sqrt() < 0.06  # the data's deviation is 0.4


def test_errors_weigh_themselves():
    found = torch.tensor([0.5, 2.0], requires_grad=True)
    assert torch.equal(weigh(found, 0, 1e-3), found)
    weighed = weigh(found, 1, 0.5)
    torch.testing.assert_close(weighed, torch.tensor([0.5, 0.8]))
    weighed.sum().backward()
    torch.testing.assert_close(found.grad, torch.tensor([1.0, 0.4]))  # the weight itself is none of the gradient's


def test_guidance_of_the_target_is_that_of_its_scale():
    """Where the network's own velocity is already guided by the scale, the guided velocity is that."""
    v, null = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    for omega, kappa in ((2.0, 0.0), (1.0, 0.5), (0.8, 0.6), (1.0, 0.0)):
        guidance = Guidance(omega, kappa)
        wanted = null + guidance.scale * (v - null)
        torch.testing.assert_close(guidance(v, lambda wanted=wanted: wanted, lambda: null), wanted)
    assert Guidance(1.0, 0.5).scale == 2

    def never():
        raise AssertionError

    assert Guidance()(v, never, never).equal(v)
