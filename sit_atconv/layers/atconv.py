"""Attentive Convolution as a layer over the token grid (arXiv 2510.20092)."""

import math
import reprlib

import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv.layers.linear import is_plain, linear
from sit_atconv.ops.atconv import POOLS, choose_backend, dynamic_depthwise_conv, inhibit, on_grid, pool_tokens, taps
from sit_atconv.ops.atconv.taps import ACTIVATIONS, INHIBITIONS
from sit_atconv.runtime.compat.torch import is_exporting, is_parameter
from sit_atconv.runtime.errors import InputError, check_choice

MOST_KERNEL = 127  # beyond any grid that a kernel was tried on; the parameters grow with its fourth power
MOST_TAPS = MOST_KERNEL**2
ROUTINGS = ("adaptive", "static")
VOLUMES = ("full", "factored")  # a swap takes the first where it is told none


class TapLinear(nn.Linear):
    """The linear over the taps, (..., C, K) -> (..., C, K), views of rows (..., K, C): the channels stay the last in
    memory, where everything beside it has them.

    In eager it is a product over the rows, which takes half the time of the linear with the activation before and the
    inhibition after it. Under torch.compile it is sums, of which Inductor makes loops in one kernel with both. Measured
    on CPUs for K = 9; not for larger kernels. On CUDA `taps.tap_kernels` takes its place, with both.
    A quantised weight may know the product of a linear alone, and gets it; so does a graph of torch.export or a trace.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        if is_exporting() or torch.jit.is_tracing() or type(self.weight) is not nn.Parameter:
            return super().forward(x)
        rows = x.mT
        if torch.compiler.is_compiling():
            y = (self.weight[:, :, None] * rows.unsqueeze(-3)).sum(-2)
        else:
            y = self.weight.expand(*rows.shape[:-2], -1, -1) @ rows
        return (y if self.bias is None else y + self.bias[:, None].to(y.dtype)).mT


TAP_FORWARD = TapLinear.forward


class KernelGenerator(nn.Module):
    """The kernels of ATConv from its tokens, for the layers that convolve with them.

    x (B, H, W, dim) -> (B, K, channels), K = kernel_size ** 2 taps. Of volumes x (B, T, H, W, dim): kernel_size is
    (kt, kh, kw), such as (3, 3, 3), and K its product.

        K1 = kernel_gen(act(kernel_proj(pool(x))))       adaptive routing, a kernel per sample and channel
        K2 = K1 - sigmoid(difference_control) * mean(K1)  lateral inhibition, mean over the K taps

    The paper pools after `kernel_proj`; both are linear and the weights of a mean sum to one, so pooling first is the
    same function on K rows instead of H W. `kernel_gen` mixes the taps and is shared by all channels.

    activation: gelu_tanh (SiT), silu (REPA), gelu (AttNet). pool: raster (public checkpoints) or grid (k x k cells).
    routing "static": the kernels are a parameter (K, channels) and do not depend on x.
    inhibition "full": the whole mean is subtracted; "none": nothing is.
    time: of volumes, the size of a second kernel, (time, 1, 1), for a pass of its own after the first; it has a
    generator of its own, with the same options.
    Raises ValueError for an even kernel size or an unknown choice.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        activation: str = "gelu_tanh",
        bias: bool = True,
        pool: str = "raster",
        routing: str = "adaptive",
        inhibition: str = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        time: int | None = None,
    ):
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("pool", pool, POOLS)
        check_choice("routing", routing, ROUTINGS)
        check_choice("inhibition", inhibition, INHIBITIONS)
        self.sizes = _sizes(kernel_size)  # in each dimension of the grid
        self.kernel_size, self.pool, self.routing, self.inhibition = kernel_size, pool, routing, inhibition
        self.activation = ACTIVATIONS[activation]
        taps, factory = math.prod(self.sizes), {"device": device, "dtype": dtype}
        if routing == "adaptive":
            self.kernel_proj = nn.Linear(dim, channels, bias=bias, **factory)
            self.kernel_gen = TapLinear(taps, taps, bias=bias, **factory)
        else:
            self.static_kernel = nn.Parameter(torch.empty(taps, channels, **factory))
        if inhibition == "learned":
            self.difference_control = nn.Parameter(torch.empty(channels, **factory))
        options = activation, bias, pool, routing, inhibition
        self.time = None if time is None else KernelGenerator(dim, channels, (time, 1, 1), *options, device, dtype)

    def reset_parameters(self) -> None:
        """Draw the starting weights: xavier-uniform linears; static kernels as torch starts a depthwise convolution."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.routing == "static":
            most = 1 / math.sqrt(math.prod(self.sizes))
            nn.init.uniform_(self.static_kernel, -most, most)
        if self.inhibition == "learned":
            nn.init.zeros_(self.difference_control)
        if self.time is not None:
            self.time.reset_parameters()

    def convolve(self, x: torch.Tensor, v: torch.Tensor, kernels: torch.Tensor | None = None) -> torch.Tensor:
        """The values v (B, *grid, channels), convolved with the kernels that x (B, *grid, dim) calls for: K2 * v, and
        after that in time, where there is a second generator. The result has the shape and dtype of v.

        kernels: those of x, where they were made before: it pays to make them before v, which is then in the cache.
        """
        kernels = self.kernels(x) if kernels is None else kernels
        y = dynamic_depthwise_conv(v, kernels.to(v.dtype), kernel_size=self.sizes)
        return y if self.time is None else self.time.convolve(x, y)

    def kernels(self, x: torch.Tensor) -> torch.Tensor:
        """The kernels that x (B, *grid, C) calls for, after inhibition: (B, K, C).

        In the dtype that torch gives the product and the inhibition; where one launch makes them (`taps.takes`), in
        that of `kernel_proj`'s result, which under autocast is the narrower one.
        """
        if self.routing == "adaptive":
            projected = linear(self.kernel_proj, pool_tokens(x, self.sizes, self.pool))
            if (kernels := self._by_operator(projected)) is not None:
                return kernels
            taps_last = self.activation(projected).transpose(1, 2)
            kernels = self.kernel_gen(taps_last).transpose(1, 2)
        else:
            kernels = self.static_kernel.expand(x.shape[0], -1, -1)
        if self.inhibition == "none":
            return kernels
        return inhibit(kernels, self.difference_control.sigmoid() if self.inhibition == "learned" else 1.0)

    def _by_operator(self, projected: torch.Tensor) -> torch.Tensor | None:
        """The kernels of what `kernel_proj` gives, (B, K, C), by `taps.tap_kernels`: in the dtype of `projected`.

        None where the operator does not run, or where `kernel_gen` is more than a product over the taps.
        """
        if not taps.takes(projected):
            return None
        gen, control = self.kernel_gen, self.difference_control if self.inhibition == "learned" else None
        activation = next((name for name, function in ACTIVATIONS.items() if function is self.activation), None)
        if (
            activation is None
            or not is_plain(gen, TapLinear, TAP_FORWARD)
            or not all(each is None or is_parameter(each) for each in (gen.bias, control))
            # Torch refuses to mix dtypes outside autocast.
            or (gen.weight.dtype != projected.dtype and not torch.is_autocast_enabled(projected.device.type))
        ):
            return None
        return taps.tap_kernels(projected, gen.weight, gen.bias, control, activation, self.inhibition)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, pool={self.pool}, routing={self.routing}, inhibition={self.inhibition}"


def _sizes(kernel_size: int | tuple[int, int, int]) -> tuple[int, ...]:
    """The size in each dimension; a number is that of a square. Raises InputError for what is no kernel size."""
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    odd = all(isinstance(size, int) and size in range(1, MOST_KERNEL + 1, 2) for size in sizes)
    if (isinstance(kernel_size, tuple) and len(sizes) != 3) or not odd or math.prod(sizes) > MOST_TAPS:
        raise InputError(
            f"kernel_size={reprlib.repr(kernel_size)}: choose an odd size up to {MOST_KERNEL}, such as 3; or for "
            f"volumes three of them, such as (3, 3, 3), with at most {MOST_TAPS} taps"
        )
    return sizes


class ATConv(KernelGenerator):
    """3x3 Attentive Convolution, x (B, H, W, C) -> (B, H, W, C).

        out = proj(K2 * x_proj(x))                        depthwise convolution, zero padding

    with the kernels K2 and the options of `KernelGenerator`, C = dim channels. Tokens in raster order come with their
    grid: `layer(tokens, grid=(H, W))`, (B, N, C) -> (B, N, C).
    volume: takes x (B, T, H, W, C), or tokens with grid=(T, H, W). "full": one pass of kernel_size ** 3 taps;
    "factored": one of kernel_size ** 2 taps in space, and then one of kernel_size taps in time, whose parameters are
    `time.*`. Both read the frames before and after.
    Linears start xavier-uniform with bias 0, `difference_control` at 0 (half of the mean is subtracted).
    1x1 convolution weights (C, C, 1, 1), as in the REPA and AttNet checkpoints, load as they are.
    Raises ValueError for an even kernel size, an unknown choice, another width than dim (as of an image (B, C, H, W)),
    or a grid that does not hold N tokens.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        activation: str = "gelu_tanh",
        bias: bool = True,
        pool: str = "raster",
        routing: str = "adaptive",
        inhibition: str = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        volume: str | None = None,
    ):
        sizes, time = volume_sizes(kernel_size, volume)
        super().__init__(dim, dim, sizes, activation, bias, pool, routing, inhibition, device, dtype, time)
        self.dim = dim
        self.x_proj = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(flatten_pointwise_weights)

    def forward(self, x: torch.Tensor, grid: tuple[int, ...] | None = None) -> torch.Tensor:
        if x.shape[-1] != self.dim:
            raise _misfit(tuple(x.shape), self.dim, len(self.sizes))
        if grid is not None:
            return self.forward(on_grid(x, grid)).flatten(1, len(grid))
        kernels = self.kernels(x)  # first: the convolution then finds the output of x_proj in the cache
        return linear(self.proj, self.convolve(x, linear(self.x_proj, x), kernels))


