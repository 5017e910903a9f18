"""REPA: tokens inside the model, projected, are to point where a frozen image encoder's features point.

"Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think" (arXiv 2410.06940).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sit_atconv import config
from sit_atconv.data.images import in_range
from sit_atconv.data.samples import Batch
from sit_atconv.layers.projectors import Projectors, write_projectors
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.vit import is_rgb, load_vit
from sit_atconv.runtime.weights import digest_of
from sit_atconv.training.checkpoint import Part
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.objectives.objective import Forward
from sit_atconv.training.origin import Origin


class ImageEncoder(nn.Module):
    """A frozen ViT of timm, in eval mode. It belongs to no model, so it is in no state dict but its own.

    name: of timm, with a tag or without ("vit_base_patch14_dinov2.lvd142m"), downloaded to the Hugging Face cache where
    it is not there yet; or "local-dir:FOLDER", a folder with the config.json and model.safetensors of timm's
    `save_for_hf`. Weights are read from safetensors alone.
    Raises InputError when the encoder is not there, is damaged, or is no ViT of RGB images.
    """

    def __init__(self, name: str):
        super().__init__()
        self.vit = _load(name).eval().requires_grad_(False)
        made = self.vit.pretrained_cfg
        self.name = ".".join(part for part in (made["architecture"], made.get("tag")) if part)
        self.register_buffer("mean", torch.tensor(made["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(made["std"]).view(3, 1, 1))
        self.sha256 = digest_of(self.state_dict())

    @property
    def width(self) -> int:
        """Width D of the features."""
        return self.vit.embed_dim

    @torch.no_grad()
    def features(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Patch tokens (B, h * w, D), row by row, of images (B, 3 or 1, H, W), levels or in [-1, 1], grey made RGB.

        grid: (h, w); the images are resized (bicubic, antialiased) so that the encoder has one patch per cell. The
        tokens went through the encoder's final norm (DINOv2's x_norm_patchtokens), if it has one before pooling; class
        and register tokens are left out.
        """
        size = [cells * side for cells, side in zip(grid, self.vit.patch_embed.patch_size, strict=True)]
        resized = F.interpolate(in_range(images).float(), size, mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
        tokens = self.vit.forward_features(((resized + 1) / 2 - self.mean) / self.std)
        return tokens[:, self.vit.num_prefix_tokens :]

    def describe(self) -> dict[str, Any]:
        """What features depend on, wherever it lies: architecture and tag, SHA-256 of the weights, mean and std."""
        return {"name": self.name, "sha256": self.sha256}


def _load(name: str) -> VisionTransformer | Eva:
    where = f"repa.encoder={name!r}"
    vit, _ = load_vit(name, where, "repa.encoder=")
    if not isinstance(vit, VisionTransformer | Eva) or not is_rgb(vit):
        raise InputError(f"{where} is no ViT of RGB images; choose such as vit_base_patch14_dinov2.lvd142m")
    vit.reset_classifier(0)
    return vit


def repa_loss(z: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(B,): minus the mean over tokens of the cosine between z (B, N, D) and features (B, N, D). In [-1, 1]; fp32."""
    return -F.cosine_similarity(z.float(), features.float(), dim=-1).mean(1)


class AlignedModel(nn.Module):
    """A model with its projectors in one module, as DDP and FSDP want all that is trained."""

    def __init__(self, model: nn.Module, projectors: Projectors):
        super().__init__()
        self.model, self.projectors = model, projectors
        self._no_split_modules = sorted({type(block).__name__ for block in model.blocks})  # what FSDP shards one by one

    def forward(self, x: torch.Tensor, t: torch.Tensor | float, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(velocity, z of every encoder (B, N, z_dim) ...) at (x, t, labels)."""
        velocity, z = self.projectors.with_model(self.model, x, t, labels)
        return (velocity, *z)


def align(model: nn.Module, encoder: ImageEncoder, settings: config.Repa, seed: int) -> AlignedModel:
    """The model with one projector to the encoder's width, after block `settings.depth`.

    The projector has torch's default starting weights, drawn from the seed alone and apart from the model's.
    """
    own_seed = np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(own_seed))
        projectors = Projectors(model.config.hidden_size, settings.projector_dim, [encoder.width], settings.depth)
    return AlignedModel(model, projectors)


class RepaObjective(FlowObjective):
    """The flow loss, and REPA's: projected tokens of the model beside the features of a frozen encoder.

    Raises InputError where the model lacks the block that REPA looks at.
    """

    with_image = True
    besides = "; REPA's projectors and encoder come on top"

    def __init__(self, recipe: config.Recipe, facts: Facts, origin: Origin | None = None):
        super().__init__(recipe, facts, origin)
        self.weights["repa_loss"] = recipe.repa.weight
        if recipe.repa.depth > len(self.model.blocks):
            raise InputError(
                f"repa.depth={recipe.repa.depth}: the model has {len(self.model.blocks)} blocks; choose one of them"
            )

    def open(self, codec: nn.Module) -> None:
        super().open(codec)
        self.encoder = ImageEncoder(self.recipe.repa.encoder)
        self.trained = align(self.model, self.encoder, self.recipe.repa, self.recipe.run.seed)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "encoder": self.encoder.describe()}

    @property
    def frozen(self) -> list[nn.Module]:
        return [*super().frozen, self.encoder]

    def _load(self, checkpoint: Path) -> None:
        super()._load(checkpoint)
        self.trained.projectors.load_state_dict(Projectors.load(checkpoint / "model").state_dict())

    def losses(self, batch: Batch, forward: Forward) -> list[torch.Tensor | None]:
        hidden: list[torch.Tensor] = []

        def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            velocity, *z = forward(x, t, batch["label"])
            hidden.extend(z)
            return velocity

        latents = self.encode(batch)
        loss = self.flow_loss(network, latents, batch)
        grid = tuple(side // self.model.config.patch_size for side in latents.shape[-2:])
        with forward.autocast():
            features = self.encoder.features(batch.get("pixels", batch["image"]), grid)
        return [loss, repa_loss(hidden[0], features)]

    def parts(self) -> list[Part]:
        return [*super().parts(), Part("model", self.trained.projectors, write_projectors)]
