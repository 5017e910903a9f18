"""How a swapped layer starts: 3x3 taps fitted to what its attention did, in the form that ATConv can express."""

import math

import torch

from sit_atconv.layers.atconv import KernelGenerator
from sit_atconv.ops.atconv.reference import shifts


class TapFit:
    """Least squares over calibration inputs: taps t of a head with sum_k t_k shifted_k(values) next to the targets."""

    def __init__(self, heads: int, sizes):
        taps = math.prod(sizes)
        self.heads, self.sizes = heads, sizes
        self.gram = torch.zeros(heads, taps, taps, dtype=torch.float64)
        self.cross = torch.zeros(heads, taps, dtype=torch.float64)

    def add(self, values: torch.Tensor, targets: torch.Tensor, grid: tuple[int, int]) -> None:
        """values and targets (B, N, heads * d), tokens on the grid; sums are kept in fp64."""
        for value, target in zip(values.double().split(1), targets.double().split(1), strict=True):
            seen = torch.stack(shifts(value.unflatten(1, grid), self.sizes)).flatten(2, -2)  # (K, 1, N, heads * d)
            seen = seen.unflatten(-1, (self.heads, -1))
            self.gram += torch.einsum("kbnhd,lbnhd->hkl", seen, seen).cpu()
            self.cross += torch.einsum("kbnhd,bnhd->hk", seen, target.unflatten(-1, (self.heads, -1))).cpu()

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


@torch.no_grad()
def set_kernels(layer: KernelGenerator, taps: torch.Tensor) -> None:
    """Start the layer at kernels that do not depend on its input: taps (heads, K) of the form g_h u + w.

    With `kernel_proj` at zero weight all bins of channel c hold act(b_c) = g_c, and `kernel_gen` maps them to
    g_c (its row sums) + its bias: u and w. The part of `kernel_gen` that has row sums of zero does not touch the start
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
    layer.kernel_proj.weight.zero_()
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
