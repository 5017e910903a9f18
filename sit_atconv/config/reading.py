"""How a YAML file and key=value overrides become a recipe."""

import dataclasses
import functools
import json
import math
import reprlib
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sit_atconv import limits
from sit_atconv.config.earlier import left_out, meant
from sit_atconv.config.schema import Recipe
from sit_atconv.errors import MOST, InputError, check_choice
from sit_atconv.reading import check_literal, read_yaml

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
    """Read a recipe file, lay `key=value` overrides over it, and validate. Raises InputError in one line.

    A file may name another with `base:`, relative to itself, whose keys it takes over and its own win against: a
    recipe's file, of which no message tells the content. Nothing is worked out: "${...}" is refused.
    """
    for override in overrides:
        if "=" not in override:
            raise InputError(f"override {override!r} is not of the form key=value")
        if "???" in override.partition("=")[2]:  # which would give way to whatever the file says
            raise InputError(f"override {override!r}: ??? stands for a value that is missing; state it")
    stated = _read_with_base(Path(path), (), schema)
    try:
        laid_over = OmegaConf.from_dotlist([_as_text(override, schema) for override in overrides])
        check_literal(OmegaConf.to_container(laid_over))
        _check_renamed(OmegaConf.to_container(OmegaConf.create(stated)), OmegaConf.to_container(laid_over))
        stated = OmegaConf.merge(stated, laid_over)
    except UNREADABLE as error:
        raise InputError(f"recipe {str(path)!r} cannot be read: {error}") from None
    return make_recipe(stated, schema)


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
        fields = (
            {entry.name: entry.type for entry in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else {}
        )
        found = fields.get(name)
    return found


def _lacks_value(value: Any) -> bool:
    """Whether OmegaConf's mark of a missing value is left in a recipe's value."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value == "???" or any(map(_lacks_value, parts))


def _is_text(wanted: Any) -> bool:
    return wanted in (str, str | None)


def _read_with_base(path: Path, above: tuple[Path, ...], schema: type) -> Any:
    """The keys of a recipe file over those of its base; above: the files that led here."""
    where = f"recipe {str(path)!r}"
    try:
        stated, place = read_yaml(path, regular=bool(above)), path.resolve()
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}; see experiments/recipes") from None
    except ValueError as error:
        raise InputError(f"{where} cannot be read: {error}") from None
    if place in above:
        raise InputError(f"{where}: its base leads back to it; leave one `base` out")
    if above:
        _check_base(where, stated, schema)
    if not isinstance(stated, dict):
        raise InputError(f"{where} holds no sections; see experiments/recipes")
    base = stated.pop("base", None)
    if base is None:
        return stated
    if not isinstance(base, str) or not base.endswith((".yaml", ".yml")):
        raise InputError(f"{where}: base={base!r}: give the path of one recipe file, which ends in .yaml")
    return OmegaConf.merge(_read_with_base(path.parent / base, (*above, place), schema), stated)


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
    try:
        check_literal(stated)  # before OmegaConf looks into a text
        keys = OmegaConf.to_container(OmegaConf.create(stated))
        check_literal(keys)
    except ValueError as error:
        raise InputError(f"recipe: {error}") from None
    _check_keys(keys, schema)
    _check_values(keys)
    for section, switch in (("repa", "encoder"), ("distill", "teacher")):
        if keys.get(section) and switch not in keys[section]:
            raise InputError(
                f"{section}.{next(iter(keys[section]))} does nothing without {section}.{switch}: name it, or null for "
                "none"
            )
    try:
        merged = OmegaConf.merge(_defaults(schema), left_out(schema) if stored else {}, stated)
        values = OmegaConf.to_container(merged)
        limits.check(schema, values, stored=stored)
        recipe = OmegaConf.to_object(OmegaConf.merge(merged, meant(schema, values)) if stored else merged)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise InputError(f"recipe: {key}{str(error).splitlines()[0]}") from None
    return recipe


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """A recipe that states nothing; never changed."""
    # OmegaConf takes the defaults of a section from one that it makes, which has settled them already.
    return OmegaConf.merge(OmegaConf.structured(schema), _declared(schema))


def _declared(schema: type) -> dict[str, Any]:
    """The defaults of a schema's settings as they are declared."""
    found = {}
    for entry in dataclasses.fields(schema):
        if dataclasses.is_dataclass(entry.type):
            found[entry.name] = _declared(entry.type)
        elif entry.default not in (dataclasses.MISSING, MISSING):
            found[entry.name] = entry.default
    return found


def _check_keys(stated: Any, schema: type, prefix: str = "") -> None:
    if not isinstance(stated, dict):
        raise InputError(f"recipe: {prefix.rstrip('.') or 'the file'} must be a mapping, not {stated!r}")
    fields = {entry.name: entry.type for entry in dataclasses.fields(schema)}
    for key, value in stated.items():
        check_choice("recipe key", f"{prefix}{key}", [f"{prefix}{name}" for name in fields])
        if dataclasses.is_dataclass(fields[key]):
            _check_keys(value, fields[key], f"{prefix}{key}.")
        elif _lacks_value(value):
            raise InputError(f"recipe: {prefix}{key}={value}: ??? stands for a value that is missing; state it")
        elif isinstance(value, dict | list) and not _takes(fields[key], type(value)):
            raise InputError(f"recipe: {prefix}{key}={reprlib.repr(value)}: must be a single value")
        elif value is not None and _takes(fields[key], list) and not isinstance(value, list) and fields[key] is not Any:
            raise InputError(f"recipe: {prefix}{key}={reprlib.repr(value)}: must be a list, in [ and ]")
        elif (
            isinstance(value, list) and fields[key] is not Any and any(isinstance(each, dict | list) for each in value)
        ):
            raise InputError(f"recipe: {prefix}{key}={reprlib.repr(value)}: must be a list of single values")
        elif fields[key] is bool and not (isinstance(value, bool | str) or value in (0, 1)):
            raise InputError(f"recipe: {prefix}{key}={value!r}: give true or false")
        elif _is_text(fields[key]) and not isinstance(value, str | None):
            raise InputError(f"recipe: {prefix}{key}={value!r}: must be text; put it in quotes")


def _takes(wanted: Any, kind: type) -> bool:
    """Whether a field of that type may hold a list, or a dictionary."""
    return wanted is Any or kind in {get_origin(each) or each for each in (wanted, *get_args(wanted))}


def _check_values(stated: Any, key: str = "") -> None:
    """Raise InputError for numbers that torch has no room for, and texts that no file holds, wherever they are."""
    if isinstance(stated, dict | list):
        for name, value in stated.items() if isinstance(stated, dict) else enumerate(stated):
            _check_values(value, f"{key}.{name}".lstrip("."))
    elif isinstance(stated, int) and not -(2**63) <= stated < 2**64:
        raise InputError(f"recipe: {key}={reprlib.repr(stated)}: must be a whole number of 64 bits")
    elif isinstance(stated, float) and MOST < abs(stated) < math.inf:
        raise InputError(f"recipe: {key}={stated}: must be a number that fp32 holds, at most {MOST:.1e}")
    elif isinstance(stated, str) and "\0" in stated:
        raise InputError(f"recipe: {key}={stated!r} has a NUL in it; leave it out")


def to_dict(recipe: Any) -> dict[str, Any]:
    """Plain nested dictionaries and lists, as JSON and YAML store them."""
    return OmegaConf.to_container(OmegaConf.structured(recipe))
