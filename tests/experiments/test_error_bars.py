"""The experiment that holds stated errors against repeated draws: what it runs, and what its stored table says."""

import json

import numpy as np
import pytest
from conftest import ROOT, unmarked

from experiments.error_bars import DRAWS, Draw, Mixture, correction, error_bars, main, markdown
from sit_atconv.scoring.frechet import frechet_distance

STORED = ROOT / "experiments/results/error_bars"


@pytest.mark.slow
def test_stated_errors_are_those_of_repeated_draws(monkeypatch):
    """Every metric of images of classes in turn, to what 40 draws can tell; without labels the same have a bound."""
    monkeypatch.setattr("sit_atconv.scoring.kernel.SUBSETS", 3)
    monkeypatch.setattr("experiments.error_bars.REAL", 300)
    known, unknown = (error_bars(Draw("5 a class", 32, known=known), 40, 160) for known in (True, False))
    assert (known["error_bars"]["design"], known["error_bars"]["groups"]) == ("stratified", 5)
    for name, metric in known["metrics"].items():
        assert 0.65 < metric["ratio"] < 1.5, name
    assert unknown["error_bars"]["upper_bound"]
    one, other = (found["metrics"]["frechet_distance"] for found in (known, unknown))
    assert other["spread"] == pytest.approx(one["spread"])
    assert other["stated"] != pytest.approx(one["stated"], rel=1e-3)


def test_a_corrected_distance_is_given_from_ten_images_a_feature_on():
    few, enough = correction(1, 3), correction(10, 10)
    assert (few["given"], enough["given"]) == (False, True)
    assert abs(few["corrected"] - few["truth"]) > 2 * few["stated"]
    assert abs(enough["corrected"] - enough["truth"]) < 2 * enough["stated"] < enough["value"] - enough["truth"]


def test_the_mixtures_truth_is_that_of_many_draws():
    mixture, rng = Mixture(4, 3), np.random.default_rng(0)
    x = mixture.draw(rng, np.arange(200_000) % 4)
    found = frechet_distance(x.mean(0), np.cov(x, rowvar=False), *mixture.real)
    assert found == pytest.approx(mixture.truth, rel=0.02)
    assert (mixture.logits(x).argmax(1) == np.arange(200_000) % 4).mean() > 0.5


def test_the_stored_table_holds_what_scoring_says():
    stored = json.loads((STORED / "error_bars.json").read_text())
    assert stored["repeats"] == 100
    assert unmarked(STORED / "error_bars.md") == markdown(stored)
    assert [row["draw"] for row in stored["error_bars"]] == [draw.name for draw in DRAWS]
    for row in stored["error_bars"]:
        bound = row["error_bars"]["upper_bound"]
        ratio = row["metrics"]["frechet_distance"]["ratio"]
        assert ratio > 0.75 if bound else 0.75 < ratio < 1.25, row["draw"]
    assert [row["images_per_feature"] for row in stored["corrected"] if row["given"]] == [10, 15, 25]
    for row in stored["corrected"]:
        if row["given"]:
            assert abs(row["corrected"] - row["truth"]) < row["stated"]


def test_one_draw_has_no_spread(fails):
    assert "--repeats 1: must be at least 2" in fails(main, "--repeats", 1)
