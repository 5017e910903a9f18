"""Public checkpoints -> a model."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sit_atconv.convert import forms, layout
from sit_atconv.convert.kinds import FORMS
from sit_atconv.convert.reading import Source, read_source
from sit_atconv.layers.projectors import Projectors
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime.errors import InputError, check_choice, option
from sit_atconv.runtime.files import library_versions

DEFAULT_ENCODER_DEPTH = 8


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
