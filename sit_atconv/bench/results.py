"""The files of one result beside each other: JSON with all that was measured, a table, a picture; and rows of CSV."""

import csv
import json
import os
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sit_atconv.runtime.bounded import opened
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.files import check_out, made_here, write_out

MOST_HEADER = 1 << 16  # bytes


class Results:
    """The files of a command, refused before its work where they are in another's way, written after it or meanwhile.

    keys: of the JSON of this command, by which it may be written anew, see `files.made_here`; force: see `check_out`.
    Raises InputError where something else is there, and where nothing can be written.
    """

    def __init__(self, files: Iterable[Path], force: bool, *keys: str):
        self._force, self._ours = force, made_here(*keys)
        self._files = [check_out(file, force=force, ours=self._ours) for file in files]

    def write(self, *contents: Any) -> None:
        """Write the files in their order: a text or bytes as they are, anything else as JSON.

        Raises ValueError for a number in JSON that is not finite, InputError where the disk does not take a file.
        """
        for file, content in zip(self._files, contents, strict=True):
            if not isinstance(content, str | bytes):
                content = json.dumps(content, indent=1, allow_nan=False) + "\n"
            write_out(file, content, force=self._force, ours=self._ours)


def check_csv(path: Path, columns: Sequence[str]) -> bool:
    """Whether a CSV file is there already. Raises InputError where it has other columns, or takes no more rows."""
    with told(f"{path} is no CSV file that takes more rows", OSError, UnicodeError, csv.Error, remedy="move it away"):
        if not os.path.lexists(path):
            check_out(path, "CSV file")
            return False
        with opened(path) as file:
            header = next(csv.reader([file.readline(MOST_HEADER).decode()]), [])
        open(path, "ab").close()
    if header != list(columns):
        raise InputError(f"{path} has the columns {reprlib.repr(header)}, not {list(columns)}; move it away")
    return True


def append_csv(path: Path, rows: Sequence[dict]) -> None:
    """Append rows to a CSV file, with their keys as its header. Raises InputError as `check_csv`, which tells before
    the work, and where the disk does not take them."""
    there = check_csv(path, list(rows[0]))
    with told(f"{path} cannot be written", OSError, remedy="make room, and run again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if not there:
                writer.writeheader()
            writer.writerows(rows)
