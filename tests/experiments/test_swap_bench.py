"""Swapped layers timed at the widths of models: what a row says, and that no weights of the model are needed."""

import json

import pytest
import torch
from conftest import unmarked
from diffusers import WanTransformer3DModel

from experiments.bench import swap
from experiments.bench.swap import CASES, Case
from sit_atconv.swap.blank import blank
from sit_atconv.swap.checking import check_swap

WAN = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16}
FLUX = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
FLUX |= {"joint_attention_dim": 12, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6), "in_channels": 8}


def test_rows_follow_from_the_shapes(monkeypatch, tmp_path, capsys):
    cases = (
        Case("Video", "WanTransformer3DModel", (2, 3, 4), WAN),
        Case("Image", "FluxTransformer2DModel", (2, 2), FLUX, 5),
    )
    monkeypatch.setattr(swap, "CASES", cases)
    swap.main(["--device", "cpu", "--out", str(tmp_path / "swap")])
    found = json.loads((tmp_path / "swap.json").read_text())
    video, double, single = found["rows"]
    tokens, width = 24, 24
    assert (video["model"], video["layers"], video["layer"]) == ("Video", 3, "blocks.*.attn1")
    assert video["macs_before"] == 4 * tokens * width**2 + 2 * tokens**2 * width
    assert video["products"] == 2 * tokens**2 * width
    with torch.device("meta"):
        check = check_swap(WanTransformer3DModel(**WAN), (2, 3, 4))
    assert (video["share"], video["limit"]) == (check.share, check.limit)
    assert video["share"] == pytest.approx(3 * video["products"] / check.macs_before)
    saved = 3 * (video["macs_before"] - video["macs_after"])
    assert video["limit"] == pytest.approx(check.macs_before / (check.macs_before - saved))
    assert (double["layers"], single["layers"]) == (1, 2)
    assert double["limit"] == single["limit"]
    # queries, keys, values and maps of 4 + 5 tokens; products of all with all
    assert double["macs_before"] == 4 * 9 * 32**2 + 2 * 9**2 * 32
    assert single["macs_before"] == 3 * 9 * 32**2 + 2 * 9**2 * 32  # the output's map is the block's
    for row in found["rows"]:
        assert row["timing"]["before"] > 0
        assert row["timing"]["after"] > 0
    table = capsys.readouterr().out
    assert table == unmarked(tmp_path / "swap.md")
    assert "have 5 tokens of text" in table
    ratio = video["timing"]["before"] / video["timing"]["after"]
    assert "| Video | `blocks.*.attn1` | 3 | 2 x 3 x 4 = 24 | " in table
    assert f"| {ratio:.2f}x |" in table


def test_one_model_alone_can_be_timed(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(swap, "rows_of", lambda case, device, dtype: asked.append(case) or [])
    swap.main(["--device", "cpu", "--models", "Wan2.1 1.3B", "--out", str(tmp_path / "swap")])
    assert asked == [case for case in CASES if case.said == "Wan2.1 1.3B"]
    assert len(asked) == 2


@pytest.mark.slow
def test_the_widths_are_those_that_are_published():
    """Parameters in thousands of millions, as their authors state; of DiT with diffusers' embedder in each block."""
    stated = {
        "DiT-XL/2": 0.750, "Flux.1": 11.9, "Flux.2": 32.2, "Qwen-Image": 20.4, "Z-Image": 6.15, "LTX-Video 2B": 1.92,
        "Wan2.1 1.3B": 1.42,
    }  # fmt: skip
    for case in CASES:
        assert sum(each.numel() for each in case.made().parameters()) / 1e9 == pytest.approx(
            stated[case.said], rel=0.01
        )


def test_a_batch_of_a_list_of_images_counts_its_images():
    assert check_swap(blank("ZImageTransformer2DModel"), (2, 2), 3).batch == 1
