"""The training image nearest to each sample of a page, in pixels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sit_atconv.report.pictures import shown_of
from sit_atconv.report.runs import RECIPE, Match, Neighbours, Run, SampleSet
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError, option
from sit_atconv.scoring.sources import Source, open_source

BLOCK = 1 << 25  # bytes of training images that are compared at once, as float64


def find(runs: Sequence[Run], data: str | None = None) -> None:
    """Set `nearest` of all samples that the page shows.

    data: folder, npz or recipe of the training images, see `open_source`; None for what each run's recipe says. Images
    are compared with mirrored ones, too, where the run's recipe mirrors them. All samples that share training images
    take one pass over these.
    Raises InputError where there are no samples, where a run does not say what it was trained on, and for training
    images of another size than the samples.
    """
    shared: dict[tuple[Path, bool], list[SampleSet]] = {}
    for run in runs:
        sets = [samples for samples in run.sets if samples.source is not None]
        if sets:
            place = Path(data) if data is not None else _recipe_of(run)
            shared.setdefault((place, run.recipe.get("data.flip") is True), []).extend(sets)
    if not shared:
        raise InputError(f"{option('nearest')}: no RUN has images of samples to compare; make samples first")
    for (place, mirrored), sets in shared.items():
        source = open_source(place, allow_lossy=True)
        for samples in sets:
            if samples.source.image_shape != source.image_shape:
                raise InputError(
                    f"{source.name} have the shape {source.image_shape} (C, H, W), and the samples "
                    f"{str(samples.path)!r} {samples.source.image_shape}; give training images of the samples' size"
                )
        indices = [shown_of(samples.source) for samples in sets]
        pixels = [
            samples.source.pixels(index, index + 1) for samples, own in zip(sets, indices, strict=True) for index in own
        ]
        matches = iter(nearest(np.concatenate(pixels), source, mirrored))
        for samples, own in zip(sets, indices, strict=True):
            samples.nearest = Neighbours(source.name, source.n, mirrored, {index: next(matches) for index in own})


def _recipe_of(run: Run) -> Path:
    """The recipe that says what a run was trained on. Raises InputError where there is none."""
    if run.folder is None or not (run.folder / RECIPE).is_file():
        raise InputError(
            f"RUN {run.name!r} has no {RECIPE}, which would say what it was trained on; give the training images with "
            f"{option('nearest_in', 'DATA')}"
        )
    return run.folder / RECIPE


def nearest(samples: np.ndarray, source: Source, mirrored: bool = False) -> list[Match]:
    """Of each of the samples, uint8 (K, H, W, C), the nearest of the source's images, which have their shape.

    The distance is the square root of the sum of squared differences of all values (L2), exact. Of images that are as
    near, the first counts, and itself before its mirror image. mirrored: whether mirror images count.
    """
    flat, size = samples.reshape(len(samples), -1), samples[0].size
    rows = max(1, BLOCK // (8 * size))
    least = np.full(len(samples), np.inf)
    found = [(0, False)] * len(samples)
    bar = Progress(total=source.n, desc="nearest", unit="image", delay=2, leave=False)
    with bar:
        for first in range(0, source.n, rows):
            block = source.pixels(first, min(first + rows, source.n))
            for turned in (False, True) if mirrored else (False,):
                images = (block[:, :, ::-1] if turned else block).reshape(len(block), size).astype(np.float64)
                norms = np.einsum("nd,nd->n", images, images)
                for start in range(0, len(flat), rows):
                    part = flat[start : start + rows].astype(np.float64)
                    # |s - t|^2 of whole numbers below 2^53: exact, in whatever order they are added.
                    squares = np.einsum("kd,kd->k", part, part)[:, None] + norms - 2 * part @ images.T
                    places = squares.argmin(1)
                    for k, place in enumerate(places):
                        if squares[k, place] < least[start + k]:
                            least[start + k], found[start + k] = squares[k, place], (first + int(place), turned)
            bar.update(len(block))
    pixels = {index: source.pixels(index, index + 1)[0] for index in sorted({index for index, _ in found})}
    return [
        Match(index, float(np.sqrt(square)), turned, pixels[index][:, ::-1] if turned else pixels[index])
        for square, (index, turned) in zip(least, found, strict=True)
    ]
