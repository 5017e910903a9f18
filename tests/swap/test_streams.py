"""Models whose text and image attend together: the layers against the attention's own way to its output, padding, and
what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from sit_atconv.ops.atconv import on_grid
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import swap_attention
from sit_atconv.swap.adapters import adapter_of
from sit_atconv.swap.families import (
    auraflow,
    chroma,
    cogview,
    ernie_image,
    flux2,
    flux3,
    flux_like,
    hunyuan_image,
    krea2,
    lumina2,
    qwen_image,
    z_image,
)  # fmt: skip
from sit_atconv.swap.joint import JointATConv

GRID, LENGTHS = (3, 4), (5, 3)
COUNT = GRID[0] * GRID[1]
PADDED = {
    "chroma": "attention_mask", "hunyuan_image": "encoder_attention_mask", "krea2": "encoder_attention_mask",
    "lumina2": "encoder_attention_mask", "qwen_image": "encoder_hidden_states_mask",
}  # fmt: skip
MODELS = {
    "auraflow": auraflow._tiny, "bria": flux_like._tiny_bria, "chroma": chroma._tiny, "cogview3": cogview._tiny_3,
    "cogview4": cogview._tiny_4, "ernie_image": ernie_image._tiny, "fibo": flux_like._tiny_fibo, "flux2": flux2._tiny,
    "flux3": flux3._tiny, "hunyuan_image": hunyuan_image._tiny, "krea2": krea2._tiny,
    "longcat": flux_like._tiny_longcat, "lumina2": lumina2._tiny, "ovis": flux_like._tiny_ovis,
    "qwen_image": qwen_image._tiny, "z_image": z_image._tiny,
}  # fmt: skip
RAGGED = (*PADDED, "ernie_image", "fibo", "z_image")  # those that take texts of several lengths in a batch
IMAGE_FIRST = ("ernie_image", "hunyuan_image", "z_image")
families = pytest.mark.parametrize("kind", MODELS)


def model_of(kind):
    torch.manual_seed(0)
    return MODELS[kind]().double()


def as_double(inputs):
    return tree_map(lambda each: each.double() if torch.is_tensor(each) and each.is_floating_point() else each, inputs)


def alone(kind, model):
    """A call for each of two samples, of texts of two lengths where the model takes such."""
    lengths = LENGTHS if kind in RAGGED else (5, 5)
    generator = torch.Generator().manual_seed(1)
    calls = [as_double(adapter_of(model).example(model, generator, GRID, length)) for length in lengths]
    for call, count in zip(calls, (4, 2), strict=True) if kind == "cogview4" else ():  # its mask adds to logits
        call["attention_mask"] = (torch.arange(5) < count).long().expand(2, -1)
    return [
        {
            name: each[:1] if torch.is_tensor(each) and each.ndim and each.shape[0] == 2 else each
            for name, each in call.items()
        }
        for call in calls
    ]


def filled(first, second):
    """Texts (1, T, ...) in a batch; the shorter is filled up with large numbers."""
    missing = first.shape[1] - second.shape[1]
    return torch.cat([first, F.pad(second, (0, 0) * (first.ndim - 2) + (0, missing), value=9.0)])


def together(kind, calls):
    """Both in a batch: the shorter text is padded, and a mask or a length says so."""
    first, second = calls
    batch = dict(first)
    for name, each in first.items():
        if name == "text_encoder_layers":
            batch[name] = [filled(*both) for both in zip(each, second[name], strict=True)]
        elif isinstance(each, list):
            batch[name] = each + second[name]
        elif name in ("encoder_hidden_states", "text_bth"):
            batch[name] = filled(each, second[name])
        elif torch.is_tensor(each) and not name.endswith("_ids"):
            batch[name] = torch.cat([each, second[name]]) if each.shape == second[name].shape else each
    counts = torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]
    whole = F.pad(counts, (0, COUNT), value=True)
    if kind in PADDED:
        batch[PADDED[kind]] = whole if kind == "chroma" else counts
    elif kind == "fibo":
        batch["joint_attention_kwargs"] = {"attention_mask": whole[:, None, None]}
    return batch


def swapped(kind):
    """The model with kernels that follow their input and shares of all sizes, its swap, and a batch."""
    model = model_of(kind)
    calls = alone(kind, model)
    swap = swap_attention(model, "all", joint="split", calib=[together(kind, calls)])
    torch.manual_seed(2)
    for layer in swap.layers.values():
        for name in ("kernel_proj.weight", "kernel_gen.weight", "difference_control", "text_share"):
            if (parameter := getattr(layer, name, None)) is None and "." in name:
                parameter = layer.get_parameter(name)
            if parameter is not None:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model, swap, calls


def places_of(kind, length, mask, batch):
    """Where the image's tokens are in what the attention works on, (B, N)."""
    ends = torch.full((batch, 1), COUNT if kind in IMAGE_FIRST else length)
    if kind == "lumina2" and mask is not None:
        ends = mask.sum(1, keepdim=True)
    return torch.arange(COUNT) + ends - COUNT


