"""From tensors to pictures: the one rule of rounding, and the one check that there is something to round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from sit_atconv.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

UINT8_RULE = "trunc(clamp(127.5 * x + 128, 0, 255))"


class NotFinite(InputError):
    """NaN or infinity where a picture was to be: rounding would make black or white of it."""


def check_finite(values: torch.Tensor, source: str, remedy: str, indices: Sequence[int] | None = None) -> None:
    """Raise NotFinite that names the first of `values` (B, ...) that is not finite.

    source: what they come from. indices: the names of the images, by default their places.
    """
    finite = values.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        place = finite.index(False)
        index = place if indices is None else indices[place]
        raise NotFinite(f"image {index} is not finite as it comes from {source}: no image made of it; {remedy}")


def check_latents(
    latents: torch.Tensor, network: torch.dtype, indices: Sequence[int] | None = None, sampler: str = "the sampler"
) -> None:
    """Raise NotFinite for latents (B, ...) that a network of that dtype led to and that are not finite."""
    remedy = f"try the network in float32 (it is in {_name(network)})"
    if _name(network) == "float32":
        remedy = "try more steps, less guidance or other weights (the network is in float32 already)"
    check_finite(latents, sampler, remedy, indices)


def decoded(
    latents: torch.Tensor, decode: Callable[[torch.Tensor], torch.Tensor], indices: Sequence[int] | None = None
) -> torch.Tensor:
    """decode(latents), in fp32: images (B, C, H, W), about in [-1, 1], of latents (B, ...) that are finite.

    Raises NotFinite where the autoencoder gives something that is not, and says in which dtype it ran.
    """
    images = decode(latents)
    remedy = f"try the autoencoder in float32 (it is in {_name(images.dtype)}), since the latents are finite"
    if _name(images.dtype) == "float32":
        remedy = "try another autoencoder (it is in float32 already), since the latents are finite"
    check_finite(images, "the autoencoder", remedy, indices)
    return images.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, by the common rule (ADM, DiT, SiT): 127.5 x + 128, clamped, truncated.

    Raises NotFinite for NaN and infinity.
    """
    if not images.isfinite().all():
        raise NotFinite("images that are not finite: no uint8 made of them; look for where the first NaN comes from")
    return (127.5 * images.float() + 128).clamp(0, 255).byte()


def to_pil(image: torch.Tensor) -> Image.Image:
    """uint8 (1 or 3, H, W) -> a grey or RGB image."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
