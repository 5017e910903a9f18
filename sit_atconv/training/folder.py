"""Whose a run's folder is, and what it holds to go on from."""

from pathlib import Path
from typing import Any, TextIO

import yaml

from sit_atconv import checkpoint, config, files
from sit_atconv.config import Recipe
from sit_atconv.errors import InputError
from sit_atconv.files import LOCK
from sit_atconv.latents.codecs import check_same_codec

# What a cache of latents stands for: these keys of the recipe that it was encoded by.
ENCODED = ("kind", "image_size", "split", "subset", "revision", "image_key", "label_key")


def lock(run: Path) -> TextIO:
    """Take a run's folder for this process, see `files.lock`. Raises InputError where another process has it."""
    return files.lock(run, f"run.out={str(run)!r}")


def check_run_folder(
    run: Path, recipe: Recipe, described: dict[str, Any], encoded: dict[str, Any] | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, with its manifest, or None for a new run.

    described: what this start would write into a manifest. encoded: with a cache of latents, the data section of the
    recipe that it was made by: a run of those images goes on from their cache.
    Raises InputError for a folder that is not this run's.
    """
    if not run.exists():
        return None
    found = checkpoint.newest_valid(run) if run.is_dir() else None
    if found is None and checkpoint.step_folders(run):
        raise InputError(
            f"run.out={str(run)!r} has no whole checkpoint left; remove its step-... folders to begin anew"
        )
    try:
        stored = found[1]["recipe"] if found else yaml.safe_load((run / "recipe.yaml").read_text())
    except OSError:
        if run.is_dir() and all(path.name == LOCK or path.match("recipe.yaml*.tmp") for path in run.iterdir()):
            return None  # killed at once
        raise InputError(f"run.out={str(run)!r} exists and is not a run; choose another folder") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict):
        raise InputError(f"run.out={str(run)!r}: its recipe.yaml is damaged; choose another folder")
    try:
        stated = described["recipe"]
        if encoded is not None and stored.get("data", {}).get("kind") != "latents":
            stated = stated | {"data": stated["data"] | {key: encoded.get(key) for key in ENCODED}}
        changed = "; ".join(config.differences(stored, stated))
    except InputError as error:
        raise InputError(
            f"run.out={str(run)!r}: its own recipe is not valid here ({error}); choose another folder"
        ) from None
    if changed:
        raise InputError(f"run.out={str(run)!r} holds a run of another recipe ({changed}); choose another folder")
    if found:
        manifest = found[1]
        if manifest["step"] > recipe.train.max_steps:
            step = manifest["step"]
            raise InputError(f"train.max_steps={recipe.train.max_steps}: {str(run)!r} is already at step {step}")
        check_same_codec(manifest["codec"], described["codec"])
        if manifest.get("data") != described["data"]:
            raise InputError(
                f"the images are not those of run.out={str(run)!r}: other classes, or more or fewer images"
            )
        for part, name, stated in (
            ("encoder", "repa.encoder", recipe.repa.encoder),
            ("teacher", "distill.teacher", recipe.distill.teacher),
        ):
            if manifest.get(part) != described[part]:
                raise InputError(f"{name}={stated!r} is not the one of run.out={str(run)!r}: other weights")
    return found
