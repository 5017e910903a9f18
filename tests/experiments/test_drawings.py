"""The drawings of docs/how_it_works.md show what they say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from experiments import drawings


def test_the_velocity_of_the_flow_carries_its_density():
    """The continuity equation, dp/dt + d(p v)/dx = 0, by central differences."""
    x, h = torch.linspace(-2, 2, 41, dtype=torch.float64), 1e-5
    for t in (0.1, 0.5, 0.9):
        change = (drawings.density(x, t + h) - drawings.density(x, t - h)) / (2 * h)
        flux = [drawings.density(at, t) * drawings.velocity(at, t) for at in (x + h, x - h)]
        torch.testing.assert_close(change, -(flux[0] - flux[1]) / (2 * h), atol=1e-7, rtol=1e-5)


def test_the_panels_of_the_operator_are_its_steps():
    for image, pooled, kernel, inhibited, convolved in drawings.operator_steps():
        given = torch.from_numpy(image)[None, None]
        assert pooled == pytest.approx(F.adaptive_avg_pool2d(given, 3)[0, 0].numpy())
        assert inhibited == pytest.approx(kernel - drawings.SHARE * kernel.mean(), abs=1e-6)
        wanted = F.conv2d(given, torch.from_numpy(inhibited)[None, None], padding=1)[0, 0].numpy()
        assert convolved == pytest.approx(wanted, abs=1e-5)
    assert not np.allclose(*(sample[2] for sample in drawings.operator_steps()))


def test_drawings_are_written(tmp_path):
    drawings.main(["--out", str(tmp_path)])
    for name in drawings.DRAWINGS:
        with Image.open(tmp_path / name) as image:
            assert image.width == 1050
            assert image.getpixel((2, 2))[:3] == (255, 255, 255)
