"""The Adams scheduler of the pipeline against the samplers, which the closed forms hold."""

import pytest
import torch

from experiments.schedulers import make_pipe
from sit_atconv import SiTPipeline, create_model
from sit_atconv.flow.guidance import GuidedVelocity, Reuse
from sit_atconv.flow.samplers import ADAMS, SAMPLERS
from sit_atconv.flow.times import time_grid
from sit_atconv.pipelines.adams import FlowMatchAdamsScheduler
from sit_atconv.pipelines.exporting import export, open_source
from sit_atconv.runtime.errors import InputError

NOISE = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    model = create_model(None, 4, 3, patch_size=2, hidden_size=16, depth=2, num_heads=2, in_channels=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = SiTPipeline(model.eval(), scheduler=FlowMatchAdamsScheduler(3, start="rk", shift=2.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps=6, scale=2.0, **options):
    return pipe([2, 0], steps, scale, latents=NOISE, output_type="latent", **options).images


def guided(pipe, every=1):
    def network(x, t, labels):
        return pipe.transformer(x, t, labels).sample

    return GuidedVelocity(network, torch.tensor([2, 0]), 3, 2.0, reuse=Reuse(every))


@pytest.mark.parametrize("start", ["lower", "rk"])
@pytest.mark.parametrize("name", ADAMS)
@pytest.mark.parametrize(("every", "shift"), [(1, 1.0), (3, 3.0)])
def test_the_scheduler_is_the_sampler(pipe, name, start, every, shift):
    order, corrected = ADAMS[name]
    pipe.scheduler, velocity = FlowMatchAdamsScheduler(order, corrected, start, shift), guided(pipe, every)
    with torch.no_grad():
        end = SAMPLERS[name](velocity, NOISE, time_grid(0, 1, 6, shift=shift), start=start)
    torch.testing.assert_close(draw(pipe, guidance_every=every), end, rtol=1e-5, atol=5e-6)
    assert pipe.nfe == velocity.nfe
    assert pipe.num_timesteps == (6 if start == "lower" else 6 + (order - 1) ** 2)
    assert torch.equal(
        draw(pipe, guidance_every=every), draw(pipe, guidance_every=every)
    )  # a run leaves nothing behind


def test_stated_noise_levels_are_followed_from_where_they_begin(pipe):
    pipe.scheduler, velocity, sigmas = FlowMatchAdamsScheduler(3), guided(pipe), [0.7, 0.5, 0.2]
    with torch.no_grad():
        end = SAMPLERS["adams3"](velocity, NOISE, 1 - torch.tensor([*sigmas, 0.0]))
    torch.testing.assert_close(draw(pipe, 1, sigmas=sigmas), end, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_step_goes_on_from_what_a_callback_gives(pipe, corrected):
    pipe.scheduler, velocity, jump = FlowMatchAdamsScheduler(2, corrected), guided(pipe), torch.full_like(NOISE, 0.3)

    def moved(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] + jump} if step == 1 else {}

    with torch.no_grad():
        first = velocity(NOISE, torch.tensor(0.0))
        x = NOISE + first / 3
        second = velocity(x, torch.tensor(1 / 3))
        before = NOISE + (first + second) / 6 if corrected else x
        x = before + (1.5 * second - 0.5 * first) / 3 + jump
        third = velocity(x, torch.tensor(2 / 3))
        if corrected:
            x = before + (5 * third + 8 * second - first) / 36 + jump
        x = x + (1.5 * third - 0.5 * second) / 3
    torch.testing.assert_close(draw(pipe, 3, callback_on_step_end=moved), x, rtol=1e-4, atol=1e-5)


def test_other_classes_from_a_callback_are_guided_afresh(pipe):
    pipe.scheduler = FlowMatchAdamsScheduler(2)
    draw(pipe, 4, guidance_every=4)
    assert pipe.nfe == 4 + 1
    others = torch.tensor([1, 1])
    draw(pipe, 4, guidance_every=4, callback_on_step_end=lambda *_: {"class_labels": others} if _[1] == 1 else {})
    assert pipe.nfe == 4 + 2


def test_it_is_saved_and_loaded_with_its_pipeline_and_is_no_part_of_an_export(pipe, tmp_path):
    before = draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    for load in (SiTPipeline.from_pretrained, SiTPipeline.from_run):
        loaded = load(tmp_path / "pipe")
        loaded.set_progress_bar_config(disable=True)
        assert all(loaded.scheduler.config[name] == pipe.scheduler.config[name] for name in ("start", "shift"))
        assert torch.equal(draw(loaded), before)
    with pytest.raises(InputError, match=r"scheduler FlowMatchAdamsScheduler is of this package.*export that"):
        export(open_source(tmp_path / "pipe"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_settings_are_refused():
    wrong_ones = [{"solver_order": 5}, {"start": "half"}, *({"shift": shift} for shift in (0.0, -1.0, float("nan")))]
    for wrong in wrong_ones:
        with pytest.raises(InputError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))!r}: "):
            FlowMatchAdamsScheduler(**wrong)
    scheduler, step = FlowMatchAdamsScheduler(), (NOISE, 0.0, NOISE)
    with pytest.raises(InputError, match="num_inference_steps=None: give the number of steps, or sigmas"):
        scheduler.set_timesteps()
    with pytest.raises(InputError, match="no steps are set; call set_timesteps first"):
        scheduler.step(*step)
    with pytest.raises(InputError, match=r"1 steps: solver_order=2 .* or FlowMatchEulerDiscreteScheduler"):
        scheduler.set_timesteps(1)
    scheduler.set_timesteps(2)
    for _ in range(2):
        scheduler.step(*step)
    with pytest.raises(InputError, match="all 2 calls are made; call set_timesteps"):
        scheduler.step(*step)
    with pytest.raises(InputError, match="3 steps: solver_order=4 needs at least 4; take more, or a lower order"):
        make_pipe(FlowMatchAdamsScheduler(4))([0], 3, 1.0, output_type="latent")
    with pytest.raises(InputError, match="begin_index=2: must be 0"):
        FlowMatchAdamsScheduler().set_begin_index(2)
