"""From seeds, indices and labels to images: the one sampling routine of previews, scores and commands."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sit_atconv.flow.guidance import Evaluations, GuidedVelocity, Reuse
from sit_atconv.flow.meanflow import jump
from sit_atconv.flow.path import PATHS
from sit_atconv.flow.samplers import SAMPLERS
from sit_atconv.flow.sde import SDE, SDE_SAMPLERS, last_step
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime import draws
from sit_atconv.runtime.classes import check_id
from sit_atconv.runtime.compat.diffusers import reset_cache
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError, option
from sit_atconv.runtime.files import png
from sit_atconv.runtime.pictures import check_latents, decoded, to_pil, to_uint8
from sit_atconv.sampling.caches import context
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.noise import brought, noise, steps_ahead
from sit_atconv.sampling.settings import Sampling


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Raise InputError for a class id out of range."""
    for label in labels:
        check_id(label, num_classes)


def random_label(seed: int, index: int, num_classes: int) -> int:
    """The label of image `index`, uniform over the classes."""
    return int(draws.generator(seed, Stream.SAMPLE_LABEL, index).integers(num_classes))


# Told after each evaluation of a block of images: network evaluations per image so far, and the share of the way from
# noise to data that they have come.
Watch = Callable[[int, float], None]


def noted(bar: Progress, count: int) -> Watch:
    """A watch that says on a bar of images how far the next `count` of them are."""
    return lambda nfe, share: bar.note(f"evaluation {nfe}, {share:.0%} of the block", share * count)


# Told after each evaluation of where a block of images is: x (B, C, H, W), its time t, 0-d, and the velocity there.
Trace = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

GRID_PIXELS = 64
CAPTION = 13  # pixels of the strip below an image that says its class


def grid(images: torch.Tensor, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """uint8 images (N, C, H, W) as one picture to look at; small ones are enlarged to about 64 pixels.

    captions: a text for each, in a strip below it that is CAPTION pixels high; what is too long is cut.
    """
    from torchvision.utils import make_grid

    factor = max(1, GRID_PIXELS // images.shape[-1])
    cells = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    if captions is not None:
        strips = torch.stack([_strip(text, cells.shape[-1]) for text in captions])
        cells = torch.cat([cells, strips.expand(-1, cells.shape[1], -1, -1)], -2)
    return to_pil(make_grid(cells, nrow=columns, padding=4, pad_value=255))


def grid_png(images: torch.Tensor, columns: int, captions: Sequence[str] | None = None) -> bytes:
    """`grid` as a PNG."""
    return png(grid(images, columns, captions))


def caption_of(label: int, names: Sequence[str]) -> str:
    """What is written below an image of a class: the first of its names, the id where the font has not its letters."""
    name = names[label].partition(",")[0].strip() if label < len(names) else ""
    return name if name.isascii() and name.isprintable() and name else str(label)


def _strip(text: str, width: int) -> torch.Tensor:
    """uint8 (1, CAPTION, width): black text on white."""
    font, shown = ImageFont.load_default(), text
    while len(shown) > 1 and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}.."
    strip = Image.new("L", (width, CAPTION), 255)
    ImageDraw.Draw(strip).text((0, 0), shown, fill=0, font=font)
    return torch.from_numpy(np.array(strip))[None]


@torch.no_grad()
def sample_latents(
    model: SiTTransformer2DModel,
    indices: Sequence[int],
    labels: torch.Tensor,
    sampling: Sampling,
    seed: int = 0,
    watch: Watch | None = None,
    graphs: Graphs | None = None,
    size: tuple[int, int] | None = None,
    trace: Trace | None = None,
) -> tuple[torch.Tensor, Evaluations]:
    """The latents (B, C, H, W) of images `indices`, of classes `labels` (B,); also the evaluations per image.

    The noise of image i comes from (seed, i) alone, that of a step of an SDE from (seed, i, step).
    The model and the guide of `sampling` run in their own dtypes, on the device of the model, where `labels` must be;
    the state is fp32.
    graphs: on a CUDA device the networks are replayed as these CUDA graphs, to the bit the same; they are recorded
    where they are not yet, and serve further calls with these models. None: every kernel is launched. On a CPU both are
    one.
    A cache that is on in the model or the guide, see `caches`, begins anew here.
    size: (H, W), multiples of the patch; None for those that the model was made for. trace: told of each evaluation;
    of a MeanFlow model the velocity is the average one, up to the next time.
    The host waits for the device where it records, with dopri5, and where a first block decides whether others run.
    """
    sampling = sampling.fitted(model.config.use_meanflow)
    shape = (model.config.in_channels, *(size or model.latent_size))
    path, device = PATHS[model.config.path](), model.device

    def network_of(one: SiTTransformer2DModel, graphs: Graphs | None) -> Callable[..., torch.Tensor]:
        def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, r: torch.Tensor | None = None) -> torch.Tensor:
            average = {} if r is None else {"timestep_r": r}
            with context(one, len(x)):
                predicted = one(x.to(one.dtype), t, y, return_dict=False, **average)[0]
            return predicted.to(torch.float32, copy=True)  # a compiled model may write its next output over this one

        if one.is_cache_enabled:
            reset_cache(one)  # the images depend on none that were drawn before
        return network if graphs is None else graphs.of(one, network)

    by = {"path": path, "prediction": model.config.prediction, "reuse": Reuse(sampling.guidance_every)}
    by["batches"] = sampling.guidance_batches
    if (guide := sampling.guide_model) is not None:
        by["guide"] = network_of(guide, graphs and graphs.beside)
        by["guide_prediction"] = guide.config.prediction
    guided = GuidedVelocity(network_of(model, graphs), labels, model.null_label, *sampling.guidance, **by)

    start, end = sampling.interval(model)

    def velocity(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor | None = None) -> torch.Tensor:
        v = guided(x, t, s)
        if watch is not None:
            watch(guided.nfe, (float(t) - start) / (end - start))
        if trace is not None:
            trace(x, t, v)
        return v

    times = sampling.times(model)
    x = brought(noise(shape, seed, Stream.SAMPLE_NOISE, indices), device)
    if model.config.use_meanflow:
        return jump(velocity, x, times), guided.nfe
    if sampling.sampler in SAMPLERS:
        return sampling.solver(velocity, x, times), guided.nfe
    sde = SDE(path, sampling.diffusion, sampling.diffusion_norm)
    with steps_ahead(partial(noise, shape, seed, Stream.SAMPLE_STEP, indices), len(times) - 1, device) as draw:
        x = SDE_SAMPLERS[sampling.sampler](velocity, x, times, sde, draw)
    return last_step(sampling.last_step, velocity, x, times[-1], sde), guided.nfe


