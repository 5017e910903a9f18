"""Models whose tokens fill a volume of frames: the layers against the attention's own way to its output, padding,
storage, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from conftest import slowly
from swap_families import aligned
from torch.utils._pytree import tree_map

import sit_atconv
from sit_atconv.ops.atconv import on_grid
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import regress, swap_attention
from sit_atconv.swap.adapters import adapter_of, known_adapters
from sit_atconv.swap.checking import check_swap
from sit_atconv.swap.joint import JointATConv

GRID, LENGTHS = (3, 2, 4), (5, 3)
COUNT = 24
TINY = {adapter.model.__name__: adapter.tiny for adapter in known_adapters()}
# A kind of graft each, in one pass or in two.
ALONE = {
    "WanTransformer3DModel": "factored", "AnyFlowTransformer3DModel": "full", "LTXVideoTransformer3DModel": "full",
    "LTX2VideoTransformer3DModel": "factored", "AllegroTransformer3DModel": "factored",
    "CosmosTransformer3DModel": "full", "Kandinsky5Transformer3DModel": "full",
}  # fmt: skip
WITH_TEXT = {
    "CogVideoXTransformer3DModel": "factored", "EasyAnimateTransformer3DModel": "full",
    "HunyuanVideoTransformer3DModel": "full", "HunyuanVideo15Transformer3DModel": "factored",
    "MochiTransformer3DModel": "full", "MotifVideoTransformer3DModel": "factored",
}  # fmt: skip
# Of these, the layers with parts that the others have not: sound, padding, text before the video.
FEW = [f"{name}Transformer3DModel" for name in ("Wan", "LTX2Video", "Cosmos", "CogVideoX", "HunyuanVideo", "Mochi")]
PADDED = [name for name in WITH_TEXT if not name.startswith(("Cog", "Easy"))]


def model_of(name):
    """In fp64, but for those that compute parts in fp32 whatever they are in."""
    torch.manual_seed(0)
    return TINY[name]().to(torch.float32 if name.startswith(("Cosmos", "Kandinsky", "Motif")) else torch.float64)


def inputs_of(model, length=LENGTHS[0]):
    found = adapter_of(model).example(model, torch.Generator().manual_seed(1), GRID, length)
    return tree_map(
        lambda each: each.to(model.dtype) if torch.is_tensor(each) and each.is_floating_point() else each, found
    )


def moved(swap):
    """The swap with kernels that follow their input and shares of all sizes."""
    torch.manual_seed(2)
    for layer in swap.layers.values():
        for name, parameter in layer.named_parameters():
            if name.endswith(("kernel_proj.weight", "kernel_gen.weight", "difference_control", "text_share")):
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    return swap


def convolved(layer, x, v):
    """The values v (B, T, H, W, C) by torch's convolution with the kernels that x calls for, and then those in time."""
    kernels = layer.kernels(x).mT.reshape(-1, 1, *layer.sizes)
    padding = [size // 2 for size in layer.sizes]
    y = F.conv3d(v.movedim(-1, 1).flatten(0, 1)[None], kernels, padding=padding, groups=len(kernels))
    y = y.unflatten(1, (len(v), -1))[0].movedim(1, -1)
    return y if layer.time is None else convolved(layer.time, x, y)


def formula(layer, tokens, text_first, q, k, v, attn_mask=None, **_):
    """What stands in for softmax attention (B, heads, S, head_dim) over the video's tokens (B, N, dim) and a text."""
    values = v[:, :, -COUNT:] if text_first else v[:, :, :COUNT]
    mixed = convolved(layer, on_grid(tokens, GRID), values.transpose(1, 2).flatten(2).unflatten(1, GRID))
    mixed = mixed.flatten(1, 3).unflatten(-1, (v.shape[1], -1)).transpose(1, 2)
    if not isinstance(layer, JointATConv):
        return mixed
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    of_video = torch.arange(q.shape[2]) < COUNT
    of_video = of_video.flip(0) if text_first else of_video
    read = logits[:, :, of_video].masked_fill(of_video, -torch.inf).softmax(-1) @ v
    share = layer.text_share.sigmoid()[:, None, None]
    exact = logits[:, :, ~of_video].softmax(-1).nan_to_num() @ v
    mixed = (1 - share) * mixed + share * read
    return torch.cat([exact, mixed] if text_first else [mixed, exact], 2)


@pytest.mark.parametrize("name", [*FEW, *slowly(name for name in ALONE | WITH_TEXT if name not in FEW)])
@torch.no_grad()
def test_layers_are_the_formula_within_their_attention(name, monkeypatch):
    """The attention runs by its own processor, with the formula in the place of softmax attention alone."""
    model, seen = model_of(name), {}
    for key, parameter in model.named_parameters():  # the bias of its values goes to the output map, unless gated
        if name in ALONE and "LTX2" not in name and key.endswith(("attn1.to_v.bias", "self_attention.to_value.bias")):
            parameter.zero_()
    inputs = inputs_of(model)
    swap = swap_attention(model, "all", joint="split", calib=[inputs], volume=(ALONE | WITH_TEXT)[name])
    layers = moved(swap).layers
    for key, layer in layers.items():
        layer.register_forward_hook(lambda *call, key=key: seen.update({key: call[1:]}), with_kwargs=True)
    model(**inputs)
    assert set(seen) == set(layers)
    original = F.scaled_dot_product_attention
    for key, (args, kwargs, ours) in seen.items():
        layer, tokens = layers[key], kwargs.get("hidden_states", args[0] if args else None)
        changed = [{}]
        if "LTX2" in name:
            changed += [{"perturbation_mask": torch.full((1, 1, 1), 0.3).double()}, {"all_perturbed": True}]
        for each in changed:
            ours = layer(*args, **kwargs | each)
            monkeypatch.setattr(
                F, "scaled_dot_product_attention",
                lambda query, key, value, layer=layer, tokens=tokens, **rest: formula(
                    layer, tokens, name.startswith(("Cog", "Easy")), query, key, value, **rest
                ),
            )  # fmt: skip
            theirs = swap.attentions[key](*args, **kwargs | each)
            monkeypatch.setattr(F, "scaled_dot_product_attention", original)
            last = getattr(swap.attentions[key], "context_pre_only", None)  # whose text nothing reads
            for mine, wanted in zip(*([out] if torch.is_tensor(out) else out for out in (ours, theirs)), strict=True):
                if mine is not None and not (last and wanted is not theirs[0]):
                    counts = torch.ones(mine.shape[:2], dtype=torch.bool)  # padding is nobody's
                    mask = kwargs.get("attention_mask")
                    counts = mask.bool() if mask is not None and mask.shape == counts.shape else counts
                    torch.testing.assert_close(mine[counts], wanted[counts], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PADDED)
@torch.no_grad()
def test_a_padded_batch_is_its_samples_alone(name):
    model = model_of(name)
    calls = [inputs_of(model, length) for length in LENGTHS]
    moved(swap_attention(model, "all", joint="split", calib=calls))
    batch = {}
    for key, first in calls[0].items():
        second = calls[1][key]
        if torch.is_tensor(first) and first.shape != second.shape:  # the text, and its mask
            fill = 9.0 if first.is_floating_point() else 0
            second = F.pad(second, (0, 0) * (first.ndim - 2) + (0, first.shape[1] - second.shape[1]), value=fill)
        batch[key] = torch.cat([first, second]) if torch.is_tensor(first) else first
    for mine, call in zip(model(**batch).sample, calls, strict=True):
        torch.testing.assert_close(mine, model(**call).sample[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("volume", ["full", "factored"])
def test_a_volume_is_learnt_stored_and_reported(volume, tmp_path):
    model = model_of("WanTransformer3DModel").float()
    inputs = inputs_of(model)
    swap = swap_attention(model, "even", volume=volume, calib=[inputs])
    assert (model.config["atconv"]["volume"], swap.report().layers[0].macs_after > 0) == (volume, True)
    errors = regress(swap, [inputs], steps=30, lr=1e-2)
    assert errors[-1] < 0.9 * errors[0]
    model.save_pretrained(tmp_path)
    loaded = aligned(sit_atconv.ATConvWanTransformer3DModel.from_pretrained(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, model.eval()(**inputs).sample)
    other = {"full": "factored", "factored": "full"}[volume]
    with pytest.raises(InputError, match=f"volume='{other}': this model has layers swapped with '{volume}'"):
        swap_attention(model, "all", volume=other)


@torch.no_grad()
def test_coordinates_that_fill_the_volume_tell_it_and_others_are_refused():
    model = model_of("LTXVideoTransformer3DModel")
    inputs = inputs_of(model)
    swap_attention(model, "all", calib=[inputs])
    coords = torch.stack(torch.meshgrid(*map(torch.arange, GRID), indexing="ij")).flatten(1)[None].double()
    placed = {name: each for name, each in inputs.items() if name not in ("num_frames", "height", "width")}
    scaled = coords * torch.tensor([20.0, 2048.0, 2048.0])[:, None]  # what the model divides them by
    torch.testing.assert_close(model(**placed, video_coords=scaled).sample, model(**inputs).sample)
    for changed in (coords.flip(2), coords.index_fill(2, torch.tensor([3]), 0.0), coords.roll(1, 2)):
        with pytest.raises(InputError, match="video_coords of 24 tokens name a volume of 3 x 2 x 4"):
            model(**placed, video_coords=changed)
    with pytest.raises(InputError, match=r"\(3, 2, 5\): these are no volume of 24 tokens"):
        model(**inputs | {"width": 5})


@torch.no_grad()
def test_what_a_swapped_model_does_not_stand_for_is_refused():
    cases = {
        "LTX2VideoTransformer3DModel": ({"video_self_attention_mask": torch.ones(1, 24, 24)}, "attention_mask was"),
        "AllegroTransformer3DModel": ({"attention_mask": torch.ones(1, 3, 4, 8)}, "attention_mask was given"),
        "Kandinsky5Transformer3DModel": ({"sparse_params": {"to_fractal": True}}, "sparse_params were given"),
    }  # fmt: skip
    for name, (changed, said) in cases.items():
        model = model_of(name)
        inputs = inputs_of(model)
        swap_attention(model, "all", init="copy_vo", calib=[inputs])
        with pytest.raises(InputError, match=said):
            model(**inputs | changed)
    causal, fused, image = (model_of(f"{name}Transformer3DModel") for name in ("SkyReelsV2", "Wan", "Latte"))
    causal.register_to_config(num_frame_per_block=3)
    fused.fuse_qkv_projections()
    for model, options, said in (
        (causal, {}, "num_frame_per_block=3"),
        (fused, {}, "fused projections"),
        (image, {"volume": "full"}, "volume='full': the tokens of LatteTransformer3DModel"),
    ):
        with pytest.raises(InputError, match=said):
            swap_attention(model, "all", **options)


def test_blocks_whose_text_is_a_video_keep_their_attention():
    """Those of Motif-Video's decoder: split, they would have three of four products between tokens left."""
    model = model_of("MotifVideoTransformer3DModel")
    assert (model.config.num_single_layers, model.config.num_decoder_layers) == (2, 1)
    swap = swap_attention(model, "all", joint="split", calib=[inputs_of(model)])
    assert list(swap.layers) == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    with pytest.raises(InputError, match=r"single_transformer_blocks\.1\.attn"):
        swap_attention(model_of("MotifVideoTransformer3DModel"), ["single_transformer_blocks.1.attn"], joint="split")
    check = check_swap(model_of("MotifVideoTransformer3DModel").to("meta"), GRID, 5)
    found = {kind.name: kind.layers for kind in check.kinds}
    assert found == {"transformer_blocks.*.attn": 1, "single_transformer_blocks.*.attn": 1}
