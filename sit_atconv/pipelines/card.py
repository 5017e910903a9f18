"""The model card of an exported pipeline: what the model is, how it is used, where it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import torch

from sit_atconv import config
from sit_atconv.models.cost import count_macs, count_parameters
from sit_atconv.models.sit import PRESETS, SiTTransformer2DModel, mixer_names
from sit_atconv.pipelines.pipeline_sit import SiTPipeline
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import library_versions
from sit_atconv.runtime.markdown import markdown_table, plain
from sit_atconv.runtime.reading import COUNT, POSITIVE, fault_of
from sit_atconv.sampling.settings import Sampling
from sit_atconv.training import ema
from sit_atconv.training.checkpoint import INIT_FORM

PICTURE = "picture.png"  # beside a card that shows one
HEADER = """---
license: {license}
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- class-conditional-image-generation
- flow-matching
- sit
- {mixer}
---
"""


@dataclass(frozen=True)
class Shown:
    """What a card shows beside the model. picture: a PNG, None without one; caption: what is seen. scores: Markdown.
    lines: of a shell, that fetch and repeat. repo: the name on the Hub, None where it is not known."""

    picture: bytes | None = None
    caption: str = ""
    scores: str = ""
    lines: Sequence[str] = ()
    repo: str | None = None

    def at(self, repo: str) -> "Shown":
        """The same, of what goes to a repository."""
        return replace(self, repo=repo)


def model_card(
    pipeline: SiTPipeline, manifest: dict[str, Any], dtype: torch.dtype, name: str, license: str, libraries: set[str],
    shown: Shown | None = None,
) -> str:  # fmt: skip
    """README.md of an export, Markdown under the Hub's YAML.

    manifest: a checkpoint's, from which the facts of training come, or what there is of one. dtype: of the weights on
    disk. license: of the weights. libraries: what the exported code imports. shown: what else there is to show.
    """
    shown = shown or Shown()
    model = pipeline.transformer
    mixer = model.config.token_mixer
    sections = {
        "The model": _describe(pipeline, dtype),
        "Scores": shown.scores,
        "Use": _usage(pipeline, dtype, libraries, shown.repo),
        "With the package sit_atconv": shell(shown.lines),
        "Training": _training(manifest, model.config.trained_guidance),
        "Versions": ", ".join(f"{library} {version}" for library, version in library_versions().items()) + ".",
        "Limits": _limits(pipeline, license),
    }
    header = HEADER.format(license=license, mixer=mixer if isinstance(mixer, str) else "hybrid")
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items() if text)
    picture = "" if shown.picture is None else f"\n\n![{plain(shown.caption)}]({PICTURE})\n\n{plain(shown.caption)}"
    return f"{header}\n# {plain(name)}\n\n{_summary(model)}{picture}\n\n{body}"


def shell(lines: Sequence[str]) -> str:
    """A block of command lines; "" without any."""
    return "\n".join(["```bash", *lines, "```"]) if lines else ""


def _summary(model: SiTTransformer2DModel) -> str:
    mixers = set(mixer_names(model.config.token_mixer, model.config.depth))
    tokens = "self-attention"
    if "atconv" in mixers:
        place = "in place of" if mixers == {"atconv"} else "beside"
        tokens = (
            f"3x3 Attentive Convolution ([arXiv 2510.20092](https://arxiv.org/abs/2510.20092)) {place} self-attention"
        )
    config = dict(model.config)
    preset = next((name for name, shape in PRESETS.items() if shape.items() <= config.items()), "a SiT")
    return (
        f"A class-conditional image generator: {preset}, a flow-matching diffusion transformer "
        f"(SiT, [arXiv 2401.08740](https://arxiv.org/abs/2401.08740)) with {tokens}."
    )


def _describe(pipeline: SiTPipeline, dtype: torch.dtype) -> str:
    model = pipeline.transformer
    config, (height, width) = model.config, model.latent_size
    size = f"{config.in_channels} x {height} x {width}"
    if pipeline.vae is None:
        space = f"pixels, {size}" if config.in_channels in (1, 3) else f"latents, {size}; no autoencoder comes with it"
    else:
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        space = f"latents, {size}, of images of {height * factor} x {width * factor} pixels; the autoencoder is in vae/"
    classes = f"{config.num_classes}" + (" and a null class" if model.null_label is not None else ", no null class")
    rows = {
        "parameters": f"{count_parameters(model):,}, stored in {str(dtype).removeprefix('torch.')}",
        "GMACs per network evaluation": f"{count_macs(model) / 1e9:.4g}",
        "depth, width, patch": f"{config.depth}, {config.hidden_size}, {config.patch_size}",
        "token mixer": _mixers(model),
        "generates": space,
        "classes": classes,
        "path, prediction": f"{config.path}, {config.prediction}",
    }
    if config.use_meanflow:
        learned = "" if config.trained_guidance == 1 else f"; guidance trained in: {config.trained_guidance:g}"
        rows["MeanFlow"] = (
            f"average velocity ([arXiv 2505.13447](https://arxiv.org/abs/2505.13447)); steps 1, 2 or 4{learned}"
        )
    if pipeline.guide is not None:
        mixers = _mixers(pipeline.guide)
        rows["guide"] = (
            f"{count_parameters(pipeline.guide):,} parameters, {mixers}, in guide/: guidance is away from this weaker "
            "model ([arXiv 2406.02507](https://arxiv.org/abs/2406.02507))"
        )
    return markdown_table(["", ""], rows.items())


def _mixers(model: SiTTransformer2DModel) -> str:
    mixer = model.config.token_mixer
    return mixer if isinstance(mixer, str) else ", ".join(mixer)


def _usage(pipeline: SiTPipeline, dtype: torch.dtype, libraries: set[str], repo: str | None) -> str:
    model = pipeline.transformer
    label = min(1, model.config.num_classes - 1)
    loading = "" if dtype == torch.float32 else f", dtype={dtype}"
    guided = model.null_label is not None or pipeline.guide is not None
    fitting = Sampling(guidance_scale=None if guided else 1.0).fitted(model.config.use_meanflow)
    picture = pipeline.vae is not None or model.config.in_channels in (1, 3)
    call = (
        f"class_labels=[{label}], num_inference_steps={fitting.steps}, guidance_scale={fitting.guidance_scale}, "
        "generator=generator"
    )
    output = "the velocity data - noise"
    if model.config.use_meanflow:
        output = "the average velocity from t to timestep_r; without timestep_r, the velocity at t"
    draw = (
        f'image = pipe({call}).images[0]\nimage.save("image.png")'
        if picture
        else f'latents = pipe({call}, output_type="latent").images'
    )
    place = 'folder = "."  # this folder, or its id on the Hub' if repo is None else f'folder = "{repo}"'
    needed = libraries | {"accelerate", "safetensors"}
    install = " ".join(sorted({"PIL": "pillow"}.get(library, library) for library in needed))
    return f"""    pip install {install}

