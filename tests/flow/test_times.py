"""Intervals against the table of the method, and the distribution of t against its quantiles."""

import math

import numpy as np
import pytest
import torch

from sit_atconv.flow.path import PATHS, GVPPath, LinearPath, VPPath
from sit_atconv.flow.times import TimeSampling, sampling_interval, time_grid, training_interval, within

U = torch.rand(1000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("path", "prediction", "interval"),
    [
        ("linear", "velocity", (0, 1)),
        ("gvp", "velocity", (0, 1)),
        ("linear", "score", (1e-3, 1 - 1e-3)),
        ("gvp", "noise", (1e-3, 1 - 1e-3)),
        ("vp", "velocity", (0, 1 - 1e-5)),
        ("vp", "noise", (0, 1 - 1e-5)),
    ],
)
def test_training_interval(path, prediction, interval):
    assert training_interval(PATHS[path](), prediction) == interval


@pytest.mark.parametrize(
    ("path", "prediction", "diffusion", "last_step_size", "interval"),
    [
        ("linear", "velocity", None, 0, (0, 1)),
        ("gvp", "velocity", None, 0, (0, 1)),
        ("linear", "noise", None, 0, (0.01, 0.99)),
        ("gvp", "score", None, 0, (0.01, 0.99)),
        ("vp", "velocity", None, 0, (0, 0.99)),
        ("vp", "score", None, 0, (0, 0.99)),
        ("linear", "velocity", "sigma", 0, (0, 0.99)),
        ("linear", "velocity", "sigma", 0.04, (0, 0.96)),
        ("gvp", "velocity", "constant", 0.04, (0, 0.96)),
        ("linear", "velocity", "sbdm", 0.04, (0.01, 0.96)),
        ("gvp", "noise", "linear", 0.04, (0.01, 0.96)),
        ("vp", "noise", "sbdm", 0.04, (0, 0.96)),
        ("vp", "velocity", "decreasing", 0, (0, 0.99)),
    ],
)
def test_sampling_interval(path, prediction, diffusion, last_step_size, interval):
    assert sampling_interval(PATHS[path](), prediction, diffusion, last_step_size, 0.01) == interval


def test_sampling_has_an_epsilon_unless_told_otherwise():
    assert sampling_interval(LinearPath(), "score") == (1e-3, 1 - 1e-3)
    assert sampling_interval(LinearPath(), "velocity", epsilon=0.0) == (0, 1)
    for singular in ((LinearPath(), "velocity", "sbdm"), (GVPPath(), "noise"), (VPPath(), "velocity")):
        with pytest.raises(ValueError, match="epsilon 0: must be positive"):
            sampling_interval(*singular, epsilon=0.0)
    with pytest.raises(ValueError, match="leave nothing"):
        sampling_interval(LinearPath(), "noise", "sigma", last_step_size=0.9995)


def test_a_grid_ends_exactly_at_its_ends():
    times = time_grid(0.25, 1.0, 3)
    assert times.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert torch.equal(time_grid(1.0, 0.25, 3), times.flip(0))


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0.25, 0.96)])
@pytest.mark.parametrize("grid", ["uniform", "cosine", [0, 0.1, 0.3, 0.35, 0.8, 1]], ids=str)
def test_a_grid_is_the_unit_intervals_shifted_and_mapped_onto_its_own(grid, start, end):
    times = time_grid(start, end, 5, torch.float64, grid, shift=3.0)
    u = np.linspace(0, 1, 6)
    t = {"uniform": u, "cosine": np.sin(np.pi * u / 2) ** 2}[grid] if isinstance(grid, str) else np.array(grid)
    noise_level = 3 * (1 - t) / (1 + 2 * (1 - t))
    np.testing.assert_allclose(times, start + (end - start) * (1 - noise_level), atol=1e-12)
    assert (times[0], times[-1]) == (start, end)
    assert torch.equal(time_grid(end, start, 5, torch.float64, grid, shift=3.0), times.flip(0))
    assert time_grid(start, end, 5, grid=grid, shift=3.0).dtype == torch.float32


def test_what_is_no_grid_is_refused():
    for grid in ([0, 0.5], [0.1, 1], [0, 0.6, 0.6, 1], [0, 0.7, 0.4, 1], [0], [0, math.nan, 1]):
        with pytest.raises(ValueError, match="rise strictly, from 0 to 1"):
            time_grid(0, 1, len(grid) - 1, grid=grid)
    with pytest.raises(ValueError, match="3 steps: the grid has the times of 2"):
        time_grid(0, 1, 3, grid=[0, 0.5, 1])
    with pytest.raises(ValueError, match=r"grid='cosin': choose from \['cosine', 'uniform'\]"):
        time_grid(0, 1, 3, grid="cosin")


def test_uniform_is_the_number_itself_to_the_bit():
    assert torch.equal(TimeSampling()(U), U)
    t = TimeSampling((0.1, 0.7))(U)
    torch.testing.assert_close(t, 0.1 + 0.6 * U)


def test_logit_normal_has_the_normals_quantiles():
    t = TimeSampling(kind="logit-normal", mean=-0.5, std=0.8)(U)
    normal = torch.distributions.Normal(-0.5, 0.8)
    torch.testing.assert_close(normal.cdf(torch.logit(t.double())).float(), U, rtol=1e-4, atol=1e-5)
    assert TimeSampling(kind="logit-normal", mean=2.0)(torch.tensor(0.5)) > 0.88  # nearer to the data
    ends = TimeSampling((0.001, 0.999), "logit-normal")(torch.tensor([0.0, 1 - 2**-24]))
    assert ends[0] == torch.tensor(0.001)
    assert ends[1] < 0.999


@pytest.mark.parametrize("kind", ["uniform", "logit-normal"])
def test_shift_maps_the_noise_level(kind):
    noise_level = 1 - TimeSampling(kind=kind)(U).double()
    expected = 3 * noise_level / (1 + 2 * noise_level)
    shifted = TimeSampling(kind=kind, shift=3.0)(U)
    torch.testing.assert_close(1 - shifted.double(), expected, rtol=1e-5, atol=1e-6)
    assert shifted.mean() < 0.4  # nearer to the noise


def test_the_interval_comes_after_the_shift():
    t = TimeSampling((0.2, 0.6), shift=3.0)(U)
    torch.testing.assert_close(t, 0.2 + 0.4 * TimeSampling(shift=3.0)(U))


@pytest.mark.parametrize("steps", [*range(1, 61), 100, 250, 1000])
def test_an_end_of_an_interval_that_is_a_time_of_the_grid_is_in_it(steps):
    ours = time_grid(0, 1, steps)
    sigmas = torch.from_numpy(np.linspace(1, 1 / steps, steps)).float()  # a flow-matching scheduler's
    ends = range(0, steps + 1, max(1, steps // 50))
    for times in (ours, 1 - sigmas):
        for low in ends:
            for high in (low, steps):
                inside = [step for step, t in enumerate(times) if within(t, (low / steps, high / steps))]
                assert inside == list(range(low, min(high, len(times) - 1) + 1))


def test_what_lies_outside_an_interval_by_more_than_rounding_is_not_in_it():
    interval = (0.2, 0.7)
    assert [within(torch.tensor(t), interval) for t in (0.2 - 9e-7, 0.7 + 9e-7)] == [True, True]
    assert [within(torch.tensor(t), interval) for t in (0.2 - 2e-6, 0.7 + 2e-6, 0.0, 1.0)] == [False] * 4