def generate(
    model: SiTTransformer2DModel,
    codec,
    indices: Sequence[int],
    labels: Sequence[int],
    sampling: Sampling,
    seed: int = 0,
    kept: int | None = None,
    watch: Watch | None = None,
    graphs: Graphs | None = None,
    size: tuple[int, int] | None = None,
    trace: Trace | None = None,
) -> tuple[torch.Tensor, Evaluations]:
    """Images of the given indices, and the number of network evaluations that each took.

    codec: decodes latents to images. labels: one class per index. kept: the first so many alone are wanted, the others
    fill the batch up. watch: told of each evaluation.
    graphs, size, trace: see `sample_latents`. dopri5 shares its step size over the batch, and the cache first_block its
    decisions. Decoding is fp32.
    Returns uint8 (kept, C, H, W) on the CPU, by images.UINT8_RULE.
    Raises InputError for a label out of range, settings that do not fit the model, see `Sampling.for_model`, and
    guidance that never acts;
    NotFinite where latents or images that are wanted are not finite.
    """
    sampling = sampling.for_model(model)
    sampling.check_acts_on(model)
    check_labels(labels, model.config.num_classes)
    wanted = torch.tensor(labels, device=model.device)
    latents, nfe = sample_latents(model, indices, wanted, sampling, seed, watch, graphs, size, trace)
    return render(codec, latents, model.dtype, indices, kept), nfe


def too_large(
    batch: int, device: torch.device, remedy: str, graphs: Graphs | None = None, name: str = "batch"
) -> InputError:
    """What to raise where a batch of images does not fit into the memory of the device; remedy: what to give; name: of
    the option that says how many they are."""
    also = f", or take {option('no_cuda_graphs')}, which holds less" if graphs and device.type == "cuda" else ""
    return InputError(f"{option(name, batch)}: {device} has not the memory; give {remedy}{also}")


@torch.no_grad()
def render(
    codec, latents: torch.Tensor, network: torch.dtype, indices: Sequence[int], kept: int | None = None
) -> torch.Tensor:
    """uint8 images (kept, C, H, W) on the CPU, of latents (B, ...) that a network of that dtype led to; see `generate`.

    Raises NotFinite.
    """
    check_latents(latents[:kept], network, indices)
    return to_uint8(decoded(latents, lambda all_of_them: codec.decode(all_of_them)[:kept], indices)).cpu()
