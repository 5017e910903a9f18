"""The recipes that come with the package, and the sets of keys for any of them, by name; and where a run lies that no
recipe places."""

import os
import re
from pathlib import Path
from typing import Any

from sit_atconv.runtime.errors import InputError, check_choice

FOLDER = Path(__file__).with_name("recipes")
SETS = Path(__file__).with_name("sets")


def recipe_names() -> list[str]:
    """The names of all recipes that come with the package, less those that others build on (_NAME)."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def set_names() -> list[str]:
    """The names of the sets of keys that can be laid over a recipe."""
    return sorted(path.stem for path in SETS.glob("*.yaml"))


def set_path(name: str) -> Path | None:
    """The file of a set; None for a name that is none."""
    return SETS / f"{name}.yaml" if name in set_names() else None


def recipe_text(name: str) -> str:
    """The file of a recipe, or of a set, as it is, with its comments. Raises InputError for a name that is none."""
    return (set_path(name) or _file(name)).read_text()


def about(name: str) -> str:
    """What a recipe or a set is, in one line: the first comment of its file."""
    return recipe_text(name).partition("\n")[0].removeprefix("# ")


def recipe_path(recipe: str | Path) -> Path:
    """The file of a recipe: of that path, or of that name, which has neither a separator nor a suffix.

    Raises InputError for a name that is none.
    """
    is_path = Path(recipe).suffix or any(mark in str(recipe) for mark in (os.sep, "/"))
    return Path(recipe) if is_path else _file(str(recipe))


def base_path(base: str, path: Path) -> Path | None:
    """The file that a recipe at `path` names as its base, by its name or by its path; None for neither."""
    named = FOLDER / f"{base}.yaml"
    if "/" not in base and named.is_file():
        return named
    return path.parent / base if base.endswith((".yaml", ".yml")) else None


def _file(name: str) -> Path:
    if set_path(name):
        raise InputError(f"recipe={name!r} is a set of keys, which is laid over a recipe: name that before it")
    try:
        check_choice("recipe", name, recipe_names())
    except InputError as error:
        raise InputError(f"{error}; see `sit-atconv recipes`, or give the path of a .yaml file") from None
    return FOLDER / f"{name}.yaml"


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
