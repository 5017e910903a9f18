"""A run in the characters of a terminal: how far it is, its loss, and its newest preview."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sit_atconv.data.images import DAMAGED, MOST_BYTES, open_image
from sit_atconv.report.curves import four_digits
from sit_atconv.report.runs import Run, read_runs
from sit_atconv.runtime.bounded import read_bytes
from sit_atconv.runtime.console import clock_told
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.markdown import visible
from sit_atconv.scoring.result import number

RISE = "▁▂▃▄▅▆▇█"
GREYS = " .:-=+*#%@"  # from black to white, where there are no colours
UPPER = "▀"  # its colour is that of the pixel above, its ground that of the pixel below
PLAIN = "\x1b[0m"
LEVELS = (0, 95, 135, 175, 215, 255)  # of the 6 x 6 x 6 colours of a terminal of 256


@dataclass(frozen=True)
class Colours:
    """What a terminal shows. count: 0, 256, or 1 << 24."""

    count: int

    @classmethod
    def of(cls, environment: dict[str, str]) -> "Colours":
        """By NO_COLOR, COLORTERM and TERM of the environment."""
        if environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
            return cls(0)
        return cls(1 << 24 if environment.get("COLORTERM") in ("truecolor", "24bit") else 256)

    def code(self, ground: bool, rgb: Sequence[int]) -> str:
        """The sequence that sets the colour of what follows, or of its ground."""
        first = 48 if ground else 38
        if self.count > 256:
            return f"\x1b[{first};2;{rgb[0]};{rgb[1]};{rgb[2]}m"
        places = [min(range(6), key=lambda place: abs(LEVELS[place] - value)) for value in rgb]
        return f"\x1b[{first};5;{16 + 36 * places[0] + 6 * places[1] + places[2]}m"


def blocks(image: Image.Image, columns: int, rows: int, colours: Colours) -> list[str]:
    """The lines of an image, two pixels a character, one above the other; it is made smaller until it fits, and never
    larger. Without colours, one grey a character."""
    width, height = image.size
    tall = 2 * rows
    scale = min(1.0, columns / width, tall / height)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    small = image.convert("RGB")
    small = small if size == image.size else small.resize(size, Image.Resampling.BOX)
    pixels = np.asarray(small).astype(int)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, np.zeros_like(pixels[:1])])
    lines = []
    for above, below in zip(pixels[::2], pixels[1::2], strict=True):
        if not colours.count:
            means = (above.mean(1) + below.mean(1)) / 2
            lines.append("".join(GREYS[round(mean / 255 * (len(GREYS) - 1))] for mean in means))
            continue
        pairs = zip(above.tolist(), below.tolist(), strict=True)
        lines.append("".join(colours.code(False, a) + colours.code(True, b) + UPPER for a, b in pairs) + PLAIN)
    return lines


def sparkline(values: Sequence[float | None], columns: int) -> str:
    """A curve of at most so many characters, each the mean of neighbours; a gap where nothing was measured."""
    size = max(1, math.ceil(len(values) / max(1, columns)))
    parts = [
        [each for each in values[first : first + size] if each is not None] for first in range(0, len(values), size)
    ]
    means = [math.fsum(part) / len(part) if part else None for part in parts]
    found = [mean for mean in means if mean is not None]
    if not found:
        return ""
    low, span = min(found), (max(found) - min(found)) or 1.0
    return "".join(" " if mean is None else RISE[round((mean - low) / span * (len(RISE) - 1))] for mean in means)


@dataclass(frozen=True)
class Look:
    """A run at a moment."""

    run: Run

    @property
    def step(self) -> int:
        """The newest that is logged or saved."""
        return int(max([row["step"] for row in self.run.log[-1:]] + [number(self.run.checkpoint.get("step")) or 0]))

    @property
    def steps(self) -> int | None:
        """Of the whole training; None of a run whose recipe counts otherwise, as a classifier's counts epochs."""
        found = number(self.run.recipe.get("train.max_steps"))
        return None if found is None else int(found)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes: no process is at work, or, where that is not known, the last step is there."""
        return not self.run.going if self.run.going is not None else self.step == self.steps

    @property
    def state(self) -> str:
        """In words, for the last line."""
        at = f"step {self.step:,}"
        if not self.ended:
            return f"training, {at}"
        if self.steps is None:
            return f"no process is at work there; {at} is the newest"
        if self.step < self.steps:
            return f"stopped at {at} of {self.steps:,}; the command that began it goes on"
        return f"ended at {at}"


def look(path: str | Path) -> Look:
    """Read a run. Raises InputError where there is none, and for a damaged file."""
    run = read_runs([str(path)])[0]
    if not run.trained:
        raise InputError(f"RUN {str(path)!r} is a folder of samples, and no training run; give that of a run")
    return Look(run)


def line(at: Look) -> str:
    """How far a run is, as one line."""
    row = at.run.log[-1] if at.run.log else {}
    parts = [f"step {at.step:,}" + (f" of {at.steps:,}" if at.steps else "")]
    for name, form in (("loss", "loss {:.4f}"), ("images_per_second", "{:,.4g} images/s")):
        if (value := number(row.get(name))) is not None:
            parts.append(form.format(value))
    if (left := number(row.get("eta_seconds"))) and not at.ended:
        parts.append(f"{clock_told(left)} left")
    if skipped := number(row.get("skipped")):
        parts.append(f"{skipped:,} skipped")
    return ", ".join(parts)


def screen(at: Look, columns: int, rows: int, colours: Colours) -> list[str]:
    """A run as lines that fit a terminal of so many columns and rows. Raises InputError for a preview that does not
    decode."""
    run = at.run
    lines = [f"{visible(run.name)}: {at.state}"[:columns], line(at)[:columns]]
    if at.steps:
        wide = max(1, min(columns, 60) - 6)
        full = min(wide, wide * at.step // at.steps)
        lines.append(f"{'█' * full}{'░' * (wide - full)} {at.step / at.steps:4.0%}"[:columns])
    losses = [number(row.get("loss")) for row in run.log]
    if curve := sparkline(losses, min(columns, 60) - 6):
        known = [each for each in losses if each is not None]
        lines += [
            f"loss  {curve}",
            f"      {four_digits(known[0])} at first, {four_digits(min(known))} at least"[:columns],
        ]
    if run.validation and (loss := number(run.validation[-1].get("loss"))) is not None:
        lines.append(f"validation loss {loss:.4f} at step {int(run.validation[-1]['step']):,}"[:columns])
    if run.preview:
        path, step = run.preview
        lines.append(f"preview of step {step:,}"[:columns])
        left = rows - len(lines) - 1
        if left >= 2:
            try:
                with open_image(read_bytes(path, MOST_BYTES), formats=("PNG",)) as image:
                    lines += blocks(image, columns, left, colours)
            except DAMAGED as error:
                raise InputError(f"preview {str(path)!r} does not decode ({error}); take it away") from None
    return lines[: rows - 1]
