"""The bits that a recorded commit makes, in a worktree beside this tree: weights, images and scores are the same."""

import bits
import pytest
from conftest import ROOT, made_in


@pytest.mark.slow
def test_the_bits_of_the_recorded_commit(recorded_tree, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    bits.make_inputs(inputs)
    assert made_in(recorded_tree, "bits.py", inputs, tmp_path / "a") == made_in(ROOT, "bits.py", inputs, tmp_path / "b")
