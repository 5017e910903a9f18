"""What is measured: a trained SiT, a trained classifier or a model of timm, and the images that it is shown."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset

import sit_atconv.models.attnet  # noqa: F401 (registers the family with timm)
from sit_atconv import config
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.classification.samples import open_held_out
from sit_atconv.config import load_recipe, make_recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.digits import Digits
from sit_atconv.data.held_out import split
from sit_atconv.data.order import Shuffled
from sit_atconv.flow.path import PATHS
from sit_atconv.latents.codecs import check_same_codec, open_codec, reopen_codec
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError, option, said
from sit_atconv.runtime.files import shown
from sit_atconv.runtime.reading import Malformed, read_config
from sit_atconv.runtime.vit import CONFIG, load_folder
from sit_atconv.sampling.sampling import check_labels
from sit_atconv.sampling.settings import check_path
from sit_atconv.training import checkpoint


@dataclass
class Target:
    """A model with the images that it is shown, ready to be run.

    images (N, C, H, W): what the model takes; of a SiT latents, from which its input is made at a time t with noise of
    the same shape. labels (N,): of a SiT alone. facts: what a record says of it.
    """

    name: str
    model: nn.Module
    facts: dict[str, Any]
    images: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    labels: torch.Tensor | None = None
    noise: torch.Tensor | None = None

    @property
    def has_times(self) -> bool:
        return self.facts["kind"] == "SiT"

    def inputs(self, part: slice, t: float | None, device: torch.device) -> torch.Tensor:
        """What the model is given of these samples: the images, or x_t."""
        if t is None:
            return self.images[part].to(device)
        path, time = PATHS[self.model.config.path](), torch.tensor(t)
        return (path.alpha(time) * self.images[part] + path.sigma(time) * self.noise[part]).to(device)

    def run(self, inputs: torch.Tensor, part: slice, t: float | None) -> None:
        """A pass of the model."""
        if t is None:
            self.model(inputs)
        else:
            self.model(inputs, t, self.labels[part].to(inputs.device), return_dict=False)

    def grid(self) -> tuple[int, int] | None:
        """Of the tokens, as timm's patch embedding makes them of the images; None where the model has none."""
        embedding = getattr(self.model, "patch_embed", None)
        if not hasattr(embedding, "dynamic_feat_size"):
            return None
        return embedding.dynamic_feat_size(tuple(self.images.shape[2:]))


