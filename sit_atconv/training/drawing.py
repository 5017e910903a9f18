"""How previews and scores are drawn while training: the recipe's settings, and the guide that they name."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sit_atconv.config import Preview, Recipe
from sit_atconv.layers.atconv import check_backend
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime.errors import InputError, named
from sit_atconv.runtime.files import shown
from sit_atconv.runtime.processes import gathered
from sit_atconv.sampling.trained import describe_guide, open_guide
from sit_atconv.training.checkpoint import Trained


@dataclass(frozen=True)
class Drawing:
    """The settings, with the guide itself in the place of where it lies; and what is known of the guide."""

    sampling: Preview
    guide: Trained | None = None

    def to(self, device: torch.device) -> "Drawing":
        """With the guide on a device. Raises InputError where its operator does not run there."""
        if self.guide is not None:
            torch.nn.Module.to(self.guide.model, device)
            check_backend(self.guide.model, device)
        return self

    def check_shared(self) -> None:
        """Raise InputError in every process where they have loaded different guides, such as of a run that is being
        trained. Collective."""
        files = gathered(self.guide and self.guide.files)
        if any(other != files[0] for other in files):
            place = shown(self.guide.folder)
            raise InputError(f"preview.guide: the processes found different weights in {place!r}; name one that stays")

    def describe(self, model: SiTTransformer2DModel) -> dict[str, Any]:
        """What a log says of images that are drawn from the model."""
        guide = {} if self.guide is None else {"guide": describe_guide(self.guide)}
        return self.sampling.for_model(model).describe() | guide


def open_drawing(
    recipe: Recipe,
    model: SiTTransformer2DModel,
    codec: dict[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> Drawing:
    """How a recipe's previews and scores are drawn from a model, with the guide on the CPU.

    codec: of the latents, as it describes itself. classes: their names. None: nobody knows yet.
    Raises InputError where images are to be drawn, and cannot be drawn from the model as the recipe says.
    """
    sampling, guide = recipe.preview, None
    if not (sampling.every or recipe.score.every):
        return Drawing(sampling)
    if sampling.guide is not None:
        with torch.device("cpu"):
            guide = open_guide(sampling.guide, f"preview.guide={sampling.guide!r}", model, codec, classes)
        sampling = dataclasses.replace(sampling, guide=guide.model)
    with named("preview"):
        sampling.for_model(model).check_acts_on(model)
    return Drawing(sampling, guide)