def formula(kind, layer, tokens, q, k, v, attn_mask=None, **_):
    """What stands in for softmax attention (B, heads, S, head_dim), written out in the order that it comes in."""
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    flat = attn_mask.reshape(len(q), -1) if attn_mask is not None and attn_mask.shape[-2] == 1 else None
    places = places_of(kind, q.shape[2], flat, len(q))
    of_image = torch.zeros(len(q), q.shape[2], dtype=torch.bool).scatter(1, places, True)
    index = places[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    values = v.gather(2, index).transpose(2, 3).flatten(1, 2).unflatten(2, GRID)  # (B, channels, H, W)
    kernels = layer.kernels(on_grid(tokens, GRID)).mT.reshape(-1, 1, 3, 3)
    convolved = F.conv2d(values.flatten(0, 1)[None], kernels, padding=1, groups=len(kernels))
    convolved = convolved.view(len(q), q.shape[1], q.shape[3], COUNT).mT
    if not isinstance(layer, JointATConv):
        return torch.zeros_like(q).scatter(2, index, convolved)
    text_alone = logits.masked_fill(of_image[:, None, None], -torch.inf).softmax(-1) @ v
    share = layer.text_share.sigmoid()[:, None, None]
    mixed = (1 - share) * convolved + share * text_alone.gather(2, index)
    # Of an image whose text is padding alone, the attention's mass is on the image: so is the layer's.
    mixed = torch.where(text_alone.gather(2, index).isnan(), convolved, mixed)
    return (logits.softmax(-1).nan_to_num() @ v).scatter(2, index, mixed)


@families
@torch.no_grad()
def test_layers_are_the_formula_within_their_attention(kind, monkeypatch):
    """The attention runs by its own processor, with the formula in the place of softmax attention alone: names, norms,
    rotary positions, heads that share, MLPs within and output maps are its own."""
    model, swap, calls = swapped(kind)
    batch, seen = together(kind, calls), {}
    layers = swap.layers
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *call, name=name: seen.update({name: call[1:]}), with_kwargs=True)
    model(**batch)
    assert set(seen) == set(layers)
    original = F.scaled_dot_product_attention
    for name, (args, kwargs, ours) in seen.items():
        layer, tokens = layers[name], kwargs.get("hidden_states", args[0] if args else None)
        places = places_of(kind, tokens.shape[1], kwargs.get("attention_mask"), len(tokens))
        if tokens.shape[1] > COUNT:
            tokens = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))

        def attend(query, key, value, layer=layer, tokens=tokens, **options):
            return formula(kind, layer, tokens, query, key, value, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
        theirs = swap.attentions[name](*args, **kwargs)
        monkeypatch.setattr(F, "scaled_dot_product_attention", original)
        for mine, wanted in zip(*([each] if torch.is_tensor(each) else each for each in (ours, theirs)), strict=True):
            assert mine.shape == wanted.shape
            mask = kwargs.get("attention_mask", kwargs.get("encoder_hidden_states_mask"))
            counts = torch.ones(mine.shape[:2], dtype=torch.bool)  # padding is nobody's
            if mask is not None and mask.shape == counts.shape:
                counts = mask
            torch.testing.assert_close(mine[counts], wanted[counts], rtol=1e-5, atol=1e-6)


@families
@torch.no_grad()
def test_a_padded_batch_is_its_samples_alone(kind):
    model, _, calls = swapped(kind)
    both = model(**together(kind, calls)).sample
    for mine, call in zip(both, calls, strict=True):
        torch.testing.assert_close(mine, model(**call).sample[0], rtol=1e-5, atol=1e-6)


def test_what_makes_no_grid_is_refused():
    cases = {
        "qwen_image": [
            ({"img_shapes": [[(1, 3, 4), (1, 2, 2)]]}, "one image a sample"),
            ({"img_shapes": [[(1, 3, 4)], [(1, 4, 3)]]}, "of one size in a batch"),
            ({"img_shapes": [[(2, 3, 2)]]}, "of one frame"),
            ({"img_shapes": None}, "img_shapes: none were given"),
            ({"attention_kwargs": {"attention_mask": torch.ones(1, 17)}}, "attention_mask was given"),
        ],
        "z_image": [
            ({"x": [[torch.zeros(4, 1, 6, 8)]]}, "several images in one sequence"),
            ({"x": [torch.zeros(4, 1, 6, 8), torch.zeros(4, 1, 8, 6)]}, "one size in a batch"),
            ({"x": [torch.zeros(4, 2, 6, 8)]}, "of one frame"),
        ],
        "flux2": [
            ({"img_ids": torch.tensor([[10 * (i > 5), i // 4, i % 4, 0] for i in range(12)])}, "number 2 images"),
            ({"kv_cache_mode": "extract"}, "kv_cache_mode was given"),
        ],
        "flux3": [({"image_cond_hidden_states": torch.zeros(1, 4, 4)}, "image_cond_hidden_states was given")],
        "chroma": [({"attention_mask": torch.arange(17)[None] < 16}, "leaves out image tokens")],
        "hunyuan_image": [({"hidden_states": torch.zeros(1, 4, 2, 3, 4)}, "without frames")],
    }
    for kind, refused in cases.items():
        model = MODELS[kind]()
        calib = [adapter_of(model).example(model, torch.Generator().manual_seed(0), GRID, 5)]
        swap_attention(model, "all", joint="split", init="copy_vo", calib=calib)
        for changed, said in refused:
            with pytest.raises(InputError, match=said):
                model(**calib[0] | changed)


@torch.no_grad()
def test_joint_attention_stays_unless_told_and_the_refiners_go():
    for kind, wanted in (
        ("z_image", ["noise_refiner.0.attention"]), ("lumina2", ["noise_refiner.0.attn"]),
        ("flux3", ["mode_blocks.image.0.attn"]),
    ):  # fmt: skip
        model = MODELS[kind]()
        calib = [adapter_of(model).example(model, torch.Generator().manual_seed(0), GRID, 5)]
        assert list(swap_attention(model, "all", calib=calib).layers) == wanted
    with pytest.raises(InputError, match=r"joint='split'"):
        swap_attention(MODELS["krea2"](), "all")


def test_an_image_whose_text_is_padding_alone_is_all_convolution():
    """As in the attention, whose mass is then on the image; gradients are finite too."""
    model, swap, calls = swapped("qwen_image")
    batch = together("qwen_image", calls)
    batch["encoder_hidden_states_mask"][1] = False
    output = model(**batch).sample
    output.square().sum().backward()
    assert output.isfinite().all()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    seen = []
    layer = next(iter(swap.layers.values()))
    layer.to_out[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
        layer.text_share.add_(3)
        model(**batch)
    before, after = seen
    torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=1e-6)  # no share of a text that is not there
    assert not torch.allclose(after[0], before[0], rtol=1e-2)
