"""From tensors to pictures: the one rule of rounding."""

import torch
from PIL import Image

UINT8_RULE = "trunc(clamp(127.5 * x + 128, 0, 255))"


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8, by the common rule (ADM, DiT, SiT): 127.5 x + 128, clamped, truncated."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def to_pil(image: torch.Tensor) -> Image.Image:
    """uint8 (1 or 3, H, W) -> a grey or RGB image."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
