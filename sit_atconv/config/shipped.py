"""The recipes that come with the package, by name, and where a run lies that no recipe places."""

import re
from pathlib import Path
from typing import Any

from sit_atconv.runtime.errors import InputError, check_choice

FOLDER = Path(__file__).with_name("recipes")


def recipe_names() -> list[str]:
    """The names of all recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """A recipe's file as it is, with its comments. Raises InputError for a name that is none."""
    check_choice("recipe", name, recipe_names())
    return (FOLDER / f"{name}.yaml").read_text()


def about(name: str) -> str:
    """What a recipe is, in one line: the first comment of its file."""
    return recipe_text(name).partition("\n")[0].removeprefix("# ")


def recipe_path(recipe: str | Path) -> Path:
    """The file of a recipe: of that path, or of that name. Raises InputError for what looks like neither."""
    path = Path(recipe)
    if path.suffix or len(path.parts) != 1 or path.exists():
        return path
    if path.name not in recipe_names():
        try:
            check_choice("recipe", str(recipe), recipe_names())
        except InputError as error:
            raise InputError(f"{error}; see `recipes`, or give a .yaml file") from None
    return FOLDER / f"{path.name}.yaml"


def default_out(path: Path, model: Any) -> str:
    """Where a run lies that its recipe does not place: runs/RECIPE-MODEL.

    path: of the recipe. model: what is stated of it; its name, or else its token mixer, tells runs of one recipe apart.
    It is left out where the recipe has it in its own name.
    """
    stated = (model.get("name") or model.get("token_mixer")) if isinstance(model, dict) else None
    label = re.sub(r"[^\w.]+", "-", stated) if isinstance(stated, str) else ""
    within = _letters(label) in _letters(path.stem)
    return f"runs/{path.stem}" + ("" if within else f"-{label}")


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).lower()
