"""From the paths on the command line to what draws on the page."""

from collections.abc import Mapping
from pathlib import Path

import torch

from sit_atconv.app.foreign import Foreign
from sit_atconv.app.form import Side
from sit_atconv.app.own import Own, Read
from sit_atconv.pipelines.opening import INDEX_FORM, NAME
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.reading import Malformed, read_json
from sit_atconv.sampling.settings import Sampling
from sit_atconv.sampling.setup import setup
from sit_atconv.training.checkpoint import PIPELINE_INDEX


def opened(
    first: str, second: str | None, dtype: str, device: torch.device, vae: str | None, read: Mapping[str, Read]
) -> list[Side]:
    """What draws: one side, or two.

    first, second: what `setup` takes, or a pipeline of diffusers and what is swapped in it, as `Foreign` opens it.
    read: by path, how the form is read. Raises InputError for what cannot be opened, and for two of different kinds.
    """
    if is_foreign(first):
        if vae is not None:
            raise InputError(f"vae={vae!r}: the pipeline {first!r} brings its own autoencoder; leave it out")
        before = Foreign.open(first, dtype, device)
        return [before] if second is None else [before, before.after(second)]
    if second is not None and is_foreign(second):
        raise InputError(f"{second!r} is a pipeline of diffusers, and {first!r} is none; give two of one kind")
    paths = [first] if second is None else [first, second]
    plain = Sampling(guidance_scale=1.0)  # until the form says more
    return [Own(path, setup(path, plain, dtype, str(device), vae), read[path]) for path in paths]


def is_foreign(path: str) -> bool:
    """Whether a path is the folder of a pipeline that is not ours."""
    index = Path(path) / PIPELINE_INDEX
    if not index.is_file():
        return False
    with told(f"pipeline {path!r} cannot be read", Malformed, OSError):
        name = read_json(index, {"_class_name": INDEX_FORM["_class_name"]})["_class_name"]
    return NAME not in (name if isinstance(name, str) else name[-1:])
