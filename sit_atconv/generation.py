"""From indices and labels to images: the one sampling routine of previews, sample.py and `python -m sampling`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.utils import make_grid

from sit_atconv import draws, limits
from sit_atconv.draws import Stream
from sit_atconv.errors import InputError, check_choice
from sit_atconv.files import png
from sit_atconv.flow import samplers
from sit_atconv.flow.guidance import CHANNELS, GuidedVelocity
from sit_atconv.flow.path import PATHS
from sit_atconv.flow.sde import DIFFUSIONS, LAST_STEPS, SDE, SDE_SAMPLERS, last_step
from sit_atconv.flow.times import SAMPLE_EPSILON, SBDM_EPSILON, sampling_interval, time_grid
from sit_atconv.images import check_latents, decoded, to_pil, to_uint8
from sit_atconv.limits import ranged
from sit_atconv.models.sit import SiTTransformer2DModel

SAMPLERS = (*samplers.SAMPLERS, *SDE_SAMPLERS)
# As the public SiT code evaluates. "last_step_size" has no default of its own where there is no last step.
SDE_DEFAULTS = {"diffusion": "sigma", "diffusion_norm": 1.0, "last_step": "mean", "last_step_size": 0.04}


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. Raises InputError for a value out of range, or one that would do nothing.

    steps: from noise to data, an SDE's last step included (dopri5 sets its own). guidance_scale: 1 is no guidance.
    guidance_channels: "all" or "first3". guidance_interval: guidance acts for t in it, t = 0 noise, t = 1 data.
    With scale 1 the defaults of both are all that is accepted.
    diffusion, diffusion_norm, last_step, last_step_size: of the SDE samplers; None is SDE_DEFAULTS for them, and for an
    ODE sampler all that is accepted.
    epsilon: how far t keeps from an end that is singular, see `flow.times.sampling_interval`; None is 1e-3, and 0.04
    for the SBDM form where alpha vanishes at t = 0. Stated for a model without such an end, `check_model` refuses it.
    """

    sampler: str = "euler"
    steps: int = ranged(50, limits.EVALUATIONS)
    guidance_scale: float = ranged(1.5, limits.GUIDANCE)
    guidance_channels: str = "all"
    guidance_interval: tuple[float, float] = ranged((0.0, 1.0), limits.TIME)
    seed: int = ranged(0, limits.SEED)
    diffusion: str | None = None
    diffusion_norm: float | None = ranged(None, limits.DIFFUSION_NORM)
    last_step: str | None = None
    last_step_size: float | None = ranged(None, limits.LAST_STEP_SIZE)
    epsilon: float | None = ranged(None, limits.EPSILON)

    def __post_init__(self):
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("guidance channels", self.guidance_channels, CHANNELS)
        limits.check(Sampling, vars(self))
        self._settle_sde()
        if self.steps < self.least_steps:
            raise InputError(f"steps={self.steps}: must be at least 2 with a last step, which is one of them")
        low, high = self.guidance_interval
        if low > high:
            raise InputError(f"guidance interval {low} to {high}: give 0 <= LOW <= HIGH <= 1 (t = 0 noise, t = 1 data)")
        for name, default in (("channels", "all"), ("interval", (0.0, 1.0))):
            value = getattr(self, f"guidance_{name}")
            if self.guidance_scale == 1 and value != default:
                raise InputError(f"guidance {name} {value}: with guidance scale 1 nothing is guided; leave it out")

    def _settle_sde(self) -> None:
        """Put the defaults in, refuse what is idle, check the rest."""
        idle = {}
        if self.sampler not in SDE_SAMPLERS:
            idle = dict.fromkeys(SDE_DEFAULTS, f"sampler={self.sampler!r} is not one of {sorted(SDE_SAMPLERS)}")
        elif self.last_step == "none":
            idle = {"last_step_size": "there is no last step"}
        for name, default in SDE_DEFAULTS.items():
            if name not in idle:
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)
            elif getattr(self, name) is not None:
                raise InputError(f"{name}={getattr(self, name)!r} would do nothing: {idle[name]}; leave it out")
        if self.sampler not in SDE_SAMPLERS:
            return
        check_choice("diffusion", self.diffusion, DIFFUSIONS)
        check_choice("last_step", self.last_step, LAST_STEPS)

    @property
    def least_steps(self) -> int:
        """How few steps there can be: one, and the last step of an SDE."""
        return 1 if self.last_step_size is None else 2

    def interval(self, model: SiTTransformer2DModel) -> tuple[float, float]:
        """The times [t0, t1] between which the model is integrated; an SDE's last step goes on from t1."""
        path, prediction = PATHS[model.config.path](), model.config.prediction
        return sampling_interval(path, prediction, self.diffusion, self.last_step_size or 0.0, self._epsilon(model))

    def _epsilon(self, model: SiTTransformer2DModel) -> float:
        if self.epsilon is not None:
            return self.epsilon
        steep = self.diffusion == "sbdm" and PATHS[model.config.path].alpha_vanishes
        return SBDM_EPSILON if steep else SAMPLE_EPSILON

    def _epsilon_acts(self, model: SiTTransformer2DModel) -> bool:
        """Whether an end of the interval is other than 0, or 1 less the last step."""
        return self.interval(model) != (0, 1 - (self.last_step_size or 0))

    def describe(self, model: SiTTransformer2DModel | None = None) -> dict[str, Any]:
        """What a manifest records: the settings, None where one did not act, and dopri5's tolerances.

        model: what was sampled, which decides the epsilon that acted; without it, epsilon is as stated.
        """
        settings = dataclasses.asdict(self)
        if model is not None:
            settings["epsilon"] = self._epsilon(model) if self._epsilon_acts(model) else None
        if self.guidance_scale == 1:
            settings |= {"guidance_channels": None, "guidance_interval": None}
        if self.sampler == "dopri5":
            settings |= {"steps": None, "rtol": samplers.RTOL, "atol": samplers.ATOL}
        return settings

    def check_model(self, model: SiTTransformer2DModel) -> None:
        """Raise InputError when the model cannot be sampled as asked, or something asked would do nothing to it."""
        check_path(model)
        if self.guidance_scale != 1 and model.null_label is None:
            raise InputError(
                f"guidance scale {self.guidance_scale:g} needs a null class, and this model was trained without class "
                "dropout; use guidance scale 1"
            )
        if self.guidance_channels == "first3" and model.config.in_channels <= 3:
            raise InputError(
                f"guidance channels first3 would do nothing: this model has {model.config.in_channels}; leave it out"
            )
        try:
            acts = self._epsilon_acts(model)
        except ValueError as error:
            raise InputError(f"{error}; make the last step or epsilon smaller") from None
        if self.epsilon is not None and not acts:
            raise InputError(f"epsilon={self.epsilon:g} would do nothing: no end is singular here; leave it out")


