"""The ODE samplers against closed forms and torchdiffeq."""

import math

import gaussian_flow
import pytest
import torch
from torchdiffeq import odeint

from sit_atconv.flow.path import LinearPath
from sit_atconv.flow.samplers import SAMPLERS, dopri5
from sit_atconv.flow.times import time_grid

STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}


def test_all_that_are_promised_are_there():
    assert SAMPLERS.keys() == STAGES.keys() | {"dopri5"}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
@pytest.mark.parametrize("backwards", [False, True])
def test_convergence_order_on_a_closed_form(name, order, backwards):
    # dx/dt = cos(t) x has x(1) = x(0) exp(sin 1).
    x0 = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    x1 = x0 * math.exp(math.sin(1))
    (start, end), (a, b) = ((x1, x0), (1, 0)) if backwards else ((x0, x1), (0, 1))
    errors = [
        (SAMPLERS[name](lambda x, t: t.cos() * x, start, time_grid(a, b, n, torch.float64)) - end).abs().max()
        for n in (20, 40)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("late", [False, True])
def test_a_velocity_that_is_not_finite_ends_in_nothing_finite(name, value, late):
    x = torch.full((2, 3), 3e38)  # from which 3e38 further there is no fp32

    def velocity(x, t):  # of the second item alone
        v = torch.ones_like(x)
        v[1] = value if t > 0.3 or not late else 1
        return v

    end = SAMPLERS[name](velocity, x, time_grid(0, 1, 4))
    assert not end[1].isfinite().any()
    assert name == "dopri5" or end[0].isfinite().all()


def test_dopri5_tells_any_other_fault():
    with pytest.raises(AssertionError):  # torchdiffeq wants two different times
        dopri5(lambda x, t: x, torch.ones(1, 2), torch.tensor([0.5, 0.5]))

    def network(x, t):
        assert t < 0.5, "the network's own"
        return x

    with pytest.raises(AssertionError, match="the network's own"):
        dopri5(network, torch.ones(1, 2), time_grid(0, 1, 1))


@pytest.mark.parametrize(
    ("name", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2"), ("heun3", "heun3")]
)
def test_steps_are_torchdiffeqs_on_an_uneven_grid(name, theirs):
    times = torch.tensor([0.1, 0.15, 0.4, 0.9], dtype=torch.float64)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = odeint(lambda t, x: (x * 3).sin() * t, x, times, method=theirs)[-1]
    torch.testing.assert_close(SAMPLERS[name](lambda x, t: (x * 3).sin() * t, x, times), expected)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.1, 0.7), (1.0, 0.0), (0.999, 0.04)])
def test_a_constant_velocity_is_followed_within_the_interval(name, start, end):
    times = []

    def velocity(x, t):
        times.append(float(t))
        return torch.full_like(x, 3.0)

    grid = time_grid(start, end, 4)
    x = SAMPLERS[name](velocity, torch.zeros(2, 1, 2, 2), grid)
    torch.testing.assert_close(x, torch.full_like(x, 3.0 * (end - start)))
    assert times[0] == grid[0]
    assert min(times) >= grid.min()
    assert max(times) <= grid.max()
    if name in ("heun", "rk4"):
        assert times[-1] == grid[-1]
    if name != "dopri5":
        assert len(times) == 4 * STAGES[name]


@pytest.mark.parametrize(("start", "end"), [(0.2, 1.0), (1.0, 0.2)])
def test_dopri5_never_asks_beyond_the_interval_where_the_flow_is_slow(start, end):
    # The solver guesses its first step from |x| / |v|, here 100, and tries it.
    times = []

    def velocity(x, t):
        times.append(float(t))
        return torch.full_like(x, 1e-4)

    dopri5(velocity, torch.ones(2, 3), time_grid(start, end, 1))
    low, high = sorted(float(t) for t in time_grid(start, end, 1))
    assert low <= min(times)
    assert max(times) <= high


@pytest.mark.parametrize(("name", "tolerance"), [("rk4", 1e-4), ("dopri5", 1e-2)])
def test_noise_becomes_data_of_the_right_distribution(name, tolerance):
    # The flow of a Gaussian is affine: x(1) = MEAN + STD x(0).
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    path = LinearPath()
    end = SAMPLERS[name](lambda x, t: gaussian_flow.velocity(path, x, t), x, time_grid(0, 1, 40))
    torch.testing.assert_close(end, gaussian_flow.MEAN + gaussian_flow.STD * x, rtol=0, atol=tolerance)
