"""Every setting of diffusers' schedulers: right against a closed form, warned of, or refused before an evaluation."""

import inspect
import warnings

import gaussian_flow
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from experiments.schedulers import (
    ACCEPTED,
    FLOW,
    MEANS,
    REFUSED,
    STDS,
    GaussianFlow,
    draw,
    make_pipe,
    make_scheduler,
    measure,
    table,
)
from sit_atconv import SiTPipeline
from sit_atconv.flow.path import LinearPath
from sit_atconv.pipelines.adams import FlowMatchAdamsScheduler
from sit_atconv.pipelines.schedulers import IDLE, LEVELS, RULES, STEPS, check_scheduler


def cases(settings):
    return [
        pytest.param(kind, options, id=f"{kind.__name__}-{'-'.join(f'{k}={v}'[:40] for k, v in options.items())}")
        for kind, each in settings.items()
        for options in each
    ]


@pytest.fixture
def never(monkeypatch):
    """No network may be evaluated."""

    def forward(*args, **kwargs):
        raise AssertionError("the network was evaluated")

    monkeypatch.setattr(GaussianFlow, "forward", forward)


def test_the_networks_velocity_is_the_closed_form(monkeypatch):
    monkeypatch.setattr(gaussian_flow, "MEAN", MEANS[1])
    monkeypatch.setattr(gaussian_flow, "STD", STDS[1])
    x, t = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 0.4, 1.0])
    (velocity,) = make_pipe(FlowMatchEulerDiscreteScheduler()).transformer(x, t, None)
    torch.testing.assert_close(velocity[:, 1], gaussian_flow.velocity(LinearPath(), x[:, 1], t))


@pytest.mark.parametrize(("kind", "options"), cases(ACCEPTED))
def test_accepted_settings_draw_the_models_distribution(kind, options):
    fewest = 2 if options.get("shift_terminal") else 1  # the first level is 1, so a single one cannot be the terminal
    if kind is FlowMatchAdamsScheduler:
        fewest = options.get("solver_order", 2)
    row = measure(kind, options, (fewest, max(3, fewest), 20, 80))
    assert torch.tensor(row["std"] + row["mean"]).isfinite().all()
    if row["distilled_alone"]:
        assert max(row["std"]) < -0.25  # what is warned of
        return
    coarse, fine = (abs(row["std"][step]) for step in (2, 3))
    noise = 0.012 if row["random"] else 0  # three deviations of what 32,768 numbers tell
    assert max(map(abs, row["mean"])) < 2e-3 + noise
    assert fine < 0.045 + noise
    assert fine < max(0.005, coarse / 2.5) + noise


@pytest.mark.parametrize(("kind", "options"), cases(REFUSED))
def test_other_settings_are_refused_before_an_evaluation(kind, options, never):
    scheduler = make_scheduler(kind, options)
    says = rf"^scheduler {kind.__name__} .*(make it with|use|bring|choose) "
    with pytest.raises(ValueError, match=says) as refused:
        make_pipe(scheduler)
    assert any(option in str(refused.value) for option in (*options, "'linspace', 'leading' or 'trailing'"))
    assert "\n" not in str(refused.value)
    pipe = make_pipe(FlowMatchEulerDiscreteScheduler())
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=says):
        draw(pipe, 2, random=False)


@pytest.mark.parametrize("kind", RULES)
def test_every_option_of_a_scheduler_is_known_and_tried(kind):
    options = inspect.signature(kind.__init__).parameters.keys() - {"self"}
    assert options <= LEVELS | STEPS | IDLE | {rule.option for rule in RULES[kind]}
    assert options <= set().union(FLOW, *ACCEPTED[kind], *REFUSED[kind])


def test_an_option_that_nobody_knows_must_have_its_default():
    from diffusers.configuration_utils import register_to_config

    class Newer(FlowMatchEulerDiscreteScheduler):
        @register_to_config
        def __init__(self, shift: float = 1.0, churn: float = 0.0, use_dynamic_shifting: bool = False):
            super().__init__(shift=shift)

    assert check_scheduler(Newer()) is None
    with pytest.raises(
        ValueError, match=r"Newer with churn=0\.5 is not known to follow the flow; make it with churn=0\.0"
    ):
        check_scheduler(Newer(churn=0.5))


def test_what_a_config_keeps_of_another_class_does_nothing():
    other = UniPCMultistepScheduler(solver_type="bh1", final_sigmas_type="sigma_min", use_dynamic_shifting=True)
    heun = FlowMatchHeunDiscreteScheduler.from_config(other.config)
    assert heun.config.final_sigmas_type == "sigma_min"
    assert check_scheduler(heun) is None
    # but this is read from where it is not an option
    karras = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    karras = FlowMatchEulerDiscreteScheduler.from_config({**karras.config, "sigma_min": 0.3})
    with pytest.raises(ValueError, match=r"use_karras_sigmas=True, sigma_min=0\.3 goes from noise level 0\.3 to 0"):
        check_scheduler(karras)


