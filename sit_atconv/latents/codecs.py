"""Codecs between images and latents; the only owner of a latent's scale and shift.

Images to encode are levels, uint8, or in [-1, 1], see `sit_atconv.data.images.in_range`; decoded ones are in [-1, 1].
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset

from sit_atconv.config import Latents
from sit_atconv.data.images import in_range
from sit_atconv.data.latent_cache import LatentCache
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, option, told
from sit_atconv.runtime.reading import read_config
from sit_atconv.runtime.weights import fits, load_pretrained, weight_files

CONFIG = "config.json"
WIDTH, LAYERS = range(1, (1 << 16) + 1), range(1, 1001)
# What a constructor would take memory or time by, or a codec works by; far beyond every autoencoder there is.
VAE_FORM = {
    "in_channels?": WIDTH, "out_channels?": WIDTH, "latent_channels?": WIDTH, "block_out_channels?": [WIDTH],
    "layers_per_block?": LAYERS, "norm_num_groups?": WIDTH, "sample_size?": (WIDTH, [WIDTH, WIDTH]),
    "scaling_factor?": float, "shift_factor?": (float, None), "quantization_config?": None,
}  # fmt: skip
SCALE = limits.number(1e-6, 1e6, "latents are multiplied by it, and divided by it again, in fp32")
SHIFT = limits.number(-1e6, 1e6, "it is taken from the latents, and added again, in fp32")


def draw_latents(moments: torch.Tensor, posterior: torch.Tensor, scale: float, shift: float) -> torch.Tensor:
    """A draw of an autoencoder's posterior, scaled: (mean + std * posterior - shift) * scale, in fp32.

    moments (B, 2C, h, w) of any dtype: mean, then log-variance; posterior (B, C, h, w): standard normal.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance) * posterior - shift) * scale


class IdentityCodec(nn.Module):
    """Pixels in [-1, 1] are the latents."""

    draws_posterior = False

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of a square image."""
        return channels, image_size, image_size

    def image_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the image that a latent is decoded to."""
        return latent_shape

    def encode(self, images: torch.Tensor, posterior: torch.Tensor | None = None) -> torch.Tensor:
        """images (B, C, H, W), levels or in [-1, 1] -> those in [-1, 1]; there is no posterior to draw from."""
        return in_range(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (B, C, H, W), as they are."""
        return latents

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of the codec."""
        return {"codec": "identity", "scale": 1.0, "shift": 0.0}


def _files_of(folder: Path, variant: str | None) -> list[Path]:
    """The files of weights of an autoencoder's folder. Raises InputError for a configuration that none can have."""
    config = read_config(folder / CONFIG, VAE_FORM)
    SCALE.check(f"{CONFIG}: scaling_factor=", abs(config.get("scaling_factor", 1.0)))
    SHIFT.check(f"{CONFIG}: shift_factor=", config.get("shift_factor"))
    return weight_files(folder, variant)


class VaeCodec(nn.Module):
    """A diffusers AutoencoderKL, frozen, in fp32: latents = (posterior sample - shift) * scale, both from its config.

    source: hub id or local folder with config.json and safetensors weights. batch_size: images per pass.
    variant: of the weights, such as "fp16". On CUDA weights and images lie channels last within a pass, as cuDNN's
    convolutions read them (not measured yet); what comes out is contiguous.
    Raises InputError when the autoencoder is not there.
    """

    draws_posterior = True

    def __init__(self, source: str, batch_size: int, variant: str | None = None):
        from diffusers import AutoencoderKL

        super().__init__()
        folder = Path(source)
        if folder.exists() and not (folder / CONFIG).is_file():
            raise InputError(f"latents.vae={source!r}: the folder holds no {CONFIG} of an AutoencoderKL")
        wanted = (
            f"latents.vae={source!r} cannot be loaded; download a repository such as stabilityai/sd-vae-ft-ema and "
            f"give its folder ({CONFIG}, diffusion_pytorch_model.safetensors)"
        )
        with (
            told(wanted, InputError, OSError, SafetensorError),
            fits(_files_of(folder, variant)) if folder.is_dir() else nullcontext(),
        ):
            self.vae = load_pretrained(AutoencoderKL, source, variant)
        if getattr(self.vae.config, "latents_mean", None) is not None:
            raise InputError(
                f"latents.vae={source!r} normalises each channel (latents_mean); only scale and shift are known"
            )
        self.vae.eval().requires_grad_(False)
        self.source, self.batch_size = source, batch_size
        self.scale = float(self.vae.config.scaling_factor)
        self.shift = float(self.vae.config.shift_factor or 0.0)

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of an image. Raises InputError when the autoencoder does not take such images."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if channels != self.vae.config.in_channels or image_size % factor:
            raise InputError(
                f"images of {channels} x {image_size} x {image_size} do not fit the autoencoder {self.source!r}: "
                f"it takes {self.vae.config.in_channels} channels and multiples of {factor} pixels"
            )
        return self.vae.config.latent_channels, image_size // factor, image_size // factor

    def image_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the image that a latent is decoded to."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.out_channels, latent_shape[1] * factor, latent_shape[2] * factor

    def _parts(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """x (B, C, H, W) in parts of a pass each, and the weights, laid out for its device."""
        layout = torch.channels_last if x.device.type == "cuda" else torch.preserve_format
        if x.device.type == "cuda" and not self.vae.encoder.conv_in.weight.is_contiguous(memory_format=layout):
            for weight in self.vae.parameters():
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=layout)
        for part in x.split(self.batch_size):
            yield part.to(memory_format=layout)

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W), levels or in [-1, 1] -> (B, 2C, h, w): mean, and log-variance in [-30, 20], as diffusers
        clamps it.

        Both without scale and shift. Within that range fp16 keeps the deviation to 0.4%, and has no infinity to meet.
        """
        parts = [self.vae.encode(in_range(part)).latent_dist for part in self._parts(images)]
        return torch.cat([torch.cat([part.mean, part.logvar], dim=1) for part in parts]).contiguous()

    def encode(self, images: torch.Tensor, posterior: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W), levels or in [-1, 1] -> latents (B, C, h, w), fp32.

        posterior: standard normal (B, C, h, w).
        """
        return draw_latents(self.moments(images), posterior, self.scale, self.shift)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (B, C, h, w) -> images (B, 3, H, W), about in [-1, 1]."""
        unscaled = latents.float() / self.scale + self.shift
        return torch.cat([self.vae.decode(part).sample for part in self._parts(unscaled)]).contiguous()

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of the codec: source, SHA-256 of the weights, scale and shift."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        weights = digest.hexdigest()
        return {"codec": "vae", "vae": self.source, "sha256": weights, "scale": self.scale, "shift": self.shift}


class CachedCodec(nn.Module):
    """Draws latents from the moments of a cache; decodes through the autoencoder that made them, where one is named.

    index: what the cache says of itself. Raises InputError when `latents.vae` is not the autoencoder of the cache.
    """

    draws_posterior = True

    def __init__(self, index: dict[str, Any], latents: Latents):
        super().__init__()
        self.shape, self.description, self.vae = tuple(index["latent_shape"]), index["codec"], None
        if latents.vae is not None:
            self.vae = VaeCodec(latents.vae, latents.batch_size)
            self.description = self.vae.describe()
            check_same_codec(index["codec"], self.description, "the cache of latents")

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """(C, H, W) of a latent, which the cache has settled."""
        return self.shape

    def image_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the image that a latent is decoded to. Raises InputError as `decode`."""
        return self._decoder().image_shape(latent_shape)

    def encode(self, moments: torch.Tensor, posterior: torch.Tensor) -> torch.Tensor:
        """moments (B, 2C, h, w) of the cache, posterior: standard normal (B, C, h, w) -> latents (B, C, h, w)."""
        return draw_latents(moments, posterior, self.description["scale"], self.description["shift"])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (B, C, h, w) -> images (B, 3, H, W). Raises InputError where the recipe names no autoencoder."""
        return self._decoder().decode(latents)

    def _decoder(self) -> VaeCodec:
        if self.vae is None:
            raise InputError(f"latents.vae is missing: decoding takes the cache's, {self.description['vae']!r}")
        return self.vae

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of the codec: the same as if its autoencoder had encoded the images just now."""
        return self.description


