"""From indices and labels to images: the one sampling routine of previews, sample.py and `python -m sampling`."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import make_grid, save_image

from sit_atconv import draws
from sit_atconv.data import to_uint8
from sit_atconv.draws import Stream
from sit_atconv.errors import InputError, check_choice
from sit_atconv.flow.guidance import CHANNELS, GuidedVelocity
from sit_atconv.flow.samplers import ATOL, RTOL, SAMPLERS
from sit_atconv.models.sit import SiTTransformer2DModel


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. Raises InputError for a value out of range.

    steps: intervals of the time grid (dopri5 sets its own). guidance_scale: 1 is no guidance.
    guidance_channels: "all" or "first3". guidance_interval: guidance acts for t in it, t = 0 noise, t = 1 data.
    """

    sampler: str = "euler"
    steps: int = 50
    guidance_scale: float = 1.5
    guidance_channels: str = "all"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self):
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("guidance channels", self.guidance_channels, CHANNELS)
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: must be at least 0")
        if not math.isfinite(self.guidance_scale):
            raise InputError(f"guidance scale {self.guidance_scale}: must be a finite number")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise InputError(f"guidance interval {low} to {high}: give 0 <= LOW <= HIGH <= 1 (t = 0 noise, t = 1 data)")

    def describe(self) -> dict[str, Any]:
        """What a manifest records: the settings that acted, with the tolerances of the adaptive sampler."""
        settings = dataclasses.asdict(self)
        return {**settings, "steps": None, "rtol": RTOL, "atol": ATOL} if self.sampler == "dopri5" else settings

    def check_model(self, model: SiTTransformer2DModel) -> None:
        """Raise InputError when the model cannot be guided as asked."""
        if self.guidance_scale != 1 and model.null_label is None:
            raise InputError(
                f"guidance scale {self.guidance_scale:g} needs a null class, and this model was trained without class "
                "dropout; use guidance scale 1"
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


def save_grid(images: torch.Tensor, columns: int, path: Path) -> None:
    """Write uint8 images (N, C, H, W) as one PNG to look at; small ones are enlarged to about 64 pixels."""
    factor = max(1, GRID_PIXELS // images.shape[-1])
    enlarged = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(make_grid(enlarged.float() / 255, nrow=columns, padding=4, pad_value=1.0), path)


@torch.no_grad()
def flow(
    model: SiTTransformer2DModel, noise: torch.Tensor, labels: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, int]:
    """Carry noise (B, C, H, W), fp32, to latents of the classes `labels` (B,); also the evaluations per image.

    The model runs in its own dtype; the state is fp32. All on one device.
    """

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x.to(model.dtype), t, y, return_dict=False)[0].float()

    velocity = GuidedVelocity(
        network,
        labels,
        model.null_label,
        sampling.guidance_scale,
        sampling.guidance_channels,
        sampling.guidance_interval,
    )
    return SAMPLERS[sampling.sampler](velocity, noise, sampling.steps), velocity.nfe


def generate(
    model: SiTTransformer2DModel, codec, indices: Sequence[int], labels: Sequence[int], sampling: Sampling
) -> tuple[torch.Tensor, int]:
    """Images of the given indices, and the number of network evaluations that each took.

    codec: decodes latents to images. labels: one class per index.
    The noise of image i comes from (seed, i) alone; dopri5 shares its step size over the batch.
    The model runs in its own dtype and on its own device; state and decoding are fp32.
    Returns uint8 (B, C, H, W) on the CPU, by data.UINT8_RULE.
    Raises InputError for a label out of range or guidance without a null class.
    """
    sampling.check_model(model)
    check_labels(labels, model.config.num_classes)
    shape = (model.config.in_channels, *model.latent_size)
    noise = [draws.normal(shape, sampling.seed, Stream.SAMPLE_NOISE, index) for index in indices]
    device = model.device
    latents, nfe = flow(model, torch.stack(noise).to(device), torch.tensor(labels, device=device), sampling)
    with torch.no_grad():
        return to_uint8(codec.decode(latents)).cpu(), nfe
