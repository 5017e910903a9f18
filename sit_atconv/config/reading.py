"""How a YAML file and key=value overrides become a recipe."""

import dataclasses
import functools
import json
import math
import reprlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sit_atconv.config.earlier import by_section, left_out, meant
from sit_atconv.config.schema import Recipe
from sit_atconv.config.shipped import base_path, default_out, recipe_path, set_names, set_path
from sit_atconv.runtime import limits
from sit_atconv.runtime.comparison import flat
from sit_atconv.runtime.errors import MOST, InputError, check_choice, said, told
from sit_atconv.runtime.fields import WHEN, When
from sit_atconv.runtime.reading import check_literal, entries, read_yaml

Schema = TypeVar("Schema")

# What YAML of any content ends in: the parser's own errors, and Python's of numbers and brackets without end.
UNREADABLE = (
    yaml.YAMLError,
    OmegaConfBaseException,
    AttributeError,
    TypeError,
    ValueError,
    RecursionError,
    AssertionError,
)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = (), schema: type[Schema] = Recipe) -> Schema:
    """Read a recipe, lay overrides over it, and validate. Raises InputError in one line.

    path: of a file, or the name of a recipe that comes with the package. A run that no recipe places lies at
    `shipped.default_out`. A file may name another with `base:`, by its path relative to itself or by its name, whose
    keys it takes over and its own win against: a recipe's file, of which no message tells the content. Nothing is
    worked out: "${...}" is refused.
    overrides: each is `key=value`, or the name of a set of keys that comes with the package; later ones win.
    What is laid over a file may take back a choice that other keys of the file go with, such as latents.codec=vae:
    these keys go with it.
    """
    overrides = [word for override in overrides for word in _words(override)]
    for override in overrides:
        if "???" in override.partition("=")[2]:  # which would give way to whatever the file says
            raise InputError(f"override {override!r}: ??? stands for a value that is missing; state it")
    place = recipe_path(path)
    stated = _read_with_base(place, (), schema)
    with told(f"recipe {str(path)!r} cannot be read", *UNREADABLE):
        laid_over = OmegaConf.from_dotlist([_as_text(override, schema) for override in overrides])
        check_literal(OmegaConf.to_container(laid_over))
        _check_renamed(OmegaConf.to_container(OmegaConf.create(stated)), OmegaConf.to_container(laid_over))
        keys = _laid_over(stated, laid_over, schema)
        if isinstance(run := keys.setdefault("run", {}), dict):
            run.setdefault("out", default_out(place, keys.get("model")))
    return make_recipe(keys, schema)


def _laid_over(below: Any, above: Any, schema: type) -> dict[str, Any]:
    """The keys below with those above over them, without those below that went with a choice (`fields.When`) there and
    do nothing beside the one above."""
    below, above, merged = (
        OmegaConf.to_container(each) for each in map(OmegaConf.create, (below, above, OmegaConf.merge(below, above)))
    )
    for section in dataclasses.fields(schema):
        old, new, both = (keys.get(section.name) for keys in (below, above, merged))
        if not (isinstance(old, dict) and isinstance(new, dict)):
            continue
        for entry in dataclasses.fields(section.type):
            when = entry.metadata.get(WHEN)
            if when is not None and entry.name in old and entry.name not in new:
                with suppress(TypeError):  # of a value that is refused later
                    if _holds(when, section.type, old) and not _holds(when, section.type, both):
                        del both[entry.name]
    return merged


def _holds(when: When, section: type, stated: dict[str, Any]) -> bool:
    """Whether a setting does anything beside what is stated of its section, and the defaults of the rest."""
    defaults = {
        entry.name: entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        for entry in dataclasses.fields(section)
    }
    return when.holds(SimpleNamespace(**defaults | {str(key): value for key, value in stated.items()}))


def _words(override: str) -> list[str]:
    """The override, or those that its set stands for."""
    if "=" in override:
        return [override]
    path = set_path(override)
    if path is None:
        sets = " or ".join(set_names())
        raise InputError(f"override {override!r} is not of the form key=value, and no set of keys, as {sets} is")
    return [f"{key}={json.dumps(value)}" for key, value in flat(read_yaml(path)).items()]


SIZES = ("depth", "hidden_size", "num_heads", "patch_size")


def _check_renamed(stated: Any, laid_over: Any) -> None:
    """Raise InputError for another model.name over a recipe that states all sizes of its own model, as a run stores it:
    it would be that model, by another name."""
    model, over = (part.get("model") if isinstance(part, dict) else None for part in (stated, laid_over))
    if not isinstance(model, dict) or not isinstance(over, dict) or None in (model.get("name"), over.get("name")):
        return
    if over["name"] != model["name"] and all(model.get(key) and key not in over for key in SIZES):
        raise InputError(
            f"model.name={over['name']}: the recipe states the sizes of {model['name']}, as a run stores them; begin "
            "with the recipe that the run was made by"
        )


def _as_text(override: str, schema: type) -> str:
    """The override, quoted where YAML would take the text that its key wants for a number: data.root=2024_01."""
    key, _, value = override.partition("=")
    if not _is_text(_type_of(key, schema)) or value in ("", "null", "~") or value[0] in "\"'":
        return override
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _type_of(key: str, schema: type) -> Any:
    """The type of a recipe's key, None where there is no such key."""
    found: Any = schema
    for name in key.split("."):
        own = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
        found = next((entry.type for entry in own if entry.name == name), None)
    return found


def _lacks_value(value: Any) -> bool:
    """Whether OmegaConf's mark of a missing value is left in a recipe's value."""
    return value == "???" or any(_lacks_value(part) for _, part in entries(value))


