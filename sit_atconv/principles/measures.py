"""What is measured of a layer: functions of tensors alone.

Kernels are (S, T, K, C): S samples, T times, K taps, C channels (of attention, heads). All sums are in float64.
"""

import math

import torch


def routing(kernels: torch.Tensor) -> dict[str, float | None]:
    """How much kernels (S, T, K, C) differ between samples, and between times, as shares of their mean square.

        over_samples = mean_tkc Var_s(kernels) / mean(kernels^2)
        over_times = mean_skc Var_t(kernels) / mean(kernels^2)

    Var divides by the number of values, so both are in [0, 1]: 0 for kernels that are all the same, exactly, and 1 for
    kernels whose mean over the samples (times) is 0. None over a single sample (time), or where all kernels are 0.
    """
    return {"over_samples": _varying_share(kernels, 0), "over_times": _varying_share(kernels, 1)}


def _varying_share(kernels: torch.Tensor, dim: int) -> float | None:
    kernels = kernels.double()
    power = kernels.square().mean().item()
    if kernels.shape[dim] == 1 or power == 0:
        return None
    # From the first one on: equal kernels give 0 with no rounding, which a mean of equal numbers need not.
    shifted = kernels - kernels.narrow(dim, 0, 1)
    variance = shifted.square().mean(dim) - shifted.mean(dim).square()
    return variance.clamp(min=0).mean().item() / power


def mean_share(kernels: torch.Tensor) -> float | None:
    """Root mean square of the kernels' means over their taps, over that of all taps; kernels (S, T, K, C).

    In [0, 1]: 0 for kernels that sum to 0, 1 for box kernels. None where all kernels are 0.
    """
    kernels = kernels.double()
    power = kernels.square().mean().item()
    return None if power == 0 else math.sqrt(kernels.mean(2).square().mean().item() / power)


