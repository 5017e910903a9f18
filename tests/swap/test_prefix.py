"""ViTs of timm and transformers: prefix tokens as before, by their positions too, and patches as the formula."""

import copy
import re
from functools import partial

import pytest
import timm
import torch
from conftest import ROOT
from swapped_layers import convolved, stir
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from sit_atconv import swap_attention
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import load_delta, save_delta
from sit_atconv.swap.adapters import adapter_of, known_adapters
from sit_atconv.swap.families.beit import tiny_beit, tiny_rel_pos
from sit_atconv.swap.families.eva import tiny_eva
from sit_atconv.swap.families.vision import FAMILIES
from sit_atconv.swap.families.vit import tiny_parallel

FUSED = partial(ParallelScalingBlock, fuse_out_proj=True)
LIKE_CLIP = ("MetaClip2", "AltCLIP", "ChineseCLIPVision", "CLIPSeg", "OwlViT", "Owlv2")
OWNERS = [family.owners[0] for family in FAMILIES if family.name not in LIKE_CLIP]
TIMM = {
    "parallel": tiny_parallel,
    "parallel, one output map": partial(tiny_parallel, block_fn=FUSED, init_values=0.5, reg_tokens=2),
    "parallel, one bias": partial(tiny_parallel, qkv_bias=True, qk_norm=True),
    "parallel attentions": partial(tiny_parallel, scaling=False),
    "eva": tiny_eva,
    "eva, separate maps": partial(tiny_eva, qkv_fused=False, qk_norm=True),
    "eva, post-norm, rotations of a block": partial(tiny_eva, use_post_norm=True, rope_type="mixed"),
    "eva, rotated halves": partial(tiny_eva, attn_type="rope", rope_rotate_half=True, rope_type="dinov3"),
    "eva, no prefix": partial(tiny_eva, class_token=False, num_reg_tokens=0),
    "beit": tiny_beit,
    "beit, shared positions": partial(tiny_beit, use_shared_rel_pos_bias=True, qkv_bias=False),
    "relative positions": tiny_rel_pos,
    "relative positions by an MLP": partial(tiny_rel_pos, rel_pos_type="mlp"),
    "shared relative positions": partial(tiny_rel_pos, shared_rel_pos=True),
    "relative positions, no prefix": partial(tiny_rel_pos, class_token=False),
}


def tiny(kind, seed=0):
    torch.manual_seed(seed)
    if kind in TIMM:
        return TIMM[kind]()
    return next(each for each in known_adapters() if each.model.__name__ == kind).tiny()


def example(model, grid=None):
    inputs = adapter_of(model).example(model, torch.Generator().manual_seed(0), grid)
    dtype = next(model.parameters()).dtype
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def hidden(output):
    """The tensor of an attention's output, or of a model's."""
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("kind", [*TIMM, *OWNERS])
@torch.no_grad()
def test_prefix_as_the_attention_and_patches_as_the_formula(kind):
    """What is beside the mixing (norms, MLP, scale of a parallel block) is the same; the rest is the output map's."""
    model = tiny(kind).double()
    adapter, calls = adapter_of(model), {}
    inputs = example(model, None if "eit" in kind or "relative" in kind else (3, 5))
    sites = adapter.find(model)
    for name in sites:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, out, name=name: calls.update({name: (args, kwargs, hidden(out))}), with_kwargs=True
        )
    model(**inputs)
    swap = swap_attention(model, select="all", calib=[inputs])
    assert set(swap.layers) == set(sites)
    count = adapter.prefix_tokens(model)
    for name, layer in swap.layers.items():
        stir(layer)
        attention, graft, (args, kwargs, theirs) = swap.attentions[name], sites[name], calls[name]
        grid = swap.sites[0].grid
        layer.reference.set(grid, torch.device("cpu"))
        ours = hidden(layer(*args, **kwargs))
        torch.testing.assert_close(ours[:, :count], theirs[:, :count])
        values, targets = graft.observe(attention, layer, args, kwargs)
        tokens = graft.tokens(attention, args, kwargs)[:, count:]
        wanted = (convolved(layer, tokens, values, grid) - targets) @ graft.maps(attention).out.weight.T
        if isinstance(attention, ParallelScalingBlock):
            wanted = attention.ls(wanted)
        torch.testing.assert_close((ours - theirs)[:, count:], wanted)
        if not count:
            assert not any(name.startswith(("q_", "k_", "prefix_")) for name in layer.state_dict())


