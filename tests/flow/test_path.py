"""The paths against finite differences and a Gaussian flow that is known in closed form."""

import math

import gaussian_flow
import pytest
import torch

from sit_atconv.flow.loss import flow_loss
from sit_atconv.flow.path import PATHS, GVPPath, LinearPath, VPPath

T = torch.tensor([0.05, 0.3, 0.8, 0.99], dtype=torch.float64)
X = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
each_path = pytest.mark.parametrize("path", [path() for path in PATHS.values()], ids=list(PATHS))


@each_path
def test_it_runs_from_noise_to_data(path):
    data, noise = X[:2], X[2:]
    start, end = (path.interpolate(data, noise, torch.full((2,), t)) for t in (0.0, 1.0))
    assert torch.equal(end, data)
    remains = 0.0 if path.alpha_vanishes else math.exp(-19.9 / 4 - 0.05)  # of the data, at t = 0
    torch.testing.assert_close(start, remains * data + math.sqrt(1 - remains**2) * noise)


@each_path
def test_velocity_is_the_derivative_of_the_path(path):
    data, noise = X, X.flip(0)
    slope = (path.interpolate(data, noise, T + 1e-6) - path.interpolate(data, noise, T - 1e-6)) / 2e-6
    torch.testing.assert_close(path.velocity(data, noise, T), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("path", "total"), [(GVPPath(), 1), (VPPath(), 1), (LinearPath(), None)])
def test_two_paths_preserve_variance(path, total):
    if total:
        torch.testing.assert_close(path.alpha(T).square() + path.sigma(T).square(), torch.ones_like(T))
    else:
        torch.testing.assert_close(path.alpha(T) + path.sigma(T), torch.ones_like(T))


@each_path
@pytest.mark.parametrize("t", [T, T[2]], ids=["a time each", "one for all"])
def test_velocity_score_noise_and_data_are_one_in_closed_form(path, t):
    v = gaussian_flow.velocity(path, X, t)
    torch.testing.assert_close(path.score(v, X, t), gaussian_flow.score(path, X, t))
    torch.testing.assert_close(path.data(v, X, t), gaussian_flow.data(path, X, t))
    torch.testing.assert_close(path.velocity_from("score", gaussian_flow.score(path, X, t), X, t), v)
    torch.testing.assert_close(path.velocity_from("noise", gaussian_flow.noise(path, X, t), X, t), v)
    assert path.velocity_from("velocity", v, X, t) is v
    if t.ndim == 0:
        rate = path.d_alpha(t) / path.alpha(t)
        torch.testing.assert_close(rate * X + path.drift_variance(t) * gaussian_flow.score(path, X, t), v)


def test_vp_sigma_keeps_its_digits_next_to_the_data():
    t = torch.tensor(1 - 1e-5)
    left = 1 - t.item()
    expected = math.sqrt(-math.expm1(-(left**2) * 19.9 / 2 - left * 0.1))
    assert VPPath().sigma(t).item() == pytest.approx(expected, rel=1e-5)  # 1 - exp would be off by 1e-2


@each_path
def test_the_score_is_finite_at_pure_noise(path):
    t = torch.tensor(0.0, dtype=torch.float64)
    v = gaussian_flow.velocity(path, X, t)
    torch.testing.assert_close(path.score(v, X, t), gaussian_flow.score(path, X, t))
    if path.alpha_vanishes:
        torch.testing.assert_close(path.score(v, X, t), -X)


@pytest.mark.parametrize("path", [LinearPath(), GVPPath()], ids=["linear", "gvp"])
def test_no_division_by_an_alpha_of_zero(path):
    times = torch.tensor([0.5, 0.0, 0.5, 0.5])
    for prediction in ("score", "noise"):
        with pytest.raises(ValueError, match="alpha is 0 at t=0"):
            path.velocity_from(prediction, X, X, times)
    with pytest.raises(ValueError, match="alpha is 0 at t=0"):
        path.drift_variance(torch.tensor(0.0))


@each_path
def test_no_division_by_a_sigma_of_zero(path):
    with pytest.raises(ValueError, match="sigma is 0 at t=1"):
        path.score(X, X, torch.tensor(1.0))
    if path.d_sigma_diverges:
        with pytest.raises(ValueError, match="sigma is 0 at t=1"):
            path.velocity(X, X, torch.ones(4))
    else:
        torch.testing.assert_close(path.data(X, X, torch.tensor(1.0)), X)
        assert path.velocity(X, X, torch.ones(4)).isfinite().all()


@each_path
@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_the_weight_velocity_makes_the_error_that_of_the_velocity(path, prediction):
    data, noise, output = X, X.flip(0), X.roll(1, 0)
    loss = flow_loss(lambda x, t: output, path, data, noise, T, prediction, "velocity")
    v = path.velocity_from(prediction, output, path.interpolate(data, noise, T), T)
    torch.testing.assert_close(loss, (v - path.velocity(data, noise, T)).square().flatten(1).mean(1))


@each_path
def test_losses_refuse_what_has_no_finite_value(path):
    with pytest.raises(ValueError, match="velocity prediction has no weight"):
        flow_loss(lambda x, t: x, path, X, X, T, "velocity", "likelihood")
    with pytest.raises(ValueError, match="epsilon away from 1"):
        flow_loss(lambda x, t: x, path, X, X, torch.tensor([0.5, 1, 0.5, 0.5]), "noise", "likelihood")
