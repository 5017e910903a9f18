"""What the recorded commit wrote is read by this tree as by that commit itself: the same bits, images and scores."""

import shutil

import pytest
from conftest import ROOT, made_in


@pytest.mark.slow
def test_the_artefacts_of_the_recorded_commit(recorded_tree, tmp_path):
    place, copy = tmp_path / "place", tmp_path / "copy"
    before = made_in(recorded_tree, "artefacts.py", place, copy, HF_MODULES_CACHE=tmp_path / "modules-before")
    shutil.rmtree(place)
    copy.rename(place)  # so that every command is the same to the letter
    assert made_in(ROOT, "artefacts.py", place, HF_MODULES_CACHE=tmp_path / "modules") == before
