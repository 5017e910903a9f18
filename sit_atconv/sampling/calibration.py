"""The ratios that the cache `mag` goes by: measured on a few images of a model, and kept beside its weights."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError, named, option, told
from sit_atconv.runtime.files import MAG_RATIOS, library_versions
from sit_atconv.runtime.pictures import NotFinite
from sit_atconv.runtime.reading import SHA256, read_json
from sit_atconv.sampling.caches import MAG, Cache, check, check_ratios, enable, ratios_at
from sit_atconv.sampling.sampling import random_label, sample_latents
from sit_atconv.sampling.settings import Sampling
from sit_atconv.training.checkpoint import Trained

RATIOS_FORM = {"times": [float], "ratios": [float], "weights": {str: SHA256}}


def read_ratios(path: str | Path) -> dict[str, Any]:
    """What `sit-atconv calibrate` wrote, see `caches.check_ratios`. Raises InputError for a missing or damaged file."""
    remedy = "write it by `sit-atconv calibrate`"
    with told(f"ratios {str(path)!r} cannot be read", OSError, InputError, remedy=remedy):
        check_ratios(found := read_json(path, RATIOS_FORM))
    return found


def place_of(trained: Trained) -> Path:
    """Where the ratios of a trained model are kept."""
    return trained.weights_folder / MAG_RATIOS


def ratios_for(trained: Trained, cache: Cache) -> dict[str, Any] | None:
    """The ratios that a cache goes by in a trained model, see `read_ratios`; None for another cache than `mag`.

    Raises InputError where there are none, or none of these weights.
    """
    if cache.kind != MAG:
        return None
    found = read_ratios(place := place_of(trained))
    if found["weights"] != trained.files:
        raise InputError(f"ratios {str(place)!r} are of other weights; write them anew by `sit-atconv calibrate`")
    return found


def enable_for(trained: Trained, guide: Trained | None, cache: Cache, sampling: Sampling) -> None:
    """Switch a cache on in a trained model and its guide, for what is drawn with these settings, which are for this
    model.

    Raises InputError where the cache cannot work with them, or leaves nothing out, and as `ratios_for` does.
    """
    if sampling.sampler == "dopri5":
        raise InputError(
            f"{option('cache', str(cache))}: dopri5 sets its steps by errors, to which a cache adds its "
            "own; take another sampler"
        )
    times = [float(t) for t in sampling.evaluation_times(trained.model)]
    check(cache, times, *sampling.reused)
    found = ratios_for(trained, cache)
    enable(trained.model, cache, found and ratios_at(found, times))
    if guide is not None:
        with named(option("guide")):
            found = ratios_for(guide, cache)
            enable(guide.model, cache, found and ratios_at(found, sampling.guided_times(times)))


def calibrate(
    model: SiTTransformer2DModel, sampling: Sampling, num: int, seed: int = 0
) -> tuple[list[float], list[float]]:
    """(times, ratios) of the evaluations in which `num` images of random classes are drawn, see `caches.check_ratios`.

    The ratio is the mean over images and tokens of |r_i| / |r_(i-1)|, r being what all blocks together add to a token;
    of a guided evaluation both halves count.
    Raises InputError for a sampler whose times do not rise, as dopri5's and heun's do not, for guidance that `mag`
    cannot go with, see `caches.check`, and for blocks that add nothing; NotFinite for what is not finite.
    """
    if sampling.sampler == "dopri5":
        raise InputError("sampler=dopri5 sets its own times; take another one, such as euler")
    sampling = sampling.for_model(model)
    times = [float(t) for t in sampling.evaluation_times(model)]
    if len(times) < 2 or any(a >= b for a, b in pairwise(times)):
        rule = f"steps={sampling.steps}: ratios need two evaluations, at rising times"
        if model.config.use_meanflow:
            raise InputError(
                f"{rule}, and a MeanFlow model has one step by default; state more, such as {option('steps', 4)}"
            )
        raise InputError(f"sampler={sampling.sampler}, {rule}; take euler with more steps")
    check(Cache(MAG, ()), times, *sampling.reused)
    ratios, entered, before = [], [], []

    def enters(block: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        entered[:] = given[:1]

    def leaves(block: nn.Module, given: Any, output: torch.Tensor) -> None:
        lengths = (output - entered.pop()).float().norm(dim=-1)
        ratios.append((lengths / (before.pop() + 1e-8)).mean() if before else lengths.new_ones(()))
        before.append(lengths)
        bar.update()

    hooks = [model.blocks[0].register_forward_pre_hook(enters), model.blocks[-1].register_forward_hook(leaves)]
    bar = Progress(total=len(times), desc="calibrate", unit="evaluation", delay=1e-3)
    try:
        labels = [random_label(seed, index, model.config.num_classes) for index in range(num)]
        with bar:
            sample_latents(model, range(num), torch.tensor(labels, device=model.device), sampling, seed)
    finally:
        for hook in hooks:
            hook.remove()
    found = torch.stack(ratios)
    if not found.isfinite().all():
        raise NotFinite(
            f"ratios are not finite: what the blocks add is NaN or infinity, in {model.dtype}; calibrate in float32, "
            "or other weights"
        )
    if not found.all():
        raise InputError("ratios are 0: the blocks add nothing, as those of a new model do; train it first")
    return times, found.tolist()


def record(
    trained: Trained, sampling: Sampling, num: int, seed: int, times: Sequence[float], ratios: Sequence[float]
) -> str:
    """The file of ratios: what was measured, how, and of which weights."""
    return json.dumps(
        {
            "times": times,
            "ratios": ratios,
            "sampling": sampling.describe(),
            "num": num,
            "seed": seed,
            "dtype": str(trained.model.dtype).removeprefix("torch."),
            "weights": trained.files,
            "versions": library_versions(),
        },
        indent=1,
    )
