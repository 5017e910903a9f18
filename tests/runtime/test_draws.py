"""Draws belong to their index."""

import numpy as np
import pytest
import torch

from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream


def test_a_draw_is_a_function_of_seed_stream_and_index():
    first = draws.normal((2, 3), 0, Stream.NOISE, 4, 5)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(draws.normal((2, 3), 0, Stream.NOISE, 4, 5), first)
    others = [
        draws.normal((2, 3), *key)
        for key in [
            (1, Stream.NOISE, 4, 5),
            (0, Stream.POSTERIOR, 4, 5),
            (0, Stream.NOISE, 5, 4),
            (0, Stream.NOISE, 4, 6),
        ]
    ]
    assert all(not torch.equal(other, first) for other in others)


def test_streams_are_distinct_numbers():
    members = Stream.__members__  # a number used twice would make an alias, which iteration leaves out
    assert len({int(stream) for stream in members.values()}) == len(members)


def test_the_numbers_of_streams_stay():
    assert {name: int(stream) for name, stream in Stream.__members__.items()} == {
        "ORDER": 0, "TIME": 1, "NOISE": 2, "LABEL_DROP": 3, "FLIP": 4, "POSTERIOR": 5, "SAMPLE_NOISE": 6,
        "SAMPLE_LABEL": 7, "SAMPLE_STEP": 8, "PROBE": 9, "DEQUANTIZE": 10, "CLASS_ORDER": 11, "CLASS_IMAGES": 12,
        "SUBSTITUTE": 13,
        "AUGMENT": 14,
        "MIX": 15,
        "DROP_PATH": 16,
        "GROUPS": 17,
        "VALIDATION": 18,
        "END_TIME": 19,
    }  # fmt: skip


def test_distributions():
    normal = draws.normal((100_000,), 0, Stream.NOISE, 0)
    assert normal.dtype == torch.float32
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    uniform = np.array([draws.uniforms((), 0, Stream.TIME, 3, sample).item() for sample in range(4000)])
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    assert np.corrcoef(uniform[:-1], uniform[1:])[0, 1] == pytest.approx(0, abs=0.05)
    assert all(np.float32(value) == value for value in uniform[:10])


def test_signs_and_uniforms():
    signs = draws.signs((10_000,), 0, Stream.PROBE, 3, 1)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.05
    assert not torch.equal(draws.signs((10_000,), 0, Stream.PROBE, 3, 2), signs)
    uniforms = draws.uniforms((10_000,), 0, Stream.DEQUANTIZE, 3)
    assert uniforms.dtype == torch.float32
    assert 0 <= uniforms.min() < 0.01 < 0.99 < uniforms.max() < 1
    assert uniforms.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1, 2**32, 2**40 + 3, 2**100 + 7])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_batch_of_draws_is_the_draws(seed, length):
    indices = np.random.default_rng(length).integers(0, 2**32, (9, length))
    indices[0], indices[1] = 0, 2**32 - 1
    rows = [tuple(map(int, row)) for row in indices]
    expected = [draws.uniforms((), seed, Stream.TIME, *row).item() for row in rows]
    assert draws.uniform_batch(seed, Stream.TIME, indices).tolist() == expected
    normal = torch.stack([draws.normal((2, 3), seed, Stream.NOISE, *row) for row in rows])
    assert torch.equal(draws.normal_batch((2, 3), seed, Stream.NOISE, indices), normal)


def test_a_batch_of_draws_has_indices_of_32_bits():
    for index in (-1, 2**32):
        with pytest.raises(ValueError, match="must be in"):
            draws.uniform_batch(0, Stream.TIME, np.array([[0, index]]))
    assert draws.uniform_batch(0, Stream.TIME, np.zeros((0, 2), int)).shape == (0,)