```python
import torch
from diffusers import DiffusionPipeline

{place}
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True{loading})
generator = torch.Generator().manual_seed(0)
{draw}
```

The transformer alone, t = 0 being noise, t = 1 data, and its output {output}:

```python
from diffusers import AutoModel

transformer = AutoModel.from_pretrained(folder, subfolder="transformer", trust_remote_code=True{loading})
```

`trust_remote_code=True` runs `pipeline.py` and the Python file in `transformer/`: read them first. They need nothing
beside the libraries above; with the package `sit_atconv` installed, its `SiTTransformer2DModel.from_pretrained` loads
`transformer/` too."""


# What a card tells of a checkpoint's training.
TOLD = {
    "recipe": {
        "train": {"batch_size": POSITIVE, "lr": float, "precision": str}, "data": {"kind": str}, "ema": dict,
        "lora?": {"rank": (POSITIVE, None), "alpha": (float, None)},
        "meanflow?": {"share": (float, None), "tangent": (str, None), "teacher": (str, None)},
    },
    "data": {"num_images": object, "classes": list}, "step": COUNT, "images_seen": COUNT,
    "versions": {"sit_atconv": str, "torch": str, "diffusers": str}, "init?": (INIT_FORM, None),
}  # fmt: skip


def _training(manifest: dict[str, Any], guidance: float) -> str:
    """What a checkpoint's manifest says, as a list; paths are of another machine and stay out. guidance: in the
    weights."""
    if "recipe" not in manifest:
        return ""
    if fault := fault_of(manifest, TOLD):
        raise InputError(f"the checkpoint's manifest.json: {fault}; give another checkpoint")
    recipe, data, versions = manifest["recipe"], manifest["data"], manifest["versions"]
    train = recipe["train"]
    held_out = f", {data['held_out']} more held out" if "held_out" in data else ""
    trained_with = ", ".join(f"{name} {versions[name]}" for name in ("sit_atconv", "torch", "diffusers"))
    facts = {
        "steps": f"{manifest['step']}, batch {train['batch_size']}, {manifest['images_seen']} images seen",
        "data": f"{recipe['data']['kind']}, {data['num_images']} images{held_out}, {len(data['classes'])} classes",
        "optimiser": f"AdamW, learning rate {train['lr']:g}",
        "precision": train["precision"],
        "weights": f"EMA, {ema.describe(config.make_recipe(recipe['ema'], config.Ema, stored=True))}",
        "began from": _origin(manifest.get("init")),
        "LoRA": _lora(recipe.get("lora")),
        "MeanFlow": _meanflow(recipe.get("meanflow"), guidance),
        "trained with": trained_with,
    }
    return "\n".join(f"- {name}: {plain(value)}" for name, value in facts.items() if value)


def _lora(lora: dict[str, Any] | None) -> str:
    """What was trained in the place of all weights; "" where they were."""
    if not lora or lora["rank"] is None:
        return ""
    return f"rank {lora['rank']}, alpha {lora['alpha']:g}, added to the weights that it began from"


def _meanflow(meanflow: dict[str, Any] | None, guidance: float) -> str:
    """How average velocities were learned; "" where they were not."""
    if not meanflow or meanflow["share"] is None:
        return ""
    gave = "the samples" if meanflow["teacher"] is None else "a teacher"
    times = f"two times in a share of {meanflow['share']:g}"
    return f"{times}, tangent {meanflow['tangent']}, guidance {guidance:g}, velocity of {gave}"


def _origin(init: dict[str, Any] | None) -> str:
    """Where the first weights came from, by the last names of its place; "" where they were drawn."""
    if init is None:
        return ""
    place, step = PurePath(init["from"]["source"]), init["from"]["step"]
    name = place.name if step is None else place.parent.parent.name
    told = [name, *([] if step is None else [f"step {step}"]), init["from"]["which"], f"SHA-256 {init['sha256']}"]
    anew = f"; drawn anew: {', '.join(init['anew'])}" if init["anew"] else ""
    return f"{', '.join(filter(None, told))}{anew}"


def _limits(pipeline: SiTPipeline, license: str) -> str:
    model = pipeline.transformer
    named, last = "names or " if pipeline.config.id2label else "", model.config.num_classes - 1
    limits = [
        f"Classes are {named}numbers from 0 to {last}; there is no text prompt.",
        "The model knows what it was trained on; its samples carry that data's biases.",
        "`pipe.save_pretrained` leaves this code out; `sit-atconv export` puts it in again.",
    ]
    if model.null_label is None and pipeline.guide is None:
        limits.insert(1, "Trained without class dropout: no guidance (`guidance_scale=1`).")
    elif (trained := model.config.trained_guidance) != 1:
        limits.insert(1, f"Guidance of {trained:g} is in the weights: no other (`guidance_scale=1`).")
    if model.config.use_meanflow:
        limits.append("The scheduler is FlowMatchEulerDiscreteScheduler; no other follows average velocities.")
    if license == "unknown":
        limits.append("The code is under the MIT licence; nobody said what licence the weights are under.")
    return "\n".join(f"- {limit}" for limit in limits)
