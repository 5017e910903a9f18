"""The files of one result beside each other: JSON with all that was measured, a table, a picture."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sit_atconv.runtime.files import check_out, made_here, write_out


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
