"""Scores over time, as `sit-atconv frontier` writes them: those that are of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sit_atconv.runtime.comparison import flat
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.reading import Malformed, read_json
from sit_atconv.scoring.result import number

FILE, MANIFEST = "frontier.json", "manifest.json"
POINT = {
    "model": str, "label": str, "line": str, "kind": ("ODE", "SDE"), "nfe": float, "ms": float,
    "ms_quartiles": [float, float], "score": {"value": float, "error": (float, None)}, "pareto": ("all", "model", None),
}  # fmt: skip
RECOMMENDED = {
    "of": (str, None), "model": str, "point": str, "told": str, "command": str, "score_command": str,
}  # fmt: skip
FORM = {
    "metric": str, "models": {str: {"checkpoint_sha256": object}}, "notes": [str], "points": [POINT],
    "recommended": [RECOMMENDED],
}  # fmt: skip


@dataclass
class Frontier:
    """A folder of `sit-atconv frontier`. result: what its frontier.json says, of the form FORM."""

    name: str
    path: Path
    result: dict[str, Any]

    @property
    def points(self) -> list[dict[str, Any]]:
        """Its points, the quickest first."""
        return sorted(self.result["points"], key=lambda each: (each["ms"], each["score"]["value"]))


def beside(run: Path, checkpoints: Sequence[Path]) -> list[Frontier]:
    """The frontiers of a run: those in its folder, and those next to it that measured one of its checkpoints.

    A frontier next to it knows a checkpoint by the digests of its files. Raises InputError for a damaged one in the
    run's folder. One next to it that cannot be read is passed over: it need not be of this run.
    """
    run = run.resolve()
    found = []
    for folder in _folders(run):
        with told(f"{str(folder / FILE)!r} is damaged", OSError, Malformed, remedy="mend it, or set it aside"):
            found.append(_read(folder))
    digests: set[str] | None = None
    for folder in _folders(run.parent):
        try:
            frontier = _read(folder)
        except (OSError, InputError):
            continue
        digests = _digests(checkpoints) if digests is None else digests
        models = [model["checkpoint_sha256"] for model in frontier.result["models"].values()]
        if any(isinstance(each, dict) and each and digests >= {*map(str, each.values())} for each in models):
            found.append(frontier)
    return found


def _folders(place: Path) -> Iterator[Path]:
    return (file.parent for file in sorted(place.glob(f"*/{FILE}")))


def _read(folder: Path) -> Frontier:
    """Raises OSError or Malformed for what is no result of `sit-atconv frontier`."""
    result = read_json(folder / FILE, FORM)
    if not result["points"]:
        raise Malformed(f"{FILE}: points is empty")
    for index, point in enumerate(result["points"]):
        times, score = [point["ms"], *point["ms_quartiles"]], point["score"]
        if not all(number(each) and each > 0 for each in times):
            raise Malformed(f"{FILE}: points.{index}: a time is not above 0")
        if number(score["value"]) is None or not 0 <= (score["error"] or 0) <= 1e30:
            raise Malformed(f"{FILE}: points.{index}.score is {score!r}")
    return Frontier(folder.name, folder, result)


def _digests(checkpoints: Sequence[Path]) -> set[str]:
    """The digests of all files of some checkpoints, as their manifests have them."""
    found: set[str] = set()
    for folder in checkpoints:
        file = folder / MANIFEST
        if not file.is_file():  # a run that goes on has removed it since
            continue
        with told(f"{str(file)!r} is damaged", OSError, Malformed, remedy="mend it, or set it aside"):
            files = read_json(file).get("files")
        found |= {str(each) for each in (flat(files) if isinstance(files, dict) else {}).values()}
    return found