def volume_sizes(kernel_size: int, volume: str | None) -> tuple[int | tuple[int, int, int], int | None]:
    """kernel_size and time of `KernelGenerator` for grids (None), and for volumes by one pass ("full") or two
    ("factored"). Raises InputError for another volume, and for a kernel_size that is no number."""
    if not isinstance(kernel_size, int):
        raise InputError(f"kernel_size={reprlib.repr(kernel_size)}: choose an odd whole number, such as 3")
    if volume is None:
        return kernel_size, None
    check_choice("volume", volume, VOLUMES)
    return ((kernel_size,) * 3, None) if volume == "full" else ((1, kernel_size, kernel_size), kernel_size)


def _misfit(shape: tuple[int, ...], dim: int, dims: int) -> InputError:
    """The error for tokens of another width than the layer's, which takes grids of so many dimensions."""
    remedy = "make the layer as wide as the tokens, or give it others"
    if len(shape) == 2 + dims and shape[1] == dim:
        remedy = f"the channels come last: x.permute(0, {', '.join(map(str, range(2, 2 + dims)))}, 1)"
    elif len(shape) == 3 and shape[1] == dim:
        remedy = "the channels come last: x.transpose(1, 2)"
    grid = "T, H, W" if dims == 3 else "H, W"
    return InputError(
        f"tokens of shape {shape} for an ATConv of dim={dim}: give (B, {grid}, {dim}), or (B, N, {dim}) with "
        f"grid=({grid}); {remedy}"
    )


def flatten_pointwise_weights(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Hook before a module loads its state dict: 1x1 convolutions (C, D, 1, 1) become the weights of its linears."""
    for name, child in module.named_children():
        weight = state_dict.get(f"{prefix}{name}.weight")
        if isinstance(child, nn.Linear) and weight is not None and weight.ndim == 4:
            state_dict[f"{prefix}{name}.weight"] = weight.flatten(1)


def check_backend(model: nn.Module, device: torch.device) -> None:
    """Raise InputError where the environment asks for a backend that the model's ATConv layers, if it has any, cannot
    run on that device: at the start, not in the first network evaluation."""
    sizes = [max(module.sizes) for module in model.modules() if isinstance(module, ATConv)]
    if sizes:
        choose_backend(torch.empty(1, 1, 1, 1, device=device), kernel_size=max(sizes))
