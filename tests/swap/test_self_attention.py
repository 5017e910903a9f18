"""Models of diffusers whose image tokens attend to each other: what of them is swapped, and what is kept beside it."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    HunyuanDiT2DModel,
    I2VGenXLUNet,
    Kandinsky3UNet,
    LatteTransformer3DModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    UVit2DModel,
)
from diffusers.models.attention_processor import Attention
from swapped_layers import convolved, stir

from sit_atconv import swap_attention
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.adapters import _ADAPTERS

BLOCK = "transformer_blocks.0.attn1"
U_NET = [f"{block}.attentions.{i}" for block, i in (("down_blocks.0", 0), ("up_blocks.1", 0), ("up_blocks.1", 1))]
U_NET.append("mid_block.attentions.0")
SWAPPED = {
    HunyuanDiT2DModel: [f"blocks.{i}.attn1" for i in range(4)],
    LatteTransformer3DModel: [f"transformer_blocks.{i}.attn1" for i in range(2)],
    UNet2DModel: U_NET,
    UNet3DConditionModel: [f"{name}.{BLOCK}" for name in U_NET],
    UNetMotionModel: [f"{name}.{BLOCK}" for name in U_NET],
    I2VGenXLUNet: [f"{name}.{BLOCK}" for name in U_NET],
    UNetSpatioTemporalConditionModel: [f"{name}.{BLOCK}" for name in U_NET],
    UVit2DModel: [f"transformer_layers.{i}.attn1" for i in range(2)],
    Kandinsky3UNet: [f"{block}.attentions.0.attention" for block in ("down_blocks.1", "up_blocks.0", "up_blocks.1")],
}  # fmt: skip


def tiny(model_class):
    """The adapter, a tiny model in fp64, and its inputs on a grid that is no square."""
    torch.manual_seed(0)
    adapter = next(each for each in _ADAPTERS if each.model is model_class)
    model = adapter.tiny().double()
    return adapter, model, inputs_of(adapter, model)


def inputs_of(adapter, model, grid=(3, 4, 6)):
    video = model.__class__.__name__.removeprefix("ATConv") in [
        each.__name__ for each in SWAPPED if "3D" in each.__name__ or each.__name__.startswith(("UNetM", "UNetS", "I2"))
    ]
    found = adapter.example(model, torch.Generator().manual_seed(0), grid if video else grid[1:])
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in found.items()
    }


@pytest.mark.parametrize("model_class", SWAPPED)
@torch.no_grad()
def test_layers_in_the_place_of_attention_over_an_image_and_of_no_other(model_class):
    """All self-attention over images goes, that over time and to text stays; each layer is as the formula has it, with
    all that the attention does beside mixing: the difference of both is what the output map makes of the mixed values.
    """
    adapter, model, inputs = tiny(model_class)
    calls = {}
    sites = adapter.find(model)
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, out, name=name: calls.update({name: (args, kwargs, out)}), with_kwargs=True
        )
        for name in sites
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    before = {name for name, each in model.named_modules() if isinstance(each, Attention)}
    swap = swap_attention(model, select="all", calib=[inputs])
    assert set(swap.layers) == set(SWAPPED[model_class])
    assert {name for name, each in model.named_modules() if isinstance(each, Attention)} == before - set(swap.layers)
    model(**inputs)
    for name, layer in swap.layers.items():
        stir(layer)
        attention, (args, kwargs, output) = swap.attentions[name], calls[name]
        graft, site = sites[name], next(each for each in swap.sites if each.name == name)
        if layer.reference is not None:
            layer.reference.set(site.grid, torch.device("cpu"))
        values, targets = graft.observe(attention, layer, args, kwargs)
        tokens = args[0] if args else kwargs["hidden_states"]
        if tokens.ndim == 4:
            assert site.grid == tokens.shape[2:]
            tokens = attention.group_norm(tokens).flatten(2).transpose(1, 2)
        torch.testing.assert_close(values, F.linear(tokens, attention.to_v.weight))
        wanted = (convolved(layer, tokens, values, site.grid) - targets) @ attention.to_out[0].weight.T
        if output.ndim == 4:
            wanted = wanted.transpose(1, 2).view_as(output)
        torch.testing.assert_close(layer(*args, **kwargs) - output, wanted / attention.rescale_output_factor)


@pytest.mark.parametrize("model_class", [HunyuanDiT2DModel, UNet2DModel, Kandinsky3UNet])
def test_fitted_layers_start_nearer_than_boxes(model_class):
    errors = []
    for init in ("closed_form", "copy_vo"):
        _, model, inputs = tiny(model_class)
        rows = swap_attention(model, select="all", calib=[inputs], init=init).report(measure=False).layers
        errors.append([row.error for row in rows])
    assert all(fitted < boxes for fitted, boxes in zip(*errors, strict=True))


def test_uvit_halves_its_grid_or_not():
    _, model, inputs = tiny(UVit2DModel)
    swap = swap_attention(model, select="all", calib=[inputs], init="random")
    assert inputs["input_ids"].shape[1:] == (8, 12)
    assert swap.sites[0].grid == (4, 6)
    swap.revert()
    other = UVit2DModel.from_config({**model.config, "downsample": False, "upsample": False}).double()
    assert swap_attention(other, select="all", calib=[inputs], init="random").sites[0].grid == (8, 12)


def test_map_attention_with_a_norm_in_space_stays():
    _, model, inputs = tiny(UNet2DModel)
    model.mid_block.attentions[0].spatial_norm = torch.nn.Identity()
    keys = list(model.state_dict())
    with pytest.raises(InputError, match=r"mid_block.attentions.0 normalises in space"):
        swap_attention(model, select="all", calib=[inputs])
    assert list(model.state_dict()) == keys
