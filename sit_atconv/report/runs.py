"""What a run's folder holds that a report tells of: every file that is there, read and checked, nothing computed."""

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sit_atconv.data.images import is_image
from sit_atconv.report.frontiers import Frontier, beside
from sit_atconv.runtime.adapters import ADAPTERS
from sit_atconv.runtime.claims import SETTINGS
from sit_atconv.runtime.comparison import flat
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.files import by_step, in_use, sha256, step_in
from sit_atconv.runtime.reading import read_json, read_rows, read_shapes, read_yaml
from sit_atconv.scoring.result import reading, sound
from sit_atconv.scoring.sources import MANIFEST, SAMPLES, Source, open_source
from sit_atconv.scoring.table import comparable

METRICS, RECIPE = "metrics.json", "recipe.yaml"
LOOKED_FOR = (
    "log.jsonl, scores.jsonl, validation.jsonl, recipe.yaml, previews/step-*.png, step-*/manifest.json and "
    "samples/*/manifest.json of a run, or manifest.json, metrics.json and images of samples"
)
Row = dict[str, Any]


@dataclass
class Match:
    """The training image nearest to a sample. index: among the training images. distance: the square root of the sum
    of squared differences of all values, 0 to 255 each. mirrored: whether its mirror image is what is so near. pixels:
    what is so near, uint8 (H, W, C)."""

    index: int
    distance: float
    mirrored: bool
    pixels: np.ndarray


@dataclass
class Neighbours:
    """The nearest training images of samples. data: what the training images are called. n: how many there are.
    mirrored: whether mirror images count. found: by the sample's index."""

    data: str
    n: int
    mirrored: bool
    found: dict[int, Match]


@dataclass
class SampleSet:
    """Samples of a run. manifest: without its labels, {} where none says how they were made. metrics: the result of
    `sit-atconv score`, as `sound` gives it, {} where there is none. facts: what others must share for their metrics to
    be compared, see `sit_atconv.scoring.table`, {} without metrics. finished: whether all samples are there. nearest:
    of the samples that the page shows, None where nobody asked for them.
    """

    name: str
    path: Path
    manifest: dict[str, Any]
    manifest_sha256: str | None
    metrics: dict[str, Any]
    facts: dict[str, Any]
    finished: bool = True
    nearest: Neighbours | None = None

    @cached_property
    def source(self) -> Source | None:
        """The images; None where the folder holds none. Raises InputError for those that cannot be read."""
        there = self.finished and _holds_images(self.path)
        return open_source(self.path, allow_lossy=True) if there else None


@dataclass
class Run:
    """A run. folder: None for a folder of samples alone. recipe: by dotted key. checkpoint: the manifest of its newest
    checkpoint, {} without one. preview: the newest one's file, and step. params: numbers in the weights of the newest
    checkpoint's EMA, None where they are not there. frontiers: scores over time of its checkpoints, in the run's folder
    or beside it. going: whether a process trained it as it was read; None where the system does not tell."""

    name: str
    sets: list[SampleSet]
    folder: Path | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    log: list[Row] = field(default_factory=list)
    scores: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    checkpoint_folder: Path | None = None
    preview: tuple[Path, int] | None = None
    params: int | None = None
    frontiers: list[Frontier] = field(default_factory=list)
    going: bool | None = False

    @property
    def trained(self) -> bool:
        """Whether this is a training run."""
        return self.folder is not None

    @property
    def class_names(self) -> list[str]:
        """The data set's, [] where the run does not say."""
        names = at(self.checkpoint, "data", "classes")
        return [str(name) for name in names] if isinstance(names, list) else []


