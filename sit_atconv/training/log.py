"""What a run reports: log.jsonl, trackers, and the figures in them."""

import json
import math
import re
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from sit_atconv import config
from sit_atconv.config import Recipe
from sit_atconv.runtime.comparison import flat
from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import resolved, write_atomic
from sit_atconv.runtime.processes import is_main
from sit_atconv.runtime.reading import COUNT, Malformed, parse_json, read_json

TIME_BINS = 10  # of equal width over t in [0, 1]; t = 0 is noise

# Dense peak TFLOP/s of bf16 or fp16, TF32 and fp32, as the makers' data sheets have them; the first name that fits.
PEAK_TFLOPS = {
    "B200": (2250, 1125, 75), "H200": (989, 494, 67), "GH200": (989, 494, 67), "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 417, 60), "H100": (989, 494, 67), "A100": (312, 156, 19.5), "A800": (312, 156, 19.5),
    "L40S": (362, 183, 91.6), "L40": (181, 90.5, 90.5), "L4": (121, 60, 30.3),
    "A10G": (70, 35, 35), "A10": (125, 62.5, 31.2), "RTX 4090": (165, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6), "V100": (125, 15.7, 15.7),
}  # fmt: skip


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in the recipe's precision, FLOP/s; None for one that is not in the table, a CPU among them."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peaks for key, peaks in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)
    return found and 1e12 * found[{"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 2}[precision]]


def peak_memory(device: torch.device) -> int:
    """The most memory held so far, bytes: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # accelerate brings it

        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Means:
    """Means since the last report: of named per-sample losses, and, where they have times, of the first by bins of t.

    Sums stay on the device, so adding to them waits for nothing.
    """

    def __init__(self, names: list[str], device: torch.device, bins: int = TIME_BINS):
        self.names, self.bins = names, bins
        self.sums = torch.zeros(2, len(names) + bins, device=device)  # of values, of counts

    def add(self, t: torch.Tensor | None, *losses: torch.Tensor | None) -> None:
        """Losses (B,) in the order of the names, None of those that this step has not; t (B,): their times, if any."""
        there = [index for index, loss in enumerate(losses) if loss is not None]
        values = torch.stack([losses[index].detach().float() for index in there])
        finite = values.isfinite().all(0)  # a step with another one is skipped
        values, ones = torch.where(finite, values, 0), finite.float()
        count = len(self.names)
        number = ones.sum()
        for index, value in zip(there, values.sum(1), strict=True):  # a list as the index would be copied to the device
            self.sums[0, index].add_(value)
            self.sums[1, index].add_(number)
        if t is None or there[0] != 0:
            return
        bins = count + (t * self.bins).long().clamp(0, self.bins - 1)
        self.sums[0].index_add_(0, bins, values[0])
        self.sums[1].index_add_(0, bins, ones)

    def reduced(self, accelerator: Accelerator) -> torch.Tensor:
        """The sums over all processes; every process must call it."""
        return accelerator.reduce(self.sums.clone(), "sum")

    def row(self, sums: torch.Tensor) -> dict[str, Any]:
        """The means of reduced sums; a bin that no sample fell into is None."""
        values, counts = sums.tolist()
        means = [value / count if count else None for value, count in zip(values, counts, strict=True)]
        named = dict(zip(self.names, means, strict=False))
        return {**named, "loss_by_time": means[len(self.names) :]} if self.bins else named

    def reset(self) -> None:
        self.sums.zero_()


class Log:
    """A file with a line of JSON per report, each with its "step". A restart drops the lines past its own step.

    Lines that the disk does not take are kept, and written with the next that it does. `last`: the newest line's step.
    """

    def __init__(self, path: Path, step: int):
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        steps = [_step(line) for line in lines]
        write_atomic(
            path, "".join(line for line, its in zip(lines, steps, strict=True) if its is not None and its <= step)
        )
        if broken := steps[:-1].count(None):  # the last may be one that a kill cut
            say(f"warning: {path}: {broken} lines that are no reports are left out")
        self.last = max((its for its in steps if its is not None and its <= step), default=None)
        self.path, self.pending, self.warned = path, "", False
        self.size = path.stat().st_size

    def write(self, row: dict[str, Any]) -> None:
        self.pending, self.last = self.pending + json.dumps(_plain(row), allow_nan=False) + "\n", row["step"]
        try:
            with open(self.path, "r+") as file:
                file.seek(self.size)
                file.truncate()  # a line cut short by a full disk
                file.write(self.pending)
        except OSError as error:
            if not self.warned:
                say(f"warning: {self.path} cannot be written ({error.strerror}); lines are kept")
            self.warned = True
            return
        self.size += len(self.pending.encode())
        self.pending, self.warned = "", False


def _plain(value: Any) -> Any:
    """A value of a row as JSON has it, which knows neither NaN nor infinity: None in their place."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> int | None:
    """The step of a line of a log; None where it is cut, or no report."""
    try:
        return parse_json(line, "the line", {"step": COUNT})["step"] if line.endswith("\n") else None
    except Malformed:
        return None


class Trackers:
    """The recipe's trackers, started at `step`, each on the run that it had before: its id lies in the run's folder.

    tensorboard drops what it was told past `step`; wandb passes over steps that it has. Every process makes one.
    Raises InputError where a tracker does not start. One that fails later costs a warning, and no step.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, step: int):
        self.accelerator, self.warned = accelerator, False
        try:
            self._start(recipe, step)
        except Exception as error:  # other people's programs, which may raise anything
            said = f"{type(error).__name__}: {error}"
            raise InputError(f"run.trackers={recipe.run.trackers}: {said}; mend it, or leave the tracker out") from None

    def _start(self, recipe: Recipe, step: int) -> None:
        run = resolved(recipe.run.out, "run.out")
        options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}}
        if is_main() and "wandb" in recipe.run.trackers:
            file = run / "trackers.json"
            if not file.exists():
                write_atomic(file, json.dumps({"wandb": uuid.uuid4().hex[:12]}))
            run_id = read_json(file, {"wandb": str})["wandb"]
            options["wandb"] = {"id": run_id, "name": run.name, "dir": str(run), "resume": "allow"}
        settings = flat(config.to_dict(recipe))
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        own = {name: options.get(name, {}) for name in recipe.run.trackers}
        self.accelerator.init_trackers("sit_atconv", plain, own)

    def log(self, row: dict[str, Any], step: int) -> None:
        """Pass on the numbers of a row."""
        with self._told(step):
            self.accelerator.log(for_trackers(row), step=step)

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Pass on a picture. The main process calls it."""
        pixels = np.array(picture.convert("RGB"))[None]
        with self._told(step):
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pixels}, step=step, **layout)

    @contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """Within it, the first error of a tracker's becomes a warning, and later ones nothing."""
        try:
            yield
        except Exception as error:
            if not self.warned:
                say(f"warning: a tracker failed at step {step}: {type(error).__name__}: {error}")
            self.warned = True


def for_trackers(row: dict[str, Any]) -> dict[str, float]:
    """A row as trackers take it: numbers alone; a list becomes a number per bin of t, named by the bin's middle."""
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
    for key, values in row.items():
        if isinstance(values, list):
            middles = [f"{(index + 0.5) / len(values):.2f}" for index in range(len(values))]
            numbers |= {f"{key}/{t}": value for t, value in zip(middles, values, strict=True) if value is not None}
    return numbers
