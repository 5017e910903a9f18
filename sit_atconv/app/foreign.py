"""A pipeline of diffusers on the page, and beside it the same pipeline with swapped attention."""

import copy
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import nn

import sit_atconv
from sit_atconv.app.form import Bar, Control, Drawn, Form, number, whole_number
from sit_atconv.models.cost import count_parameters
from sit_atconv.runtime.classes import Classes
from sit_atconv.runtime.console import Unheard
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.limits import EVALUATIONS, GUIDANCE, PICTURE, PIXELS, SEED
from sit_atconv.runtime.precision import dtype_of
from sit_atconv.runtime.reading import read_json
from sit_atconv.sampling.sampling import grid_png
from sit_atconv.swap import load_delta
from sit_atconv.swap.wrapping import model_of
from sit_atconv.training.checkpoint import PIPELINE_INDEX

STEPS = 20  # what the form begins with: the pipeline's own default may take minutes
CONFIG = "config.json"


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, diffusers shows no bars off a terminal, where each is one endless line."""
    shown = logging.is_progress_bar_enabled()
    if not Unheard(sys.stderr).isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Foreign:
    """A pipeline of diffusers that draws images of a prompt, of classes, or of nothing.

    loading: the lines of Python that made it. Image i is drawn by a generator of its own, of seed + i, on the CPU.
    Raises InputError for a pipeline that takes no such thing.
    """

    language, live, has_way = "python", False, False

    def __init__(self, title: str, pipe: DiffusionPipeline, loading: list[str], dtype: str, device: torch.device):
        self.title, self.pipe, self.loading, self.dtype, self.device = title, pipe, loading, dtype, device
        self.taken = inspect.signature(type(pipe).__call__).parameters
        self.asks = next((name for name in ("prompt", "class_labels", "batch_size") if name in self.taken), None)
        if self.asks is None or "generator" not in self.taken:
            raise InputError(
                f"{title!r} is a {type(pipe).__name__}; give a pipeline that takes a generator, and a prompt, "
                "class_labels or a batch_size"
            )
        pipe.set_progress_bar_config(disable=True)
        pipe.to(device)
        self.model = model_of(pipe)[1]
        self.about = f"{type(self.model).__name__}, {count_parameters(self.model):,} parameters"
        if self.asks == "class_labels":
            names: dict[int, list[str]] = {}
            for name, label in getattr(pipe, "labels", {}).items():
                names.setdefault(label, []).append(name)
            given = {label: ",".join(each) for label, each in names.items()}
            self.classes = Classes(self.model.config.num_embeds_ada_norm, given, "the pipeline has no id2label")

    @classmethod
    def open(cls, path: str, dtype: str, device: torch.device) -> "Foreign":
        """The pipeline in a folder, from safetensors alone. Raises InputError where diffusers does not load it."""
        kind = dtype_of(dtype)
        with quiet(), told(f"pipeline {path!r} cannot be loaded", Exception):  # diffusers refuses in every way there is
            pipe = DiffusionPipeline.from_pretrained(
                path, torch_dtype=kind, use_safetensors=True, local_files_only=True
            )
        line = f"pipe = DiffusionPipeline.from_pretrained({path!r}, torch_dtype={kind}, use_safetensors=True)"
        return cls(path, pipe, [line, f"pipe.to({str(device)!r})"], dtype, device)

    def after(self, path: str) -> "Foreign":
        """The same after a swap: `path` is the folder of the swapped pipeline or of its swapped model, or a delta.

        Raises InputError for anything else, and for a pipeline of another class.
        """
        folder = Path(path)
        if (folder / PIPELINE_INDEX).is_file():
            other = Foreign.open(path, self.dtype, self.device)
            if type(other.pipe) is not type(self.pipe):
                kinds = f"{type(other.pipe).__name__}, and {self.title!r} a {type(self.pipe).__name__}"
                raise InputError(f"{path!r} is a {kinds}; give two pipelines of one class")
            return other
        part = next(name for name in ("transformer", "unet") if getattr(self.pipe, name, None) is self.model)
        if (folder / CONFIG).is_file():
            model, loading = self._swapped_model(path, part)
        else:
            model = copy.deepcopy(self.model)
            load_delta(model, path)
            loading = [f"load_delta(pipe, {path!r})"]
        pipe = copy.copy(self.pipe)  # of the same parts, but for the model
        pipe.register_modules(**{part: model})
        return Foreign(path, pipe, [*self.loading[:1], *loading, *self.loading[1:]], self.dtype, self.device)

    def _swapped_model(self, path: str, part: str) -> tuple[nn.Module, list[str]]:
        kind = dtype_of(self.dtype)
        with quiet(), told(f"model {path!r} cannot be loaded", Exception, InputError):
            name = read_json(Path(path) / CONFIG, {"_class_name": str})["_class_name"]
            if not name.startswith("ATConv") or not hasattr(sit_atconv, name):
                raise InputError(f"it is a {name}; give a model that was swapped by swap_attention")
            model = getattr(sit_atconv, name).from_pretrained(path, torch_dtype=kind, use_safetensors=True)
        return model, [f"pipe.{part} = sit_atconv.{name}.from_pretrained({path!r}, torch_dtype={kind})"]

    @property
    def controls(self) -> list[Control]:
        """The fields of the form, of what the pipeline takes."""
        asked = {
            "prompt": [Control("prompt", "Prompt", "text", "")],
            "class_labels": self._class_controls() if self.asks == "class_labels" else [],
            "batch_size": [],
        }[self.asks]
        count = Control(
            "count",
            "Images per class" if self.asks == "class_labels" else "Images",
            "number",
            1,
            about="each of other noise",
        )
        fields = {
            "num_inference_steps": Control("steps", "Steps", "number", STEPS, about="more: finer"),
            "guidance_scale": Control("guidance", "Guidance", "number", about="blank: its own"),
            "height": Control("height", "Height", "number", about="blank: its own", rare=True),
            "width": Control("width", "Width", "number", about="blank: its own", rare=True),
        }
        taken = [control for name, control in fields.items() if name in self.taken]
        return [*asked, count, Control("seed", "Seed", "number", 0, about="of the noise"), *taken]

    def _class_controls(self) -> list[Control]:
        from sit_atconv.app.own import class_words

        words = class_words(self.classes)
        return [Control("classes", "Classes", "choices", list(words[:4]), words)]

    def draw(self, form: Form, bar: Callable[[int], Bar]) -> Drawn:
        """As `Side` says. Raises InputError for what is out of range, and for what the pipeline refuses."""
        call, count, seed = self._call(form)
        seeds = range(seed, seed + count)
        generators = [torch.Generator().manual_seed(each) for each in seeds]
        shown, start = bar(count), time.perf_counter()
        with (
            self._counted(shown, call.get("num_inference_steps", 1), count) as evaluated,
            told(f"{type(self.pipe).__name__}", TypeError, ValueError, NotImplementedError),
        ):
            images = getattr(self.pipe(**call, generator=generators), "images", None)
        if images is None:
            raise InputError(f"{type(self.pipe).__name__} gives no images; give a pipeline of images")
        shown.update(count)
        seconds = time.perf_counter() - start
        arrays = np.stack([np.array(image.convert("RGB")) for image in images])
        grid = grid_png(torch.from_numpy(arrays).permute(0, 3, 1, 2), max(1, round(count**0.5)))
        return Drawn(grid, images, sum(evaluated) / count, seconds, self._repeat(call, seeds))

    def _call(self, form: Form) -> tuple[dict[str, Any], int, int]:
        """What the pipeline is called with, the number of images, and the seed of the first."""
        each = whole_number(form, "count", 1)
        PICTURE.check("count=", each)
        if self.asks == "class_labels":
            ids = [self.classes.read(str(word)) for word in form["classes"] or ()]
            if not ids:
                raise InputError("classes is blank: give at least one")
            asked = each * ids
            PICTURE.check("count of all classes=", len(asked))
            call, count = {"class_labels": asked}, len(asked)
        else:
            call = {"prompt": each * [form["prompt"] or ""]} if self.asks == "prompt" else {"batch_size": each}
            count = each
        seed = whole_number(form, "seed", 0)
        SEED.check("seed=", [seed, seed + count - 1])
        for name, field, limits in (
            ("num_inference_steps", "steps", EVALUATIONS),
            ("height", "height", PIXELS),
            ("width", "width", PIXELS),
        ):
            if name in self.taken and (value := whole_number(form, field, None)) is not None:
                limits.check(f"{field}=", value)
                call[name] = value
        if "guidance_scale" in self.taken and (scale := number(form, "guidance")) is not None:
            GUIDANCE.check("guidance=", scale)
            call["guidance_scale"] = scale
        return call, count, seed

    @contextmanager
    def _counted(self, bar: Bar, steps: int, images: int) -> Iterator[list[int]]:
        """Gives a list, in which every call of the model puts how many samples it was of."""
        samples: list[int] = []

        def note(model: nn.Module, args: tuple, kwargs: dict) -> None:
            first = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor | list))
            samples.append(len(first))
            share = min(1.0, len(samples) / steps)
            bar.note(f"call {len(samples)} of the model", share * images)

        hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield samples
        finally:
            hook.remove()

    def _repeat(self, call: dict[str, Any], seeds: range) -> str:
        """The program that draws the same images."""
        imports = ["import torch", "from diffusers import DiffusionPipeline", "", "import sit_atconv.swap"]
        if any("load_delta" in line for line in self.loading):
            imports.append("from sit_atconv.swap import load_delta")
        given = ", ".join(f"{name}={value!r}" for name, value in call.items())
        return "\n".join([
            *imports, "", *self.loading,
            f"generator = [torch.Generator().manual_seed(seed) for seed in {seeds!r}]",
            f"images = pipe({given}, generator=generator).images",
        ])  # fmt: skip
