"""The SDE samplers against the marginals that they must keep."""

import itertools

import gaussian_flow
import pytest
import torch
from conftest import slowly

from sit_atconv.flow.path import PATHS, LinearPath
from sit_atconv.flow.sde import DIFFUSIONS, LAST_STEPS, SDE, SDE_SAMPLERS, last_step
from sit_atconv.flow.times import sampling_interval, time_grid


def draw_from(seed: int, shape):
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(shape, generator=generator)


# Twice w at t = 0.25 and t = 0.7. The SBDM form is (1 - t) / t, pi / 2 cot(pi t / 2) and beta / 2.
# "decreasing" has the norm within: (2 cos(pi t) + 1)^2 / 4.
EVERY_PATH = {"constant": (2, 2), "linear": (1.5, 0.6), "decreasing": (1.457107, 0.007706),
              "increasing-decreasing": (1, 1.309017)}  # fmt: skip
W = {
    "linear": {**EVERY_PATH, "sbdm": (6, 0.857143), "sigma": (1.5, 0.6)},
    "gvp": {**EVERY_PATH, "sbdm": (7.584476, 1.600721), "sigma": (1.847759, 0.907981)},
    "vp": {**EVERY_PATH, "sbdm": (15.025, 6.07), "sigma": (1.996556, 1.553920)},
}


@pytest.mark.parametrize("path_name", PATHS)
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_every_diffusion_is_its_formula_with_the_norm(diffusion, path_name):
    sde = SDE(PATHS[path_name](), diffusion, 2.0)
    assert [sde.w(torch.tensor(t)).item() for t in (0.25, 0.7)] == pytest.approx(W[path_name][diffusion], abs=2e-6)


FORMS = [*itertools.product(PATHS, DIFFUSIONS)]
BY_TURNS, OTHERS = ([(*form, [*SDE_SAMPLERS][(n + i) % 2]) for n, form in enumerate(FORMS)] for i in (0, 1))


@pytest.mark.parametrize(("path_name", "diffusion", "sampler"), [*BY_TURNS, *slowly(OTHERS)])
def test_every_diffusion_ends_in_the_datas_distribution(sampler, diffusion, path_name):
    path = PATHS[path_name]()
    sde = SDE(path, diffusion, 0.5 if diffusion == "sbdm" else 1.0)
    times = time_grid(*sampling_interval(path, "velocity", diffusion, 0.02, 0.02), 150)
    shape = (20_000,)

    def velocity(x, t):
        return gaussian_flow.velocity(path, x, t)

    x = SDE_SAMPLERS[sampler](velocity, torch.randn(shape, generator=torch.Generator().manual_seed(1)), times, sde,
                              draw_from(2, shape))  # fmt: skip
    x = last_step("euler", velocity, x, times[-1], sde)  # without the noise, "mean" is narrower where w is large
    assert x.mean() == pytest.approx(gaussian_flow.MEAN, abs=0.02)
    assert x.std() == pytest.approx(gaussian_flow.STD, abs=0.03)


def test_noise_really_enters():
    path, x = LinearPath(), torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    times = time_grid(0, 0.96, 100)
    ends = {}
    for norm in (0.5, 2.0):
        sde = SDE(path, "sigma", norm)
        sampler = SDE_SAMPLERS["euler-maruyama"]
        end = sampler(lambda x, t: gaussian_flow.velocity(path, x, t), x, times, sde, draw_from(2, x.shape))
        ends[norm] = torch.corrcoef(torch.stack([x, end]))[0, 1].item()
    assert 0.05 < ends[2.0] < ends[0.5] < 0.95  # an ODE has a correlation of 1


def test_one_step_is_the_formula():
    path, x, z = LinearPath(), torch.tensor([[0.3, -1.0]]), torch.tensor([[1.0, 0.5]])
    sde, times = SDE(path, "linear", 2.0), torch.tensor([0.5, 0.6])

    def velocity(x, t):
        return x * 2

    # w = 2 (1 - t), score = (t v - x) / (1 - t)
    def drift(x, t):
        return 2 * x + 2 * (t * 2 * x - x)

    kick = (2 * 2 * 0.5 * 0.1) ** 0.5 * z
    maruyama = SDE_SAMPLERS["euler-maruyama"](velocity, x, times, sde, lambda step: z)
    torch.testing.assert_close(maruyama, x + 0.1 * drift(x, 0.5) + kick)
    y = x + kick
    ahead = y + 0.1 * drift(y, 0.5)
    heun = SDE_SAMPLERS["sde-heun"](velocity, x, times, sde, lambda step: z)
    torch.testing.assert_close(heun, y + 0.05 * (drift(y, 0.5) + drift(ahead, 0.6)))


@pytest.mark.parametrize(("sampler", "stages"), [("euler-maruyama", 1), ("sde-heun", 2)])
def test_evaluations_and_draws(sampler, stages):
    calls, steps = [], []

    def velocity(x, t):
        calls.append(float(t))
        return x

    def draw(step):
        steps.append(step)
        return torch.zeros(2, 3)

    sde, times = SDE(LinearPath()), time_grid(0, 0.9, 5)
    x = SDE_SAMPLERS[sampler](velocity, torch.ones(2, 3), times, sde, draw)
    assert len(calls) == 5 * stages
    assert steps == [0, 1, 2, 3, 4]
    for kind in LAST_STEPS:
        calls.clear()
        last_step(kind, velocity, x, times[-1], sde)
        assert len(calls) == (0 if kind == "none" else 1)


@pytest.mark.parametrize("path_name", PATHS)
def test_last_steps(path_name):
    path = PATHS[path_name]()
    sde, t, x = SDE(path, "sigma", 3.0), torch.tensor(0.9), torch.tensor([[0.2, 1.0]])
    v, score = gaussian_flow.velocity(path, x, t), gaussian_flow.score(path, x, t)
    ends = {kind: last_step(kind, lambda x, t: v, x, t, sde) for kind in LAST_STEPS}
    torch.testing.assert_close(ends["mean"], x + 0.1 * (v + 3 * path.sigma(t) * score))
    torch.testing.assert_close(ends["euler"], x + 0.1 * v)
    tweedie = x / path.alpha(t) + path.sigma(t) ** 2 / path.alpha(t) * score
    torch.testing.assert_close(ends["tweedie"], tweedie)
    assert ends["none"] is x


def test_singular_ends_are_refused_and_never_give_nan():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="alpha is 0 at t=0"):
        SDE_SAMPLERS["euler-maruyama"](lambda x, t: x, x, time_grid(0, 1, 3), SDE(LinearPath(), "sbdm"), lambda _: x)
    with pytest.raises(ValueError, match="sigma is 0 at t=1"):
        SDE_SAMPLERS["sde-heun"](lambda x, t: x, x, time_grid(0, 1, 3), SDE(LinearPath(), "constant"), lambda _: x)
