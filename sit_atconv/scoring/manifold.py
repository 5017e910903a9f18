"""Precision, recall, density and coverage: how samples and real images lie among each other's nearest neighbours."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from sit_atconv.runtime.console import Progress
from sit_atconv.scoring.moments import checked_pair

NEAREST = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
TILE = 2048  # images of a side whose distances are there at once (32 MiB)

Values = dict[str, tuple[float, list[float]]]


def manifold_scores(
    real: np.ndarray, fake: np.ndarray, group_ids: np.ndarray, device: torch.device | str = "cpu",
    progress: bool = False,
) -> Values:  # fmt: skip
    """{name: (of all samples, [without each group of samples])} for real features (M, D) and those of samples (N, D).

    The ball of an image reaches to its k-th nearest neighbour among its own kind, itself left out.
    precision: share of samples in the ball of any real image; recall: share of real images in the ball of any sample
    (Kynkäänniemi 2019, as in ADM's evaluator: k = 3, the ball is closed).
    density: mean number of real balls that a sample lies in, over k; coverage: share of real images with a sample in
    their ball (Naeem 2020, as in its code: k = 5, the ball is open).

    group_ids (N,): as `counted_off` gives them. The values without a group are exactly those of the others: a
    sample's ball grows to the k-th nearest of those left.

    Distances are Euclidean, from |a|^2 + |b|^2 - 2 ab in float64: no TF32 touches them, and a squared distance differs
    from that of the differences by at most 1e-14 (|a|^2 + |b|^2), however near the images are. (ADM's evaluator takes
    them in fp16 unless one overflows.) Tiles bound the memory: 32 MiB of distances, one copy of the samples.

    Raises ValueError where images are too few, shapes differ or a number is not finite.
    """
    groups = int(group_ids.max()) + 1
    real, fake = checked_pair(real, fake)
    left = len(fake) - (int(np.bincount(group_ids).max()) if groups > 1 else 0)
    closed, opened = NEAREST["precision"], NEAREST["density"]
    if min(len(real), left) <= opened:
        raise ValueError(f"{len(real)} real images, {len(fake)} samples: nearest neighbours need more than {opened}")
    # Sorted by group, each group is one run of columns.
    order = np.argsort(group_ids, kind="stable")
    fake = fake[torch.from_numpy(order)]
    bounds = np.searchsorted(group_ids[order], np.arange(groups + 1))
    runs = [slice(first, last) for first, last in pairwise(bounds)]
    whole, cases = [slice(0, len(real))], range(groups + 1 if groups > 1 else 1)  # case 0: all; case g + 1: without g

    with Progress(total=len(real) * 2 + len(fake), desc="neighbours", unit="image", disable=not progress) as bar:
        radii = _nearest(real, whole, opened, device, bar)[:, 0]  # (M, 5) squared
        near = _nearest(fake, runs, closed, device, bar)  # (N, G, 3) squared
        reach = torch.stack([_without(near, case, closed) for case in cases], 1)  # (N, cases)
        precise = torch.zeros(len(fake), dtype=torch.bool, device=device)
        density = torch.zeros(len(fake), dtype=torch.int64, device=device)
        closest = torch.full((len(real), groups), torch.inf, dtype=torch.float64)
        recalled = torch.zeros(len(real), len(cases), dtype=torch.bool)
        for rows, group, columns, distances in tiles(real, fake, runs, device, bar):
            own = radii[rows].to(device)
            precise[columns] |= (distances <= own[:, closed - 1, None]).any(0)
            density[columns] += (distances < own[:, opened - 1, None]).sum(0)
            closest[rows, group] = torch.minimum(closest[rows, group], distances.min(1).values.cpu())
            balls = reach[columns].to(device)
            for case in cases:
                if case != group + 1:
                    recalled[rows, case] |= (distances <= balls[:, case]).any(1).cpu()

    covered = torch.stack([_without(closest[..., None], case, 1) < radii[:, opened - 1] for case in cases], 1)
    kept = torch.ones(len(fake), len(cases), dtype=torch.float64)
    for case in cases[1:]:
        kept[runs[case - 1], case] = 0
    values = {
        "precision": precise.cpu().double() @ kept / kept.sum(0),
        "recall": recalled.double().mean(0),
        "density": density.cpu().double() @ kept / (opened * kept.sum(0)),
        "coverage": covered.double().mean(0),
    }
    return {name: (value[0].item(), value[1:].tolist()) for name, value in values.items()}


def blocks(n: int) -> Iterator[slice]:
    """The images 0 to n - 1 in parts of a tile's side."""
    return (slice(start, min(start + TILE, n)) for start in range(0, n, TILE))


def tiles(rows: torch.Tensor, columns: torch.Tensor, runs: list[slice], device, bar):
    """(rows, number of the run, columns, squared distances (rows, columns) in float64), tile by tile.

    The tiles of a set with itself say inf for an image and itself.
    """
    for part in blocks(len(rows)):
        a = rows[part].to(device, torch.float64)
        for number, run in enumerate(runs):
            for first in range(run.start, run.stop, TILE):
                tile = slice(first, min(first + TILE, run.stop))
                b = columns[tile].to(device, torch.float64)
                distances = torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2).clamp_(min=0)
                if rows is columns:
                    distances.diagonal(part.start - tile.start).fill_(torch.inf)
                yield part, number, tile, distances
        bar.update(part.stop - part.start)


def _nearest(features: torch.Tensor, runs: list[slice], k: int, device, bar) -> torch.Tensor:
    """The k smallest squared distances of each image to those of each run, (N, runs, k), ascending; inf where fewer."""
    result = torch.full((len(features), len(runs), k), torch.inf, dtype=torch.float64)
    for rows, number, _, distances in tiles(features, features, runs, device, bar):
        found = distances.topk(min(k, distances.shape[1]), dim=1, largest=False).values.cpu()
        merged = torch.cat([result[rows, number], found], 1)
        result[rows, number] = merged.topk(k, dim=1, largest=False).values.sort(1).values
    return result


def _without(near: torch.Tensor, case: int, k: int) -> torch.Tensor:
    """The k-th smallest (N,) of distances (N, G, ...): of all groups for case 0, of all but g for case g + 1."""
    kept = [group for group in range(near.shape[1]) if group != case - 1]
    return near[:, kept].flatten(1).kthvalue(k, dim=1).values
