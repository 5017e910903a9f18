"""Swapped layers in a file of their own, a delta to the model that they were swapped into."""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from torch import nn

from sit_atconv.runtime.compat.torch import uncompiled
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.files import new_path, tensors_made_here
from sit_atconv.runtime.reading import Malformed, parse_json, read_tensors
from sit_atconv.swap.handle import AttentionSwap
from sit_atconv.swap.identity import fingerprint
from sit_atconv.swap.stored import swap_as_stored
from sit_atconv.swap.wrapping import check_unwrapped, model_of

KEY = "sit_atconv_delta"
FILE = "atconv-delta.safetensors"  # of a delta in a folder, or in a repository of the hub


def save_delta(model_or_pipeline, path: str | Path, force: bool = False) -> None:
    """Write the weights of the swapped layers to `path`, a safetensors file, for `load_delta`.

    Its metadata hold the settings of the swap, what identifies the original model, and a fingerprint of the weights
    outside of the layers: those are not in the file. A delta that is there is replaced. force: what is there and is no
    delta is set aside.
    Raises InputError where no layer is swapped, where the model carries what it had not at the swap (adapters, an
    IP-Adapter, quantised or sharded weights), and where the disk does not take the file.
    """
    model = uncompiled(model_of(model_or_pipeline)[1])
    record = getattr(model, "_swap_record", None)
    if record is None:
        raise InputError(f"{type(model).__name__} has no swapped layers to save; swap_attention(model) first")
    check_unwrapped(model)
    layers = record.config["layers"]
    if gone := [name for name in layers if name not in dict(model.named_modules())]:
        raise InputError(f"{gone[0]} was cut off since the swap, and a delta is for the whole model; save before that")
    inside = {name: each for name, each in model.state_dict().items() if _is_in(name, layers)}
    wrapped = next((name for name in inside if ".base_layer." in name), None)
    if wrapped is not None:
        raise InputError(f"{wrapped}: an adapter is on a swapped layer; fuse or unload it first")
    if change := record.change(model):
        raise InputError(f"{change}, and a delta fits the model of the swap alone; save it before, or undo that")
    stored = {**record.config, "rest": fingerprint(_rest(model, layers))}
    tensors = {name: each.contiguous() for name, each in inside.items()}
    with new_path(path, "delta", force, tensors_made_here(KEY)) as unfinished:
        # A single key: safetensors writes several in an order that changes from process to process.
        save_file(tensors, unfinished, metadata={KEY: json.dumps(stored)})


def load_delta(model_or_pipeline, path: str | Path) -> AttentionSwap:
    """Swap the layers that a delta names in the original model, in place, and give them the delta's weights.

    path: the file; or a folder, or a repository of the Hugging Face hub as OWNER/NAME or OWNER/NAME@REVISION, that has
    it as "atconv-delta.safetensors".
    What comes back is as of `swap_attention`, nothing having been calibrated: its report tells parameters alone.
    Raises InputError, the model untouched, for a file that is damaged, no delta, or of another version, one that the
    hub does not give, and for a model other than the delta's: in class, in weights, or with swapped layers already.
    """
    path = _file(path)
    stored, tensors = read_delta(path)
    rest = stored.pop("rest", None)
    _, model = model_of(model_or_pipeline)

    def check(teacher: dict) -> None:
        wanted = stored["teacher"]
        if any(teacher[name] != wanted[name] for name in ("class", "fingerprint")):
            raise InputError(
                f"{str(path)!r} is for {_named(wanted)}, and this model is {_named(teacher)}: load it onto the weights "
                "that it was made from (in fp32 or bf16, before any training, adapter or conversion)"
            )
        if fingerprint(_rest(model, stored["layers"])) != rest:
            raise InputError(
                f"{str(path)!r} was saved from a model trained outside of its swapped layers too, which a delta does "
                "not hold; store such a model whole, by save_pretrained"
            )

    return swap_as_stored(model_or_pipeline, stored, tensors, check)


def _file(source: str | Path) -> Path:
    """Where the file of a delta is; one of the hub is fetched."""
    path = Path(source)
    if path.is_dir():
        return path / FILE
    repository, _, revision = str(source).partition("@")
    if path.exists() or path.suffix == ".safetensors" or repository.count("/") != 1:
        return path
    about = f"delta {str(source)!r} is no file or folder here, and the hub does not give {FILE} of such a repository"
    with told(about, Exception, remedy="download it, and give its path"):  # what the hub raises has no base of its own
        return Path(hf_hub_download(repository, FILE, revision=revision or None))


def _is_in(tensor: str, layers: list[str]) -> bool:
    return tensor.startswith(tuple(f"{name}." for name in layers))


def _rest(model: nn.Module, layers: list[str]) -> dict:
    return {name: tensor for name, tensor in model.state_dict().items() if not _is_in(name, layers)}


def _named(teacher: dict) -> str:
    return (
        f"{teacher['class']} {teacher['name'] or 'without a name'} (revision {teacher['revision'] or 'unknown'}, "
        f"weights {teacher['fingerprint'][:12]})"
    )


def read_delta(path: Path) -> tuple[dict, dict]:
    """(what a delta says of its swap, its tensors). Raises InputError where the file is no whole delta."""
    if not path.is_file():
        raise InputError(f"delta {str(path)!r}: no such file; give one that save_delta wrote")
    remedy = "write it again by save_delta"
    tensors, metadata = read_tensors(path, "delta", remedy)
    if KEY not in metadata:
        raise InputError(f"delta {str(path)!r} was not written by save_delta; give one that was")
    with told(f"delta {str(path)!r} is cut or damaged", Malformed, remedy=remedy):
        return parse_json(metadata[KEY], KEY), tensors
