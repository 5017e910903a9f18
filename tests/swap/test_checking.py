"""What `swap-check` counts without weights, beside the same model with weights."""

import json
import re

import pytest
import torch
from swap_families import ADAPTERS, few
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.__main__ import main
from sit_atconv.runtime.compat.torch import formulas_of_attention
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import swap_attention
from sit_atconv.swap.blank import blank
from sit_atconv.swap.checking import check_swap

OF_IMAGES = ("UNetSpatioTemporalConditionModel",)  # whose condition is an image, of one token
PADDED = ("HunyuanDiT2DModel",)  # whose text has one length, with a mask


def without_text(name) -> bool:
    vision = ADAPTERS[name].model.__module__.partition(".")[0] in ("timm", "transformers")
    return vision or name in ("SiTTransformer2DModel", "DiTTransformer2DModel", "UNet2DModel", *OF_IMAGES, *PADDED)


def counted(model, inputs) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=formulas_of_attention())
    with torch.no_grad(), counter:
        model(**inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", few(sorted(ADAPTERS)))
def test_counts_without_weights_are_those_with_weights(name):
    adapter = ADAPTERS[name]
    grid = ((4, 4) if name.startswith("DiT") else (2, 4, 6)[-adapter.sides :], None if without_text(name) else 7)
    with torch.device("meta"):
        empty = adapter.tiny()
        if adapter.example(empty, torch.Generator().manual_seed(0), grid=grid[0], text=grid[1]) is None:
            grid = None, grid[1]  # a class that takes its own grid alone
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
        (["DiTTransformer2DModel", "--text", "5"], "--text 5: DiTTransformer2DModel has no text, or text of one"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["swap-check", "--no-timing", *words])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.search(said, told), told


@pytest.mark.parametrize("name", few(name for name in sorted(ADAPTERS) if without_text(name)))
def test_a_length_of_text_is_refused_where_there_is_none(name):
    with torch.device("meta"):
        model = ADAPTERS[name].tiny()
    with pytest.raises(InputError, match=rf"^text=9: {name} has no text, or text of one length alone; leave it out"):
        check_swap(model, text=9)


def written(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shapes(model):
    return {name: each.shape for name, each in model.state_dict().items()}


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel", "SiglipVisionModel"])
@pytest.mark.parametrize("told", ["both", "architectures", "model_type"])
def test_a_folder_of_transformers(name, told, tmp_path):
    model = ADAPTERS[name].tiny()
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [name]}
    left_out = {"both": (), "architectures": ("model_type",), "model_type": ("architectures",)}[told]
    found = blank(str(written(tmp_path, **{key: each for key, each in config.items() if key not in left_out})))
    assert type(found) is type(model)
    assert shapes(found) == shapes(model)
    assert all(each.is_meta for each in found.parameters())


def test_a_folder_of_timm(tmp_path):
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    found = blank(str(written(tmp_path, **config, model_args={"img_size": 64, "depth": 2})))
    assert type(found).__name__ == "VisionTransformer"
    assert (len(found.blocks), found.num_classes, found.patch_embed.grid_size) == (2, 7, (4, 4))
    assert check_swap(found).kinds[0].grid == (4, 4)


@pytest.mark.parametrize("part", ["transformer", "unet"])
def test_a_folder_of_a_pipeline(part, tmp_path):
    name = {"transformer": "DiTTransformer2DModel", "unet": "UNet2DModel"}[part]
    model = ADAPTERS[name].tiny()
    model.save_config(tmp_path / part)
    (tmp_path / "model_index.json").write_text("{}")
    assert shapes(blank(str(tmp_path))) == shapes(model)
    (tmp_path / part / "config.json").unlink()
    with pytest.raises(InputError, match=r"this pipeline has no transformer or unet with a config\.json"):
        blank(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "AutoencoderKL"}, r"config\.json is of a AutoencoderKL, which no adapter reads; known are"),
        ({"_class_name": "StableAudioDiTModel"}, "StableAudioDiTModel is of sound: it cannot be swapped as it is"),
        ({"architectures": ["CLIPModel"], "model_type": "clip"}, "CLIPModel has a model of text beside that of images"),
        ({"architectures": [], "model_type": "bert"}, r"config\.json is of a bert, which no adapter reads"),
        ({"architecture": "vit_none"}, "timm makes no vit_none of it: Unknown model"),
        ({"hidden_size": 3}, r"config\.json has no _class_name, architecture, architectures, model_type, which would"),
        ({"_class_name": "DiTTransformer2DModel", "num_layers": 10**9}, "num_layers"),
        ({"_class_name": "DiTTransformer2DModel", "num_layers": "x"}, "num_layers"),
        ({"_class_name": ["x"]}, "_class_name"),
        ({"architecture": ["x"]}, "architecture"),
        ({"architectures": "ViTModel"}, "architectures"),
        ({"model_type": 5}, "model_type"),
    ],
)  # fmt: skip
def test_a_folder_of_something_else(config, says, tmp_path):
    with pytest.raises(InputError, match=says) as info:
        blank(str(written(tmp_path, **config)))
    assert "\n" not in str(info.value)
