"""The bench of the loop, on next to nothing."""

import json

import pytest
from conftest import reset_accelerate

from experiments.bench import loop


@pytest.mark.slow
def test_it_tells_the_model_from_what_is_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "LATENTS", 64)
    trained = loop.train
    monkeypatch.setattr(loop, "train", lambda recipe: (reset_accelerate(), trained(recipe)))
    out = tmp_path / "loop.json"
    loop.main(["--batch", "4", "--steps", "3", "--rounds", "1", "--tiny-steps", "40", "--out", str(out)])
    result = json.loads(out.read_text())
    assert 0 < result["loop"]["without_model_s"] < result["loop"]["step_s"] / 2
    assert result["memory"]["most_bytes"] >= result["memory"]["early_bytes"] > 1e8
    assert "overhead" in capsys.readouterr().out
