"""Folders that say first what they are going to be, and fill up whole file by whole file, by processes that may die.

settings.json comes first and decides what the folder may become; a command with other settings is refused.
"""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sit_atconv.runtime import files
from sit_atconv.runtime.comparison import differences, flat
from sit_atconv.runtime.errors import InputError, option, told
from sit_atconv.runtime.files import LEFTOVER, LOCK, lock, set_aside, write_atomic
from sit_atconv.runtime.reading import Malformed, read_json

SETTINGS = "settings.json"
REMEDY = "choose another folder"


def writing(out: Path, name: str | None = None) -> AbstractContextManager[None]:
    """Tell an error of the file system under `out` as an InputError, of this process alone; name: what `out` is
    called, by default as the argument."""
    remedy = "whatever is there is whole: mend it and run again"
    return told(f"{name or option('out')} {str(out)!r} cannot be written", OSError, remedy=remedy, every_rank=True)


def claim(
    out: Path, settings: dict[str, Any], not_compared: tuple[str, ...], what: str, name: str | None = None,
    remedy: str = REMEDY, force: bool = False, meant: Mapping[str, Any] = {},
) -> dict[str, Any]:  # fmt: skip
    """Make the folder of these settings, or take over the one that is there; the settings that it was begun with.

    out: a path that is `files.resolved`. not_compared: keys and sections that may be otherwise, see `comparison`.
    what: the folder holds, "features". name: what `out` is; remedy: where it is something else. force: what would be
    refused is set aside, and the folder begun anew. meant: what flat keys stood for that an earlier version left out.
    Raises InputError for a file, a folder of something else, or one with other settings: in one line, what differs.
    """
    name = name or option("out")

    def taken_over() -> dict[str, Any]:
        stored = _begun(out, what, name, remedy)
        if stored is None:
            with writing(out, name):
                write_atomic(out / SETTINGS, json.dumps(settings, indent=1))
            return settings
        new = flat(settings)
        earlier = {key: meant[key] for key in meant.keys() & new.keys() - flat(stored).keys()}
        changed = differences(flat(stored) | earlier, new, not_compared)
        if changed:
            said = f"holds {what} with other settings ({'; '.join(changed)}); state them as they were, or {remedy}"
            raise InputError(f"{name} {str(out)!r} {said}")
        return stored

    try:
        return taken_over()
    except InputError:
        if not force or not os.path.lexists(out):
            raise
        clear_the_way(out, name)
    return taken_over()


def check_place(
    out: str | Path, what: str, name: str | None = None, remedy: str = REMEDY, force: bool = False
) -> None:  # fmt: skip
    """Raise InputError where `claim` would whatever the settings are, before a command loads what decides these.

    Nothing is changed there.
    """
    name = name or option("out")
    out = files.resolved(out, name)
    try:
        _begun(out, what, name, remedy)
    except InputError:
        if not force or not os.path.lexists(out):
            raise
        files.check_movable(out)


def clear_the_way(out: Path, name: str | None = None) -> None:
    """Set aside what lies at `out`, and say so. Raises InputError where a process is at work there."""
    name = name or option("out")
    with writing(out, name):
        if (out / LOCK).exists():
            lock(out, f"{name} {str(out)!r}").close()
        print(f"{name} {str(out)!r}: what was there is now {str(set_aside(out))!r}", file=sys.stderr)


def _begun(out: Path, what: str, name: str, remedy: str) -> dict[str, Any] | None:
    """The settings that a folder was begun with; None of one that is to be begun, and can be."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{name} {str(out)!r} is a file; give a new folder, or one to go on with")
    with told(f"{name} {str(out)!r}: its {SETTINGS} is damaged", OSError, Malformed, remedy=remedy):
        stored = read_json(out / SETTINGS) if (out / SETTINGS).exists() else None
    if stored is None:
        with writing(out, name):
            files.check_writable(out)
            names = sorted(path.name for path in out.iterdir()) if out.exists() else []
            if strays := [each for each in names if each != LOCK and not LEFTOVER.fullmatch(each)]:
                raise InputError(f"{name} {str(out)!r} holds {strays[0]!r} and is no folder of {what}; {remedy}")
    return stored


def clear_leftovers(out: Path, name: str | None = None) -> None:
    """`files.clear_leftovers` of a claimed folder. Call it while no other process writes."""
    with writing(out, name):
        files.clear_leftovers(out)
