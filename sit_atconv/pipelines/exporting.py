"""A folder that diffusers loads with trust_remote_code=True where this package is not installed.

model_index.json                  names pipeline.py and, for AutoModel, the transformer's file
pipeline.py                       SiTPipeline in one file
transformer/modeling_sit_*.py     operator, layers and model in one file, its hash in its name
transformer/, scheduler/, vae/    as save_pretrained writes them
README.md                         a model card

python -m sit_atconv.pipelines.export SRC --out DIR
"""

import json
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from sit_atconv.latents.codecs import VaeCodec, reopen_codec
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.pipelines.bundle import Bundle, digest
from sit_atconv.pipelines.card import model_card
from sit_atconv.pipelines.pipeline_sit import SiTPipeline
from sit_atconv.runtime.errors import InputError, option, told
from sit_atconv.runtime.files import check_out, new_path
from sit_atconv.runtime.reading import Malformed, read_config, read_json, read_tensors
from sit_atconv.runtime.weights import STEM, own_variant
from sit_atconv.training.checkpoint import ID2LABEL_FORM, PIPELINE_INDEX, load_trained
from sit_atconv.version import __version__

MODEL = Bundle(SiTTransformer2DModel.__module__, SiTTransformer2DModel.__name__)
# In pipeline.py a class of that name would be another one.
STAND_IN = f"from diffusers import ModelMixin as {MODEL.name}  # the transformer comes from a file of its own\n"
PIPELINE = Bundle(SiTPipeline.__module__, SiTPipeline.__name__, {MODEL.entry: STAND_IN})
NOTE = f"""This is the package sit_atconv {__version__} (MIT licence), as far as it is needed here. FILES holds the text
of each module, and `Importer` imports it; only imports from the package are written otherwise than there."""

INDEX_FORM = {
    "_class_name": (str, [str]), "scheduler": [str, str], "vae?": ([(str, None), (str, None)], None),
    **ID2LABEL_FORM,
}  # fmt: skip
# There are schedulers that take memory and time by the square of their levels.
SCHEDULER_FORM, MOST_SCHEDULER = {"num_train_timesteps?": range(1, 10_001)}, 1 << 18  # bytes


@dataclass
class Source:
    """What is exported: the pipeline, what training or conversion said of its weights, and their dtype on disk."""

    pipeline: SiTPipeline
    manifest: dict[str, Any]
    dtype: torch.dtype


def open_source(source: str | Path, vae: str | None = None, variant: str | None = None) -> Source:
    """The pipeline in a folder of one, exported or not, or around the model of what `load_trained` takes (a run's EMA).

    vae: folder or hub id of the autoencoder, for a model that has one and does not come with it.
    variant: of the weights, such as "fp16", as `DiffusionPipeline.from_pretrained` takes it: of each part that has it.
    Raises InputError for a folder that is none of these, is damaged, or needs another autoencoder.
    """
    folder = Path(source)
    is_pipeline = (folder / PIPELINE_INDEX).is_file()
    trained = load_trained(folder, variant=variant)
    names = [name for name in trained.files if Path(name).match(f"{STEM}*.safetensors")]
    tensors = (each for name in names for each in read_tensors(trained.folder / name, "model")[0].values())
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})  # the narrowest that holds all of them
    if dtype != torch.float32:
        trained = load_trained(folder, dtype, variant)
    if is_pipeline:
        pipeline = _open_pipeline(folder, trained.model, vae, variant)
    else:
        codec = reopen_codec(trained.stated("codec"), vae, batch_size=1)
        pipeline = SiTPipeline(
            trained.model,
            codec.vae if isinstance(codec, VaeCodec) else None,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            id2label=trained.id2label,
        )
    return Source(pipeline, trained.manifest, dtype)


def _open_pipeline(
    folder: Path, transformer: SiTTransformer2DModel, vae: str | None, variant: str | None
) -> SiTPipeline:  # fmt: skip
    # Exception: options of any kind, which diffusers, numpy and torch refuse in every way there is.
    with told(f"pipeline {str(folder)!r} cannot be read", Malformed, Exception):
        index = read_json(folder / PIPELINE_INDEX, INDEX_FORM)
        # A list where the folder was exported before.
        names = index["_class_name"] if isinstance(index["_class_name"], list) else [index["_class_name"]]
        if SiTPipeline.__name__ not in names[-1:]:
            raise InputError(f"{str(folder)!r} is a {index['_class_name']}; give a {SiTPipeline.__name__}")
        scheduler_config = read_config(folder / "scheduler" / "scheduler_config.json", SCHEDULER_FORM, MOST_SCHEDULER)
        library, name = index["scheduler"]
        if library != "diffusers" or not issubclass(kind := getattr(diffusers, name, object), SchedulerMixin):
            raise InputError(f"{str(folder)!r}: the scheduler {name} is not one of diffusers")
        scheduler = kind.from_config(scheduler_config)
        beside = vae is None and (index.get("vae") or [None])[0] is not None
        vae = folder / "vae" if beside else vae
    own = own_variant(folder / "vae", variant) if beside else None
    autoencoder = VaeCodec(str(vae), batch_size=1, variant=own).vae if vae is not None else None
    return SiTPipeline(transformer, autoencoder, scheduler=scheduler, id2label=index.get("id2label"))


def export(source: Source, out: str | Path, license: str = "unknown", force: bool = False) -> None:
    """Write the folder `out`, whole or not at all. license: of the weights, as the Hub spells it. force: what is at
    `out` is set aside.

    Raises InputError when `out` exists or cannot be written, or the license is no identifier.
    """
    check_target(out, license, force)
    with new_path(out, force=force) as unfinished:
        _write(source, unfinished, unfinished.name, license)


def check_target(out: str | Path, license: str, force: bool) -> None:
    check_out(out, force=force)
    if not re.fullmatch(r"[A-Za-z0-9.-]+", license):
        raise InputError(f"{option('license')} {license!r}: give one identifier, such as mit, cc-by-nc-4.0 or other")


def _write(source: Source, folder: Path, name: str, license: str) -> None:
    model_code, pipeline_code = MODEL.text(NOTE), PIPELINE.text(NOTE)
    # diffusers keeps local files of one name in one place: another version's must not replace this one.
    module = f"modeling_sit_{digest(model_code)}"

    source.pipeline.save_pretrained(folder)
    (folder / "transformer" / f"{module}.py").write_text(model_code)
    (folder / "pipeline.py").write_text(pipeline_code)
    auto_map = {"AutoModel": f"{module}.{MODEL.name}"}
    for path in [folder / PIPELINE_INDEX, *folder.glob("*/config.json")]:
        config = read_json(path)
        config.pop("_name_or_path", None)  # a path on this machine
        if path.name == PIPELINE_INDEX:
            config["_class_name"] = ["pipeline", PIPELINE.name]
            config["transformer"] = [module, MODEL.name]
        if path.name == PIPELINE_INDEX or path.parent.name == "transformer":
            # AutoModel reads the index where it is given a subfolder. Else diffusers warns that no class takes the key.
            config |= {"auto_map": auto_map, "_use_default_values": {"auto_map": True}}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    libraries = MODEL.libraries() | PIPELINE.libraries()
    card = model_card(source.pipeline, source.manifest, source.dtype, name, license, libraries)
    (folder / "README.md").write_text(card)
