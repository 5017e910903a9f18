"""What the parts of the drill share: rows of its table, what fails one, images, the environment."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sit_atconv.markdown import markdown_table

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass
class Row:
    """A line of the table: a command, a fault, how often it was made, what it should and did lead to."""

    script: str
    fault: str
    runs: int
    seen: str
    lost: str
    passed: bool


class Failed(Exception):
    """What should have happened did not."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Failed(what)


def row_of(script: str, fault: str, make: Callable[[], str]) -> Row:
    """The row of a fault that is made once: `make` says what was seen, or raises Failed."""
    try:
        return Row(script, fault, 1, make(), "nothing", True)
    except Failed as failure:
        return Row(script, fault, 1, str(failure), "?", False)


def table(rows: list[Row]) -> str:
    text = ["command", "fault", "what was seen", "lost", ""]
    cells = []
    for row in rows:
        seen = " ".join(row.seen.replace("|", "/").split())  # of a run that failed, the end of what it said
        cells.append([row.script, row.fault, str(row.runs), seen, row.lost, "ok" if row.passed else "FAILED"])
    return markdown_table([*text[:2], "runs", *text[2:]], cells, text)


def save_images(folder: Path, number: int, seed: int) -> Path:
    """Noise of two classes, 16 x 16."""
    for index, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (number, 16, 16, 3), np.uint8)):
        image = folder / "ab"[index % 2] / f"{index:02}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(image)
    return folder