def check_path(model: SiTTransformer2DModel) -> None:
    """Raise InputError for a model that predicts something else than a flow from noise, t = 0, to data, t = 1."""
    if model.config.path not in PATHS:
        raise InputError(
            f"path={model.config.path!r}: a DiT with time 0..999, 999 being noise; our samplers follow {sorted(PATHS)} "
            "from t = 0, noise, to t = 1, data, and cannot draw from it"
        )


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Raise InputError for a class id out of range."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise InputError(f"class id {label} is out of range; this model has classes 0 to {num_classes - 1}")


def random_label(seed: int, index: int, num_classes: int) -> int:
    """The label of image `index`, uniform over the classes."""
    return int(draws.generator(seed, Stream.SAMPLE_LABEL, index).integers(num_classes))


GRID_PIXELS = 64


def grid_png(images: torch.Tensor, columns: int) -> bytes:
    """uint8 images (N, C, H, W) as one PNG to look at; small ones are enlarged to about 64 pixels."""
    factor = max(1, GRID_PIXELS // images.shape[-1])
    enlarged = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return png(to_pil(make_grid(enlarged, nrow=columns, padding=4, pad_value=255)))


@torch.no_grad()
def flow(
    model: SiTTransformer2DModel, indices: Sequence[int], labels: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, int]:
    """The latents (B, C, H, W) of images `indices`, of classes `labels` (B,); also the evaluations per image.

    The noise of image i comes from (seed, i) alone, that of a step of an SDE from (seed, i, step).
    The model runs in its own dtype, on its own device, where `labels` must be; the state is fp32.
    """
    shape, path = (model.config.in_channels, *model.latent_size), PATHS[model.config.path]()

    def noise(stream: Stream, *step: int) -> torch.Tensor:
        each = [draws.normal(shape, sampling.seed, stream, index, *step) for index in indices]
        return torch.stack(each).to(model.device)

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x.to(model.dtype), t, y, return_dict=False)[0].float()

    guided = GuidedVelocity(
        network,
        labels,
        model.null_label,
        sampling.guidance_scale,
        sampling.guidance_channels,
        sampling.guidance_interval,
    )

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return path.velocity_from(model.config.prediction, guided(x, t), x, t)

    times = time_grid(*sampling.interval(model), sampling.steps - (sampling.last_step_size is not None))
    x = noise(Stream.SAMPLE_NOISE)
    if sampling.sampler in samplers.SAMPLERS:
        return samplers.SAMPLERS[sampling.sampler](velocity, x, times), guided.nfe
    sde = SDE(path, sampling.diffusion, sampling.diffusion_norm)
    x = SDE_SAMPLERS[sampling.sampler](velocity, x, times, sde, lambda step: noise(Stream.SAMPLE_STEP, step))
    return last_step(sampling.last_step, velocity, x, times[-1], sde), guided.nfe


def generate(
    model: SiTTransformer2DModel,
    codec,
    indices: Sequence[int],
    labels: Sequence[int],
    sampling: Sampling,
    kept: int | None = None,
) -> tuple[torch.Tensor, int]:
    """Images of the given indices, and the number of network evaluations that each took.

    codec: decodes latents to images. labels: one class per index. kept: the first so many alone are wanted, the others
    fill the batch up.
    See `flow`; dopri5 shares its step size over the batch. Decoding is fp32.
    Returns uint8 (kept, C, H, W) on the CPU, by images.UINT8_RULE.
    Raises InputError for a label out of range, guidance without a null class, or a model that is no flow; NotFinite
    where latents or images that are wanted are not finite.
    """
    sampling.check_model(model)
    check_labels(labels, model.config.num_classes)
    latents, nfe = flow(model, indices, torch.tensor(labels, device=model.device), sampling)
    return render(codec, latents, model.dtype, indices, kept), nfe


@torch.no_grad()
def render(
    codec, latents: torch.Tensor, network: torch.dtype, indices: Sequence[int], kept: int | None = None
) -> torch.Tensor:
    """uint8 images (kept, C, H, W) on the CPU, of latents (B, ...) that a network of that dtype led to; see `generate`.

    Raises NotFinite.
    """
    check_latents(latents[:kept], network, indices)
    return to_uint8(decoded(latents, lambda all_of_them: codec.decode(all_of_them)[:kept], indices)).cpu()
