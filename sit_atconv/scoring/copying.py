"""Is it copying? How near samples lie to reference images, against how near these lie to each other."""

import math

import numpy as np
import torch

from sit_atconv.runtime.console import Progress
from sit_atconv.scoring.manifold import Values, blocks, tiles
from sit_atconv.scoring.moments import checked_pair

SHARE = 0.01  # of reference images that lie so near to another one that a sample there counts as a copy


def copying_scores(
    real: np.ndarray, fake: np.ndarray, group_ids: np.ndarray, device: torch.device | str = "cpu",
    progress: bool = False,
) -> Values:  # fmt: skip
    """{name: (of all samples, [without each group of samples])} for real features (M, D) and those of samples (N, D).

    Let d(x) be the Euclidean distance of a sample to the nearest real image, and l(r) that of a real image to the
    nearest other one.
    nearest: the median of d over the samples, over the median of l over the real images. About 1 where samples are
    drawn as the real images are, near 0 where they are copies of these, above 1 where they lie apart.
    copies: the share of samples with d <= q, where q is the 1st percentile of l: the least value of l that a share of
    0.01 of the real images does not exceed. Of samples that are drawn as the real images are it is about 0.01.

    The comparison with distances of images that are no copies is that of the data-copying test of Meehan, Chaudhuri and
    Dasgupta 2020 (C_T), with the real images, each left out in turn, in the place of held-out ones. Authenticity (Alaa
    et al. 2022) compares each sample with the nearest image's own l instead; without copying it takes a value that
    depends on the dimension, and `copies` does not.

    Both tell of copies of these real images alone. Two real images that are equal have l = 0: where a share of 0.01
    or more are such, q is 0, and only samples that are equal to a real image, to the bit of the features, are counted.

    group_ids (N,): as `counted_off` gives them. Which image is nearest is found as `manifold_scores` finds it, in tiles
    of bounded memory; its distance is taken from the difference, so that equal features are at 0.

    Raises ValueError for fewer than two real images, where more than half of them are `doubles`, where shapes differ or
    a number is not finite.
    """
    groups = int(group_ids.max()) + 1
    real, fake = checked_pair(real, fake)
    if len(real) < 2:
        raise ValueError(f"{len(real)} real image has no nearest other one; give at least two")
    with Progress(total=len(real) + len(fake), desc="nearest images", unit="image", disable=not progress) as bar:
        own = _distances(real, real, device, bar)
        found = _distances(fake[:], real, device, bar)  # another tensor, even of the same images
    usual = np.median(own)
    if usual == 0:
        raise ValueError("more than half of the real images equal another one; leave doubles out")
    near = np.sort(own)[math.ceil(SHARE * len(own)) - 1]
    cases = [np.ones(len(found), bool), *(group_ids != group for group in range(groups if groups > 1 else 0))]
    values = {
        "nearest": [float(np.median(found[kept]) / usual) for kept in cases],
        "copies": [float(np.mean(found[kept] <= near)) for kept in cases],
    }
    return {name: (each[0], each[1:]) for name, each in values.items()}


def doubles(real: np.ndarray) -> int:
    """How many of real images have features (M, D) that another one has too."""
    counts = np.unique(real, axis=0, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def _distances(images: torch.Tensor, real: torch.Tensor, device, bar) -> np.ndarray:
    """The distance (N,), float64, of each image to the nearest real one, itself left out where they are one set."""
    least = torch.full((len(images),), torch.inf, dtype=torch.float64, device=device)
    which = torch.zeros(len(images), dtype=torch.int64, device=device)
    for rows, _, columns, distances in tiles(images, real, [slice(0, len(real))], device, bar):
        found = distances.min(1)
        nearer = found.values < least[rows]
        least[rows] = torch.where(nearer, found.values, least[rows])
        which[rows] = torch.where(nearer, found.indices + columns.start, which[rows])
    exact = (images[rows].double() - real[which[rows].cpu()].double() for rows in blocks(len(images)))
    return torch.cat([difference.square().sum(1).sqrt() for difference in exact]).numpy()
