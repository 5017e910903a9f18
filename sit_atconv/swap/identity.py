"""What tells which model it is that was swapped."""

import hashlib
import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn


def teacher_of(model: nn.Module) -> dict:
    """What identifies an unswapped model: class, name or path, the revision if these tell it, and a fingerprint."""
    config = getattr(model, "config", None) or getattr(model, "pretrained_cfg", None) or {}
    if hasattr(config, "name_or_path"):  # of transformers
        config = {"_name_or_path": config.name_or_path}
    path, hub_id = (str(config.get(key) or "") for key in ("_name_or_path", "hf_hub_id"))
    # The commit that a folder of the hub's cache is of, as a pipeline loads its models, or of timm's NAME@REVISION.
    found = re.search(r"[\\/]snapshots[\\/]([0-9a-f]{40})(?:[\\/]|$)", path)
    return {
        "class": type(model).__name__,
        "name": path or hub_id or None,
        "revision": found[1] if found else hub_id.partition("@")[2] or None,
        "fingerprint": fingerprint(model.state_dict()),
    }


def fingerprint(state: Mapping) -> str:
    """SHA-256 over name, shape and some 4,096 evenly spaced values of every tensor, as bf16.

    It tells revisions apart in little time, and is the same for fp32 and bf16 copies of the same weights. Quantised
    weights count by the tensors that they are made of, and what is no tensor by its representation.
    """
    digest = hashlib.sha256()
    for name, tensor in (each for entry in sorted(state.items()) for each in _plain(*entry)):
        if not isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor!r} ".encode())
            continue
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str, value) -> Iterator[tuple[str, object]]:
    """An entry of a state dict as plain tensors, and what is none: of quantised weights the tensors within them."""
    if isinstance(value, tuple | list):
        for index, each in enumerate(value):
            yield from _plain(f"{name}.{index}", each)
    elif not isinstance(value, torch.Tensor):
        yield name, value
    elif type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # a subclass around others
        inner = {key: each for key, each in vars(value).items() if isinstance(each, torch.Tensor)}
        if hasattr(value, "__tensor_flatten__"):
            inner = {key: getattr(value, key) for key in value.__tensor_flatten__()[0]}
        yield name, (type(value).__name__, tuple(value.shape))
        for key in sorted(inner):
            yield from _plain(f"{name}.{key}", inner[key])
    else:
        yield name, value.dequantize() if value.is_quantized else value
