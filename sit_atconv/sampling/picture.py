"""Images that are drawn to be looked at, in one picture: by a command, and by the app."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from sit_atconv.flow.path import PATHS
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError, option
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.sampling import Trace, caption_of, grid_png, noted, render, too_large
from sit_atconv.sampling.setup import Setup

STOPS = 40  # on the way from noise to data, at which states are kept at the most
LOOKED_AT = 16  # images of which states are kept


@dataclass(frozen=True)
class Request:
    """Which images a picture holds: image i is of class labels[i], and `columns` of them stand in a row.

    The noise of image i comes from (seed, i). batch: images per network call. size: height and width of the latents,
    as `latent_size` gives them; None for those of the model.
    """

    labels: list[int]
    columns: int
    seed: int = 0
    batch: int = 64
    size: tuple[int, int] | None = None


@dataclass
class Picture:
    """Images that were drawn: uint8 (N, C, H, W), a caption for each, and `columns` of them in a row.

    nfe, of_guide: network evaluations per image, and those of the guide among them. seconds: of all images together.
    """

    images: torch.Tensor
    columns: int
    captions: list[str]
    nfe: float
    of_guide: float
    seconds: float

    def png(self) -> bytes:
        """All images side by side, each above its caption."""
        return grid_png(self.images, self.columns, self.captions)


def latent_size(size: tuple[int, int] | None, ready: Setup) -> tuple[int, int] | None:
    """Height and width of the latents of images of `size` (height, width) in pixels; None for None.

    Raises InputError where the patches of the model do not fill such images.
    """
    if size is None:
        return None
    config, own = ready.trained.model.config, ready.trained.model.latent_size
    factor = ready.codec.image_shape((config.in_channels, *own))[1] // own[0]
    side = factor * config.patch_size
    if any(length % side for length in size):
        stated = option("size", "{} {}".format(*size))
        raise InputError(f"{stated}: a patch of this model covers {side} x {side} pixels; give multiples of {side}")
    return size[0] // factor, size[1] // factor


def draw(
    ready: Setup, request: Request, drawing: Callable, bar: Progress, graphs: Graphs | None = None, **trace: Trace
) -> Picture:
    """Draw what is asked for, batch by batch.

    drawing: as `schedulers.drawing` gives it. bar: told of each image, and of each evaluation. graphs: those that
    `drawing` goes by, if any. trace: told of each evaluation of the first batch, where `drawing` takes it.
    Raises InputError where a batch does not fit into memory, and what `drawing` raises.
    """
    model, images, nfe, of_guide, start = ready.trained.model, [], 0, 0, time.perf_counter()
    for first in range(0, len(request.labels), request.batch):
        part = request.labels[first : first + request.batch]
        indices, more = range(first, first + len(part)), {} if first else trace
        watch = noted(bar, len(part))
        try:
            batch, evaluations = drawing(
                model, ready.codec, indices, part, ready.sampling, request.seed, watch=watch, size=request.size, **more
            )
        except torch.OutOfMemoryError:
            raise too_large(request.batch, model.device, "a smaller one", graphs) from None
        images.append(batch)
        nfe += evaluations * len(part)
        of_guide += evaluations.of_guide * len(part)
        bar.update(len(part))
    seconds, count = time.perf_counter() - start, len(request.labels)
    names = [(ready.trained.id2label or {}).get(label, "") for label in range(model.config.num_classes)]
    captions = [caption_of(label, names) for label in request.labels]
    return Picture(torch.cat(images), request.columns, captions, nfe / count, of_guide / count, seconds)


@dataclass
class Way:
    """A trace of the first images of a batch: the states that they went through, and where the velocity pointed there.

    At most STOPS + 1 states are kept, of LOOKED_AT images. The data expected at a state is what the path says of its
    velocity; of a MeanFlow model it is where the average velocity leads to at t = 1.
    """

    model: SiTTransformer2DModel
    stops: dict[int, tuple[float, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> None:
        moment, stop = float(t), round(STOPS * float(t))
        if stop not in self.stops or self.stops[stop][0] == moment:  # evaluated again: a corrected state
            data = PATHS[self.model.config.path]().data(v, x, t)
            self.stops[stop] = (moment, *(each[:LOOKED_AT].to("cpu", copy=True) for each in (x, data)))

    def at(self, moment: float, codec) -> tuple[float, torch.Tensor, torch.Tensor]:
        """The stop that is nearest to a time in [0, 1]: its own time, its states and the data expected there, as uint8
        images (N, C, H, W).

        Raises NotFinite.
        """
        nearest, *latents = min(self.stops.values(), key=lambda stop: abs(stop[0] - moment))
        where, kind = self.model.device, self.model.dtype
        return nearest, *(render(codec, each.to(where), kind, range(len(each))) for each in latents)
