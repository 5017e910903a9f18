"""What can go up to the hub, kind by kind: a model as a diffusers pipeline, a swap's delta, a cache of latents."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file

from sit_atconv.data.latent_cache import INDEX, read_index, shard_problems
from sit_atconv.hub import cards
from sit_atconv.hub.pushing import CARD, Contents
from sit_atconv.hub.shown import shown_of
from sit_atconv.pipelines.card import PICTURE
from sit_atconv.pipelines.exporting import check_license, export, open_source
from sit_atconv.runtime.errors import InputError, option
from sit_atconv.swap.delta import FILE, KEY, read_delta
from sit_atconv.swap.stored import check_stored
from sit_atconv.training.checkpoint import PIPELINE_INDEX

# Of an exported pipeline; whatever else lies there stays here.
OF_EXPORT = re.compile(
    rf"{re.escape(CARD)}|{re.escape(PICTURE)}|{re.escape(PIPELINE_INDEX)}|pipeline\.py|scheduler/scheduler_config\.json"
    r"|(transformer|guide)/(config\.json|modeling_sit_[0-9a-f]{8}\.py)|vae/config\.json"
    r"|(transformer|guide|vae)/diffusion_pytorch_model[\w.-]*\.safetensors(\.index\.json)?"
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Of a path in the hub's own cache: the repository.
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+?)[\\/]snapshots[\\/]")


@dataclass(frozen=True)
class Asked:
    """What a push was asked for beside its source; None: nothing of it. repo: where it goes. license: of the weights or
    latents. vae, variant: as `exporting.open_source` takes them. picture: of the card, a PNG. base: the name on the hub
    of the model that a delta is for. lines: gives the card's command lines of a kind, by the kind's name, and what it
    tells."""

    repo: str
    license: str | None = None
    vae: str | None = None
    variant: str | None = None
    picture: str | None = None
    base: str | None = None
    lines: Callable[[str, Any], list[str]] = field(default=lambda kind, told: [])


class Kind(Protocol):
    """name: as messages and `Asked.lines` call it. takes: names of what it can be asked for."""

    name: str
    takes: tuple[str, ...]

    def fits(self, source: Path) -> bool:
        """Whether this is what lies there; by names of files alone."""

    def contents(self, source: Path, asked: Asked, scratch: Path) -> Contents:
        """What goes up of it; what has to be written for that is written into the empty folder `scratch`.

        Raises InputError for what is not whole."""


class Delta:
    """Swapped layers, as `save_delta` writes them."""

    name, takes = "delta", ("license", "base")

    def fits(self, source: Path) -> bool:
        return (source / FILE).is_file() or source.suffix == ".safetensors"

    def contents(self, source: Path, asked: Asked, scratch: Path) -> Contents:
        path = source / FILE if source.is_dir() else source
        stored, tensors = read_delta(path)
        check_stored(stored)
        name = stored["teacher"]["name"] or ""
        base = asked.base or _hub_id(name)
        if base is not None and not HUB_ID.fullmatch(base):
            raise InputError(f"{option('base')} {base!r}: give the model's name on the hub, OWNER/NAME")
        if name != (base or Path(name).name):  # where it lay on this machine
            stored["teacher"]["name"] = base or Path(name).name or None
            path = scratch / FILE
            save_file(tensors, path, metadata={KEY: json.dumps(stored)})
        lines = asked.lines(self.name, stored)
        size = sum(tensor.numel() for tensor in tensors.values())
        (scratch / CARD).write_text(cards.of_delta(stored, size, base, asked.repo, asked.license or "unknown", lines))
        return Contents("model", {CARD: scratch / CARD, FILE: path})


def _hub_id(name: str) -> str | None:
    """The name on the hub of a model that was loaded from `name`; None where that does not tell."""
    if found := CACHED.search(name):
        return f"{found[1]}/{found[2]}"
    name = name.partition("@")[0]
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


class Cache:
    """A cache of latents, every shard of which is as its index says."""

    name, takes = "cache", ("license",)

    def fits(self, source: Path) -> bool:
        return (source / INDEX).is_file()

    def contents(self, source: Path, asked: Asked, scratch: Path) -> Contents:
        index = read_index(source)
        if problem := next(shard_problems(source, index, hashes=True), None):
            raise InputError(f"cache of latents {str(source)!r}: {problem}")
        index["codec"]["vae"] = _last(index["codec"]["vae"])
        if "root" in index["data"]:
            index["data"]["root"] = _last(index["data"]["root"])
        (scratch / INDEX).write_text(json.dumps(index, indent=1))
        lines = asked.lines(self.name, index)
        (scratch / CARD).write_text(cards.of_cache(index, asked.repo, asked.license or "unknown", lines))
        files = {shard["file"]: source / shard["file"] for shard in index["shards"]}
        left = sorted({each.name for each in source.iterdir()} - {INDEX, CARD, *files})
        files = {CARD: scratch / CARD, INDEX: scratch / INDEX, **files}
        return Contents("dataset", files, left, ("moments-*.safetensors",))


def _last(place: str) -> str:
    """A place on this machine by its last name; a name on the hub as it is."""
    return Path(place).name if Path(place).is_absolute() or Path(place).exists() else place


class Exported:
    """A folder that `sit-atconv export` wrote, as it is: with its card."""

    name, takes = "exported pipeline", ()

    def fits(self, source: Path) -> bool:
        return (source / PIPELINE_INDEX).is_file() and (source / "pipeline.py").is_file()

    def contents(self, source: Path, asked: Asked, scratch: Path) -> Contents:
        open_source(source)  # which raises where it is not whole
        names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
        files = {name: source / name for name in names if OF_EXPORT.fullmatch(name)}
        left = [name for name in names if name not in files]
        return Contents("model", files, left, (PICTURE, "scheduler/*", "transformer/*", "guide/*", "vae/*"))


class Model:
    """A run, a checkpoint or a model, exported on the way."""

    name, takes = "model", ("license", "vae", "variant", "picture")

    def fits(self, source: Path) -> bool:
        return True

    def contents(self, source: Path, asked: Asked, scratch: Path) -> Contents:
        opened = open_source(source, asked.vae, asked.variant)
        shown = shown_of(source, opened.files, lambda sets: asked.lines(self.name, (opened, sets)), asked.picture)
        folder = scratch / asked.repo.rpartition("/")[2]
        export(opened, folder, asked.license or "unknown", shown=shown.at(asked.repo))
        return Exported().contents(folder, asked, scratch)


KINDS: tuple[Kind, ...] = (Delta(), Cache(), Exported(), Model())


def contents_of(source: str | Path, asked: Asked, scratch: Path) -> Contents:
    """What goes up of a source, by the first kind that fits.

    Raises InputError for what that kind cannot be asked for, and for a source that is not whole.
    """
    path = Path(source)
    kind = next(each for each in KINDS if each.fits(path))
    for name in ("license", "vae", "variant", "picture", "base"):
        value = getattr(asked, name)
        if value is not None and name not in kind.takes:
            raise InputError(f"{option(name)} {value!r} does nothing for {str(path)!r}, a {kind.name}; leave it out")
    if asked.license is not None:
        check_license(asked.license)
    return kind.contents(path, asked, scratch)
