"""What a model card shows of a run beside the model: a picture of samples, and the scores of these weights."""

from collections.abc import Callable
from pathlib import Path

from sit_atconv.data.images import DAMAGED, open_image
from sit_atconv.pipelines.card import Shown
from sit_atconv.report.runs import METRICS, SampleSet, read_runs
from sit_atconv.runtime.bounded import read_bytes
from sit_atconv.runtime.errors import option, told
from sit_atconv.scoring.table import markdown, tabulate

MOST_PICTURE = 8 << 20  # bytes
Lines = Callable[[list[SampleSet]], list[str]]  # the command lines of a card, given with the samples that were scored


def shown_of(source: str | Path, weights: dict[str, str], lines: Lines, picture: str | Path | None = None) -> Shown:
    """What the card of a model shows.

    source: where the model is from; of a run's folder, its samples in samples/ are told, those that were drawn from
    these weights and scored. weights: the SHA-256 of the model's files, as `load_trained` has them. lines: give the
    command lines. picture: a PNG; None: the run's newest preview, where it has one.
    Raises InputError for a picture that is none, and results that cannot be read.
    """
    folder, sets, caption = Path(source), [], "Samples."
    is_run = (folder / "recipe.yaml").is_file() and any(folder.glob("step-*"))
    if is_run:
        run = read_runs([str(folder)])[0]
        sets = [each for each in run.sets if each.metrics and each.manifest.get("checkpoint_sha256") == weights]
        if picture is None and run.preview:
            picture, step = run.preview
            caption = f"Samples of the classes in turn, drawn in training at step {step:,}; none is chosen."
    scores = ""
    if sets:
        scores = markdown(tabulate([f"{each.name}={each.path / METRICS}" for each in sets], mix=True))
    return Shown(None if picture is None else _png(picture), caption, scores.rstrip(), lines(sets))


def _png(path: str | Path) -> bytes:
    name = f"{option('picture')} {str(path)!r}"
    with told(name, OSError, ValueError, *DAMAGED, remedy=f"give a PNG of at most {MOST_PICTURE >> 20} MiB"):
        content = read_bytes(path, MOST_PICTURE)
        with open_image(content, formats=("PNG",)):
            return content