def load(target: str, weights: str | None = None, seed: int = 0) -> Target:
    """The model that a word on the command line means: a folder, or a name of timm.

    A folder is what `checkpoint.load_trained` takes, or a run of `classify`, a checkpoint of it, or its ema/.
    weights: a safetensors file, for a name of timm; without it the model is as drawn anew from `seed`.
    Raises InputError where it is neither, or the weights do not fit.
    """
    path = Path(target)
    if path.is_dir():
        if weights is not None:
            raise InputError(f"{option('weights', weights)}: {target!r} has its own weights; leave it out")
        classifier = _classifier_folder(path)
        return _load_sit(path) if classifier is None else _load_classifier(classifier)
    if not timm.is_model(target):
        near = difflib.get_close_matches(target, timm.list_models(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; give a run, a checkpoint, or a name such as attnet_t2"
        raise InputError(f"{target!r} is neither a folder nor a model of timm{hint}")
    return _load_timm(target, weights, seed)


def _load_sit(path: Path) -> Target:
    trained = checkpoint.load_trained(path)
    check_path(trained.model)
    facts = {
        "kind": "SiT", "folder": shown(trained.folder), "which": trained.which, "step": trained.manifest["step"],
        "sha256": trained.files, "recipe": trained.manifest.get("recipe"), "codec": trained.manifest["codec"],
    }  # fmt: skip
    return Target(_name(path), trained.model, facts)


def _name(path: Path) -> str:
    """Of a run, whichever of its folders is named."""
    path = path.absolute()
    names = [each for each in (path, *path.parents) if not each.name.startswith("step-")]
    return names[1].name if path.name in ("ema", "model") and path.parent.name.startswith("step-") else names[0].name


def _classifier_folder(path: Path) -> Path | None:
    """The folder with timm's config.json that a run, a checkpoint or the folder itself has; None where it has none."""
    newest = (checkpoint.step_folders(path) or [path])[-1]
    for folder in (path, newest / "ema"):
        try:
            if "architecture" in read_config(folder / CONFIG):
                return folder
        except (OSError, Malformed):
            continue
    return None


def _load_classifier(folder: Path) -> Target:
    facts = {"kind": "classifier", "folder": shown(folder)}
    if folder.parent.name.startswith("step-"):
        manifest = checkpoint.read_manifest(folder.parent, under=f"{folder.name}/")
        files = {name: digest for name, digest in manifest["files"].items() if name.startswith(f"{folder.name}/")}
        facts |= {"step": manifest["step"], "which": folder.name, "recipe": manifest.get("recipe"), "sha256": files}
    model, _ = load_folder(folder.absolute(), f"target {str(folder)!r}")
    return Target(_name(folder), model.eval(), facts)


def _load_timm(name: str, weights: str | None, seed: int) -> Target:
    torch.manual_seed(seed)
    if weights is None:
        return Target(name, timm.create_model(name).eval(), {"kind": "classifier", "weights": f"random, seed {seed}"})
    if not (weights.endswith(".safetensors") and Path(weights).is_file()):
        raise InputError(f"{option('weights', weights)}: no such safetensors file; nothing else is read")
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": weights})
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{option('weights', weights)}: these do not fit {name}: {error}") from None
    facts = {"kind": "classifier", "weights": shown(Path(weights)), "sha256": checkpoint.sha256(Path(weights))}
    return Target(name, model.eval(), facts)


def show(target: Target, data: str | None, num: int, seed: int, vae: str | None = None) -> Target:
    """The target with `num` images, taken at random by `seed`, its labels and noise; the facts say which.

    data: "digits", a folder of images in folders by class, or a recipe; None is the recipe of the target's manifest.
    Of digits the held-out ones are taken, of a classifier's recipe the held-out images, of a SiT's those that
    `data.held_out` holds out, or else all that it names.
    vae: where the autoencoder of a SiT lies, if not where it was.
    Raises InputError where no data are named, or they do not fit.
    """
    if data is None and target.facts.get("recipe") is None:
        raise InputError(
            f"{option('data')} is missing: {target.name} says nothing of its own data; give digits, or a folder"
        )
    loaded = _show_sit(target, data, num, seed, vae) if target.has_times else _show_classifier(target, data, num, seed)
    facts = {**target.facts, "data": data if data is not None else "that of the recipe"}
    return Target(target.name, target.model, facts, *loaded)


def _recipe_of(target: Target, data: str | None, schema: type) -> Any:
    if data is None:
        return make_recipe(target.facts["recipe"], schema, stored=True)
    return load_recipe(data, (), schema)


def _show_sit(target: Target, data: str | None, num: int, seed: int, vae: str | None) -> tuple:
    model = target.model
    size, channels = model.latent_size, model.config.in_channels
    if data is None or (data != "digits" and not Path(data).is_dir()):
        recipe = _recipe_of(target, data, config.Recipe)
        recipe.latents.vae = vae or recipe.latents.vae
        dataset = Digits("test", recipe.data.channels) if recipe.data.kind == "digits" else open_dataset(recipe.data)
        codec = open_codec(recipe.latents, dataset)
        if recipe.data.kind != "digits":
            dataset = split(dataset, recipe.data.held_out)[1] or dataset
        check_same_codec(target.facts["codec"], codec.describe())
    else:
        codec = reopen_codec(target.facts["codec"], vae, batch_size=8)
        factor = 2 ** (len(codec.vae.config.block_out_channels) - 1) if codec.draws_posterior else 1
        wanted = config.Data(kind="imagefolder", root=data, image_size=size[0] * factor) if data != "digits" else None
        dataset = Digits("test") if wanted is None else open_dataset(wanted)
    shape = codec.latent_shape(dataset.channels, dataset.image_size)
    if shape != (channels, *size):
        raise InputError(
            f"{option('data')} gives latents of {shape}, and {target.name} takes {(channels, *size)}; give others"
        )
    chosen = _choose(dataset, num, seed)
    items = [dataset[(index, False)] for index in chosen]
    labels = torch.tensor([label for _, label in items])
    check_labels(labels.tolist(), model.config.num_classes)
    indices = np.stack([np.zeros(num, int), chosen], 1)
    images = torch.stack([image for image, _ in items])
    posterior = (draws.normal_batch(shape, seed, Stream.POSTERIOR, indices),) if codec.draws_posterior else ()
    with torch.no_grad():
        latents = codec.encode(images, *posterior)
    return latents, labels, draws.normal_batch(shape, seed, Stream.NOISE, indices)


def _show_classifier(target: Target, data: str | None, num: int, seed: int) -> tuple:
    size = None
    if data == "digits":
        dataset = Digits("test")
    elif data is not None and Path(data).is_dir():
        dataset = open_dataset(config.Data(kind="imagefolder", root=data, image_size=1))  # pictures are whole
    else:
        recipe = _recipe_of(target, data, ClassifierRecipe)
        dataset, size = open_held_out(recipe.data), recipe.data.image_size
    settings = timm.data.resolve_model_data_config(target.model)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"
    pictures = [dataset.picture(index, size)[0].convert(mode) for index in _choose(dataset, num, seed)]
    try:
        transform = timm.data.create_transform(**settings)
        return (torch.stack([transform(picture) for picture in pictures]),)
    except Exception as error:  # options of any kind: timm and Pillow refuse them in every way there is
        raise InputError(f"{target.name}: images cannot be made ready as its config.json says: {said(error)}") from None


def _choose(dataset: Dataset, num: int, seed: int) -> list[int]:
    if len(dataset) < num:
        raise InputError(f"{option('num', num)}: there are {len(dataset)} images; ask for no more")
    if getattr(dataset, "in_order", False):
        return list(range(num))
    order = Shuffled(len(dataset), seed)
    return [order.index(position) for position in range(num)]
