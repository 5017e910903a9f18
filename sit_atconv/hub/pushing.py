"""From a folder to the hub: what goes up, proved before anything is sent, in one commit."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import huggingface_hub.utils
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

from sit_atconv.hub.client import DATASETS, api, asking
from sit_atconv.runtime.console import Progress, bars_of
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.reading import MOST_JSON, entries, read_card, read_json

CARD = "README.md"
TEXTS = (".json", ".md", ".py")
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}")  # a token of the hub


@dataclass
class Contents:
    """What goes up.

    kind: of the repository, "model" or "dataset". files: by their paths there. left_out: what lies beside them and
    stays here. ours: patterns of the paths that an earlier push wrote, which go where this one has no such file.
    """

    kind: str
    files: dict[str, Path]
    left_out: list[str] = field(default_factory=list)
    ours: Sequence[str] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass
class Pushed:
    """What went up: the repository as `pull` takes it, its page, and the commit."""

    repo: str
    page: str
    commit: str


def check(contents: Contents) -> None:
    """Raise InputError where the card says nothing that the hub reads, and where a file would tell of this machine: a
    place on it, or a token."""
    home, token = str(Path.home()), get_token()
    in_home = re.compile(rf"{re.escape(home)}[/\\]") if len(home) > 1 else None
    for name, path in contents.files.items():
        if not name.endswith(TEXTS):
            continue
        with told(name, UnicodeDecodeError, remedy="it must be text; take it away"):
            text = path.read_bytes()[:MOST_JSON].decode()
        if SECRET.search(text) or (token and token in text):
            raise InputError(f"{name} holds a token of the hub, which everybody could use; take it out, and revoke it")
        if in_home and in_home.search(text):
            raise InputError(f"{name} names a place in {home!r}, your home folder; take it out")
        if name.endswith(".json"):
            _check_places(name, read_json(path, (dict, list)))
        elif name.endswith(".py"):
            with told(name, SyntaxError, ValueError, remedy="export the model again"):
                ast.parse(text)
    _check_card(contents.files.get(CARD))


def _check_places(name: str, value: Any) -> None:
    for key, inner in entries(value):
        if isinstance(inner, str) and (PurePosixPath(inner).is_absolute() or PureWindowsPath(inner).is_absolute()):
            raise InputError(f"{name}: {key} is {inner!r}, a place on this machine; state its last name alone")
        _check_places(name, inner)


def _check_card(card: Path | None) -> None:
    if card is None:
        raise InputError(f"there is no {CARD}, which says what this is; export it again")
    with told(CARD, ValueError, remedy="mend what stands between the --- on its top"):
        stated = read_card(card)
    if not isinstance(stated, dict) or not isinstance(stated.get("license"), str):
        raise InputError(f"{CARD} names no license between the --- on its top; state one, such as license: mit")


def push(contents: Contents, repo: str, private: bool = False, message: str | None = None) -> Pushed:
    """Make the repository where there is none, and put the files into it in one commit; files of an earlier push that
    are not among them go.

    repo: OWNER/NAME, or NAME for the token's owner. private: whether a new repository is seen by its owner alone; one
    that is there stays as it is. message: of the commit.
    Raises InputError for what the hub refuses, and without a connection; what is there stays as it was.
    """
    about, hub = f"push to {repo!r}", api()
    kind = {"repo_type": contents.kind}
    with asking(about):
        name = hub.create_repo(repo, private=private or None, exist_ok=True, **kind).repo_id
        old = [path for path in hub.list_repo_files(name, **kind) if path not in contents.files]
        gone = [path for path in old if any(fnmatchcase(path, pattern) for pattern in contents.ours)]
        added = []
        with (
            Progress(total=contents.size, desc="push", unit="B", unit_scale=True, leave=False) as bar,
            bars_of(huggingface_hub.utils),
        ):
            for path, file in contents.files.items():
                bar.note(path)
                added.append(CommitOperationAdd(path, file))
                hub.preupload_lfs_files(name, [added[-1]], free_memory=False, **kind)
                bar.update(file.stat().st_size)
        operations = [*added, *(CommitOperationDelete(path) for path in gone)]
        commit = hub.create_commit(name, operations, commit_message=message or "Upload by sit-atconv push", **kind)
    place = f"{DATASETS if contents.kind == 'dataset' else ''}{name}"
    return Pushed(place, f"{hub.endpoint}/{place}", commit.oid)
