"""Whose a run's folder is, and what it holds to go on from."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

from sit_atconv import config
from sit_atconv.config import Recipe
from sit_atconv.data import IMAGE_KEYS
from sit_atconv.latents.codecs import check_same_codec
from sit_atconv.runtime import files, processes
from sit_atconv.runtime.comparison import differences
from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.files import LEFTOVER, LOCK
from sit_atconv.runtime.reading import read_json, read_yaml
from sit_atconv.training import checkpoint
from sit_atconv.training.objectives import FROZEN
from sit_atconv.training.resolved import resolved

BEGUN = (LOCK, "log.jsonl")  # one of them lies in the folder of every run

# What a cache of latents stands for: these keys of the recipe that it was encoded by.
ENCODED = {*IMAGE_KEYS} - {"root"}


def lock(run: Path) -> TextIO:
    """Take a run's folder for this process, see `files.lock`. Raises InputError where another process has it."""
    return files.lock(run, f"run.out={str(run)!r}")


def check_place(out: str, force: bool = False) -> None:
    """Raise InputError where a run cannot lie, whatever its recipe, before anything is loaded; nothing is changed."""
    run = files.resolved(out, "run.out")
    with usable(run):
        if not os.path.lexists(run):
            files.check_writable(run)
        elif not _is_run(run):
            if not force:
                raise _no_run(run)
            files.check_movable(run)


def usable(run: Path) -> AbstractContextManager[None]:
    """Tell what the file system says of a run's folder as an InputError."""
    return told(f"run.out={str(run)!r} cannot be written", OSError, remedy="choose another place")


def _no_run(run: Path) -> InputError:
    return InputError(f"run.out={str(run)!r} exists and is not a run; choose another folder")


def _is_run(run: Path) -> bool:
    """Whether a folder is one that a run has begun, be it that it was killed at once."""
    if not run.is_dir():
        return False
    if checkpoint.step_folders(run) or any((run / name).exists() for name in BEGUN):
        return True
    return all(LEFTOVER.fullmatch(path.name) for path in run.iterdir())


Found = tuple[Path, dict[str, Any]] | None


@dataclass
class Claimed:
    """A run's folder, taken by this start: what a manifest says of the run, the checkpoint to go on from with its
    manifest, and the main process's lock where there was a folder already."""

    run: Path
    described: dict[str, Any]
    found: Found
    lock: TextIO | None


def claim(
    out: str,
    described: dict[str, Any],
    look: Callable[[Path], Found],
    must_resume: bool,
    force: bool = False,
) -> Claimed:
    """Take a run's folder, on the main process, and tell all what it holds.

    look: gives the checkpoint, or raises InputError for a folder that is not this run's; by `force`, that is set aside,
    and a new run begins. Raises that in every process, and where `must_resume` and there is nothing to go on from.
    """
    run, held = files.resolved(out, "run.out"), []

    def take() -> Found:
        with usable(run):
            # Before looking: another process may be at work there.
            held.extend([lock(run)] if (run / LOCK).exists() else [])
            try:
                return look(run)
            except InputError:
                if not force or not os.path.lexists(run):
                    raise
                while held:
                    held.pop().close()
                say(f"run.out={str(run)!r}: what was there is now {str(files.set_aside(run))!r}")
                return None

    found = processes.first(take)
    if must_resume and not found:
        raise InputError(f"there is no checkpoint in {str(run)!r} to go on from")
    return Claimed(run, described, found, held.pop() if held else None)


def foreseen(out: str, look: Callable[[Path], Found], steps: int) -> str:
    """What a start would do at `out`, or the words in which it would be refused; nothing is changed.

    look: as `claim` takes it. steps: of the whole training.
    """
    run = files.resolved(out, "run.out")
    try:
        check_place(out)
        with usable(run):
            if (run / LOCK).exists():
                lock(run).close()
            found = look(run)
    except InputError as refusal:
        return f"a start would be refused: {refusal}"
    return told_of(run, found, steps)


def told_of(run: Path, found: Found, steps: int) -> str:
    """What a start does with a run's folder, in words."""
    if found is None:
        left = ", which holds what a killed start left" if run.is_dir() and any(run.iterdir()) else ""
        return f"a new run begins in {str(run)!r}{left}"
    step = found[1]["step"]
    if step >= steps:
        return f"the run in {str(run)!r} is at its last step, {step:,}"
    return f"the run in {str(run)!r} goes on from step {step:,} of {steps:,}"


