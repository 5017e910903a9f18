"""From the hub to a folder: every file of a revision, each proved by the hash that the hub lists for it."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import RepoFile, hf_hub_download

from sit_atconv.hub.client import DATASETS, api, asking, check_name, check_online
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import check_out, check_space, new_path, sha256
from sit_atconv.runtime.reading import INSIDE, fault_of

OF_CLIENT = ".cache"  # what the hub's client leaves in a folder of downloads


@dataclass
class Pulled:
    """What came down: the repository's commit, how many files, and their bytes."""

    commit: str
    files: int
    size: int


def pull(repo: str, out: str | Path, revision: str | None = None, force: bool = False) -> Pulled:
    """Write the folder `out`, whole or not at all, with the files of a repository.

    repo: OWNER/NAME of a model, datasets/OWNER/NAME of a dataset. revision: a branch, tag or commit; None: the newest.
    force: what is at `out` is set aside. Nothing that comes down is run.
    Raises InputError for a name or revision that is none, without a connection, for a file that is not as the hub lists
    it, and where the disk does not take it.
    """
    out, about = check_out(out, force=force), f"pull {repo!r}"
    kind, name = ("dataset", repo.removeprefix(DATASETS)) if repo.startswith(DATASETS) else ("model", repo)
    check_name(name, about)
    if revision is not None:
        about += f", revision {revision!r}"
    check_online(about)
    with asking(about):
        commit = api().repo_info(name, repo_type=kind, revision=revision).sha
        tree = api().list_repo_tree(name, repo_type=kind, revision=commit, recursive=True)
        files = [each for each in tree if isinstance(each, RepoFile)]
    for each in files:
        if fault_of(each.path, INSIDE) or each.path.split("/")[0] in (OF_CLIENT, ".git"):
            raise InputError(f"{about}: it has a file {each.path!r}, which no folder here takes; ask its owner")
    size = sum(each.size for each in files)
    with (
        new_path(out, force=force) as unfinished,
        Progress(total=size, desc="pull", unit="B", unit_scale=True, leave=False) as bar,
    ):
        check_space(unfinished.parent, size)
        unfinished.mkdir()
        place = {"repo_type": kind, "revision": commit, "local_dir": unfinished}
        with asking(about):
            for each in files:
                bar.note(each.path)
                hf_hub_download(name, each.path, **place, tqdm_class=type("Meter", (_Meter,), {"bar": bar}))
                _check(unfinished / each.path, each, about)
        shutil.rmtree(unfinished / OF_CLIENT, ignore_errors=True)
    return Pulled(commit, len(files), size)


class _Meter:
    """In the place of the client's own bars: the bytes that they are told of go to one bar for all files."""

    bar: Progress

    def __init__(self, **_):
        self.n, self.total = 0, None

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(self, *_) -> None:
        pass

    def update(self, count: int) -> None:
        """Bytes that are on the disk."""
        self.bar.update(count)

    def update_transfer(self, count: int) -> None:
        """Bytes that the network gave: the client makes a bar of its own for them where this is not there."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None  # what else a bar is told: its text, that it is to be drawn, that it ends


def _check(path: Path, listed: RepoFile, about: str) -> None:
    """Raise InputError where a file is not the one that the hub lists."""
    if listed.lfs is not None:
        same = sha256(path) == listed.lfs.sha256
    else:
        content = path.read_bytes()
        same = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == listed.blob_id  # as git has it
    if not same:
        raise InputError(f"{about}: {listed.path} did not come as the hub lists it; try again")
