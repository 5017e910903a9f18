"""A model of this library on the page: a run, a checkpoint, a pipeline of ours."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from sit_atconv.app.form import Bar, Control, Drawn, Form, Stop
from sit_atconv.models.cost import count_parameters
from sit_atconv.runtime.classes import Classes
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.pictures import to_pil
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.picture import Picture, Request, Way, draw
from sit_atconv.sampling.sampling import grid_png
from sit_atconv.sampling.schedulers import drawing
from sit_atconv.sampling.settings import SAMPLERS, Sampling
from sit_atconv.sampling.setup import Setup

# From a form to the settings as they are for the model, the images asked for, and the command line that asks for them.
Read = Callable[[Form, Setup], tuple[Sampling, Request, str]]


class Own:
    """A trained model that is set up, by the form of `sit-atconv sample`.

    read: reads the form as the command reads its options, so that the same line draws the same bits.
    """

    language, has_way = "shell", True

    def __init__(self, title: str, ready: Setup, read: Read):
        self.title, self.ready, self.read = title, ready, read
        self.graphs, self.shape = Graphs(), None
        config, model = ready.trained.model.config, ready.trained.model
        self.live = config.use_meanflow
        step = ready.trained.manifest["step"]
        mixer = config.token_mixer if isinstance(config.token_mixer, str) else ", ".join(config.token_mixer)
        facts = [f"token mixer **{mixer}**", f"{config.depth} blocks", f"{count_parameters(model):,} parameters"]
        facts += [f"step {step:,}"] if step is not None else []
        facts += ["MeanFlow: one step draws an image"] if config.use_meanflow else []
        self.about = ", ".join(facts)

    @property
    def controls(self) -> list[Control]:
        """The fields of the form, with what fits the model in them."""
        model = self.ready.trained.model
        plain = Sampling().fitted(model.config.use_meanflow)
        guided = model.null_label is not None and model.config.trained_guidance == 1
        samplers = ("euler",) if model.config.use_meanflow else SAMPLERS
        names = class_words(Classes(model.config.num_classes, self.ready.trained.id2label))
        height, width = self.ready.codec.image_shape((model.config.in_channels, *model.latent_size))[1:]
        return [
            Control("classes", "Classes", "choices", list(names[:10]), names, "none: random classes"),
            Control("count", "Images per class", "number", 1, about="no class: in all"),
            Control("seed", "Seed", "number", 0, about="of the noise"),
            Control("sampler", "Sampler", "choice", plain.sampler, samplers),
            Control("steps", "Steps", "number", plain.steps, about="more: finer"),
            Control("guidance", "Guidance", "number", plain.guidance_scale if guided else 1, about="1: none"),
            Control("low", "Guidance from t", "number", 0, about="0: noise", rare=True),
            Control("high", "Guidance to t", "number", 1, about="1: data", rare=True),
            Control("height", "Height", "number", about=f"blank: {height} px", rare=True),
            Control("width", "Width", "number", about=f"blank: {width} px", rare=True),
        ]

    def draw(self, form: Form, bar: Callable[[int], Bar]) -> Drawn:
        """As `Side` says, by the one sampling routine. Raises InputError as `sit-atconv sample` would."""
        sampling, request, line = self.read(form, self.ready)
        ready = replace(self.ready, sampling=sampling)
        if (shape := (len(request.labels), request.size)) != self.shape:  # graphs of every shape would fill the memory
            self.graphs.clear()
        self.shape, way = shape, Way(ready.trained.model)
        by = drawing(None, ready, self.graphs)
        picture = draw(ready, request, by, bar(len(request.labels)), self.graphs, trace=way)
        shown = [to_pil(image) for image in picture.images]
        at = partial(self._at, way, picture)
        return Drawn(picture.png(), shown, picture.nfe, picture.seconds, line, at)

    def _at(self, way: Way, picture: Picture, moment: float) -> Stop:
        """The stop that is nearest to a time; at the end of the way the images themselves."""
        last, *pictures = way.at(moment, self.ready.codec)
        if 1 - moment < abs(last - moment):
            last, pictures = 1.0, 2 * [picture.images[: len(pictures[0])]]

        def png(images: torch.Tensor) -> bytes:
            return grid_png(images, picture.columns, picture.captions[: len(images)])

        return Stop(last, *map(png, pictures))


def class_words(classes: Classes) -> tuple[str, ...]:
    """A word for each class, by id, that `Classes.read` takes for it: its first name that will do, else its id."""
    words = [str(label) for label in range(classes.number)]
    for name, label in sorted(classes.names.items(), key=lambda named: "," in named[0]):  # all names of a class last
        try:
            if words[label] == str(label) and not name.startswith("-") and classes.read(name) == label:
                words[label] = name
        except InputError:  # a name that reads as an id that there is not
            pass
    return tuple(words)
