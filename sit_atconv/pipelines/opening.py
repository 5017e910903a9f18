"""From a folder to a pipeline: of a run, a checkpoint, a model alone, or a pipeline, exported or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from sit_atconv.latents.codecs import VaeCodec, reopen_codec
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.pipelines.adams import FlowMatchAdamsScheduler
from sit_atconv.runtime.errors import InputError, option, told
from sit_atconv.runtime.reading import Malformed, read_config, read_json
from sit_atconv.runtime.weights import own_variant
from sit_atconv.sampling.trained import check_weaker, open_guide
from sit_atconv.training.checkpoint import ID2LABEL_FORM, PIPELINE_INDEX, load_trained

NAME = "SiTPipeline"  # in model_index.json, of what derives from it, too
INDEX_FORM = {
    "_class_name": (str, [str]), "scheduler": [str, str], "vae?": ([(str, None), (str, None)], None),
    "guide?": ([(str, None), (str, None)], None), **ID2LABEL_FORM,
}  # fmt: skip
# There are schedulers that take memory and time by the square of their levels.
SCHEDULER_FORM, MOST_SCHEDULER = {"num_train_timesteps?": range(1, 10_001)}, 1 << 18  # bytes


@dataclass
class Source:
    """A pipeline that was opened, what training or conversion said of its weights, their dtype on disk, and the SHA-256
    of their files."""

    pipeline: DiffusionPipeline
    manifest: dict[str, Any]
    dtype: torch.dtype
    files: dict[str, str]


def open_as(
    kind: type[DiffusionPipeline],
    source: str | Path,
    vae: str | None = None,
    variant: str | None = None,
    guide: str | Path | None = None,
) -> Source:
    """A SiTPipeline: that in a folder of one, exported or not, or around the model of what `load_trained` takes (a
    run's EMA).

    kind: SiTPipeline, or a class that derives from it. vae: folder or hub id of the autoencoder, where it does not come
    with the model, or has moved. variant: of the weights, such as "fp16", as `DiffusionPipeline.from_pretrained` takes
    it: of each part that has it. guide: of autoguidance, as `load_trained` takes it; the one in a pipeline's folder,
    where none is named. Transformer and guide each have the narrowest dtype that holds their weights on disk.
    Raises InputError for a folder that is none of these, is damaged, or needs another autoencoder, and for a guide that
    does not fit.
    """
    folder = Path(source)
    is_pipeline = (folder / PIPELINE_INDEX).is_file()
    trained, weaker = load_trained(folder, None, variant), None
    if guide is not None:
        called = option("guide", str(guide))
        weaker = open_guide(guide, called, trained.model, trained.stated("codec"), trained.id2label, None).model
        check_weaker(weaker, trained.model, called)
    if is_pipeline:
        pipeline = _open_pipeline(kind, folder, trained.model, weaker, vae, variant)
    else:
        codec = reopen_codec(trained.stated("codec"), vae, batch_size=1)
        vae = codec.vae if isinstance(codec, VaeCodec) else None
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipeline = _made(kind, trained.model, vae, weaker, scheduler, trained.id2label)
    return Source(pipeline, trained.manifest, trained.model.dtype, trained.files)


def _made(
    kind: type[DiffusionPipeline],
    transformer: SiTTransformer2DModel,
    vae: AutoencoderKL | None,
    guide: SiTTransformer2DModel | None,
    scheduler: SchedulerMixin,
    id2label: dict | None,
) -> DiffusionPipeline:
    by = {} if guide is None else {"guide": guide}  # what derives from SiTPipeline may take none
    return kind(transformer, vae, scheduler=scheduler, id2label=id2label, **by)


def _open_pipeline(
    kind: type[DiffusionPipeline],
    folder: Path,
    transformer: SiTTransformer2DModel,
    guide: SiTTransformer2DModel | None,
    vae: str | None,
    variant: str | None,
) -> DiffusionPipeline:
    # Exception: options of any kind, which diffusers, numpy and torch refuse in every way there is.
    with told(f"pipeline {str(folder)!r} cannot be read", Malformed, Exception):
        index = read_json(folder / PIPELINE_INDEX, INDEX_FORM)
        # A list where the folder was exported before.
        names = index["_class_name"] if isinstance(index["_class_name"], list) else [index["_class_name"]]
        if NAME not in names[-1:]:
            raise InputError(f"{str(folder)!r} is a {index['_class_name']}; give a {NAME}")
        scheduler_config = read_config(folder / "scheduler" / "scheduler_config.json", SCHEDULER_FORM, MOST_SCHEDULER)
        library, name = index["scheduler"]
        own = [library, name] == [FlowMatchAdamsScheduler.__module__, FlowMatchAdamsScheduler.__name__]
        found = FlowMatchAdamsScheduler if own else getattr(diffusers, name, object)
        if not own and (library != "diffusers" or not issubclass(found, SchedulerMixin)):
            raise InputError(f"{str(folder)!r}: the scheduler {name} is not one of diffusers, and not ours")
        scheduler = found.from_config(scheduler_config)
        beside = vae is None and (index.get("vae") or [None])[0] is not None
        vae = folder / "vae" if beside else vae
    if guide is None and (index.get("guide") or [None])[0] is not None:
        own = own_variant(folder / "guide", variant)
        guide = load_trained(folder / "guide", None, own).model
    own = own_variant(folder / "vae", variant) if beside else None
    autoencoder = VaeCodec(str(vae), batch_size=1, variant=own).vae if vae is not None else None
    return _made(kind, transformer, autoencoder, guide, scheduler, index.get("id2label"))
