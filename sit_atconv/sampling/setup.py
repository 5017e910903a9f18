"""What a sampling command works with: a trained model and its codec, loaded as its options say."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sit_atconv.latents.codecs import reopen_codec
from sit_atconv.layers.atconv import check_backend
from sit_atconv.runtime import processes
from sit_atconv.runtime.devices import import_compiler, resolve_device
from sit_atconv.runtime.errors import InputError, check_one_process, option
from sit_atconv.runtime.precision import dtype_of
from sit_atconv.sampling.caches import MAG, Cache, parse
from sit_atconv.sampling.settings import Sampling, in_short
from sit_atconv.sampling.trained import check_weaker, open_guide
from sit_atconv.training.checkpoint import Trained, load_trained, load_with_lora

# Why an option does not go with the cache `mag`.
MAG_ALONE = {
    "lora": "its ratios are of the sum, which has no place of its own; export it, and calibrate that",
    "compile": "diffusers runs the blocks as they are then; leave one out, or take another cache",
}
VAE_BATCH = 16  # images per pass through the decoder


@dataclass
class Setup:
    """A trained model and its codec, on the device, and the settings asked for, as they are for the model.

    guide: where one was asked for, the model that `sampling` has as its guide. cache: the one that is asked for, which
    `schedulers.drawing` switches on.
    """

    trained: Trained
    codec: torch.nn.Module
    sampling: Sampling
    guide: Trained | None = None
    cache: Cache | None = None


def own_device(name: str | None) -> str | None:
    """The device of this process where the command line says `name`: of several on CUDA, each has its own.

    Raises InputError for one that several would share.
    """
    if name is None and torch.cuda.is_available():
        name = "cuda"
    kind, _, index = (name or "").partition(":")
    if processes.count() == 1 or kind != "cuda":
        return name
    if index:
        raise InputError(f"{option('device', name)}: {processes.count()} processes take a GPU each; say cuda")
    return f"cuda:{processes.local_rank()}"


def setup(
    ckpt: str | Path,
    sampling: Sampling,
    dtype: str = "fp32",
    device: str | None = None,
    vae: str | None = None,
    compiled: bool = False,
    launched: bool = False,
    lora: str | Path | None = None,
    cache: str | None = None,
) -> Setup:
    """A model and its codec, on the device of this process, and the settings as they are for this model; the guide that
    they name is loaded as the model is.

    ckpt: as `load_trained` takes it. dtype: one of `precision.DTYPES`. device: by default CUDA where there is one.
    vae: folder or hub id of the autoencoder, where it is not the one that the checkpoint names.
    lora: adapters that are added to the weights, as `load_with_lora` takes them; the model is theirs then.
    compiled: whether the blocks of model and guide are compiled, as the first images are drawn: each kind once a shape.
    cache: as `caches.parse` takes it.
    launched: as one of the processes of a launch, which it has joined; else there may be one only.
    Raises InputError for a bad checkpoint, setting, cache, device or missing autoencoder, and for a guide that does not
    fit.
    """
    if not launched:
        check_one_process()
    asked = None if cache is None else parse(cache)
    if asked is not None and asked.kind == MAG:
        for name, given in (("lora", lora), ("compile", compiled)):
            if given:
                raise InputError(f"{option(name, given)} does not go with {option('cache', cache)}: {MAG_ALONE[name]}")
    where = resolve_device(own_device(device) if launched else device)
    wanted, guide = dtype_of(dtype), None
    trained = load_trained(ckpt, wanted) if lora is None else load_with_lora(ckpt, lora, wanted)
    if sampling.guide is not None:
        called = option("guide", sampling.guide)
        guide = open_guide(sampling.guide, called, trained.model, trained.stated("codec"), trained.id2label, wanted)
        check_weaker(guide.model, trained.model, called)
        sampling = replace(sampling, guide=guide.model)
    with in_short():
        sampling = sampling.for_model(trained.model)
    codec = reopen_codec(trained.stated("codec"), vae, VAE_BATCH).to(where)
    for each in filter(None, (trained, guide)):
        torch.nn.Module.to(each.model, where)  # diffusers' own loads all of its hooks, and peft
        check_backend(each.model, where)
        if compiled:
            import_compiler()
            each.model.compile_repeated_blocks()
    return Setup(trained, codec, sampling, guide, asked)