def _is_text(wanted: Any) -> bool:
    return wanted in (str, str | None)


def _read_with_base(path: Path, above: tuple[Path, ...], schema: type) -> Any:
    """The keys of a recipe file over those of its base; above: the files that led here."""
    where = f"recipe {str(path)!r}"
    with told(where, OSError, remedy="see `sit-atconv recipes`"), told(f"{where} cannot be read", ValueError):
        stated, place = read_yaml(path, regular=bool(above)), path.resolve()
    if place in above:
        raise InputError(f"{where}: its base leads back to it; leave one `base` out")
    if above:
        _check_base(where, stated, schema)
    if not isinstance(stated, dict):
        raise InputError(f"{where} holds no sections; see `sit-atconv recipes`")
    base = stated.pop("base", None)
    if base is None:
        return stated
    below = base_path(base, path) if isinstance(base, str) else None
    if below is None:
        raise InputError(f"{where}: base={base!r}: give a recipe's name, or the path of its file, which ends in .yaml")
    return _laid_over(_read_with_base(below, (*above, place), schema), stated, schema)


def _check_base(where: str, stated: Any, schema: type) -> None:
    """Raise InputError unless a base holds keys of a recipe alone, with values of their types; it tells neither."""
    try:
        keys = {key: value for key, value in stated.items() if key != "base"}
        _check_keys(keys, schema)
        OmegaConf.merge(OmegaConf.structured(schema), keys)
    except (InputError, OmegaConfBaseException, AttributeError, TypeError, ValueError):
        raise InputError(f"{where} is no recipe, and a base has to be one; a dry run of it alone says why") from None


def make_recipe(stated: Any, schema: type[Schema] = Recipe, stored: bool = False) -> Schema:
    """A validated recipe from nested dictionaries. Raises InputError for unknown keys, wrong types, wrong values.

    What a null stands for takes its place, see `fields.settle`. stored: it was accepted by an earlier version, whose
    ranges may have been wider, see `limits.check`, whose nulls mean what they meant, and which may have lacked keys,
    see `earlier`.
    """
    with told("recipe", ValueError):
        check_literal(stated)  # before OmegaConf looks into a text
        keys = OmegaConf.to_container(OmegaConf.create(stated))
        check_literal(keys)
    _check_keys(keys, schema)
    _check_values(keys)
    for section, switch in (("repa", "encoder"), ("distill", "teacher"), ("lora", "rank"), ("meanflow", "share")):
        if keys.get(section) and switch not in keys[section]:
            idle = f"{section}.{next(iter(keys[section]))}"
            raise InputError(f"{idle} does nothing without {section}.{switch}: name it, or null for none")
    try:
        merged = OmegaConf.merge(_defaults(schema), *([left_out(schema)] if stored else []), stated)
        values = OmegaConf.to_container(merged)
        limits.check(schema, values, stored=stored)
        return OmegaConf.to_object(OmegaConf.merge(merged, meant(schema, values)) if stored else merged)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise InputError(f"recipe: {key}{said(error)}") from None


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """A recipe that states nothing; never changed."""
    # OmegaConf takes the defaults of a section from one that it makes, which has settled them already.
    declared = by_section(schema, lambda entry: dataclasses.MISSING if entry.default == MISSING else entry.default)
    return OmegaConf.merge(OmegaConf.structured(schema), declared)


def _check_keys(stated: Any, schema: type, prefix: str = "") -> None:
    if not isinstance(stated, dict):
        raise InputError(f"recipe: {prefix.rstrip('.') or 'the file'} must be a mapping, not {stated!r}")
    fields = {entry.name: entry.type for entry in dataclasses.fields(schema)}
    for key, value in stated.items():
        check_choice("recipe key", f"{prefix}{key}", [f"{prefix}{name}" for name in fields])
        if dataclasses.is_dataclass(fields[key]):
            _check_keys(value, fields[key], f"{prefix}{key}.")
        elif rule := _broken_rule(value, fields[key]):
            shown = value if _lacks_value(value) else reprlib.repr(value)
            raise InputError(f"recipe: {prefix}{key}={shown}: {rule}")


def _broken_rule(value: Any, wanted: Any) -> str | None:
    """What keeps a value from being of a field's type, None where nothing does that OmegaConf would not say."""
    if _lacks_value(value):
        return "??? stands for a value that is missing; state it"
    if wanted is Any:
        return None
    kinds = {get_origin(each) or each for each in (wanted, *get_args(wanted))}
    if isinstance(value, dict | list) and type(value) not in kinds:
        return "must be a single value"
    if list in kinds and not isinstance(value, list | None):
        return "must be a list, in [ and ]"
    if isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        return "must be a list of single values"
    if wanted is bool and not (isinstance(value, bool | str) or value in (0, 1)):
        return "give true or false"
    return "must be text; put it in quotes" if _is_text(wanted) and not isinstance(value, str | None) else None


def _check_values(stated: Any, key: str = "") -> None:
    """Raise InputError for numbers that torch has no room for, wherever they are."""
    for name, value in entries(stated):
        _check_values(value, f"{key}.{name}".lstrip("."))
    if isinstance(stated, int) and not -(2**63) <= stated < 2**64:
        raise InputError(f"recipe: {key}={reprlib.repr(stated)}: must be a whole number of 64 bits")
    if isinstance(stated, float) and MOST < abs(stated) < math.inf:
        raise InputError(f"recipe: {key}={stated}: must be a number that fp32 holds, at most {MOST:.1e}")


def to_dict(recipe: Any) -> dict[str, Any]:
    """Plain nested dictionaries and lists, as JSON and YAML store them."""
    return dataclasses.asdict(recipe)
