"""Files of other people's checkpoints -> named tensors on the CPU. Nothing that is read is executed."""

import argparse
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sit_atconv.convert.kinds import WEIGHTS
from sit_atconv.runtime.errors import InputError, check_choice, told
from sit_atconv.runtime.reading import Malformed, parse_json, read_json, read_tensors
from sit_atconv.runtime.weights import INDEX, read_index, weight_files

PICKLES = (".pt", ".pth", ".bin")
WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel and torch.compile put into a name
USUAL_NAMES = ("diffusion_pytorch_model", "model")


@dataclass
class Source:
    """A checkpoint as it was found.

    tensors: by name, without wrappers' prefixes. files: what was read. weights: "ema" or "model", None where
    the file holds one set. args: the training options stored with it. config: config.json of a diffusers folder.
    """

    name: str
    files: list[Path]
    weights: str | None
    tensors: dict[str, torch.Tensor]
    args: dict[str, Any]
    config: dict[str, Any] | None


def read_source(path: str | Path, weights: str | None = None, variant: str | None = None) -> Source:
    """Read a .pt, .pth, .bin or .safetensors file, or a folder of safetensors (sharded, with its index, or one file).

    Of a folder with a config.json it reads what diffusers would load. weights: "ema" or "model" of a file that holds
    both; None is the EMA where there is one. variant: of the weights in a diffusers folder, such as "fp16".
    Raises InputError for a file that is missing, cut, or would need more than tensors, plain values and
    argparse.Namespace; for a container without the weights asked for; for names that are equal without their prefixes.
    """
    path = Path(path)
    if weights is not None:
        check_choice("weights", weights, WEIGHTS)
    if path.is_dir():
        path = path / "transformer" if (path / "model_index.json").is_file() else path  # a diffusers pipeline
        with told(f"checkpoint {str(path)!r}", OSError, InputError):
            config = read_json(path / "config.json") if (path / "config.json").is_file() else None
            files = _files_of(path) if config is None else weight_files(path, variant, pickles=True)
    elif path.is_file():
        config, files = None, [path]
    else:
        raise InputError(f"checkpoint {str(path)!r}: no such file or folder")
    if config is None and variant is not None:
        raise InputError(
            f"variant={variant!r}: {str(path)!r} is no folder of diffusers, which have variants; leave it out"
        )
    content, args = {}, {}
    for file in files:
        if file.suffix == ".safetensors":
            tensors, metadata = read_tensors(file, "checkpoint")
            content.update(tensors)
            with told(f"checkpoint {str(file)!r}: args in its header are not a JSON object", Malformed):
                args.update(parse_json(metadata.get("args", "{}"), "args"))
        elif file.suffix in PICKLES:
            content.update(_read_pickle(file))
        else:
            raise InputError(f"checkpoint {str(file)!r}: the name must end in {', '.join([*PICKLES, '.safetensors'])}")
    which, state, stored = _unpack(str(path), content, weights)
    return Source(path.absolute().name, files, which, _plain_names(str(path), state), {**args, **stored}, config)


def _files_of(folder: Path) -> list[Path]:
    """The files of weights in a folder that is not of diffusers: what its index lists, or the one file there is."""
    for index in _only(folder, INDEX):
        return read_index(index)
    for suffix in (".safetensors", *PICKLES):
        if found := _only(folder, suffix):
            return found
    raise InputError("the folder holds no file of weights")


def _only(folder: Path, suffix: str) -> list[Path]:
    """The one file of that suffix, or the one of a usual name among several; nothing where there is none."""
    found = sorted(folder.glob(f"*{suffix}"))
    usual = [file for file in found if Path(file.name.removesuffix(INDEX)).stem in USUAL_NAMES]
    if len(usual or found) > 1:
        raise InputError(
            f"it holds {[file.name for file in found]}; give a file of weights, or a folder with one of these"
        )
    return usual or found


def _compressed(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about protocols and TorchScript, both refused here
            if (zipped := zipfile.is_zipfile(path)) and _compressed(path):
                raise InputError(
                    f"checkpoint {str(path)!r} was compressed after torch.save, which stores tensors as they are: "
                    "unpack it and pack it without compression (zip -0), or save it again"
                )
            # Mapped, the optimiser's state beside the weights takes no memory.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except Exception as error:  # bytes of any kind: the restricted unpickler fails in every way there is
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise InputError(
                f"checkpoint {str(path)!r} refused, and nothing in it was run: it asks for {wanted[1]}, and only "
                "tensors, plain values and argparse.Namespace are read; save its state dict alone"
            ) from None
        raise InputError(
            f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}): it is cut, damaged, or not what "
            "torch.save makes of tensors and plain values"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {str(path)!r} holds a {type(content).__name__}; a dict of tensors is needed")
    return content


def _unpack(
    path: str, content: dict[str, Any], weights: str | None
) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """(which weights, state dict, args) of a bare state dict or of {"ema": ..., "model": ..., "args": ...}."""
    present = [key for key in WEIGHTS if isinstance(content.get(key), dict)]
    if weights is not None and weights not in present:
        holds = f"holds {' and '.join(present)}" if present else "holds one set of weights"
        raise InputError(f"weights={weights!r}: {path!r} {holds}; leave it out")
    if not present:
        return None, content, {}
    which = weights or present[0]
    args = content.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return which, content[which], args if isinstance(args, dict) else {}


def _plain_names(path: str, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Names without the parts that wrappers put anywhere into them. Raises InputError for what is no plain tensor."""
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"checkpoint {path!r}: {name!r} is a {type(tensor).__name__}; a state dict is needed")
        dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)
        if not dense or tensor.is_meta or not tensor.numel():
            kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            raise InputError(
                f"checkpoint {path!r}: {name!r} is a {kind} tensor {tuple(tensor.shape)} on {tensor.device}; one with "
                "numbers in plain memory is needed"
            )
        plain = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if plain in tensors:
            raise InputError(f"checkpoint {path!r}: two tensors are called {plain!r} once prefixes are stripped")
        tensors[plain] = tensor.detach()
    return tensors
