"""Pictures as data URIs: a few samples of each class, small enough that the page stays light."""

import base64
import io
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sit_atconv.data.images import DAMAGED, MOST_BYTES, open_image
from sit_atconv.report.runs import SampleSet
from sit_atconv.runtime.bounded import read_bytes
from sit_atconv.runtime.errors import InputError
from sit_atconv.scoring.sources import Source

CLASSES, PER_CLASS = 10, 8
BUDGET = 1_300_000  # bytes of a page's pictures as PNG; base64 makes a third more of them
SIDES = (160, 128, 96, 80, 64, 48, 32)  # of a thumbnail: the first with which the pictures are within the budget
PREVIEW_SIDES = (1024, 768, 512, 384, 256)


class Picture:
    """An image as it goes into the page, its longest side at most `side`. sharp: so small that its pixels are to be
    seen."""

    def __init__(self, image: Image.Image, side: int):
        small, buffer = image.copy(), io.BytesIO()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        small.save(buffer, "png", optimize=True)
        self.png = buffer.getvalue()
        self.width, self.height = small.size
        self.sharp = max(small.size) <= 64

    @property
    def uri(self) -> str:
        """The data URI of its PNG."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def chosen(labels: np.ndarray | None, n: int) -> list[tuple[int | None, list[int]]]:
    """Of each of at most CLASSES classes, evenly out of those there are, the first PER_CLASS indices.

    Without labels: the first images, as one row of class None per PER_CLASS.
    """
    if labels is None:
        count = min(n, CLASSES * PER_CLASS // 2)
        return [(None, list(range(first, min(first + PER_CLASS, count)))) for first in range(0, count, PER_CLASS)]
    classes = np.unique(labels)
    if len(classes) > CLASSES:
        classes = classes[np.linspace(0, len(classes) - 1, CLASSES).round().astype(int)]
    return [(int(each), np.flatnonzero(labels == each)[:PER_CLASS].tolist()) for each in classes]


def shown_of(source: Source) -> list[int]:
    """The indices of the images that are shown, in order: a compressed npz is a stream."""
    return sorted(index for _, row in chosen(source.labels, source.n) for index in row)


class Shown(NamedTuple):
    """A sample of a grid; nearest: the training image nearest to it, None where nobody asked for it."""

    index: int
    picture: Picture
    nearest: Picture | None


def grid(samples: SampleSet, share: float) -> list[tuple[int | None, list[Shown]]]:
    """Rows of a grid: the class, None without labels, and its samples; [] without images.

    share: of the page's budget. Raises InputError for images that cannot be read.
    """
    source = samples.source
    if source is None:
        return []
    indices = shown_of(source)
    pixels = [source.pixels(index, index + 1)[0] for index in indices]
    if samples.nearest:
        pixels += [samples.nearest.found[index].pixels for index in indices]
    pictures = _fit([_image(each) for each in pixels], SIDES, share * BUDGET)
    shown = {
        index: Shown(index, picture, near)
        for index, picture, near in zip_longest(indices, pictures[: len(indices)], pictures[len(indices) :])
    }
    return [(label, [shown[index] for index in row]) for label, row in chosen(source.labels, source.n)]


def _image(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W, 1 or 3) -> a grey or RGB image."""
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def preview(path: Path, share: float) -> Picture:
    """A preview's picture. Raises InputError where it does not decode."""
    try:
        with open_image(read_bytes(path, MOST_BYTES), formats=("PNG",)) as image:
            return _fit([image.convert("RGB")], PREVIEW_SIDES, share * BUDGET)[0]
    except DAMAGED as error:
        raise InputError(f"preview {str(path)!r} does not decode ({error}); take it away") from None


def _fit(images: Sequence[Image.Image], sides: Sequence[int], budget: float) -> list[Picture]:
    """The images with the longest side in `sides` that the budget allows, else the shortest; none is enlarged."""
    for side in sides:
        pictures = [Picture(image, side) for image in images]
        if sum(len(picture.png) for picture in pictures) <= budget:
            break
    return pictures
