"""The benchmark of the cache of latents: every storage is read, and one that reads wrongly is not timed."""

import json

import numpy as np
import pytest
import torch
from conftest import unmarked

from experiments.bench import cache


def test_latents_say_their_number():
    rows = np.array([0, 1, 1023, 1024, 99_999])
    moments = cache.synthetic(rows)
    assert moments.shape == (5, *cache.SHAPE)
    assert moments.dtype == np.float16
    assert cache.numbers(moments).tolist() == rows.tolist()


def test_a_storage_that_reads_other_latents_is_not_timed(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setitem(
        cache.STORAGES, "wrong", ("", lambda folder: lambda rows: torch.from_numpy(cache.synthetic(np.sort(rows))))
    )
    with pytest.raises(RuntimeError, match=r"wrong: batch 0 holds other latents .* not timed"):
        cache.epoch("wrong", tmp_path, 64, 8, 0, 0)
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_every_storage_is_read(tmp_path, capsys):
    cache.main(["--latents", "600", "--batch", "32", "--workers", "1", "--rounds", "1", "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["storage"] for row in result["rows"]] == list(cache.STORAGES)
    assert all(row["latents_per_s"] > 0 for row in result["rows"])
    assert all(1e8 < row["anonymous_bytes"]["pss"] < row["anonymous_bytes"]["rss"] for row in result["rows"])
    out = capsys.readouterr().out
    assert unmarked(tmp_path / "out.md") in out
    assert json.loads(out.splitlines()[-1]) == result


def test_an_odd_number_of_latents_is_refused(fails, tmp_path):
    assert "--latents 601" in fails(cache.main, "--latents", "601", "--out", tmp_path / "out")
