"""Images through diffusers' flow-matching schedulers in the place of our samplers."""

from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

from sit_atconv.flow.guidance import Evaluations
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.pipelines.pipeline_sit import SiTPipeline
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError, option
from sit_atconv.sampling import SCHEDULERS
from sit_atconv.sampling.calibration import read_ratios
from sit_atconv.sampling.noise import noise
from sit_atconv.sampling.sampling import Watch, render
from sit_atconv.sampling.settings import Sampling


def make_scheduler(name: str, model: SiTTransformer2DModel) -> diffusers.SchedulerMixin:
    """The scheduler of that name, one of SCHEDULERS. Raises InputError for a model that is not of the linear path."""
    if model.config.path != "linear":
        raise InputError(
            f"{option('scheduler', name)}: diffusers' schedulers follow the linear path, this model is of path="
            f"{model.config.path!r}; leave it out"
        )
    scheduler, options = SCHEDULERS[name]
    return getattr(diffusers, scheduler)(**options)


@torch.no_grad()
def generate(
    scheduler: diffusers.SchedulerMixin,
    model: SiTTransformer2DModel,
    codec,
    indices: Sequence[int],
    labels: Sequence[int],
    sampling: Sampling,
    seed: int = 0,
    watch: Watch | None = None,
    cache: str | None = None,
    ratios: Path | None = None,
) -> tuple[torch.Tensor, Evaluations]:
    """As `sit_atconv.sampling.sampling.generate`, with `scheduler` instead of the sampler of `sampling`.

    cache: as `SiTPipeline.enable_cache` takes it. ratios: the file of those that it takes.
    The noise of image i comes from (seed, i) here too, and so does what a stochastic scheduler draws.
    Warns of a scheduler that is right for distilled models alone. Raises InputError for a model that is not of the
    linear path, and for a scheduler that would not draw the model's distribution; NotFinite as there.
    """
    pipe = SiTPipeline(model, guide=sampling.guide_model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    if cache is not None:
        pipe.enable_cache(cache, ratios and read_ratios(ratios))
    shape = (model.config.in_channels, *model.latent_size)

    def after_step(pipe: SiTPipeline, step: int, *_) -> dict:
        if watch is not None:
            watch(pipe.nfe, (step + 1) / pipe.num_timesteps)
        return {}

    drawing = [draws.generator(seed, Stream.SAMPLE_STEP, index).integers(2**63) for index in indices]
    latents = pipe(
        list(labels),
        sampling.steps,
        sampling.guidance_scale,
        sampling.guidance_channels,
        sampling.guidance_interval,
        latents=noise(shape, seed, Stream.SAMPLE_NOISE, indices),
        generator=[torch.Generator().manual_seed(int(seed)) for seed in drawing],
        output_type="latent",
        callback_on_step_end=after_step,
    ).images
    return render(codec, latents, model.dtype, indices), pipe.nfe
