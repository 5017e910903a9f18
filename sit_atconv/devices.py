"""The device that a command runs on."""

import torch

from sit_atconv.errors import InputError


def resolve_device(name: str) -> torch.device:
    """The torch device of that name, with TF32 off: fp32 means fp32. Raises InputError when it is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what speaks of "the current device", such as events and memory counts, means it
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device