def open_codec(latents: Latents, dataset: Dataset | None = None) -> IdentityCodec | VaeCodec | CachedCodec:
    """The codec that a recipe names, for its opened dataset, which may be a cache of latents.

    Raises InputError when its autoencoder is not there, or is not the one that made the cache.
    """
    if isinstance(dataset, LatentCache):
        return CachedCodec(dataset.index, latents)
    return IdentityCodec() if latents.codec == "identity" else VaeCodec(latents.vae, latents.batch_size)


def reopen_codec(description: dict[str, Any], vae: str | None, batch_size: int) -> IdentityCodec | VaeCodec:
    """The codec that a checkpoint was trained with, from what `describe` said.

    vae: where the autoencoder lies today, None for where it was; batch_size: images per pass through it.
    A description that leaves the codec open (a model without a training checkpoint) gives its number of channels: the
    autoencoder is the one named, else the one that lies beside the model, and 1 or 3 channels without one are pixels.
    Raises InputError when the autoencoder is not there or is another one.
    """
    if description["codec"] == "open":
        return _named_codec(description["channels"], vae or description.get("vae"), batch_size)
    if description["codec"] == "identity":
        if vae is not None:
            raise InputError(f"{option('vae', vae)}: this checkpoint is of a pixel model and has no autoencoder")
        return IdentityCodec()
    with told("", InputError, remedy=f"say with {option('vae')} where the checkpoint's autoencoder lies"):
        codec = VaeCodec(vae or description["vae"], batch_size)
        check_same_codec(description, codec.describe())
    return codec


def _named_codec(channels: int, vae: str | None, batch_size: int) -> IdentityCodec | VaeCodec:
    if vae is None:
        if channels in (1, 3):
            return IdentityCodec()
        raise InputError(
            f"the model has {channels} latent channels and does not say of which autoencoder; name it with "
            f"{option('vae')}, such as stabilityai/sd-vae-ft-ema or a folder with it"
        )
    codec = VaeCodec(vae, batch_size)
    if codec.vae.config.latent_channels != channels:
        raise InputError(
            f"{option('vae', vae)}: its latents have {codec.vae.config.latent_channels} channels, this model has "
            f"{channels}"
        )
    return codec


def differing(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str | None:
    """The first key by which two descriptions are of different codecs: by weights, scale or shift, not by path.

    None where they are of the same, and where one is open, or None since nobody knows.
    """
    if None in (one, other) or "open" in (one.get("codec"), other.get("codec")):
        return None
    return next((key for key in ("codec", "sha256", "scale", "shift") if one.get(key) != other.get(key)), None)


def check_same_codec(then: dict[str, Any], now: dict[str, Any], owner: str = "this checkpoint") -> None:
    """Raise InputError when two descriptions are of different codecs, see `differing`.

    owner: of what `then` was recorded, for the message.
    """
    if key := differing(then, now):
        raise InputError(
            f"latents.vae={now.get('vae')!r} is not the autoencoder of {owner}: {key} is {now.get(key)}, was "
            f"{then.get(key)}"
        )