def inhibition(kernels: torch.Tensor, factors: torch.Tensor) -> dict[str, float | list[float] | None]:
    """What lateral inhibition takes from kernels (S, T, K, C), which are before it, with factors (C,) in [0, 1].

    mean, std, min, max and quantiles (0.05, 0.25, 0.5, 0.75, 0.95) of the factors; mean_before and mean_after: the
    `mean_share` of kernels and of kernels - factors * mean_K(kernels), whose mean is (1 - factors) mean_K(kernels).
    """
    kernels, factors = kernels.double(), factors.double()
    means = kernels.mean(2)
    left = (1 - factors) * means  # not the mean of the difference, whose rounding leaves something at factor 1
    power = (kernels.square().mean(2) - means.square() + left.square()).mean().item()
    quantiles = torch.quantile(factors, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
    return {
        "mean": factors.mean().item(),
        "std": factors.std(correction=0).item(),
        "min": factors.min().item(),
        "max": factors.max().item(),
        "quantiles": quantiles.tolist(),
        "mean_before": mean_share(kernels),
        "mean_after": None if power <= 0 else math.sqrt(left.square().mean().item() / power),
    }


def cosines(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cosines of all pairs of different columns: vectors (..., D, C) -> their mean and their root mean square, (...).

    In the mean a pair and its mirror image cancel; the root mean square, `rms`, tells neither from the other. A column
    of zeros has cosine 0. NaN for a single column. With unit vectors u_i, sum_ij u_i u_j = |sum_i u_i|^2 and
    sum_ij (u_i u_j)^2 = |sum_i u_i u_i^T|^2 need no C x C table.
    """
    units = torch.nn.functional.normalize(vectors.double(), dim=-2, eps=1e-300)
    present = units.square().sum((-2, -1))  # 1 for each column but zeros, whose pairs with themselves go
    pairs = units.shape[-1] * (units.shape[-1] - 1) or math.nan
    square = (units @ units.mT).square().sum((-2, -1)) - present
    return {
        "mean": (units.sum(-1).square().sum(-1) - present) / pairs,
        "rms": (square.clamp(min=0) / pairs).sqrt(),
    }


def cosines_of_products(products: torch.Tensor) -> dict[str, torch.Tensor]:
    """`cosines` of vectors (D, C) from their inner products (C, C) alone."""
    products = products.double()
    lengths = products.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0)
    between = (inverse[:, None] * products * inverse).fill_diagonal_(0)
    pairs = len(products) * (len(products) - 1) or math.nan
    return {"mean": between.sum() / pairs, "rms": (between.square().sum() / pairs).sqrt()}


def effective_rank(singular_values: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of the singular values (..., n) over their sum (Roy and Vetterli 2007): (...), 1 to n.

    0 where all are 0.
    """
    total = singular_values.double().sum(-1, keepdim=True)
    shares = singular_values.double() / torch.where(total > 0, total, 1)
    rank = torch.special.entr(shares).sum(-1).exp()
    return torch.where(total[..., 0] > 0, rank, 0)


def kernel_redundancy(kernels: torch.Tensor) -> dict[str, float | None]:
    """How alike the kernels (S, T, K, C) of a layer's channels are, within a sample and time, mean over both.

    cosine, cosine_rms: `cosines` of the channels' kernels. rank: `effective_rank` of the matrix (K, C), at most
    min(K, C), which is rank_limit.
    """
    kernels = kernels.flatten(0, 1).double()
    alike = cosines(kernels)
    return {
        "cosine": _or_none(alike["mean"].mean().item()),
        "cosine_rms": _or_none(alike["rms"].mean().item()),
        "rank": effective_rank(torch.linalg.svdvals(kernels)).mean().item(),
        "rank_limit": min(kernels.shape[1:]),
    }


def channel_redundancy(products: torch.Tensor, places: int) -> dict[str, float | None]:
    """How alike the channels of a feature map are, from their inner products (C, C) over positions and samples.

    places: how many of those there are. cosine, cosine_rms: of all pairs. rank: `effective_rank` of the matrix
    (places, C), at most min(places, C), which is rank_limit.
    """
    eigenvalues = torch.linalg.eigvalsh(products.double())
    floor = eigenvalues.max() * len(products) * torch.finfo(torch.float64).eps  # what is under it is rounding
    singular = torch.where(eigenvalues > floor, eigenvalues, 0).sqrt()
    alike = cosines_of_products(products)
    return {
        "cosine": _or_none(alike["mean"].item()),
        "cosine_rms": _or_none(alike["rms"].item()),
        "rank": effective_rank(singular).item(),
        "rank_limit": min(places, len(products)),
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def offset_moments(
    probabilities: torch.Tensor, grid: tuple[int, int], size: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as a kernel: mean and mean square, over queries, of the probability at each offset within size x size.

    probabilities (B, heads, N, N) of N = H * W queries and keys in raster order -> both (B, size^2, heads), taps in
    raster order: tap (i, j) is over p[query (h, w), key (h + i - size // 2, w + j - size // 2)], for the queries whose
    key is on the grid; 0 where no query's is. The means are how much of each neighbour a depthwise convolution would
    read; the squares tell how far the queries differ, see `over_positions`.
    """
    (height, width), reach = grid, size // 2
    maps = probabilities.unflatten(3, grid).unflatten(2, grid)  # (B, heads, h, w, h', w')
    means, squares = [], []
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            count = max(height - abs(down), 0) * max(width - abs(right), 0)
            found = maps.diagonal(down, 2, 4).diagonal(right, 2, 3) if count else maps.new_zeros(*maps.shape[:2], 1, 1)
            means.append(found.mean((2, 3)))
            squares.append(found.square().mean((2, 3)))
    return torch.stack(means, 1), torch.stack(squares, 1)


def over_positions(means: torch.Tensor, squares: torch.Tensor) -> float | None:
    """How much attention differs between queries: mean(squares - means^2) / mean(squares), of `offset_moments`.

    In [0, 1]; samples may come in any order in either. A convolution, static or not, has 0.
    """
    power, common = squares.double().mean().item(), means.double().square().mean().item()
    return None if power == 0 else max(power - common, 0.0) / power


def share_within(taps: torch.Tensor, grid: tuple[int, int]) -> float:
    """The share of all attention that stays within the window, from its means (..., size^2, heads) at the offsets."""
    size = math.isqrt(taps.shape[-2])
    offsets = range(-(size // 2), size // 2 + 1)
    counts = [max(grid[0] - abs(down), 0) * max(grid[1] - abs(right), 0) for down in offsets for right in offsets]
    weights = torch.tensor(counts, dtype=torch.float64) / (grid[0] * grid[1])
    return (taps.double() * weights[:, None]).sum(-2).mean().item()


def receptive_field(output: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Effective receptive field of the central position (H // 2, W // 2) of a feature map (Luo et al. 2016).

    output (B, C, H, W), computed from inputs (B, C', H', W'), which require a gradient -> (B, H', W'): the square of
    d sum_c output[b, c, H // 2, W // 2] / d inputs[b], summed over the channels of the inputs. The graph is kept.
    """
    height, width = output.shape[2:]
    centre = output[:, :, height // 2, width // 2].sum()
    (gradient,) = torch.autograd.grad(centre, inputs, retain_graph=True)
    return gradient.double().square().sum(1)


def mean_field(fields: torch.Tensor) -> torch.Tensor:
    """Mean of receptive fields (B, H, W), each scaled to the sum 1 so that all count alike: (H, W).

    Fields that are all 0 are left out; 0 where all are.
    """
    fields = fields.double()
    totals = fields.sum((1, 2), keepdim=True)
    used = totals[:, 0, 0] > 0
    return (fields[used] / totals[used]).sum(0) / max(int(used.sum()), 1)


def radius(field: torch.Tensor, centre: tuple[float, float], share: float) -> float | None:
    """The smallest radius about `centre` (row, column) within which a field (H, W) >= 0 has `share` of its sum.

    In pixels, between their middles; centre 0, 0 is the middle of the first pixel. None for a field of zeros.
    """
    field = field.double()
    if field.sum() == 0:
        return None
    rows, columns = (torch.arange(length, dtype=torch.float64, device=field.device) for length in field.shape)
    distance = torch.hypot(rows[:, None] - centre[0], columns[None] - centre[1]).flatten()
    distance, order = distance.sort()
    within = field.flatten()[order].cumsum(0)
    return distance[int((within < share * within[-1] * (1 - 1e-9)).sum())].item()


def centroid(field: torch.Tensor) -> tuple[float, float]:
    """Centre of mass (row, column) of a field (H, W) >= 0, in pixels; the middle of one of zeros.

    Where a position of a feature map looks depends on strides and paddings: at stride 32 on 3 x 3 convolutions with a
    padding of 1 it is 15.5 pixels beside the middle of its cell. The field says it itself.
    """
    field = field.double()
    mass = field if field.sum() > 0 else torch.ones_like(field)
    rows, columns = (torch.arange(length, dtype=torch.float64, device=field.device) for length in field.shape)
    return tuple(((mass.sum(1 - side) * at).sum() / mass.sum()).item() for side, at in enumerate((rows, columns)))
