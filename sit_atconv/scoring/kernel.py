"""The kernel distance (KID): the squared maximum mean discrepancy under a cubic kernel."""

from typing import NamedTuple

import numpy as np
import torch

from sit_atconv.runtime.console import Progress
from sit_atconv.scoring.moments import checked_pair

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # torch-fidelity's own
ROWS = 4096  # images of a side whose kernel matrix is there at once


class KernelDistance(NamedTuple):
    """torch-fidelity's value and the standard error of its choice of subsets; the full estimator, of all and without
    each group of samples."""

    value: float
    subset_se: float
    full: float
    deleted: list[float]


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, group_ids: np.ndarray, device: torch.device | str = "cpu",
    progress: bool = False,
) -> KernelDistance:  # fmt: skip
    """KID of samples (N, D) to real features (M, D), under (x.y / D + 1)^3 (Binkowski 2018).

    value: torch-fidelity's mean over 100 subsets of 1,000 (of as many as there are, with fewer), seed 2020, in float64.
    Each subset is an unbiased estimate; so the value has no 1/N bias to correct and may be below zero.

    full: the unbiased estimate from all pairs, which is what the value would be over all subsets there are. Given the
    features, the value differs from it by the draw of the subsets alone: subset_se = std / sqrt(subsets), with
    torch-fidelity's "std", which is the spread of one subset and no error of the mean. The error of drawing other
    samples is the jackknife's over `deleted`; both add up as squares to that of the value.

    Raises ValueError for fewer than two images on a side, shapes that differ or numbers that are not finite.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    real, fake = checked_pair(real, fake)
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"{len(real)} real images and {len(fake)} samples have no kernel distance; give at least two")
    groups = int(group_ids.max()) + 1
    order = torch.from_numpy(np.argsort(group_ids, kind="stable"))
    sizes = torch.bincount(torch.as_tensor(group_ids), minlength=groups).double()
    runs = fake[order].split(sizes.long().tolist())
    within, across = torch.zeros(groups, groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64)
    with Progress(total=2 * groups + 1, desc="kernel", unit="group", disable=not progress) as bar:
        for g, run in enumerate(runs):
            for h in range(g, groups):
                within[g, h] = within[h, g] = _kernel_sum(run, runs[h], device)
            within[g, g] -= _diagonal_sum(run)
            bar.update()
            across[g] = _kernel_sum(run, real, device)
            bar.update()
        among = (_kernel_sum(real, real, device) - _diagonal_sum(real)) / (len(real) * (len(real) - 1))
        bar.update()

    def distance(kept: list[int]) -> float:
        n = sizes[kept].sum()
        own = within[kept][:, kept].sum() / (n * (n - 1))
        return float(own + among - 2 * across[kept].sum() / (n * len(real)))

    everyone = list(range(groups))
    deleted = [distance([group for group in everyone if group != gone]) for gone in everyone] if groups > 1 else []
    subsets = kid_features_to_metric(
        fake.double(), real.double(),
        kid_subsets=SUBSETS, kid_subset_size=min(SUBSET_SIZE, len(real), len(fake)), rng_seed=SEED, verbose=False,
    )  # fmt: skip
    subset_se = subsets[KEY_METRIC_KID_STD] / np.sqrt(SUBSETS).item()
    return KernelDistance(subsets[KEY_METRIC_KID_MEAN], subset_se, distance(everyone), deleted)


def _kernel_sum(a: torch.Tensor, b: torch.Tensor, device) -> float:
    return sum(
        ((rows.to(device, torch.float64) @ columns.to(device, torch.float64).T / a.shape[1] + 1) ** 3).sum().item()
        for rows in a.split(ROWS)
        for columns in b.split(ROWS)
    )


def _diagonal_sum(a: torch.Tensor) -> float:
    return sum(((rows.double().square().sum(1) / a.shape[1] + 1) ** 3).sum().item() for rows in a.split(ROWS))
