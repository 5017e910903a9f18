"""What `swap-check` counts without weights, beside the same model with weights."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.__main__ import main
from sit_atconv.runtime.compat.torch import formulas_of_attention
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import swap_attention
from sit_atconv.swap.adapters import known_adapters
from sit_atconv.swap.checking import blank, check_swap

ADAPTERS = {adapter.model.__name__: adapter for adapter in known_adapters() if adapter.tiny is not None}


def counted(model, inputs) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=formulas_of_attention())
    with torch.no_grad(), counter:
        model(**inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_counts_without_weights_are_those_with_weights(name):
    adapter = ADAPTERS[name]
    grid = ((4, 4) if name.startswith("DiT") else (2, 4, 6)[-getattr(adapter, "sides", 2) :], 7)
    with torch.device("meta"):
        empty = adapter.tiny()
    check = check_swap(empty, grid=grid[0], text=grid[1])
    model = adapter.tiny().eval()
    inputs = adapter.example(model, torch.Generator().manual_seed(0), grid=grid[0], text=grid[1])
    assert check.macs_before == counted(model, inputs)
    assert check.parameters == sum(each.numel() for each in model.parameters())
    swap = swap_attention(model, "all", init="random", joint="split", calib=[inputs])
    assert check.macs_after == counted(model, inputs)
    assert check.limit == check.macs_before / check.macs_after
    assert sum(kind.layers for kind in check.kinds if kind.refusal is None) == len(swap.layers)
    rows = {row.name: (row.macs_before, row.macs_after) for row in swap.report(measure=False).layers}
    assert rows.keys() == swap.layers.keys()


def test_products_of_a_dit_in_closed_form():
    check = check_swap(blank("DiTTransformer2DModel"), grid=(12, 12))
    batch, tokens, width = check.batch, 144, 16 * 72
    (kind,) = check.kinds
    assert (kind.name, kind.layers, kind.grid) == ("transformer_blocks.*.attn1", 28, (12, 12))
    assert kind.products == batch * 2 * tokens**2 * width
    assert kind.macs_before == kind.products + batch * 4 * tokens * width**2
    # Values and output as before; of nine pooled tokens one map, nine taps a token, and the linear over the taps.
    assert kind.macs_after == batch * width * (2 * tokens * width + 9 * width + 9 * tokens + 81)
    assert check.share == 28 * kind.products / check.macs_before


def test_the_command_reads_a_folder_times_layers_and_writes_what_it_prints(tmp_path, capsys):
    model = ADAPTERS["DiTTransformer2DModel"].tiny()
    model.save_config(tmp_path / "model")
    main(["swap-check", str(tmp_path / "model"), "--grid", "6", "6", "--out", str(tmp_path / "found.json")])
    shown, stored = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert stored["kinds"][0]["timing"]["before"] > 0
    assert stored["kinds"][0]["grid"] == [6, 6]
    assert f"{stored['limit']:.2f} times" in shown
    assert "| `transformer_blocks.*.attn1` | 3 | 6 x 6 | 36 |" in shown
    assert all(each.is_meta for each in blank(str(tmp_path / "model")).parameters())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["NoModel"], "'NoModel' is neither a class with an adapter nor a folder of one; known are .*DiTTransformer2D"),
        (["DiTTransformer2DModel", "--grid", "3"], "--grid 3: give rows and columns, or frames, rows and columns"),
        (["UNet2DConditionModel"], "its configuration does not tell its inputs"),
        (["DiTTransformer2DModel", "--grid", "0", "3"], "--grid 0 3: must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["swap-check", "--no-timing", *words])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.search(said, told), told


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(InputError, match=r"config\.json is of a AutoencoderKL, which no adapter reads"):
        blank(str(tmp_path))
