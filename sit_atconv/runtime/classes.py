"""The classes of a model by id or by name: of commands, of files of labels, and of the pipeline."""

import re
from collections.abc import Iterable, Mapping

from sit_atconv.runtime.errors import InputError, check_choice

ID = re.compile("[+-]?[0-9]{1,18}")


def check_id(label: int, number: int) -> None:
    """Raise InputError for a class id out of range."""
    if not 0 <= label < number:
        raise InputError(f"class id {label} is out of range; this model has classes 0 to {number - 1}")


class Classes:
    """So many classes, and the names of those that have one.

    id2label: names by id; one with commas stands for each of its parts, as ImageNet's do. JSON makes strings of the
    ids. nameless: what is said where a name is asked for and there are none.
    Raises InputError for names that are none, or of classes that there are not.
    """

    def __init__(self, number: int, id2label: Mapping | None = None, nameless: str = "the checkpoint names no classes"):
        self.number, self.nameless, given = number, nameless, id2label or {}
        names: dict[str, set[int]] = {}
        try:
            stated = {int(label): str.split(text, ",") for label, text in dict(given).items()}
        except (TypeError, ValueError):
            raise InputError(f"id2label={given!r}: give a name for each class id, such as {{0: 'tench'}}") from None
        for label, parts in stated.items():
            if not 0 <= label < number:
                raise InputError(f"id2label names class {label}; this model has classes 0 to {number - 1}")
            for name in filter(None, (part.strip().lower() for part in (",".join(parts), *parts))):
                names.setdefault(name, set()).add(label)
        self.names = {name: min(ids) for name, ids in names.items() if len(ids) == 1}
        self.shared = {name: sorted(ids) for name, ids in names.items() if len(ids) > 1}

    def ids(self, labels: Iterable[int | str]) -> list[int]:
        """Class ids of ids and names. Raises InputError for what is no class, suggesting the nearest name."""
        return [self.named(label) if isinstance(label, str) else self.checked(label) for label in labels]

    def checked(self, label: int) -> int:
        """The id itself. Raises InputError for one out of range."""
        check_id(label, self.number)
        return int(label)

    def named(self, text: str) -> int:
        """The id of the class of that name. Raises InputError for a name that is none, or that of several classes."""
        name = text.strip().lower()
        if name in self.shared:
            raise InputError(f"class {text!r} is the name of {self.shared[name]}; give an id")
        if not self.names:
            raise InputError(f"class {text!r}: {self.nameless}; give ids, 0 to {self.number - 1}")
        check_choice("class", name, self.names)
        return self.names[name]

    def read(self, word: str) -> int:
        """The id of a class as it is written in a command or in a line of a file: a number is an id, else a name.

        Raises InputError as `checked` and `named` do.
        """
        return self.checked(int(word)) if ID.fullmatch(word.strip()) else self.named(word)
