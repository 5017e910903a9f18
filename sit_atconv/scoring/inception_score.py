"""The Inception score as ADM computes it."""

from collections.abc import Iterable

import numpy as np
import torch

SPLIT = 5000  # images whose marginal is taken together, in the order of their indices
CHUNK = 1000  # rows that are in float64 at once


def inception_scores(
    batches: Iterable[tuple[int, np.ndarray]], group_ids: np.ndarray, split: int = SPLIT
) -> tuple[float, list[float]]:
    """exp(mean KL(p(y|x) || p(y))) of each split of images, averaged over the splits: of all, and without each group.

    batches: index of the first image, and logits (B, K) of images from there on, in any order, each image once; for
    Inception the 1008 logits without bias. group_ids (N,): as `counted_off` gives them. The last split may be
    shorter and counts like the others, as in ADM's evaluator. Without a group the other images stay in their splits,
    so the value is exactly that of the shorter splits. Its bias goes with the split's size, not with 1/N.

    Raises ValueError for logits that are not finite, or where an image is missing.
    """
    groups, splits = int(group_ids.max()) + 1, -(-len(group_ids) // split)
    counts = torch.zeros(splits * groups, dtype=torch.float64)
    entropies, marginals = counts.clone(), None
    for first, logits in batches:
        for start in range(0, len(logits), CHUNK):
            part = torch.as_tensor(logits[start : start + CHUNK]).double()
            if not part.isfinite().all():
                raise ValueError("logits are not finite; check the images and the extractor's weights")
            indices = np.arange(first + start, first + start + len(part))
            cells = torch.from_numpy(indices // split * groups + group_ids[indices])
            if marginals is None:
                marginals = torch.zeros(len(counts), part.shape[1], dtype=torch.float64)
            log_p = part.log_softmax(1)
            p = log_p.exp()
            counts.index_add_(0, cells, torch.ones(len(part), dtype=torch.float64))
            marginals.index_add_(0, cells, p)
            entropies.index_add_(0, cells, (p * log_p).sum(1))
    if counts.sum() != len(group_ids):
        raise ValueError(f"logits of {int(counts.sum())} images, not of {len(group_ids)}")
    sums = [each.view(splits, groups, *each.shape[1:]) for each in (counts, entropies, marginals)]

    def score(kept: list[int]) -> float:
        n, entropy, marginal = (each[:, kept].sum(1) for each in sums)
        seen = n > 0  # a split of a few images may be all of one group
        marginal = marginal[seen] / n[seen, None]
        # sum p log p is 0 where p is 0.
        return float((entropy[seen] / n[seen] - torch.special.xlogy(marginal, marginal).sum(1)).exp().mean())

    everyone = list(range(groups))
    deleted = [score([group for group in everyone if group != gone]) for gone in everyone] if groups > 1 else []
    return score(everyone), deleted
