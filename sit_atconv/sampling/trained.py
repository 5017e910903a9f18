"""What images are drawn from: what a manifest says of a trained model, and the guide that is loaded beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sit_atconv.latents.codecs import differing
from sit_atconv.models.cost import count_parameters
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime.errors import InputError, named
from sit_atconv.runtime.files import shown
from sit_atconv.sampling.settings import check_guide
from sit_atconv.training.checkpoint import Trained, load_trained

SAME = "give a guide that was trained on the same"


def describe_trained(trained: Trained) -> dict[str, Any]:
    """Where a model came from, as a manifest of samples has it."""
    return {
        "checkpoint": shown(trained.folder),
        "weights": trained.which,
        "step": trained.manifest["step"],
        "checkpoint_sha256": trained.files,
        "training": describe_training(trained),
    }


def describe_guide(guide: Trained | None) -> dict[str, Any] | None:
    """What is recorded of a guide: where it came from, and what it predicts; None without one."""
    return guide and {"prediction": guide.model.config.prediction, **describe_trained(guide)}


def describe_training(trained: Trained) -> dict[str, Any]:
    """What the checkpoint says of how its model was trained; None where nobody says, as of a converted model.

    name: the model's preset. run: the folder of the run. repa: of a run with REPA, its encoder, block and weight.
    distill: of a run with a teacher, which of its attentions were replaced, and whether by attention.
    init: of a run that began from a checkpoint, the parts that were drawn anew. lora: of a run of LoRA, its rank and
    alpha; of adapters from a file, which says nothing of their training, its SHA-256. meanflow: of a model of average
    velocities, the guidance in the weights, and, where a run says so, the share of samples with two times, what the
    change was taken along, and whether a teacher gave the velocity.
    """
    recipe, init = trained.manifest.get("recipe"), trained.manifest.get("init")
    sections = ("repa", "distill", "lora", "meanflow")
    repa, distill, lora, meanflow = ((recipe or {}).get(section) or {} for section in sections)
    if "lora" in trained.files:
        added = {"sha256": trained.files["lora"]}
    else:
        added = {key: lora[key] for key in ("rank", "alpha")} if lora.get("rank") else None

    def said(section: str, key: str) -> Any:
        return recipe and recipe.get(section, {}).get(key)

    return {
        "name": said("model", "name"),
        "token_mixer": trained.model.config.token_mixer,
        "seed": said("run", "seed"),
        "run": recipe and shown(trained.folder.parent),
        "images_seen": trained.manifest.get("images_seen"),
        "precision": said("train", "precision"),
        "repa": {key: repa[key] for key in ("encoder", "depth", "weight")} if repa.get("encoder") else None,
        "distill": {key: distill[key] for key in ("select", "control")} if distill.get("teacher") else None,
        "init": init and {"anew": init["anew"]},
        "lora": added,
        "meanflow": {
            "share": meanflow.get("share"),
            "guidance": trained.model.config.trained_guidance,
            "tangent": meanflow.get("tangent"),
            "teacher": meanflow.get("teacher") is not None if meanflow else None,
        }
        if trained.model.config.use_meanflow
        else None,
        "params": count_parameters(trained.model),
    }


def open_guide(
    place: str | Path,
    called: str,
    model: SiTTransformer2DModel,
    codec: dict[str, Any] | None = None,
    classes: Mapping[int, str] | Sequence[str] | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Trained:
    """The guide at `place`, which is taken as `load_trained` takes it, frozen, on the CPU, held against what it guides.

    called: what the guide is called in a message. model: what is to be guided. codec: that of the latents, as a codec
    describes itself. classes: their names by id. None, and a codec that is open: nobody knows, nothing is compared;
    nor is a name that is only the id. dtype: of the weights in memory, as `load_trained` takes it.
    Raises InputError where there is no model, and for other latents, classes, codec or another path than the model's.
    """
    with named(called):
        guide = load_trained(place, dtype)
        guide.model.requires_grad_(False)
        check_guide(guide.model, model)
        check_codec(guide.manifest.get("codec"), codec)
        check_classes(guide.id2label, classes)
    return guide


def check_codec(own: dict[str, Any] | None, wanted: dict[str, Any] | None) -> None:
    """Raise InputError for a guide's codec that is another one than the model's."""
    if key := differing(own, wanted):
        raise InputError(
            f"its latents are of a codec with {key}={own.get(key)}, the model's of one with {key}={wanted.get(key)}; "
            f"{SAME} codec"
        )


def check_classes(own: dict[int, str] | None, wanted: Mapping[int, str] | Sequence[str] | None) -> None:
    """Raise InputError where a guide's classes have other names than the model's, by id."""
    wanted = wanted if isinstance(wanted, Mapping) else dict(enumerate(wanted or ()))
    for label, name in (own or {}).items():
        if str(label) not in (name, stated := wanted.get(label, name)) and stated != name:
            raise InputError(
                f"its class {label} is {name!r}, the model's {stated!r}; {SAME} classes, or, where both mean the same, "
                "a copy of the guide's folder ema/, which names no classes"
            )


def check_weaker(guide: SiTTransformer2DModel, model: SiTTransformer2DModel, called: str) -> None:
    """Raise InputError for a guide of the weights of the model, which would change nothing."""
    own, others = guide.state_dict(), model.state_dict()
    if own.keys() == others.keys() and all(_same(own[name], others[name]) for name in own):
        raise InputError(
            f"{called}: it has the weights of the model itself, and would change nothing; give a weaker one"
        )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers, or one is the other in a narrower dtype."""
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(a.to(narrow), b.to(narrow))
