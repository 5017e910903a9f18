"""From uint8 images to the features of a classifier of one's own: what `attnet:RUN` names."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms import MaybeToTensor
from torch import nn
from torchvision.transforms import Resize
from torchvision.transforms.functional import resize

import sit_atconv.models.attnet  # noqa: F401 (registers the family with timm)
from sit_atconv.classification.evaluation import EVALS, evaluations
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.reading import read_config
from sit_atconv.runtime.vit import CONFIG, WEIGHTS, load_folder
from sit_atconv.scoring.extractor import Extractor
from sit_atconv.training.checkpoint import MANIFEST, is_in_checkpoint, step_folders, stored_model
from sit_atconv.training.folder import BEGUN

PROTOCOL = "attnet-1"
REMEDY = "give the folder of a run of `sit-atconv classify`"
CLASSES_FORM = {"label_names?": ([str], None), "_class_name?": str}


class Classifier(nn.Module):
    """uint8 images (B, C, H, W) -> their streams: pool (B, D), what goes into the last linear layer, and logits
    (B, classes).

    Pixels go through the steps of the model's evaluation, which timm makes of its data configuration, on tensors: the
    short side is resized (bicubic, antialiased), the middle cut out, / 255, - mean, / std. As in Pillow, which the
    evaluation resizes with, rows are resized before columns, and both are rounded to uint8. Where nothing is resized,
    that is the evaluation's own input to the bit; else one pixel in a hundred, or fewer, rounds to the next level. Grey
    images are repeated for a model of RGB images.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        config = resolve_model_data_config(model)
        self.channels = config["input_size"][0]
        self.steps = [*map(_on_tensors, create_transform(**config).transforms)]

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        images = pixels.expand(-1, self.channels, -1, -1)
        for step in self.steps:
            images = step(images)
        maps = self.model.forward_features(images)
        return {"pool": self.model.forward_head(maps, pre_logits=True), "logits": self.model.forward_head(maps)}


def _on_tensors(step: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    """A step of an evaluation, for uint8 images (B, C, H, W) until they are in [0, 1]."""
    if isinstance(step, MaybeToTensor):
        return _in_unit_range
    return partial(_resized, step) if isinstance(step, Resize) else step


def _resized(step: Resize, pixels: torch.Tensor) -> torch.Tensor:
    height, width = step(pixels[:1]).shape[-2:]
    for size in ((pixels.shape[-2], width), (height, width)):
        pixels = resize(pixels, size, step.interpolation, antialias=True)
    return pixels


def _in_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 255


def open_classifier(place: str, device: torch.device) -> Extractor:
    """The extractor of a classifier.

    place: a run of `sit-atconv classify` (the EMA of its newest checkpoint), a checkpoint of one (its EMA), the ema/ or
    model/ folder of one, or a folder that timm's `save_for_hf` wrote elsewhere. Files of a checkpoint are compared with
    their SHA-256. Raises InputError for what is none of these.
    """
    where, path = f"extractor 'attnet:{place}'", Path(place)
    if not path.is_dir():
        raise InputError(f"{where}: no such folder; {REMEDY}")
    step, accuracy, size, stored = None, None, None, None
    folder = path
    if not (path / CONFIG).is_file() or is_in_checkpoint(path):
        if not (path / CONFIG).is_file() and not (path / MANIFEST).is_file() and not step_folders(path):
            if any((path / name).exists() for name in BEGUN):
                raise InputError(f"{where}: a run without a checkpoint; go on with it until it has one, or {REMEDY}")
            raise InputError(f"{where}: neither a run nor a model; {REMEDY}")
        stored = stored_model(path)
        folder, step = stored.folder / stored.which, stored.manifest.get("step")
    with told(f"{where} cannot be read", InputError, OSError):
        config = read_config(folder / CONFIG, CLASSES_FORM)
    if (name := config.get("_class_name")) is not None:
        raise InputError(f"{where}: {name}, a generator of images and no classifier; {REMEDY}")
    model, file = load_folder(folder, where)
    if not model.num_classes:
        raise InputError(f"{where}: a model without classes; {REMEDY}")
    if stored is not None and (stored.folder.parent / EVALS).is_file():
        row = next((row for row in evaluations(stored.folder.parent) if row["step"] == step), {})
        size, top1 = row.get("image_size"), row.get(f"{stored.which}_top1")
        accuracy = None if top1 is None else top1 / 100
    features = Classifier(model)
    if features.channels not in (1, 3):
        raise InputError(f"{where}: a model of images of {features.channels} channels; {REMEDY}, of 1 or 3")
    digest = sha256(file) if stored is None else stored.files[f"{stored.which}/{WEIGHTS}"]
    names = config.get("label_names") or [*map(str, range(model.num_classes))]
    return Extractor(
        f"attnet-{digest[:8]}", PROTOCOL, features, {"pool": model.head_hidden_size, "logits": model.num_classes},
        device, spec=f"attnet:{folder}", weights_sha256=digest, model=model.pretrained_cfg["architecture"],
        channels=features.channels, image_size=size, class_names=list(names), heldout_accuracy=accuracy,
        input=_told(model),
    )  # fmt: skip


def _told(model: nn.Module) -> str:
    """What becomes of the pixels, in words."""
    config = resolve_model_data_config(model)
    mean, std = (", ".join(f"{value:g}" for value in config[key]) for key in ("mean", "std"))
    height, width = config["input_size"][1:]
    return (
        f"{config['interpolation']}, antialiased, the middle (share {config['crop_pct']:g}), to {height} x {width} px; "
        f"x / 255; mean {mean}; std {std}"
    )