def stored_run(
    run: Path, described: dict[str, Any], changed: Callable[[dict[str, Any], Path | None], list[str]]
) -> Found:
    """The checkpoint to go on from, with its manifest, or None for a new run.

    described: what this start would write into a manifest; of a plan, as much as it knows, and no more is compared.
    changed: what keeps a stored recipe, that of a checkpoint where there is one, from being that of this start, see
    `config.differences`.
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
        if not found and not any((run / name).exists() for name in BEGUN):
            raise FileNotFoundError("a recipe that lies there is the user's")
        stored = found[1]["recipe"] if found else read_yaml(run / "recipe.yaml", regular=True)
    except OSError:
        if run.is_dir() and all(path.name == LOCK or LEFTOVER.fullmatch(path.name) for path in run.iterdir()):
            return None  # killed at once
        raise _no_run(run) from None
    except ValueError:
        stored = None
    if not stored or not isinstance(stored, dict):
        raise InputError(f"run.out={str(run)!r}: its recipe.yaml is damaged; choose another folder")
    invalid = f"run.out={str(run)!r}: its own recipe is not valid here"
    with told(invalid, InputError, remedy="choose another folder"):
        said = "; ".join(changed(stored, found and found[0]))
    if said:
        raise InputError(
            f"run.out={str(run)!r} holds a run of another recipe ({said}); state it as it was, or choose another folder"
        )
    if found and "data" in described and found[1].get("data") != described["data"]:
        raise InputError(f"the images are not those of run.out={str(run)!r}: other classes, or more or fewer images")
    return found


def check_run_folder(
    run: Path, recipe: Recipe, described: dict[str, Any], encoded: dict[str, Any] | None = None
) -> Found:
    """The checkpoint to go on from, with its manifest, or None for a new run.

    described: as `stored_run` takes it. encoded: with a cache of latents, the data section of the
    recipe that it was made by: a run of those images goes on from their cache.
    Raises InputError for a folder that is not this run's.
    """

    def changed(stored: dict[str, Any], last: Path | None) -> list[str]:
        stated, data = described["recipe"], stored.get("data")
        if encoded is not None and not (isinstance(data, dict) and data.get("kind") == "latents"):
            images = config.to_dict(config.make_recipe(encoded, config.Data, stored=True))
            stated = stated | {"data": stated["data"] | {key: images[key] for key in ENCODED}}
        made = {} if last is None else read_json(last / "model" / "config.json")
        return config.differences(stored, stated, complete=partial(resolved, made=made))

    found = stored_run(run, described, changed)
    if found:
        manifest = found[1]
        if manifest["step"] > recipe.train.max_steps:
            step = manifest["step"]
            raise InputError(
                f"train.max_steps={recipe.train.max_steps}: {str(run)!r} is already at step {step}; state {step} or "
                "more, or another run.out"
            )
        if "codec" in described:
            check_same_codec(manifest.get("codec", {}), described["codec"])
        for part, name in FROZEN.items():
            # Where the first weights lay is told, and may be another place today.
            pair = {part: manifest.get(part)}, {part: described.get(part)}
            if part in described and differences(*pair, {f"{part}.from"}):
                raise _of_other_weights(run, name, manifest, recipe)
    return found


def _of_other_weights(run: Path, key: str, manifest: dict[str, Any], recipe: Recipe) -> InputError:
    """What to say where a run began with another network than the one that a key names now, or one has none."""
    section, name = key.split(".")
    begun, stated = (manifest["recipe"].get(section) or {}).get(name), attrgetter(key)(recipe)
    out, remedy = f"run.out={str(run)!r}", "or choose another run.out"
    if begun is None:
        return InputError(f"{key}={stated!r}: {out} was begun without one; state {key}=null, {remedy}")
    if stated is None:
        return InputError(f"{key} is missing: {out} was begun with one; state {key}={begun!r}, {remedy}")
    return InputError(
        f"{key}={stated!r} is not the one of {out}: other weights; name the one that it was begun with, {remedy}"
    )