def test_what_a_setter_changed_is_what_counts():
    euler, lcm = FlowMatchEulerDiscreteScheduler(), FlowMatchLCMScheduler()
    euler.set_shift(30.0)
    lcm.set_scale_factors([0.5], "bicubic")
    with pytest.raises(ValueError, match=r"shift=30\.0 goes from"):
        check_scheduler(euler)
    with pytest.raises(ValueError, match=r"scale_factors=\[0\.5\] changes the size"):
        check_scheduler(lcm)


def test_the_check_leaves_a_scheduler_as_it_was():
    scheduler = UniPCMultistepScheduler(**FLOW)
    scheduler.set_timesteps(3)
    scheduler.model_outputs[0] = kept = torch.ones(1)
    check_scheduler(scheduler)
    assert len(scheduler.timesteps) == 3
    assert len(scheduler.sigmas) == 4
    assert scheduler.model_outputs[0] is kept


@pytest.mark.parametrize(
    ("scheduler", "steps", "sigmas", "says"),
    [
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.02), 1, None, r"shift_terminal=0\.02 has noise levels nan"),
        (UniPCMultistepScheduler(**FLOW), 10**6, None, "must be at least 1 and at most 100,000"),
        (UniPCMultistepScheduler(**FLOW), 2, [0.7, 0.3], r"begins at noise level 0\.7.*give latents of that level"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 2, [0.9, 0.3], r"begins at noise level 0\.96"),
    ],
    ids=["terminal", "steps", "sigmas", "shifted"],
)
def test_what_the_steps_asked_for_make_of_the_levels_is_looked_at_too(scheduler, steps, sigmas, says, never):
    pipe = make_pipe(scheduler)
    with pytest.raises(ValueError, match=says):
        pipe([0], steps, 1.0, sigmas=sigmas, output_type="latent")


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_given_latents_may_begin_at_their_own_level(kind):
    # half way: x_t of the data's flow goes on to the data
    sigma, noise = 0.5, torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 2, 2, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEANS, STDS))
    x = (1 - sigma) * mean + ((1 - sigma) ** 2 * std**2 + sigma**2).sqrt() * noise
    sigmas = torch.linspace(sigma, 0, 201)[:-1].tolist()
    pipe = make_pipe(make_scheduler(kind, {}))
    data = pipe([0, 0], 1, 1.0, sigmas=sigmas, latents=x, output_type="latent").images
    torch.testing.assert_close(data, mean + std * noise, atol=0.01, rtol=0)


class Consistent(GaussianFlow):
    """A model distilled to few steps: what it says of x_t leads to the end of x_t's own path."""

    def forward(self, x, t, labels, return_dict=False):
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEANS, STDS))
        t = t[:, None, None, None]
        end = mean + std / ((t * std) ** 2 + (1 - t) ** 2).sqrt() * (x - t * mean)
        return ((end - x) / (1 - t),)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchLCMScheduler(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)],
    ids=["lcm", "stochastic"],
)
def test_what_is_right_for_distilled_models_alone_is_said_at_the_start(scheduler):
    pipe = make_pipe(FlowMatchEulerDiscreteScheduler())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe, 2, random=True)  # this one says nothing
    pipe.scheduler = scheduler
    with pytest.warns(UserWarning, match="right for a model that was distilled") as said:
        draw(pipe, 2, random=True)
    assert len(said) == 1
    assert said[0].filename.endswith("schedulers.py")  # the line that calls the pipeline
    pipe = SiTPipeline(Consistent(**pipe.transformer.config), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="distilled"):
        mean, std = draw(pipe, 4, random=True)
    torch.testing.assert_close(mean.float(), torch.tensor(MEANS), atol=0.03, rtol=0)
    torch.testing.assert_close(std.float(), torch.tensor(STDS), atol=0, rtol=0.02)


def test_the_table_tells_what_follows_from_what_is_refused():
    few = [
        measure(FlowMatchEulerDiscreteScheduler, {}),
        measure(DPMSolverMultistepScheduler, {"thresholding": True}),
    ]
    accepted, _, refused = table(few).partition("refused before the run")
    assert "| FlowMatchEulerDiscreteScheduler | (defaults) | -7.88% | -2.03% | -0.51% | -0.00% | follows" in accepted
    assert "| DPMSolverMultistepScheduler | thresholding=True | with thresholding=True clips" in refused
