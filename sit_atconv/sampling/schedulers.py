"""Images through diffusers' flow-matching schedulers in the place of our samplers."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import diffusers
import torch

from sit_atconv.flow.guidance import Evaluations
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.pipelines.pipeline_sit import SiTPipeline
from sit_atconv.pipelines.schedulers import check_scheduler, set_steps
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError, named, option
from sit_atconv.sampling import SCHEDULERS
from sit_atconv.sampling import sampling as own
from sit_atconv.sampling.calibration import enable_for, ratios_for
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.noise import noise
from sit_atconv.sampling.sampling import Watch, render
from sit_atconv.sampling.settings import Sampling
from sit_atconv.sampling.setup import Setup


def make_scheduler(name: str, model: SiTTransformer2DModel, time_shift: float = 1.0) -> diffusers.SchedulerMixin:
    """The scheduler of that name, one of SCHEDULERS. time_shift: of its noise levels, as `flow.times.shifted` means it.

    Raises InputError for a model that is not of the linear path, and for a shift of one that has none.
    """
    called = option("scheduler", name)
    if model.config.path != "linear":
        raise InputError(
            f"{called}: diffusers' schedulers follow the linear path, this model is of path={model.config.path!r}; "
            "leave it out"
        )
    scheduler, options, shift = SCHEDULERS[name]
    if time_shift != 1 and shift is None:
        able = ", ".join(other for other, (*_, by) in SCHEDULERS.items() if by)
        raise InputError(
            f"{option('time_shift', time_shift)}: {called} does not shift its last noise levels so; leave one out, or "
            f"take one of {able}"
        )
    return getattr(diffusers, scheduler)(**options, **({} if shift is None else {shift: time_shift}))


def drawing(
    name: str | None, ready: Setup, graphs: Graphs | None = None
) -> Callable[..., tuple[torch.Tensor, Evaluations]]:
    """How images are drawn from a model that is set up: called as `generate` of `sit_atconv.sampling.sampling`, without
    the graphs, and with a scheduler without the trace. The cache that is asked for is switched on here.

    name: of the scheduler in the place of the sampler; None for the sampler.
    Raises InputError for guidance that never acts, for a scheduler that cannot draw so, and for a cache that cannot
    work at these times.
    """
    model, sampling = ready.trained.model, ready.sampling
    if name is None:
        sampling.check_acts_on(model)
        if ready.cache is not None:
            enable_for(ready.trained, ready.guide, ready.cache, sampling)
        return partial(own.generate, graphs=graphs)
    check_scheduler(make_scheduler(name, model), model.config.use_meanflow)
    shift = sampling.time_shift
    scheduler = make_scheduler(name, model, shift)
    with nullcontext() if shift == 1 else named(option("time_shift", shift)):
        check_scheduler(scheduler)
        times = 1 - set_steps(copy.copy(scheduler), sampling.steps)
    sampling.check_acts(times.clamp(*sampling.interval(model)))
    pipe = SiTPipeline(model, guide=sampling.guide_model, scheduler=scheduler)
    if ready.cache is not None:
        pipe.enable_cache(str(ready.cache), ratios_for(ready.trained, ready.cache))
        pipe.check_cache(times.tolist(), sampling.reused)
    return partial(generate, pipe)


@torch.no_grad()
def generate(
    pipe: SiTPipeline,
    model: SiTTransformer2DModel,
    codec,
    indices: Sequence[int],
    labels: Sequence[int],
    sampling: Sampling,
    seed: int = 0,
    kept: int | None = None,
    watch: Watch | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, Evaluations]:
    """As `sit_atconv.sampling.sampling.generate`, with the scheduler of a pipeline in the place of the sampler.

    model, and the guide of `sampling`: those of the pipeline.
    The noise of image i comes from (seed, i) here too, and so does what a stochastic scheduler draws.
    Warns of a scheduler that is right for distilled models alone. Raises InputError for a scheduler that would not draw
    the model's distribution; NotFinite as there.
    """
    pipe.set_progress_bar_config(disable=True)
    shape = (model.config.in_channels, *(size or model.latent_size))

    def after_step(pipe: SiTPipeline, step: int, *_) -> dict:
        if watch is not None:
            watch(pipe.nfe, (step + 1) / pipe.num_timesteps)
        return {}

    seeds = [draws.generator(seed, Stream.SAMPLE_STEP, index).integers(2**63) for index in indices]
    latents = pipe(
        list(labels),
        sampling.steps,
        sampling.guidance_scale,
        sampling.guidance_channels,
        sampling.guidance_interval,
        latents=noise(shape, seed, Stream.SAMPLE_NOISE, indices),
        generator=[torch.Generator().manual_seed(int(each)) for each in seeds],
        guidance_every=sampling.guidance_every,
        guidance_batches=sampling.guidance_batches,
        output_type="latent",
        callback_on_step_end=after_step,
    ).images
    return render(codec, latents, model.dtype, indices, kept), pipe.nfe