def at(tree: Any, *keys: str) -> Any:
    """tree[key][key]..., None where one is missing or there is nothing to look into."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _holds_images(folder: Path) -> bool:
    return any(path.name == SAMPLES or is_image(path.name) for path in folder.iterdir())


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs at `paths`, each with a name that no other has.

    Raises InputError for one that is given twice, has nothing to report, or holds a broken file.
    """
    folders = [Path(path) for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if not folder.is_dir():
            raise InputError(f"RUN {path!r} is no folder; give that of a training run, or of samples")
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise InputError(f"RUN {paths[index]!r} is given twice; give it once")
    try:
        return [_read(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]
    except OSError as error:
        raise InputError(f"{error.filename!r} cannot be read: {error.strerror or error}; make it readable") from None


def _names(folders: list[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    going = in_use(folder)  # before anything is read: of a run that has ended, all is read
    if (folder / MANIFEST).is_file() or (folder / METRICS).is_file():
        return Run(name, [_read_set(folder)])
    with _whole(folder / RECIPE):
        recipe = read_yaml(folder / RECIPE, regular=True) if (folder / RECIPE).is_file() else {}
        if not isinstance(recipe, dict):
            raise ValueError("it is no recipe: it holds no sections")
    checkpoints = [path for path in by_step(folder.glob("step-*")) if (path / MANIFEST).is_file()]
    previews = by_step((folder / "previews").glob("step-*.png"), ".png")
    sets = [
        _read_set(path)
        for path in sorted((folder / "samples").glob("*/"))
        if any((path / file).is_file() for file in (MANIFEST, METRICS, SETTINGS))
    ]
    logs = [_read_rows(folder / f"{name}.jsonl") for name in ("log", "scores", "validation")]
    if not (recipe or checkpoints or previews or sets or any(logs)):
        if not _holds_images(folder):
            raise InputError(f"RUN {str(folder)!r}: nothing to report; looked for {LOOKED_FOR}")
        return Run(name, [_read_set(folder)])
    run = Run(name, sets, folder, flat(recipe), *logs, going=going)
    run.frontiers = beside(folder, checkpoints)
    if checkpoints:
        run.checkpoint, run.checkpoint_folder = _read_manifest(checkpoints[-1] / MANIFEST), checkpoints[-1]
        run.params = _parameters(checkpoints[-1], run.checkpoint)
    if previews:
        run.preview = previews[-1], step_in(previews[-1].stem)
    return run


def _read_set(folder: Path) -> SampleSet:
    manifest, metrics = folder / MANIFEST, folder / METRICS
    stated = _read_manifest(manifest) if manifest.is_file() else {}
    stated.pop("labels", None)
    with reading(metrics):
        stored = read_json(metrics) if metrics.is_file() else {}
        result = sound(stored) if stored else {}
        scored = result.get("samples_manifest") or stated
        facts = comparable(result, scored) if result else {}
    # Where there is no manifest, as the result kept it, of an npz or a folder that has moved.
    digest = sha256(manifest) if manifest.is_file() else None
    begun = (folder / SETTINGS).is_file() and digest is None and not result
    return SampleSet(folder.resolve().name, folder, stated or scored, digest, result, facts, finished=not begun)


def _read_manifest(path: Path) -> dict[str, Any]:
    with _whole(path):
        return read_json(path)


def _parameters(checkpoint: Path, manifest: dict[str, Any]) -> int | None:
    """How many numbers the EMA's weights are, by the shapes in their files' headers; None where a file is not there,
    as in a copy of a run without its weights, and of a LoRA, whose files are a part of its model."""
    names = manifest.get("files")
    names = sorted(str(name) for name in names) if isinstance(names, dict) else []
    files = [checkpoint / name for name in names if re.fullmatch(r"ema/[^/\\]+\.safetensors", name)]
    if not files or f"ema/{ADAPTERS}" in names or not all(file.is_file() for file in files):
        return None
    shapes = (read_shapes(file, "checkpoint file", "take the checkpoint away") for file in files)
    return sum(math.prod(shape) for each in shapes for shape in each.values())


def _read_rows(path: Path) -> list[Row]:
    """The lines of a log in the order of their steps, but for a last one that was cut short as it was written."""
    with _whole(path):
        rows = read_rows(path, {"step": float}) if path.is_file() else []
    return sorted(rows, key=lambda row: row["step"])


def _whole(path: Path) -> AbstractContextManager[None]:
    """Tell what a damaged file raises when it is read as an InputError."""
    return told(f"{str(path)!r} is damaged", ValueError, InputError, remedy="mend it, or set it aside")
