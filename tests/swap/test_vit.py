"""timm's ViTs: prefix tokens as before, patches against an oracle in fp64, and what a swapped model must do."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchDropout
from torch import nn

from sit_atconv import swap_attention
from sit_atconv.ops.atconv import on_grid
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.prefix import PrefixATConv

PATCH, WIDTH, HEADS = 4, 12, 2
GRIDS = [(4, 4), (3, 5), (6, 2)]
ARGS = {
    "img_size": 16, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 7,
    "dynamic_img_size": True, "reg_tokens": 2, "init_values": 1.0,
}  # fmt: skip
PREFIXES = {"class and registers": {}, "class": {"reg_tokens": 0}, "none": {"reg_tokens": 0, "class_token": False,
            "global_pool": "avg"}}  # fmt: skip
prefixes = pytest.mark.parametrize("prefix", PREFIXES)


def vit(**changed):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**ARGS, **changed})
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def images(grid=(4, 4), batch=2, seed=0):
    return torch.randn(batch, 3, *(PATCH * side for side in grid), generator=torch.Generator().manual_seed(seed))


def swapped(dtype=torch.float32, init="closed_form", **changed):
    model = vit(**changed).to(dtype)
    swap = swap_attention(model, select="all", init=init, calib=[(images(grid).to(dtype),) for grid in GRIDS[:2]])
    return model, swap


def stir(model):
    torch.manual_seed(1)
    for layer in (each for each in model.modules() if isinstance(each, PrefixATConv)):
        for name in ("kernel_proj.weight", "kernel_gen.weight", "difference_control"):
            layer.get_parameter(name).data.add_(0.3 * torch.randn_like(layer.get_parameter(name)))


def outputs(model, grid=(4, 4), **options):
    with torch.no_grad():
        return model(images(grid, **options))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("changed", [{}, {"qkv_bias": False}, {"qk_norm": True}, {"proj_bias": False}], ids=str)
@prefixes
@torch.no_grad()
def test_prefix_as_the_attention_patches_as_the_oracle(prefix, changed, grid):
    model, swap = swapped(torch.float64, **PREFIXES[prefix], **changed)
    stir(model)
    count = model.num_prefix_tokens
    assert count == {"none": 0, "class": 1}.get(prefix, 3)
    x = torch.randn(2, count + grid[0] * grid[1], WIDTH, dtype=torch.float64)
    for name, layer in swap.layers.items():
        attention = swap.attentions[name]
        layer.reference.set(grid, x.device)
        ours, theirs = layer(x), attention(x)
        torch.testing.assert_close(ours[:, :count], theirs[:, :count])
        patches = x[:, count:]
        kernels = layer.kernels(on_grid(patches, grid))
        weight, bias = attention.qkv.weight[2 * WIDTH :], attention.qkv.bias
        value = F.linear(patches, weight).transpose(1, 2).reshape(1, -1, *grid)
        mixed = F.conv2d(value, kernels.transpose(1, 2).reshape(-1, 1, 3, 3), padding=1, groups=2 * WIDTH)
        mixed = mixed.view(2, WIDTH, -1).transpose(1, 2)
        if bias is not None:
            mixed = mixed + bias[2 * WIDTH :]
        torch.testing.assert_close(ours[:, count:], attention.proj(mixed))
        if not count:
            assert not any(name.startswith(("q_", "k_")) for name in layer.state_dict())


@prefixes
@torch.no_grad()
def test_fit_aims_at_what_the_patches_got_of_the_attention(prefix):
    model, swap = swapped(torch.float64, **PREFIXES[prefix])
    swap.revert()
    count, x = model.num_prefix_tokens, torch.randn(2, 18, WIDTH, dtype=torch.float64)
    for name, attention in swap.attentions.items():
        graft = swap.adapter.find(model)[name]
        values, targets = graft.observe(attention, swap.layers[name], (x,), {})
        q, k, v = attention.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        bias = attention.qkv.bias[2 * WIDTH :]
        mixed = ((q @ k.mT / (WIDTH / HEADS) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(targets, mixed[:, count:] - bias)
        torch.testing.assert_close(values, v.transpose(1, 2).flatten(2)[:, count:] - bias)


def test_closed_form_starts_nearer_than_boxes_and_these_nearer_than_chance():
    errors = [swapped(init=init)[1].report(measure=False).layers for init in ("closed_form", "copy_vo", "random")]
    for fitted, boxes, chance in zip(*errors, strict=True):
        assert fitted.error < boxes.error < chance.error


@torch.no_grad()
def test_error_is_that_of_the_patches_alone():
    _, swap = swapped()
    calls, squares = [], [0.0, 0.0]
    swap.revert()
    attention, layer = swap.attentions["blocks.0.attn"], swap.layers["blocks.0.attn"]
    handle = attention.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    for grid in GRIDS[:2]:
        outputs(swap.model, grid)
        x, theirs = calls.pop()
        layer.reference.set(grid, x.device)
        squares[0] += (layer(x) - theirs)[:, 3:].square().sum()
        squares[1] += theirs[:, 3:].square().sum()
    handle.remove()
    error = swap.report(measure=False).layers[0].error
    assert error == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-4)


@prefixes
def test_every_parameter_of_the_layers_learns(prefix):
    model, swap = swapped(**PREFIXES[prefix], qk_norm=True)
    model.train().forward_features(images((3, 5))).square().sum().backward()
    for layer in swap.layers.values():
        for name, parameter in layer.named_parameters():
            assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_every_way_through_the_model_knows_the_grid():
    model, _ = swapped()
    stir(model)
    x = images((3, 5))
    features = model.forward_features(x)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, features)
    assert maps[-1].shape == (2, WIDTH, 3, 5)
    torch.testing.assert_close(model.forward_head(features), model(x))


@torch.no_grad()
def test_padded_and_fixed_sizes():
    model, _ = swapped(dynamic_img_pad=True)
    assert model(torch.randn(1, 3, 13, 18)).shape == (1, 7)
    assert model.blocks[0].attn.reference.get() == (4, 5)
    fixed = vit(dynamic_img_size=False, img_size=(12, 20))
    swap_attention(fixed, select="all")  # on synthetic images of that size
    assert fixed(images((3, 5))).shape == (2, 7)
    assert fixed.blocks[0].attn.reference.get() == (3, 5)


@torch.no_grad()
def test_class_token_depends_on_the_patches_and_patches_on_their_neighbours_alone():
    model, swap = swapped()
    stir(model)
    layer = swap.layers["blocks.0.attn"]
    nn.init.zeros_(layer.kernel_proj.weight)  # kernels that do not depend on the patches
    layer.reference.set((4, 4), torch.device("cpu"))
    x = torch.randn(1, 19, WIDTH)
    other = x.clone()
    other[0, 3 + 5] += 1  # row 1, column 1
    moved = (layer(x) - layer(other))[0].abs().amax(-1) > 1e-5
    assert moved[:3].all()
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    assert torch.equal(moved[3:], (rows <= 2) & (columns <= 2))


@torch.no_grad()
def test_reverted_to_the_bit():
    model = vit()
    keys, before = list(model.state_dict()), outputs(model)
    swap = swap_attention(model, select="all", calib=[(images(),)])
    assert type(model) is timm.models.VisionTransformer
    assert not torch.equal(outputs(model), before)
    for parameter in (each for layer in swap.layers.values() for each in layer.parameters()):
        parameter.add_(1)
    swap.revert()
    assert list(model.state_dict()) == keys
    assert torch.equal(outputs(model), before)
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())
    assert not hasattr(model, "_swap_record")


@torch.no_grad()
def test_copies_are_whole_and_apart():
    model, _ = swapped()
    stir(model)
    before = outputs(model, (3, 5))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        outputs(other, (6, 2))
        assert torch.equal(outputs(model, (3, 5)), before)
        assert torch.equal(outputs(other, (3, 5)), before)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh, _ = swapped(init="random")
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(outputs(fresh, (3, 5)), before)


def test_gradient_checkpointing_has_the_same_gradients():
    model, _ = swapped()
    stir(model)

    def gradients(forward):
        model.zero_grad()
        sum(forward(images(grid)) for grid in ((2, 6), (4, 4), (6, 2))).backward()  # two of as many tokens
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    for forward in (
        lambda x: model(x).square().sum(),
        lambda x: model.forward_intermediates(x, [0], intermediates_only=True)[0].square().sum(),
    ):
        plain = gradients(forward)
        model.set_grad_checkpointing()
        for ours, wanted in zip(gradients(forward), plain, strict=True):
            torch.testing.assert_close(ours, wanted)
        model.set_grad_checkpointing(False)


@torch.no_grad()
def test_dropout_of_the_attention_stays_with_the_prefix():
    _, swap = swapped(attn_drop_rate=0.5)
    layer, x = swap.layers["blocks.0.attn"].train(), torch.randn(1, 19, WIDTH)
    layer.reference.set((4, 4), x.device)
    first, second = layer(x), layer(x)
    assert not torch.equal(first[:, :3], second[:, :3])
    assert torch.equal(first[:, 3:], second[:, 3:])
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_batch_does_not_matter():
    model, _ = swapped()
    stir(model)
    for grid in GRIDS:
        with torch.no_grad():
            torch.testing.assert_close(model(images(grid)[:1]), outputs(model, grid)[:1], rtol=1e-4, atol=1e-5)


def test_half_swapped_and_then_the_rest():
    model = vit()
    before = outputs(model)
    first = swap_attention(model, select=["blocks.1.attn"], calib=[(images(),)])
    second = swap_attention(model, select="all", calib=[(images(),)])
    assert list(second.layers) == ["blocks.0.attn"]
    assert model.blocks[0].attn.reference is model.blocks[1].attn.reference
    first.revert()
    assert outputs(model, (3, 5)).isfinite().all()
    second.revert()
    assert torch.equal(outputs(model), before)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_in_one_graph_for_all_grids():
    model, _ = swapped()
    stir(model)
    grids = [(4, 4), (3, 5), (6, 2), (2, 7), (4, 4)]
    wanted = [outputs(model, grid) for grid in grids]
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for count, (grid, expected) in enumerate(zip(grids, wanted, strict=True)):
        with torch._dynamo.config.patch(error_on_recompile=count > 1):
            torch.testing.assert_close(outputs(model, grid), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_swapped_stays_as_it_was():
    def gated():
        model = vit()
        model.blocks[1].attn.gate = nn.Linear(WIDTH, WIDTH)
        return model

    for model, options, said in (
        (vit(), {"prefix": "error"}, "3 class or register tokens"),
        (vit(patch_drop_rate=0.5), {}, "patch_drop_rate=0.5"),
        (vit(scale_attn_norm=True), {}, "scale_norm"),
        (gated(), {}, r"blocks\.1\.attn gates"),
        (vit(attn_layer="diff"), {}, "is a timm.*DiffAttention"),
    ):
        keys = list(model.state_dict())
        with pytest.raises(InputError, match=said) as caught:
            swap_attention(model, select="all", init="copy_vo", **options)
        assert "\n" not in str(caught.value)
        assert list(model.state_dict()) == keys
        assert not model.patch_embed._forward_pre_hooks
        assert not model.blocks[0]._forward_hooks
    assert isinstance(vit(patch_drop_rate=0.5).patch_drop, PatchDropout)
    swap_attention(vit(**PREFIXES["none"]), select="all", init="copy_vo", prefix="error")


def test_masks_are_refused():
    model, _ = swapped()
    x = images()
    with pytest.raises(InputError, match="attn_mask was given"):
        model(x, attn_mask=torch.zeros(19, 19))
    with pytest.raises(InputError, match="is_causal was given"):
        model(x, is_causal=True)
