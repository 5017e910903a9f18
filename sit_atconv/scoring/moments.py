"""Mean and covariance of features, from sums per group of images that add up over batches, shards, processes."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.processes import is_main
from sit_atconv.scoring.frechet import Moments
from sit_atconv.scoring.jackknife import GROUPS


def checked(features: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    """Features (N, D). Raises ValueError, which says what they are of, for another shape, or not finite."""
    features = torch.as_tensor(features)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features of {name} are of shape {tuple(features.shape)}; give (N, D)")
    if not features.isfinite().all():
        raise ValueError(f"features of {name} are not finite; check the images and the extractor's weights")
    return features


def checked_pair(real: np.ndarray, fake: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (M, D) of real images and (N, D) of samples, `checked`. Raises ValueError where D differs."""
    real, fake = checked(real, "real images"), checked(fake, "samples")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"samples have {fake.shape[1]} features, real images {real.shape[1]}")
    return real, fake


class GroupSums:
    """Number, sum and sum of outer products of each group's features, float64: n (G,), sum (G, D), outer (G, D, D).

    Sums of disjoint sets of images add to those of the union (`all_reduce`), in any split and order to rounding.
    """

    def __init__(self, dim: int, groups: int = GROUPS):
        self.n = torch.zeros(groups, dtype=torch.float64)
        self.sum = torch.zeros(groups, dim, dtype=torch.float64)
        self.outer = torch.zeros(groups, dim, dim, dtype=torch.float64)

    def update(self, features: np.ndarray | torch.Tensor, group_ids: np.ndarray) -> "GroupSums":
        """Add features (B, D) of images of these groups (B,). Raises ValueError for other shapes, or not finite."""
        features = checked(features, "images")
        if features.shape != (wanted := (len(group_ids), self.sum.shape[1])):
            raise ValueError(
                f"features are of shape {tuple(features.shape)}; give {wanted} for {len(group_ids)} images"
            )
        group_ids = torch.as_tensor(group_ids)
        for group in group_ids.unique().tolist():
            rows = features[group_ids == group].to("cpu", torch.float64)
            self.n[group] += len(rows)
            self.sum[group] += rows.sum(0)
            self.outer[group].addmm_(rows.T, rows)
        return self

    def all_reduce(self) -> "GroupSums":
        """Add up the sums of all processes, where there are several; every process must call it."""
        if dist.is_initialized():
            device = "cpu" if "cpu:" in str(dist.get_backend_config()) else "cuda"  # nccl alone has no CPU tensors
            for tensor in self._tensors():
                moved = tensor.to(device)
                dist.all_reduce(moved)
                tensor.copy_(moved)
        return self

    def moments(self, without: int | None = None) -> Moments:
        """Moments of all images, or of those of all groups but one. Raises ValueError for fewer than two images."""
        n, total, outer = (tensor.sum(0) for tensor in self._tensors())
        if without is not None:
            n, total, outer = n - self.n[without], total - self.sum[without], outer - self.outer[without]
        if n < 2:
            raise ValueError(f"{int(n)} images have no covariance; give at least two")
        mu = total / n
        return Moments(mu.numpy(), ((outer - n * mu.outer(mu)) / (n - 1)).numpy())

    def all_moments(self) -> Iterator[Moments]:
        """Moments of all images; then those without each of the groups, where there are several."""
        yield self.moments()
        yield from map(self.moments, range(len(self.n)) if len(self.n) > 1 else ())

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.n, self.sum, self.outer


def stream_sums(features, stream: str, groups: np.ndarray | None = None, shared: bool = False) -> GroupSums:
    """Sums of one stream of `Features` or `Held`, by the group of every image (n,), by default one.

    shared: of this process's part of the shards, where there are several processes.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared and dist.is_initialized() else (0, 1)
    groups = np.zeros(features.n, np.int64) if groups is None else groups
    sums = GroupSums(features.streams[stream], int(groups.max()) + 1)
    shards = range(rank, len(features), world)
    batches = features.batches(stream, shards)
    for first, rows in Progress(batches, desc=f"sums of {stream}", total=len(shards), delay=1, disable=not is_main()):
        sums.update(rows, groups[first : first + len(rows)])
    return sums


def moments(features: np.ndarray | torch.Tensor) -> Moments:
    """Moments of features (N, D). Raises ValueError for fewer than two rows or non-finite numbers."""
    return GroupSums(features.shape[1], 1).update(features, np.zeros(len(features), np.int64)).moments()
