"""The dtypes that commands name."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OF_CACHES = ("fp16", "fp32")  # of the moments in a cache of latents


def dtype_of(name: str) -> "torch.dtype":
    """The torch dtype of that name, one of DTYPES."""
    import torch

    return getattr(torch, DTYPES[name])
