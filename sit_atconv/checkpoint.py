"""Checkpoints: a folder that describes itself, is written atomically, and is proved whole before it is used.

    step-0001000/
        ema/, model/          config.json + safetensors, each loadable with from_pretrained
        optimizer.safetensors "<parameter name>.<state name>"
        trainer.json          step, images seen, gradient scaler
        manifest.json         recipe, codec, library versions, SHA-256 of every other file

A folder without a valid manifest is not a checkpoint.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sit_atconv.errors import InputError
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.version import __version__

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def library_versions() -> dict[str, str]:
    """Versions of what decides a result."""
    names = ("torch", "torchvision", "diffusers", "accelerate", "numpy", "safetensors")
    return {
        "sit_atconv": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    return load_file(path)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state by parameter name."""
    return {
        f"{name}.{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave. Raises KeyError when the parameters are not the same."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition(".")
        states.setdefault(name, {})[field] = value
    if states.keys() != set(names.values()):
        raise KeyError(f"optimiser state of other parameters: {sorted(states.keys() ^ set(names.values()))[:3]}")
    # Through load_state_dict, so that the optimiser places every tensor as it wants it.
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: states[name] for index, name in enumerate(order)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(
    run: Path,
    step: int,
    model: SiTTransformer2DModel,
    ema: SiTTransformer2DModel,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    recipe: dict[str, Any],
    codec: dict[str, Any],
) -> Path:
    """Write `run`/step-XXXXXXX, whole or not at all; call on the main process alone.

    Raises FloatingPointError, and writes nothing, when a weight is not finite.
    """
    for name, tensor in [*model.state_dict().items(), *ema.state_dict().items()]:
        if not tensor.isfinite().all():
            raise FloatingPointError(f"step {step}: {name} is not finite; no checkpoint written")
    final = run / f"step-{step:07d}"
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    ema.save_pretrained(temporary / "ema")
    model.save_pretrained(temporary / "model")
    save_file(optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
    (temporary / "trainer.json").write_text(json.dumps({"step": step, **trainer}, indent=1))
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "images_seen": trainer["images_seen"],
        "recipe": recipe,
        "codec": codec,
        "versions": library_versions(),
        "files": {path.relative_to(temporary).as_posix(): sha256(path) for path in files},
    }
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if final.exists():  # left invalid by a fault: a valid one would have been resumed from
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(run)
    return final


def prune(run: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints, and what an interrupted save left."""
    for path in [*step_folders(run)[:-keep_last], *run.glob("step-*.tmp")]:
        shutil.rmtree(path)


def step_folders(run: Path) -> list[Path]:
    """The folders that claim to be checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit())


def read_manifest(folder: Path, under: str = "") -> dict[str, Any]:
    """The manifest of a checkpoint, after comparing the SHA-256 of its files (those under `under`) with it.

    Raises InputError naming the first thing that is missing or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = manifest["format_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{str(folder)!r} is not a checkpoint: no valid {MANIFEST}") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{str(folder)!r} has checkpoint format {version}; this library reads {FORMAT_VERSION}")
    for name, digest in files.items():
        if name.startswith(under):
            path = folder / name
            if not path.is_file():
                raise InputError(f"checkpoint {str(folder)!r} is damaged: {name} is missing")
            if sha256(path) != digest:
                raise InputError(f"checkpoint {str(folder)!r} is damaged: {name} was changed or cut")
    return manifest


def newest_valid(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that is whole, with its manifest; a damaged one is passed over with a warning."""
    for folder in reversed(step_folders(run)):
        try:
            return folder, read_manifest(folder)
        except InputError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    return None


@dataclass
class Trained:
    """A trained model for sampling: the checkpoint, which of its models ("ema" or "model"), and its files' SHA-256."""

    folder: Path
    which: str
    manifest: dict[str, Any]
    model: SiTTransformer2DModel
    files: dict[str, str]


def load_trained(path: str | Path, dtype: torch.dtype = torch.float32) -> Trained:
    """The EMA model of a run folder (its newest checkpoint) or a checkpoint, or the one in an ema/ or model/ folder.

    dtype: of the weights in memory; on disk they are fp32.
    Raises InputError when there is none or it is damaged. Nothing in it is executed: JSON and safetensors alone.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise InputError(f"checkpoint {str(path)!r}: no such folder; give a run, a step-... folder or its ema/ folder")
    if path.name in ("ema", "model") and (path / "config.json").is_file():
        folder, which = path.parent, path.name
    else:
        folder, which = (step_folders(path) or [path])[-1], "ema"
    manifest = read_manifest(folder, under=f"{which}/")
    try:
        model = SiTTransformer2DModel.from_pretrained(folder / which, torch_dtype=dtype)
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {str(folder)!r} cannot be read: {str(error).splitlines()[0]}") from None
    weights = {name: digest for name, digest in manifest["files"].items() if name.startswith(f"{which}/")}
    return Trained(folder, which, manifest, model.eval(), weights)


def load_weights(folder: Path, into: SiTTransformer2DModel) -> None:
    """Load `folder` (ema/ or model/) into a model, strictly."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_tensors(file))
    into.load_state_dict(tensors, strict=True)
