"""What data and codec decide about a run."""

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from sit_atconv.config import Recipe
from sit_atconv.data.held_out import describe_parts
from sit_atconv.models.sit import options_of
from sit_atconv.runtime.errors import InputError


@dataclass(frozen=True)
class Facts:
    """What data and codec decide about a run: latent shape (C, H, W), classes, images to train on and held-out ones."""

    latent_shape: tuple[int, int, int]
    num_classes: int
    num_images: int
    held_out: int = 0

    @property
    def all_images(self) -> int:
        """How many images lie where `data.root` says, which is what `data.num_images` states."""
        return self.num_images + self.held_out


def measured_facts(train: Dataset, codec, held_out: Dataset | None) -> Facts:
    """The facts of an opened dataset's parts, see `data.held_out.split`, and of a codec.

    Raises InputError when the codec does not take such images.
    """
    shape = codec.latent_shape(train.channels, train.image_size)
    return Facts(shape, len(train.class_names), len(train), 0 if held_out is None else len(held_out))


def describe(train: Dataset, codec, held_out: Dataset | None) -> dict[str, Any]:
    """What a manifest says of an opened dataset's parts, and of a codec."""
    return {"data": describe_parts(train, held_out), "codec": codec.describe()}


def stated_facts(recipe: Recipe) -> Facts | None:
    """The facts as the recipe states them, or None where it leaves one to the data, as how many are held out."""
    model = recipe.model
    stated = (model.sample_size, model.in_channels, model.num_classes, recipe.data.num_images)
    if None in stated or recipe.data.held_out is not None:
        return None
    size = model.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Facts((model.in_channels, height, width), model.num_classes, recipe.data.num_images)


def check_stated(recipe: Recipe, facts: Facts) -> None:
    """Raise InputError where the recipe states something else than data and codec say, or cuts no such pixels."""
    channels, height, width = facts.latent_shape
    size = recipe.model.sample_size
    for key, stated, measured in (
        ("model.in_channels", recipe.model.in_channels, channels),
        ("model.sample_size", [size, size] if isinstance(size, int) else size, [height, width]),
        ("model.num_classes", recipe.model.num_classes, facts.num_classes),
        ("data.num_images", recipe.data.num_images, facts.all_images),
    ):
        if stated is not None and stated != measured:
            raise InputError(
                f"{key}: the recipe says {stated}, data and codec say {measured}; correct it or leave it out"
            )
    if recipe.latents.codec == "vae" or recipe.distill.teacher is not None:
        return
    patch = recipe.model.patch_size or options_of(recipe.model.name)["patch_size"]
    if height % patch or width % patch:
        raise InputError(
            f"images of {height} x {width} pixels cannot be cut into patches of {patch}; make data.image_size a "
            "multiple of model.patch_size, or choose another model.patch_size"
        )
