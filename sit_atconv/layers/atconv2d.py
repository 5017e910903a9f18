"""ATConv as a layer of convolutional networks: on maps, with the arguments of torch's Conv2d."""

import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv.layers.atconv import ATConv
from sit_atconv.layers.linear import linear
from sit_atconv.ops.atconv.grouped import grouped_convolution
from sit_atconv.runtime.errors import InputError


class ATConv2d(ATConv):
    """ATConv of a map (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).

    x_proj and the kernels work on in_channels, and proj maps to out_channels. stride: the result is that of stride 1 at
    every stride-th row and column, from the first on; proj, which sees each position alone, runs on these only.
    The other options are those of `ATConv`; the activation is the exact GELU, as in AttNet.
    In the channels-last memory format nothing is copied. TorchScript gets plain torch operators in the place of the
    library's own, so a scripted model needs no library to run.
    Raises InputError (a ValueError) for a stride below 1, a map of other channels, and as `ATConv` does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        activation: str = "gelu",
        bias: bool = True,
        pool: str = "raster",
        routing: str = "adaptive",
        inhibition: str = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not isinstance(stride, int) or stride < 1:
            raise InputError(f"stride={stride!r}: give a whole number, 1 or more")
        super().__init__(in_channels, kernel_size, activation, bias, pool, routing, inhibition, device, dtype)
        self.stride = stride
        if out_channels != in_channels:
            self.proj = nn.Linear(in_channels, out_channels, bias=bias, device=device, dtype=dtype)
            self.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self._portable(x)
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise InputError(
                f"a map of shape {tuple(x.shape)} for an ATConv2d of in_channels={self.dim}: give (B, {self.dim}, H, W)"
            )
        tokens = x.permute(0, 2, 3, 1)
        kernels = self.kernels(tokens)  # first: see `ATConv.forward`
        mixed = self.convolve(tokens, linear(self.x_proj, tokens), kernels)
        return linear(self.proj, mixed[:, :: self.stride, :: self.stride]).permute(0, 3, 1, 2)

    def _portable(self, x: torch.Tensor) -> torch.Tensor:
        k = self.kernel_size
        if hasattr(self, "static_kernel"):
            kernels = self.static_kernel.expand(len(x), -1, -1).transpose(1, 2)
        else:
            if self.pool == "raster":
                pooled = F.adaptive_avg_pool1d(x.flatten(2), k * k)
            else:
                pooled = F.adaptive_avg_pool2d(x, [k, k]).flatten(2)
            hidden = self.activation(self.kernel_proj(pooled.transpose(1, 2)))
            kernels = self.kernel_gen(hidden.transpose(1, 2))
        if hasattr(self, "difference_control"):
            kernels = kernels - self.difference_control.sigmoid()[:, None] * kernels.mean(2, keepdim=True)
        elif self.inhibition == "full":
            kernels = kernels - kernels.mean(2, keepdim=True)
        y = grouped_convolution(self.x_proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), kernels)
        return self.proj(y.permute(0, 2, 3, 1)[:, :: self.stride, :: self.stride]).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}"
