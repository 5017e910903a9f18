"""Folders that say first what they are going to be, and fill up whole file by whole file, by processes that may die.

settings.json comes first and decides what the folder may become; a command with other settings is refused.
"""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sit_atconv.errors import InputError
from sit_atconv.files import LOCK, Malformed, read_json, sync, write_atomic

SETTINGS = "settings.json"


@contextmanager
def writing(out: Path, name: str = "--out") -> Iterator[None]:
    """Tell an error of the file system under `out` as an InputError, of this process alone; name: what `out` is."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{name} {str(out)!r} cannot be written: {error.strerror or error}; whatever is there is whole: mend it "
            "and run again",
            every_rank=True,
        ) from None


def claim(
    out: Path, settings: dict[str, Any], not_compared: tuple[str, ...], what: str, name: str = "--out",
    remedy: str = "choose another folder",
) -> dict[str, Any]:  # fmt: skip
    """Make the folder of these settings, or take over the one that is there; the settings that it was begun with.

    not_compared: beginnings of the flat keys that may be otherwise, see `flat`. what: the folder holds, "features".
    name: what `out` is; remedy: where it is something else.
    Raises InputError for a file, a folder of something else, or one with other settings: in one line, what differs.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{name} {str(out)!r} is a file; give a new folder, or one to go on with")
    try:
        stored = read_json(out / SETTINGS) if (out / SETTINGS).exists() else None
    except (OSError, Malformed) as error:
        raise InputError(f"{name} {str(out)!r}: its {SETTINGS} is damaged ({error}); {remedy}") from None
    if stored is None:
        with writing(out, name):
            out.mkdir(parents=True, exist_ok=True)
            if strays := sorted(path.name for path in out.iterdir() if path.suffix != ".tmp" and path.name != LOCK):
                raise InputError(f"{name} {str(out)!r} holds {strays[0]!r} and is no folder of {what}; {remedy}")
            write_atomic(out / SETTINGS, json.dumps(settings, indent=1))
        return settings
    old, new = flat(stored, not_compared), flat(settings, not_compared)
    changed = [
        f"{key}: {short(old.get(key))} -> {short(new.get(key))}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise InputError(
            f"{name} {str(out)!r} holds {what} with other settings ({'; '.join(changed)}); state them as they were, or "
            f"{remedy}"
        )
    return stored


def flat(settings: dict[str, Any], not_compared: tuple[str, ...] = (), prefix: str = "") -> dict[str, Any]:
    """{"section": {"key": value}} as {"section.key": value}, without the keys that begin as `not_compared` says."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, not_compared, f"{prefix}{key}.")
        elif not f"{prefix}{key}".startswith(not_compared):
            found[prefix + key] = value
    return found


def short(value: Any) -> str:
    """A JSON value for a message: the beginning of a long one."""
    text = json.dumps(value)
    return text if len(text) <= 72 else f"{text[:60]}... ({len(text)} characters)"


def clear_leftovers(out: Path, name: str = "--out") -> None:
    """Remove what killed processes were writing. Call it while no other process writes."""
    with writing(out, name):
        for leftover in out.glob("*.tmp"):
            leftover.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes, name: str = "--out") -> None:
    """Write a file so that it is there whole or not at all, even where two processes write the same.

    Raises InputError where the disk does not take it.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path.parent, name):
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                sync(temporary)
            temporary.rename(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
