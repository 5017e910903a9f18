"""The bits that a recorded commit makes, in a worktree beside this tree: weights, images and scores are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bits
import pytest
from conftest import ROOT

RECORDED = "ccf83eb"  # the last commit whose operator took tokens beside their grid, and whose trainer knew kinds


def made_in(tree: Path, inputs: Path, out: Path) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    words = [sys.executable, bits.__file__, str(inputs), str(out)]
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_bits_of_the_recorded_commit(tmp_path):
    known = subprocess.run(["git", "cat-file", "-e", f"{RECORDED}^{{commit}}"], cwd=ROOT, capture_output=True)
    if known.returncode:
        pytest.skip(f"commit {RECORDED} is not in this clone; fetch the whole history")
    inputs, before = tmp_path / "inputs", tmp_path / "before"
    inputs.mkdir()
    bits.make_inputs(inputs)
    subprocess.run(["git", "worktree", "add", "--detach", before, RECORDED], cwd=ROOT, check=True, capture_output=True)
    try:
        assert made_in(before, inputs, tmp_path / "a") == made_in(ROOT, inputs, tmp_path / "b")
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True, capture_output=True)
