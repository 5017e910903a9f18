"""What makes two recipes the same run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sit_atconv.config.reading import Schema, make_recipe, to_dict
from sit_atconv.config.schema import Recipe
from sit_atconv.runtime import comparison


def differences(
    old: dict[str, Any],
    new: dict[str, Any],
    schema: type[Schema] = Recipe,
    complete: Callable[[Schema], Schema] = lambda recipe: recipe,
) -> list[str]:
    """What keeps two recipes of a schema from being the same run: a text "key: old -> new" for each key.

    old: as it was stored; a key that it leaves out, as one stored before the key was there, means what
    `earlier.LEFT_OUT` says, or has its default.
    complete: puts in what a recipe leaves to others, as it was put into `new`.
    Raises InputError where `old` is no recipe.
    """
    before = to_dict(complete(make_recipe(old, schema, stored=True)))
    return comparison.differences(before, new, mutable_keys(new, schema))


def mutable_keys(recipe: dict[str, Any], schema: type = Recipe) -> set[str]:
    """The keys that a later start of this recipe's run may state differently, see `fields.MUTABLE`."""
    return {
        f"{section.name}.{entry.name}"
        for section in dataclasses.fields(schema)
        for entry in dataclasses.fields(section.type)
        if _is_mutable(section, recipe) or _is_mutable(entry, recipe[section.name])
    }


def _is_mutable(entry: dataclasses.Field, beside: Mapping[str, Any]) -> bool:
    said = entry.metadata.get("mutable", False)
    return said(beside) if callable(said) else said
