"""The operator as torch's grouped convolution, a call for each sample, since kernels differ; shapes as in `reference`.

(H, W, C) is a channels-last image as it lies, so nothing is transposed, and oneDNN has loops for that layout. So for
volumes, but for the gradient of the kernels: there oneDNN takes a call for each frame of the kernel, with the frames of
the sample as a batch (fp32, 8x16x16, C = 384, on a Xeon core: 0.8 ms, where one call for all took 10).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sit_atconv.ops.atconv.reference import sides


def dynamic_depthwise_conv(
    v: torch.Tensor, kernels: torch.Tensor, kernel_size: int | Sequence[int] | None = None
) -> torch.Tensor:
    """v (B, *grid, C), kernels (B, K, C) -> (B, *grid, C), contiguous."""
    batch, *grid, channels = v.shape
    sizes = sides(kernel_size, len(grid), kernels.shape[1])
    images, weights = v.movedim(-1, 1), kernels.transpose(1, 2).reshape(batch, channels, 1, *sizes)
    convolution = F.conv2d if len(grid) == 2 else F.conv3d
    padding = [size // 2 for size in sizes]
    with torch.autocast(v.device.type, enabled=False):  # the result has the dtype of v there too
        samples = [
            convolution(images[b : b + 1], weights[b], padding=padding, groups=channels) for b in range(batch)
        ]  # fmt: skip
    if batch == 1:
        return samples[0].movedim(1, -1).contiguous()
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for target, sample in zip(y.movedim(-1, 1), samples, strict=True):
        target.copy_(sample[0])
    return y


def grad_v(grad_y: torch.Tensor, kernels: torch.Tensor, kernel_size: int | Sequence[int] | None = None) -> torch.Tensor:
    """The same with tap K - 1 - t in the place of t: grad_y (B, *grid, C), kernels (B, K, C) -> (B, *grid, C)."""
    return dynamic_depthwise_conv(grad_y, kernels.flip(1), kernel_size)


def grad_kernels(v: torch.Tensor, grad_y: torch.Tensor, kernel_size: int | Sequence[int]) -> torch.Tensor:
    """dK[b, i k + j, c] = sum_hw grad_y[b, h, w, c] * v[b, h + i - k // 2, w + j - k // 2, c]: (B, K, C)."""
    sizes = sides(kernel_size, v.ndim - 2)
    if len(sizes) == 2:  # a volume of one frame
        v, grad_y, sizes = v.unsqueeze(1), grad_y.unsqueeze(1), (1, *sizes)
    batch, frames, _, _, channels = v.shape
    depth, *sizes = sizes
    images, upstream = v.movedim(-1, 2), grad_y.movedim(-1, 2)
    gradient = torch.zeros((batch, depth, sizes[0] * sizes[1], channels), dtype=v.dtype, device=v.device)
    for b in range(batch):
        for dt in range(depth):
            by = dt - depth // 2
            first, last = max(0, -by), min(frames, frames - by)
            if first < last:
                one = torch.nn.grad.conv2d_weight(
                    images[b, first + by : last + by], (channels, 1, *sizes), upstream[b, first:last],
                    padding=[size // 2 for size in sizes], groups=channels,
                )  # fmt: skip
                gradient[b, dt] = one.flatten(1).t()
    return gradient.flatten(1, 2)
