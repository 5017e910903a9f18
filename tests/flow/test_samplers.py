"""The ODE samplers against closed forms and torchdiffeq."""

import math
from functools import partial
from itertools import pairwise

import gaussian_flow
import numpy as np
import pytest
import torch
from conftest import slowly
from torchdiffeq import odeint

from sit_atconv.flow.path import GVPPath, LinearPath
from sit_atconv.flow.samplers import ADAMS, SAMPLERS, adams_weights, dopri5
from sit_atconv.flow.times import time_grid

STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "adams2": 1, "adams3": 1, "adams4": 1, "abm2": 1}
STAGES |= {"abm3": 1}
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


@pytest.fixture(scope="module", params=[LinearPath(), GVPPath()], ids=lambda path: type(path).__name__)
def mixture(request):
    """Three Gaussians, whose velocity is a formula: error(sampler, steps, ...) the root mean square of the end's."""
    path, means, stds = request.param, torch.tensor([-1.2, 0.1, 1.5]).double(), torch.tensor([0.4, 0.35, 0.5]).double()
    noise = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)

    def velocity(x, t):
        x = x[:, None]
        variance = (path.alpha(t) * stds).square() + path.sigma(t).square()
        log_share = -(x - path.alpha(t) * means).square() / (2 * variance) - variance.log() / 2
        slope = (path.d_alpha(t) * path.alpha(t) * stds.square() + path.d_sigma(t) * path.sigma(t)) / variance
        return (log_share.softmax(1) * (path.d_alpha(t) * means + slope * (x - path.alpha(t) * means))).sum(1)

    def end(sampler, *grid):
        return sampler(velocity, noise, time_grid(0, 1, *grid))

    true = end(SAMPLERS["rk4"], 1200, torch.float64)
    return lambda sampler, steps, *grid: (
        (end(sampler, steps, torch.float64, *grid) - true).square().mean().sqrt().item()
    )


@pytest.mark.parametrize("grid", [("cosine",), *slowly([(("uniform",),), (("uniform", 1.5),)])], ids=str)
@pytest.mark.parametrize("name", ADAMS)
def test_adams_started_by_runge_kutta_has_its_order(mixture, name, grid):
    coarse, fine = (mixture(partial(SAMPLERS[name], start="rk"), steps, *grid) for steps in (320, 640))
    assert math.log2(coarse / fine) == pytest.approx(sum(ADAMS[name]), abs=0.2 if name.startswith("abm") else 0.1)


@pytest.mark.parametrize("name", ADAMS)
def test_adams_started_by_lower_orders_is_behind_but_on_a_grid_that_is_dense_there(mixture, name):
    order, corrected = ADAMS[name]
    for grid, expected in (("uniform", 2 + corrected), ("cosine", order + corrected)):
        if (name, grid) != ("abm3", "uniform"):  # whose term of order 3 is small beside the next one
            coarse, fine = (mixture(SAMPLERS[name], steps, grid) for steps in (320, 640))
            assert math.log2(coarse / fine) == pytest.approx(expected, abs=0.1), grid
    # At equal evaluations, as few as one takes.
    for nfe in (12, 16, 24):
        ours, euler = mixture(SAMPLERS[name], nfe), mixture(SAMPLERS["euler"], nfe)
        heun = mixture(SAMPLERS["heun"], nfe // 2)
        assert ours < min(euler, 1.2 * heun)
        assert not corrected or ours < 0.6 * min(heun, mixture(SAMPLERS["adams2"], nfe))
        assert name != "adams4" or mixture(SAMPLERS[name], nfe, "cosine") < 0.6 * min(euler, heun)


def test_weights_of_equal_steps_are_the_textbooks():
    for times, start, end, expected in (
        ([0.3], 0.3, 0.4, [1]),
        ([0.0, 1.0], 1.0, 2.0, [-1 / 2, 3 / 2]),
        ([3.0, 2.0, 1.0], 1.0, 0.0, [5 / 12, -16 / 12, 23 / 12]),
        ([0.0, 0.5, 1.0, 1.5], 1.5, 2.0, [-9 / 24, 37 / 24, -59 / 24, 55 / 24]),
        ([0.0, 0.5], 0.0, 0.5, [1 / 2, 1 / 2]),  # Adams-Moulton
        ([0.0, 1.0, 2.0], 1.0, 2.0, [-1 / 12, 8 / 12, 5 / 12]),
    ):
        assert adams_weights(times, start, end) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("start", ["lower", "rk"])
@pytest.mark.parametrize("name", ADAMS)
def test_adams_integrates_the_polynomial_through_the_last_velocities(name, start):
    (order, corrected), polynomial = ADAMS[name], np.polynomial.polynomial
    times = torch.tensor([0.1, 0.15, 0.4, 0.45, 0.6, 0.9, 1.0], dtype=torch.float64)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def velocity(x, t):
        return (x * 3).sin() * t

    def integral(known, begin, end):
        moments, slopes = zip(*known, strict=True)
        fit = polynomial.polyfit(moments, np.stack(slopes).reshape(len(known), -1), len(known) - 1)
        whole = [polynomial.polyval(each, polynomial.polyint(fit)) for each in (begin, end)]
        return (whole[1] - whole[0]).reshape(slopes[0].shape)

    state, known, before = x.numpy(), [], None
    for step, (t, t_next) in enumerate(pairwise(times.tolist())):
        known.append((t, velocity(torch.tensor(state), t).numpy()))
        if start == "rk" and step < order - 1:
            method = {2: "heun", 3: "heun3", 4: "rk4"}[order]
            state = SAMPLERS[method](velocity, torch.tensor(state), times[step : step + 2]).numpy()
            continue
        if corrected and before is not None:
            state = before + integral(known[-order - 1 :], times[step - 1].item(), t)
        before = state
        state = state + integral(known[-order:], t, t_next)
    asked = []
    end = SAMPLERS[name](lambda x, t: asked.append(t) or velocity(x, t), x, times, start=start)
    torch.testing.assert_close(end, torch.tensor(state), rtol=0, atol=1e-9)
    assert len(asked) == (6 if start == "lower" else (order - 1) * order + 6 - (order - 1))
    # Each item has velocities of its own: alone it is the same to the bit.
    assert torch.equal(SAMPLERS[name](velocity, x[1:2], times, start=start), end[1:2])


def test_adams_of_too_few_steps_is_refused():
    with pytest.raises(ValueError, match="2 steps: Adams-Bashforth of order 3 needs at least 3"):
        SAMPLERS["adams3"](lambda x, t: x, torch.ones(1), time_grid(0, 1, 2))
    with pytest.raises(ValueError, match=r"start='half': choose from \['lower', 'rk'\]"):
        SAMPLERS["adams3"](lambda x, t: x, torch.ones(1), time_grid(0, 1, 3), start="half")