@pytest.mark.parametrize("kind", ["parallel, one output map", "eva", "beit", "ViTModel", "DINOv3ViTModel"])
def test_delta_revert_copies_and_gradients_of_recomputed_blocks(kind, tmp_path):
    model = tiny(kind)
    grids = [None] if kind == "beit" else [(2, 6), (4, 3), (6, 2)]  # all of as many tokens
    inputs, before = [example(model, grid) for grid in grids], copy.deepcopy(model.state_dict())
    swap = swap_attention(model, select="all", calib=inputs)
    for layer in swap.layers.values():
        stir(layer)

    def features(model, each):
        return hidden(model.forward_features(**each) if hasattr(model, "forward_features") else model(**each))

    def gradients():
        torch.manual_seed(1)  # DINOv3 draws scales of positions as it trains
        model.zero_grad()
        sum(features(model.train(), each).square().mean() for each in inputs).backward()
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    plain = gradients()
    for name, layer in swap.layers.items():
        assert all(plain[f"{name}.{key}"].abs().sum() > 0 for key, _ in layer.named_parameters())
    enable = getattr(model, "activation_checkpointing_enable", None) or model.set_grad_checkpointing
    enable()
    for name, each in gradients().items():
        torch.testing.assert_close(each, plain[name], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        wanted = [features(model.eval(), each) for each in inputs]
        save_delta(model, tmp_path / "delta.safetensors")
        fresh = tiny(kind)
        load_delta(fresh, tmp_path / "delta.safetensors")
        for other in (fresh, copy.deepcopy(model)):
            assert all(torch.equal(features(other, x), y) for x, y in zip(inputs, wanted, strict=True))
    if hasattr(model, "save_pretrained"):
        with pytest.raises(InputError, match="save_delta"):
            model.save_pretrained(tmp_path / "whole")
    swap.revert()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_prefix_reads_by_the_biases_of_class_and_patches_alone():
    model = tiny("beit")
    table = model.blocks[0].attn.relative_position_bias_table
    swap = swap_attention(model, select="all", init="copy_vo")
    layer = swap.layers["blocks.0.attn"]
    torch.testing.assert_close(layer.prefix_bias, table[[-3, -1]].T)
    assert "prefix_bias" in layer.state_dict()


@pytest.mark.parametrize(
    ("maker", "says"),
    [
        (partial(tiny_eva, scale_attn_inner=True), "scale_norm"),
        (lambda: timm.models.eva.Eva(**SMALL, attn_type="rope", qkv_fused=False, num_kv_heads=1), "fewer value heads"),
        (partial(tiny_eva, patch_drop_rate=0.5), r"set model.patch_drop = None"),
        (partial(tiny_parallel, block_fn=timm.models.vision_transformer.DiffParallelScalingBlock), "no attention"),
        (lambda: timm.create_model("cait_xxs24_224", depth=1, embed_dim=16, num_heads=2), "Cait mixes its heads"),
    ],
    ids=["scale norm", "grouped queries", "dropped patches", "differential", "talking heads"],
)
def test_what_atconv_does_not_stand_for_stays(maker, says):
    model = maker()
    keys = list(model.state_dict())
    with pytest.raises(InputError, match=says) as caught:
        swap_attention(model, select="all", init="copy_vo")
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def test_masks_prefixes_and_text_of_transformers_are_refused():
    model = tiny("ViTModel")
    with pytest.raises(InputError, match="1 class or register tokens"):
        swap_attention(model, select="all", init="copy_vo", prefix="error")
    swap_attention(tiny("SiglipVisionModel"), select="all", init="copy_vo", prefix="error")
    swap_attention(model, select="all", init="copy_vo")
    inputs = example(model)
    with pytest.raises(InputError, match="attention_mask was given"):
        model(**inputs, attention_mask=torch.tensor([[1] * 16 + [0]] * 2))
    with pytest.raises(InputError, match=r"no adapter for Linear; .*ViTForImageClassification"):
        swap_attention(nn.Linear(2, 2))


def test_transformers_is_imported_by_its_models_alone():
    for path in (ROOT / "sit_atconv").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) transformers", path.read_text(), re.M), path
