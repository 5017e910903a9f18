"""Random draws that belong to an index, never to a process or to a position in a program.

Every draw is made on the CPU from SeedSequence([seed, stream, ...index]), so it does not depend on batch size,
number of processes, or where a run was interrupted. A stream is what the draw is for; numbers are never reused.
"""

from enum import IntEnum

import numpy as np
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


def generator(seed: int, stream: Stream, *index: int) -> np.random.Generator:
    """The generator of one draw. seed and index: integers >= 0."""
    return np.random.default_rng(np.random.SeedSequence([seed, stream, *index]))


def normal(shape: tuple[int, ...], seed: int, stream: Stream, *index: int) -> torch.Tensor:
    """Standard normal numbers, fp32, of the given shape."""
    return torch.from_numpy(generator(seed, stream, *index).standard_normal(shape, dtype=np.float32))


def signs(shape: tuple[int, ...], seed: int, stream: Stream, *index: int) -> torch.Tensor:
    """Rademacher numbers, 1 or -1 with equal chance, fp32, of the given shape."""
    return torch.from_numpy(generator(seed, stream, *index).integers(2, size=shape)).float() * 2 - 1


def uniforms(shape: tuple[int, ...], seed: int, stream: Stream, *index: int) -> torch.Tensor:
    """Numbers in [0, 1), fp32, of the given shape."""
    return torch.from_numpy(generator(seed, stream, *index).random(shape, dtype=np.float32))


def uniform(seed: int, stream: Stream, *index: int) -> float:
    """A number in [0, 1) that fp32 holds exactly."""
    return float(generator(seed, stream, *index).random(dtype=np.float32))
