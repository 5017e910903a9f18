"""The recipe of a classifier as a run stores it: with every value that it runs with."""

from dataclasses import replace

from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.models.attnet import options_of
from sit_atconv.runtime.reading import as_stored


def resolved(recipe: ClassifierRecipe) -> ClassifierRecipe:
    """The recipe with what the name of an AttNet decides in the place of what it leaves out.

    Other models of timm keep what theirs decide to themselves: options stay left out, and drop rates null.
    """
    model, own = recipe.model, as_stored(options_of(recipe.model.name))
    for name in ("drop_rate", "drop_path_rate"):
        if (rate := own.pop(name, None)) is not None and getattr(model, name) is None:
            model = replace(model, **{name: rate})
    return replace(recipe, model=replace(model, options={**own, **model.options}))
