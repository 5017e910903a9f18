"""A folder that diffusers loads with trust_remote_code=True where this package is not installed.

model_index.json                  names pipeline.py and, for AutoModel, the transformer's file
pipeline.py                       SiTPipeline in one file
transformer/modeling_sit_*.py     operator, layers and model in one file, its hash in its name; in guide/ too
transformer/, guide/, scheduler/, vae/    as save_pretrained writes them
README.md                         a model card, with picture.png where there is one

sit-atconv export SRC --out DIR
"""

import json
import re
from pathlib import Path

from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.pipelines.bundle import Bundle, digest
from sit_atconv.pipelines.card import PICTURE, Shown, model_card
from sit_atconv.pipelines.from_run import FromRun
from sit_atconv.pipelines.opening import Source, open_as
from sit_atconv.pipelines.pipeline_sit import SiTPipeline
from sit_atconv.runtime.errors import InputError, option
from sit_atconv.runtime.files import check_out, new_path
from sit_atconv.runtime.reading import read_json
from sit_atconv.training.checkpoint import PIPELINE_INDEX
from sit_atconv.version import __version__

MODEL = Bundle(SiTTransformer2DModel.__module__, SiTTransformer2DModel.__name__)
# In pipeline.py a class of that name would be another one.
STAND_IN = f"from diffusers import ModelMixin as {MODEL.name}  # the transformer comes from a file of its own\n"
# Runs are read by the trainer's modules, which are no part of an export.
NO_RUNS = '''"""What reads the folders of runs is left out here."""


class FromRun:
    """See the package sit_atconv."""

    @classmethod
    def from_run(cls, *args, **options):
        """Not here: raises NotImplementedError."""
        raise NotImplementedError("from_run reads runs by the package sit_atconv; install it")
'''
PIPELINE = Bundle(SiTPipeline.__module__, SiTPipeline.__name__, {MODEL.entry: STAND_IN, FromRun.__module__: NO_RUNS})
NOTE = f"""This is the package sit_atconv {__version__} (MIT licence), as far as it is needed here. FILES holds the text
of each module, and `Importer` imports it; only imports from the package are written otherwise than there."""


def open_source(source: str | Path, vae: str | None = None, variant: str | None = None) -> Source:
    """What is exported, see `opening.open_as`."""
    return open_as(SiTPipeline, source, vae, variant)


def export(
    source: Source, out: str | Path, license: str = "unknown", force: bool = False, shown: Shown | None = None
) -> None:
    """Write the folder `out`, whole or not at all. license: of the weights, as the Hub spells it. force: what is at
    `out` is set aside. shown: what the card shows beside the model.

    Raises InputError when `out` exists or cannot be written, or the license is no identifier.
    """
    check_target(out, license, force)
    scheduler = type(source.pipeline.scheduler)
    if scheduler.__module__.startswith("sit_atconv."):
        raise InputError(
            f"the pipeline's scheduler {scheduler.__name__} is of this package, without which an export works; save "
            "the pipeline with one of diffusers, such as FlowMatchEulerDiscreteScheduler, and export that"
        )
    with new_path(out, force=force) as unfinished:
        _write(source, unfinished, unfinished.name, license, shown)


def check_target(out: str | Path, license: str, force: bool) -> None:
    """Raise InputError, before the work, for a path that nothing may be written to, and as `check_license`."""
    check_out(out, force=force)
    check_license(license)


def check_license(license: str) -> None:
    """Raise InputError for a license that is no identifier of the Hub's."""
    if not re.fullmatch(r"[A-Za-z0-9.-]+", license):
        raise InputError(f"{option('license')} {license!r}: give one identifier, such as mit, cc-by-nc-4.0 or other")


def _write(source: Source, folder: Path, name: str, license: str, shown: Shown | None) -> None:
    model_code, pipeline_code = MODEL.text(NOTE), PIPELINE.text(NOTE)
    # diffusers keeps local files of one name in one place: another version's must not replace this one.
    module = f"modeling_sit_{digest(model_code)}"

    source.pipeline.save_pretrained(folder)
    models = [name for name in ("transformer", "guide") if (folder / name).is_dir()]
    for model in models:
        (folder / model / f"{module}.py").write_text(model_code)
    (folder / "pipeline.py").write_text(pipeline_code)
    auto_map = {"AutoModel": f"{module}.{MODEL.name}"}
    for path in [folder / PIPELINE_INDEX, *folder.glob("*/config.json")]:
        config = read_json(path)
        config.pop("_name_or_path", None)  # a path on this machine
        if path.name == PIPELINE_INDEX:
            config["_class_name"] = ["pipeline", PIPELINE.name]
            config |= {model: [module, MODEL.name] for model in models}
        if path.name == PIPELINE_INDEX or path.parent.name in models:
            # AutoModel reads the index where it is given a subfolder. Else diffusers warns that no class takes the key.
            config |= {"auto_map": auto_map, "_use_default_values": {"auto_map": True}}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    libraries = MODEL.libraries() | PIPELINE.libraries()
    card = model_card(source.pipeline, source.manifest, source.dtype, name, license, libraries, shown)
    (folder / "README.md").write_text(card)
    if shown is not None and shown.picture is not None:
        (folder / PICTURE).write_bytes(shown.picture)
