"""A public checkpoint -> a folder of ours; and back to the public layout."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sit_atconv.convert import forms, layout
from sit_atconv.convert.public import read_public
from sit_atconv.convert.reading import PICKLES
from sit_atconv.layers.projectors import FILE as PROJECTORS_FILE
from sit_atconv.layers.projectors import Projectors
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime.errors import InputError, check_choice
from sit_atconv.runtime.files import check_out, new_path, sha256
from sit_atconv.training.checkpoint import CONVERSION, load_trained, read_conversion, write_conversion

EXPORT_FORMS = ("sit", "repa")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in layout.DTYPES}
# What the public ATConv layer computes, beside its activation.
PUBLIC_ATCONV = {"pool": "raster", "routing": "adaptive", "inhibition": "learned"}


def convert(source: str | Path, out: str | Path, force: bool = False, **options) -> dict[str, Any]:
    """Write a public checkpoint as a folder of ours, whole or not at all; options and errors as in `read_public`.

    `out` holds config.json and safetensors (SiTTransformer2DModel.from_pretrained(out) loads it), conversion.json, and
    projectors.safetensors of a REPA checkpoint. Returns what conversion.json says. force: what is at `out` is set
    aside. Raises InputError when `out` exists or cannot be written.
    """
    check_out(out, force=force)
    converted = read_public(source, **options)
    with new_path(out, force=force) as unfinished:
        converted.model.save_pretrained(unfinished)
        if converted.projectors is not None:
            converted.projectors.save(unfinished)
        sources = {path.name: sha256(path) for path in converted.files}
        return write_conversion(unfinished, {**converted.record, "source_sha256": sources})


def export_public(
    source: str | Path, out: str | Path, *, form: str | None = None, variant: str | None = None, force: bool = False
) -> None:  # fmt: skip
    """Write a model folder, checkpoint or run of ours in the public layout: the inverse of `convert`.

    out: a new .pt ({"ema": state dict, "args": options}), .pth, .bin or .safetensors file, written whole or not at all.
    form: "sit" or "repa" (time reversed, 1x1 convolutions, projectors where the folder has them); None is the one that
    a converted folder came in, else "sit". The precision is the one that it came in. variant: of the weights in a model
    folder, such as "fp16". force: what is at `out` is set aside.
    Raises InputError for a model that the form cannot express, another suffix, or an `out` that exists or cannot be
    written.
    """
    source, out = Path(source), Path(out)
    if out.suffix not in (*PICKLES, ".safetensors"):
        raise InputError(f"{str(out)!r}: the name must end in {', '.join([*PICKLES, '.safetensors'])}")
    check_out(out, force=force)
    record = read_conversion(source) if (source / CONVERSION).is_file() else {}
    came_in, dtype = record.get("form", "sit"), record.get("dtype", "float32")
    form = form or ("repa" if came_in == "repa" else "sit")
    check_choice("form", form, EXPORT_FORMS)
    check_choice(f"dtype in {CONVERSION}", dtype, DTYPES)
    dtype = DTYPES[dtype]
    widest = torch.promote_types(dtype, torch.float32) if came_in == "repa" else dtype
    trained = load_trained(source, widest, variant)
    _check_expressible(trained.model, form)
    tensors = trained.model.state_dict()
    if form == "repa":
        has_projectors = (trained.folder / PROJECTORS_FILE).is_file()
        projectors = Projectors.load(trained.folder) if has_projectors else None
        tensors = forms.to_repa(tensors)
        if came_in == "repa":
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors |= projectors.state_dict() if projectors else {}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    config = trained.model.config
    args = {
        # What the tensors do not say, for whoever reads the file, this converter included.
        "form": "dit" if config.path == "ddpm" else form,
        "input_size": config.sample_size,
        "num_heads": config.num_heads,
        "num_classes": config.num_classes,
        "class_dropout_prob": config.class_dropout_prob,
        "path_type": config.path,
        "prediction": config.prediction,
    }
    if form == "repa" and projectors:
        args["encoder_depth"] = projectors.encoder_depth
    with new_path(out, force=force) as unfinished:
        if out.suffix == ".safetensors":
            save_file(tensors, unfinished, metadata={"format": "pt", "args": json.dumps(args)})
        else:
            with open(unfinished, "wb") as file:  # it tells of a full disk as an OSError, torch's own writer does not
                torch.save({"ema": tensors, "args": args}, file)


def _check_expressible(model: SiTTransformer2DModel, form: str) -> None:
    config = model.config
    needed = {"use_meanflow": False}  # no public form has an embedding of a second time
    if "atconv" in layout.mixer_names(config.token_mixer, config.depth):
        needed = {**PUBLIC_ATCONV, "activation": "silu" if form == "repa" else "gelu_tanh"}
    if form == "repa":
        needed["prediction"] = "velocity"
    for key, value in needed.items():
        if config[key] != value:
            raise InputError(f"{key}={config[key]!r}: the public {form} form has {value!r} and no other")
    if form == "repa" and model.pos_embed is None:
        raise InputError("pos_embed=False: the public repa form always has a position embedding")
