"""Random draws that belong to an index, never to a process or to a position in a program.

Every draw is made on the CPU from SeedSequence([seed, stream, ...index]), so it does not depend on batch size,
number of processes, or where a run was interrupted. A stream is what the draw is for; numbers are never reused.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from sit_atconv.runtime.compat.numpy import ISeedSequence

if TYPE_CHECKING:
    import torch


class Stream(IntEnum):
    """What a draw is for, with the index that it belongs to; the numbers are part of every result, never reused."""

    ORDER = 0  # (epoch): order of the images
    TIME = 1  # (step, sample): t
    NOISE = 2  # (step, sample): noise of the flow
    LABEL_DROP = 3  # (step, sample): class dropout
    FLIP = 4  # (step, sample): horizontal flip
    POSTERIOR = 5  # (step, sample): draw from the VAE's posterior
    SAMPLE_NOISE = 6  # (image): noise that an image is sampled from
    SAMPLE_LABEL = 7  # (image): its label, where labels are random
    SAMPLE_STEP = 8  # (image, step): noise of a step of an SDE sampler
    PROBE = 9  # (image, probe): signs of a probe of the likelihood
    DEQUANTIZE = 10  # (image): where in its grey level a pixel lies, for the likelihood
    CLASS_ORDER = 11  # (round): order of the classes, where they are balanced
    CLASS_IMAGES = 12  # (class, pass): order of the images of a class, where they are balanced
    SUBSTITUTE = 13  # (step, sample, attempt): which image takes the place of one that cannot be read
    AUGMENT = 14  # (step, sample): the augmentation of an image to be classified
    MIX = 15  # (step, micro-batch): which images of it are mixed, and how
    DROP_PATH = 16  # (step, micro-batch): which residual branches and features are dropped
    GROUPS = 17  # (): order in which scored images are counted off into the groups of their error bars
    VALIDATION = 18  # (what, held-out image): t, noise and posterior of its loss; (0, images): which part of t each has
    END_TIME = 19  # (step, sample): the second time of an average velocity


def generator(seed: int, stream: Stream, *index: int) -> np.random.Generator:
    """The generator of one draw. seed and index: integers >= 0."""
    return np.random.default_rng(np.random.SeedSequence([seed, stream, *index]))


def normal(shape: tuple[int, ...], seed: int, stream: Stream, *index: int) -> torch.Tensor:
    """Standard normal numbers, fp32, of the given shape."""
    return _tensor(generator(seed, stream, *index).standard_normal(shape, dtype=np.float32))


def signs(shape: tuple[int, ...], seed: int, stream: Stream, *index: int) -> torch.Tensor:
    """Rademacher numbers, 1 or -1 with equal chance, fp32, of the given shape."""
    return _tensor(generator(seed, stream, *index).integers(2, size=shape)).float() * 2 - 1


def uniforms(shape: tuple[int, ...], seed: int, stream: Stream, *index: int) -> torch.Tensor:
    """Numbers in [0, 1), fp32, of the given shape."""
    return _tensor(generator(seed, stream, *index).random(shape, dtype=np.float32))


def uniform_batch(seed: int, stream: Stream, indices: np.ndarray) -> np.ndarray:
    """`uniforms` of shape () of every row of indices (N, k), fp32 (N,): the same numbers, several times faster."""
    return np.array([_generator(words).random(dtype=np.float32) for words in _states(seed, stream, indices)])


def normal_batch(shape: tuple[int, ...], seed: int, stream: Stream, indices: np.ndarray) -> torch.Tensor:
    """`normal` of every row of indices (N, k), (N, *shape): the same numbers, several times faster for small shapes."""
    numbers = np.empty((len(indices), *shape), np.float32)
    for row, words in zip(numbers, _states(seed, stream, indices), strict=True):
        _generator(words).standard_normal(out=row, dtype=np.float32)
    return _tensor(numbers)


def _tensor(numbers: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(numbers)


class _Words(ISeedSequence):
    """A seed sequence whose state is known already."""

    def __init__(self, words: np.ndarray):
        self.words = words

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return self.words


def _generator(words: np.ndarray) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(_Words(words)))


# Constants of numpy's SeedSequence (numpy promises its streams to stay), and what its hash constant becomes: it is
# multiplied at every use, so the u-th use in a sequence has first * mult^u, and mult^(u + 1) right after.
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)


def _powers(first: int, mult: int, count: int) -> np.ndarray:
    return np.array([first * pow(mult, use, 1 << 32) % (1 << 32) for use in range(count)], np.uint32)[:, None]


_IN, _OUT = _powers(0x43B0D7E5, 0x931E8875, 64), _powers(0x8B51F9DD, 0x58F38DED, 9)


def _hash(values: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """SeedSequence's hashmix of values, one row for each of the constants but the last; or of one row for all."""
    values = (values ^ constants[:-1]) * constants[1:]
    return values ^ (values >> 16)


def _mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    mixed = _MIX_LEFT * x - _MIX_RIGHT * y
    return mixed ^ (mixed >> 16)


def _states(seed: int, stream: Stream, indices: np.ndarray) -> np.ndarray:
    """SeedSequence([seed, stream, *index]).generate_state(4, uint64) of every row of indices (N, k) at once, (N, 4).

    SeedSequence itself takes most of the time of a small draw. Raises ValueError for an index outside [0, 2^32).
    """
    indices = np.asarray(indices)
    if indices.size and not 0 <= indices.min() <= indices.max() < 1 << 32:
        raise ValueError("an index of a draw must be in [0, 2^32)")
    head = [seed >> shift & 0xFFFFFFFF for shift in range(0, max(seed.bit_length(), 1), 32)]
    entropy = np.zeros((max(4, len(head) + 1 + indices.shape[1]), len(indices)), np.uint32)
    entropy[: len(head) + 1] = np.array([*head, stream], np.uint32)[:, None]
    entropy[len(head) + 1 : len(head) + 1 + indices.shape[1]] = indices.T
    pool, used = _hash(entropy[:4], _IN[:5]), 4
    for source in range(4):
        others = [row for row in range(4) if row != source]
        pool[others] = _mix(pool[others], _hash(pool[source], _IN[used : used + 4]))
        used += 3
    for extra in entropy[4:]:
        pool = _mix(pool, _hash(extra, _IN[used : used + 5]))
        used += 4
    return np.ascontiguousarray(_hash(np.concatenate([pool, pool]), _OUT).T).view(np.uint64)
