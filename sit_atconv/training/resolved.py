"""The recipe as a run stores it: with every value that it runs with."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sit_atconv.config import Recipe, differences, to_dict
from sit_atconv.models.sit import options_of
from sit_atconv.training.facts import Facts

# Options of a model that follow from the sections flow and meanflow, and from data and codec.
FROM_FLOW = ("path", "prediction", "use_meanflow", "trained_guidance")
FROM_DATA = "sample_size", "in_channels", "num_classes"


def resolved(recipe: Recipe, facts: Facts | None = None, made: Mapping[str, Any] = {}) -> Recipe:
    """The recipe with what a preset, the data and the codec decide in the place of its nulls.

    facts: of data and codec; None leaves what follows from them as the recipe states it. made: options of the model as
    this recipe once made it, in the place of the preset's; an earlier version did not store them. A distillation's
    model is a copy of its teacher, whose options stay null. The recipe is to fit the facts, see `facts.check_stated`.
    Raises InputError for an unknown preset.
    """
    data, decided = recipe.data, {}
    if recipe.distill.teacher is None:
        options = options_of(recipe.model.name)
        decided = {name: made.get(name, options[name]) for name in options.keys() - {*FROM_FLOW, *FROM_DATA}}
    if facts is not None:
        channels, height, width = facts.latent_shape
        size = height if height == width else [height, width]
        decided |= zip(FROM_DATA, (size, channels, facts.num_classes), strict=True)
        data = replace(data, num_images=facts.all_images)
    latents = replace(recipe.latents, precision=recipe.encoding_precision)
    model = replace(recipe.model, **{**decided, **recipe.model.options()})
    return replace(recipe, data=data, latents=latents, model=model)


def changes(stored: dict[str, Any], recipe: Recipe) -> list[str]:
    """What keeps the run of a stored recipe from being that of this one, see `config.differences`.

    Options of the model that `train.init` decides are as the run had them: what they are now, its source alone knows.
    """
    decided = recipe.train.init is not None and recipe.model.name is None
    wanted = resolved(recipe, made=stored.get("model", {}) if decided else {})
    return differences(stored, to_dict(wanted), complete=resolved)
