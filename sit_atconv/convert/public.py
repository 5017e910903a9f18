"""Public checkpoints -> a model, a folder of ours; and back to the public layout."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sit_atconv.convert import forms, layout
from sit_atconv.convert.kinds import FORMS
from sit_atconv.convert.reading import PICKLES, Source, read_source
from sit_atconv.layers.projectors import FILE as PROJECTORS_FILE
from sit_atconv.layers.projectors import Projectors
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime.errors import InputError, check_choice, option
from sit_atconv.runtime.files import check_out, library_versions, new_path, sha256
from sit_atconv.training.checkpoint import CONVERSION, load_trained, read_conversion, write_conversion

EXPORT_FORMS = ("sit", "repa")
DEFAULT_ENCODER_DEPTH = 8
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in layout.DTYPES}
# What the public ATConv layer computes, beside its activation.
PUBLIC_ATCONV = {"pool": "raster", "routing": "adaptive", "inhibition": "learned"}


@dataclass
class Converted:
    """A public checkpoint as ours: the model, REPA's projectors or None, where from, and what was found and done."""

    model: SiTTransformer2DModel
    projectors: Projectors | None
    files: list[Path]
    record: dict[str, Any]


def read_public(
    source: str | Path,
    *,
    weights: str | None = None,
    variant: str | None = None,
    form: str | None = None,
    num_heads: int | None = None,
    sample_size: int | tuple[int, int] | None = None,
    path: str | None = None,
    prediction: str | None = None,
    encoder_depth: int | None = None,
    keep_projectors: bool = True,
) -> Converted:
    """Read a SiT, ATConv-SiT, REPA, fast-DiT or diffusers DiT checkpoint; see `read_source` for the containers.

    weights: "ema" or "model"; None is the EMA where there is one. variant: of a diffusers folder, such as "fp16".
    form: "sit", "repa" or "dit"; None tells REPA and diffusers' DiT by their tensors and takes all else for SiT. The
        tensors of a DiT .pt are those of a SiT. A DiT keeps its own time, 0 to 999 with 999 noise, and predicts noise:
        its path is "ddpm", which no sampler of ours follows.
    num_heads, sample_size, path, prediction: what the tensors and the options stored with them leave open.
    encoder_depth: number of blocks (1-based) before REPA's projectors, 8 unless the checkpoint or the caller says.
    Raises InputError for a file that cannot be read without running it, another architecture, or options left open.
    """
    if form is not None:
        check_choice("form", form, FORMS)
    told = {"num_heads": num_heads, "sample_size": sample_size, "path": path, "prediction": prediction}
    name = str(source)
    found = read_source(source, weights, variant)
    actual, tensors, projectors, folded, notes = _public_layout(name, found, form, told)
    options, assumed = layout.read_options(name, tensors, found.args, told, actual)
    model = layout.build(name, tensors, options)
    kept = _projectors(projectors, found, encoder_depth, options["depth"]) if keep_projectors else None
    if encoder_depth is not None and kept is None:
        raise InputError(f"encoder depth {encoder_depth}: there are no projectors to keep; leave it out")
    position = layout.position_embedding_kind(tensors, model.grid)
    if position == "stored":
        notes.append("pos_embed is not the fixed one, which takes its place at any other latent size")
    dtype = layout.widest({name: found.tensors[name] for name in found.tensors if name not in projectors})
    described = {"encoder_depth": kept.encoder_depth, "z_dims": kept.z_dims} if kept is not None else None
    record = {
        "source": found.name,
        "weights": found.weights,
        "form": actual,
        "dtype": str(dtype).removeprefix("torch."),  # the source's: what absorbs REPA's time makes the model's wider
        "folded": folded,
        "pos_embed": position,
        "projectors": described or ("dropped" if projectors else None),
        "notes": notes + assumed,
        "versions": library_versions(),
    }
    return Converted(model, kept, found.files, record)


def load_public(source: str | Path, **options) -> SiTTransformer2DModel:
    """The model of a public checkpoint, in evaluation mode on the CPU; options and errors as in `read_public`.

    Warns of what had to be assumed. REPA's time is folded into the weights: t = 0 is noise, v = data - noise.
    """
    converted = read_public(source, keep_projectors=False, **options)
    for note in converted.record["notes"]:
        warnings.warn(note, stacklevel=2)
    return converted.model


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


def _public_layout(
    name: str, found: Source, form: str | None, told: dict[str, Any]
) -> tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor], list[str], list[str]]:
    """(form, model, projectors, what was folded, notes); completes `told` by what a diffusers config says."""
    if found.config is not None:
        if found.config.get("_class_name") == SiTTransformer2DModel.__name__:
            raise InputError(
                f"{name!r} is a model of this library already; its public layout is the other direction's to write"
            )
        if form not in (None, "dit"):
            raise InputError(f"form={form!r}: {name!r} is a diffusers folder, of which DiT is read; leave it out")
        tensors, facts, notes = forms.from_diffusers(name, found.tensors, found.config)
        for key, value in facts.items():
            if told[key] not in (None, value):
                raise InputError(f"{key}={told[key]}: config.json of {name!r} says {value}; leave it out")
        told.update(facts)
        return "dit", tensors, {}, [], notes
    stored = found.args.get("form")
    form = form or (stored if isinstance(stored, str) and stored in FORMS else None)
    if forms.is_repa(found.tensors):
        if form not in (None, "repa"):
            raise InputError(f"form={form!r}: the tensors of {name!r} are of the REPA form; leave it out")
        form = "repa"
    if form != "repa":
        return form or "sit", found.tensors, {}, [], []
    tensors, projectors = forms.from_repa(name, found.tensors)
    return "repa", tensors, projectors, forms.REPA_FOLDED, []


def _projectors(
    tensors: dict[str, torch.Tensor], found: Source, encoder_depth: int | None, depth: int
) -> Projectors | None:
    if not tensors:
        return None
    number = encoder_depth or found.args.get("encoder_depth", DEFAULT_ENCODER_DEPTH)
    if not isinstance(number, int) or not 1 <= number <= depth:
        raise InputError(
            f"encoder depth {number}: the model has {depth} blocks; give the number of blocks before REPA's "
            f"projectors with {option('encoder_depth')}, or drop them"
        )
    return Projectors.from_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, number)


def _check_expressible(model: SiTTransformer2DModel, form: str) -> None:
    config = model.config
    needed = {}
    if "atconv" in layout.mixer_names(config.token_mixer, config.depth):
        needed = {**PUBLIC_ATCONV, "activation": "silu" if form == "repa" else "gelu_tanh"}
    if form == "repa":
        needed["prediction"] = "velocity"
    for key, value in needed.items():
        if config[key] != value:
            raise InputError(f"{key}={config[key]!r}: the public {form} form has {value!r} and no other")
    if form == "repa" and model.pos_embed is None:
        raise InputError("pos_embed=False: the public repa form always has a position embedding")
