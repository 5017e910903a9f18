"""How a swapped layer starts: taps fitted to what its attention did, in the form that ATConv can express."""

import copy
import math

import torch

from sit_atconv.layers.atconv import KernelGenerator
from sit_atconv.ops.atconv.reference import shifts

SEEN_BYTES = 2**31  # of what the taps of some heads see of a sample, at most; of one head, if it is more
UNNOTICED = 1e-19  # of a weight, beside a bias of the order of one; in fp16, which does not hold it, its least is that
ROUNDS = 8  # of fitting the taps in space and in time in turn


class TapFit:
    """Least squares over calibration inputs: taps t of a head with sum_k t_k shifted_k(values) next to the targets.

    The taps are those of a kernel of size kernel_size in each of the `dims` dimensions of the grid.
    """

    def __init__(self, heads: int, kernel_size: int, dims: int = 2):
        taps = kernel_size**dims
        self.heads, self.kernel_size = heads, kernel_size
        self.gram = torch.zeros(heads, taps, taps, dtype=torch.float64)
        self.cross = torch.zeros(heads, taps, dtype=torch.float64)

    def add(self, values: torch.Tensor, targets: torch.Tensor, grid: tuple[int, ...]) -> None:
        """values and targets (B, N, heads * d), tokens on the grid; sums are kept in fp64."""
        of_a_head = 8 * self.cross.shape[1] * values[0].numel() // self.heads
        together = max(1, SEEN_BYTES // max(1, of_a_head))
        for pair in zip(values.double().split(1), targets.double().split(1), strict=True):
            parts = (each.unflatten(-1, (self.heads, -1)).split(together, -2) for each in pair)
            for first, (value, target) in enumerate(zip(*parts, strict=True)):
                here = slice(first * together, (first + 1) * together)
                seen = torch.stack(shifts(value.flatten(2).unflatten(1, grid), self.kernel_size))
                seen = seen.flatten(2, -2).unflatten(-1, value.shape[2:])  # (K, 1, N, heads, d)
                self.gram[here] += torch.einsum("kbnhd,lbnhd->hkl", seen, seen).cpu()
                self.cross[here] += torch.einsum("kbnhd,bnhd->hk", seen, target).cpu()

    def taps(self) -> torch.Tensor:
        """(heads, K), the least-norm solution where values leave taps open."""
        return torch.einsum("hkl,hl->hk", torch.linalg.pinv(self.gram, rtol=1e-9, hermitian=True), self.cross)

    def expressible(self, sweeps: int = 50) -> torch.Tensor:
        """The taps (heads, K) of the form g_h u + w that lose least, `kernel_gen` being shared by all channels.

        Starts from the mean and the first singular vector, weighted by how much a head's values weigh, and goes on by
        alternating least squares in the metric of the fit: g given u and w, then u and w given g.
        """
        taps, weight = self.taps(), self.gram.diagonal(dim1=1, dim2=2).mean(1).sqrt()
        weight = weight / weight.sum() if weight.sum() > 0 else torch.full_like(weight, 1 / len(weight))
        w = (weight[:, None] * taps).sum(0)
        left, singular, right = torch.linalg.svd(weight[:, None] * (taps - w), full_matrices=False)
        if singular[0] <= 1e-12 * taps.norm():
            return w.expand_as(taps)
        u, g = right[0], left[:, 0] * singular[0] / weight.clamp_min(1e-12)
        for _ in range(sweeps):
            forms = torch.stack([g, torch.ones_like(g)], 1)  # (heads, 2)
            left_side = torch.einsum("ha,hb,hkl->akbl", forms, forms, self.gram).flatten(2).flatten(0, 1)
            right_side = torch.einsum("ha,hk->ak", forms, self.cross).flatten()
            u, w = (torch.linalg.pinv(left_side, rtol=1e-9, hermitian=True) @ right_side).chunk(2)
            energy = torch.einsum("k,hkl,l->h", u, self.gram, u)
            slope = (self.cross @ u) - torch.einsum("k,hkl,l->h", u, self.gram, w)
            g = torch.where(energy > 0, slope / energy.clamp_min(1e-300), torch.zeros_like(g))
        return g[:, None] * u + w

    def loss(self, taps: torch.Tensor) -> float:
        """What taps (heads, K) lose, less the squares of the targets."""
        return (torch.einsum("hk,hkl,hl->", taps, self.gram, taps) - 2 * (taps * self.cross).sum()).item()

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Taps in space (heads, k * k) and in time (heads, k), of a fit of volumes, whose products lose little: both of
        the form of `expressible`, fitted in turn, each given the other; the best of all rounds.

        A start is the first singular vectors of each head's taps, and the same kernel in time for all heads.
        """
        k = self.kernel_size
        table = self.taps().unflatten(1, (k, k * k))
        own = torch.linalg.svd(table, full_matrices=False)[0][..., 0]
        own = torch.where(own.sum(1, keepdim=True) < 0, -own, own)  # their signs are arbitrary
        shared = torch.linalg.svd(table.transpose(0, 1).flatten(1), full_matrices=False)[0][:, 0]
        found = []
        for time in (own, shared.expand(self.heads, -1)):
            for _ in range(ROUNDS):
                space = self._given(time[:, :, None, None] * torch.eye(k * k, dtype=time.dtype)[None, None])
                time = self._given(space[:, None, :, None] * torch.eye(k, dtype=time.dtype)[None, :, None])
                found.append((self.loss((time[:, :, None] * space[:, None]).flatten(1)), space, time))
        _, space, time = min(found, key=lambda each: each[0])
        sizes = [each.square().mean().sqrt() for each in (space, time)]
        scale = (sizes[0] / sizes[1]).sqrt() if min(sizes) > 0 else 1.0  # alike in size
        return space / scale, time * scale

    def _given(self, products: torch.Tensor) -> torch.Tensor:
        """The best taps (heads, n) of one pass, which the other one makes products (heads, k, k * k, n) of."""
        of, fit = products.flatten(1, 2), copy.copy(self)
        fit.gram = torch.einsum("hka,hkl,hlb->hab", of, self.gram, of)
        fit.cross = torch.einsum("hka,hk->ha", of, self.cross)
        return fit.expressible()


def start_as_box(layer: KernelGenerator) -> None:
    """Start the layer at means over its taps, each pass of it."""
    for part in (layer,) if layer.time is None else (layer, layer.time):
        taps = math.prod(part.sizes)
        set_kernels(part, torch.full((1, taps), 1 / taps, dtype=torch.float64))


def start_as_fitted(layer: KernelGenerator, fit: TapFit) -> None:
    """Start the layer at the taps of the fit that it can express, in one pass or in two."""
    if layer.time is None:
        set_kernels(layer, fit.expressible())
    else:
        for part, taps in zip((layer, layer.time), fit.factors(), strict=True):
            set_kernels(part, taps)


@torch.no_grad()
def set_kernels(layer: KernelGenerator, taps: torch.Tensor) -> None:
    """Start the layer at kernels that do not depend on its input: taps (heads, K) of the form g_h u + w.

    With `kernel_proj` at weights that no sum notices all bins of channel c hold act(b_c) = g_c, and `kernel_gen` maps
    them to g_c (its row sums) + its bias: u and w. Zeros would be divided by themselves where weights are quantised to
    fp8 by the greatest of a row. The part of `kernel_gen` that has row sums of zero does not touch the start
    and lets gradients pass to `kernel_proj`: there tap i follows bin i. Lateral inhibition, which takes the share s of
    the mean away, is undone by s / (1 - s) of the mean.
    """
    channels, count = layer.kernel_proj.out_features, taps.shape[1]
    taps = taps.to(torch.float64).repeat_interleave(channels // taps.shape[0], 0)
    share = layer.difference_control.double().cpu().sigmoid()[:, None]
    taps = taps + share / (1 - share) * taps.mean(1, keepdim=True)
    w = taps.mean(0)
    left, singular, right = torch.linalg.svd(taps - w, full_matrices=False)
    g, u = left[:, 0] * singular[0], right[0]
    span = 2 * g.abs().max().clamp_min(1e-12)  # g is brought into [0.5, 1.5], where the activation can be inverted
    g, u, w = 1 + g / span, span * u, w - span * u
    dtype = torch.finfo(layer.kernel_proj.weight.dtype)
    layer.kernel_proj.weight.fill_(max(UNNOTICED, dtype.tiny * dtype.eps))
    layer.kernel_proj.bias.copy_(_inverse(layer.activation, g))
    rms = taps.square().mean().sqrt()
    layer.kernel_gen.weight.copy_(u[:, None] / count + rms * (torch.eye(count) - 1 / count))
    layer.kernel_gen.bias.copy_(w)


def _inverse(activation, values: torch.Tensor) -> torch.Tensor:
    """Where a GELU or SiLU, which rises from 0 on, takes the values (in fp64): by bisection in [0, 4]."""
    low, high = torch.zeros_like(values), torch.full_like(values, 4.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = activation(middle) < values
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
