"""Joint attention split: the text as before, the image against an oracle in fp64, and what a swapped model must do."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from joint_models import HEAD_DIM, HEADS, TEXT, flux, flux_inputs, raster, sd3, sd3_inputs

from sit_atconv import swap_attention
from sit_atconv.ops.atconv import on_grid
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import calibration, regress
from sit_atconv.swap.families import ATConvFluxTransformer2DModel, ATConvSD3Transformer2DModel
from sit_atconv.swap.joint import JointATConv

GRIDS = [(3, 4), (5, 2), (4, 4), (1, 6)]


KINDS = {
    "sd3": (sd3, sd3_inputs, ATConvSD3Transformer2DModel),
    "flux": (flux, flux_inputs, ATConvFluxTransformer2DModel),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def swapped(kind, init="closed_form", dtype=torch.float32, **options):
    make, inputs, _ = KINDS[kind]
    model = make().to(dtype)
    calib = [as_dtype(inputs(grid, seed=seed), dtype) for seed, grid in enumerate(GRIDS[:2])]
    swap = swap_attention(model, select="all", joint="split", init=init, calib=calib, **options)
    return model, swap, lambda *args, **kwargs: as_dtype(inputs(*args, **kwargs), dtype)


def as_dtype(inputs, dtype):
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}


def stir(model, scale=0.3):
    """Kernels that depend on the input, and shares of all sizes."""
    torch.manual_seed(1)
    for layer in (each for each in model.modules() if isinstance(each, JointATConv)):
        for name in ("kernel_proj.weight", "kernel_gen.weight", "difference_control", "text_share"):
            layer.get_parameter(name).data.add_(scale * torch.randn_like(layer.get_parameter(name)))


def calls_of(model, names, inputs):
    """The arguments and the output of the modules of these names in a forward pass."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, name=name: seen.update({name: (args, kwargs, output)}), with_kwargs=True
        )
        for name in names
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def projected(attention, names, norms, tokens, angles):
    """Queries, keys and values (B, n, heads, head_dim), rotated as complex numbers."""
    made = [getattr(attention, name)(tokens).unflatten(-1, (HEADS, HEAD_DIM)) for name in names]
    made[:2] = [getattr(attention, norm)(each) for norm, each in zip(norms, made, strict=False)]
    if angles is not None:
        cos, sin = (table[:, None, ::2].double() for table in angles)
        for index in (0, 1):
            as_complex = torch.view_as_complex(made[index].double().unflatten(-1, (-1, 2)).contiguous())
            made[index] = torch.view_as_real(as_complex * torch.complex(cos, sin)).flatten(-2)
    return [each.double() for each in made]


def softmax_over(q, k):
    return torch.einsum("bihd,bjhd->bhij", q, k).div(HEAD_DIM**0.5).softmax(-1)


def read(q, k, v):
    return torch.einsum("bhij,bjhd->bihd", softmax_over(q, k), v)


def streams_of(attention, kwargs, grid):
    """Text and image, each (q, k, v), as the attention projects them; its text length and image tokens."""
    tokens, text, angles = kwargs["hidden_states"], kwargs.get("encoder_hidden_states"), kwargs.get("image_rotary_emb")
    maps, norms = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
    if text is None:
        length = tokens.shape[1] - grid[0] * grid[1]
        both = projected(attention, maps, norms, tokens, angles)
        return [each[:, :length] for each in both], [each[:, length:] for each in both], tokens[:, length:]
    length = text.shape[1]
    of_text, of_image = (None, None) if angles is None else ([t[:length] for t in angles], [t[length:] for t in angles])
    ours = projected(attention, maps, norms, tokens, of_image)
    added = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
    return projected(attention, *added, text, of_text), ours, tokens


def convolved(layer, tokens, v, grid):
    kernels = layer.kernels(on_grid(tokens, grid)).double()  # (B, K, C)
    batch, _, channels = kernels.shape
    image = v.flatten(2).transpose(1, 2).unflatten(-1, grid).reshape(1, batch * channels, *grid)
    weight = kernels.transpose(1, 2).reshape(batch * channels, 1, 3, 3)
    out = F.conv2d(image, weight, padding=1, groups=batch * channels)
    return out.view(batch, channels, -1).transpose(1, 2)


@pytest.mark.parametrize("grid", GRIDS)
@kinds
@torch.no_grad()
def test_text_as_the_attention_image_as_the_oracle(kind, grid):
    model, swap, inputs = swapped(kind, dtype=torch.float64)
    stir(model)
    names = [name for name, layer in swap.layers.items() if isinstance(layer, JointATConv)]
    for name, (_, kwargs, output) in calls_of(model, names, inputs(grid)).items():
        layer, attention = swap.layers[name], swap.attentions[name]
        text, image, tokens = streams_of(attention, kwargs, grid)
        share = layer.text_share.sigmoid()[:, None]
        mixed = (1 - share) * convolved(layer, tokens, image[2], grid).unflatten(-1, (HEADS, -1))
        mixed = (mixed + share * read(image[0], text[1], text[2])).flatten(2)
        theirs = attention(**kwargs)
        if "single" in name:
            ours_text, ours_image = output.split([TEXT, grid[0] * grid[1]], 1)
            text_wanted = theirs[:, :TEXT]
        else:
            ours_image, ours_text = output
            mixed, text_wanted = attention.to_out[0](mixed), theirs[1]
        torch.testing.assert_close(ours_image, mixed, rtol=1e-5, atol=1e-6)  # rotary tables are fp32
        if name == "transformer_blocks.2.attn":  # SD3's last: nothing reads the text
            assert ours_text.shape == text_wanted.shape
            assert layer.add_q_proj is None
            assert layer.to_k is None
        else:
            torch.testing.assert_close(ours_text, text_wanted, rtol=1e-5, atol=1e-6)


@kinds
@torch.no_grad()
def test_shares_start_at_the_teachers_text_mass(kind):
    model, swap, inputs = swapped(kind)
    swap.revert()
    masses = {name: [] for name, layer in swap.layers.items() if isinstance(layer, JointATConv)}
    for seed, grid in enumerate(GRIDS[:2]):
        for name, (_, kwargs, _) in calls_of(model, masses, inputs(grid, seed=seed)).items():
            text, image, _ = streams_of(swap.attentions[name], kwargs, grid)
            attention = softmax_over(image[0], torch.cat([text[1], image[1]], 1))
            masses[name].append(attention[..., :TEXT].sum(-1).mean((0, 2)))
    for name, found in masses.items():
        share = swap.layers[name].text_share.sigmoid().double()
        torch.testing.assert_close(share, torch.stack(found).mean(0), rtol=1e-4, atol=1e-5)
        assert share.std() > 1e-3, "heads differ"


@kinds
@torch.no_grad()
def test_fit_aims_at_what_the_share_leaves_of_the_teacher(kind):
    model, swap, inputs = swapped(kind)
    swap.revert()
    grid = GRIDS[1]
    names = [name for name, layer in swap.layers.items() if isinstance(layer, JointATConv)]
    for name, (_, kwargs, _) in calls_of(model, names, inputs(grid)).items():
        layer, attention = swap.layers[name], swap.attentions[name]
        graft = swap.adapter.find(model)[name]
        text, image, _ = streams_of(attention, kwargs, grid)
        values, targets = graft.observe(attention, layer, (), kwargs)
        share = layer.text_share.sigmoid()[:, None]
        ours = (1 - share) * targets.unflatten(-1, (HEADS, -1)) + share * read(image[0], text[1], text[2])
        both = [torch.cat(each, 1) for each in zip(text, image, strict=True)]
        torch.testing.assert_close(ours, read(image[0], both[1], both[2]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values.double(), image[2].flatten(2), rtol=1e-4, atol=1e-5)


@kinds
def test_closed_form_starts_nearer_than_boxes_and_these_nearer_than_chance(kind):
    errors = {
        init: swapped(kind, init)[1].report(measure=False).layers for init in ("closed_form", "copy_vo", "random")
    }
    for fitted, boxes, chance in zip(*errors.values(), strict=True):
        assert fitted.error < boxes.error < chance.error, fitted.name


@torch.no_grad()
def test_report_counts_every_product_and_the_error_of_the_image_alone():
    model, swap, inputs = swapped("flux")
    row = next(each for each in swap.report().layers if each.name == "single_transformer_blocks.1.attn")
    batch, image, dim, taps = 2, GRIDS[0][0] * GRIDS[0][1], HEADS * HEAD_DIM, 9
    tokens = TEXT + image
    maps = 3 * tokens * dim**2
    assert row.macs_before == batch * (maps + 2 * tokens**2 * dim)
    kernels = taps * dim**2 + taps**2 * dim + image * taps * dim
    assert row.macs_after == batch * (maps + kernels + 2 * TEXT * (tokens + image) * dim)
    swap.revert()
    squares = [0.0, 0.0]
    for seed, grid in enumerate(GRIDS[:2]):
        _, kwargs, theirs = calls_of(model, [row.name], inputs(grid, seed=seed))[row.name]
        layer = swap.layers[row.name]
        layer.reference.set(grid, torch.device("cpu"))
        squares[0] += (layer(**kwargs) - theirs)[:, TEXT:].square().sum()
        squares[1] += theirs[:, TEXT:].square().sum()
    assert row.error == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-4)


@kinds
def test_random_starts_take_nothing_from_the_attention(kind):
    _, swap, _ = swapped(kind, init="random")
    for layer in (each for each in swap.layers.values() if isinstance(each, JointATConv)):
        for name, parameter in layer.named_parameters():
            if "norm" in name or name == "text_share":
                assert torch.equal(parameter, torch.full_like(parameter, "norm" in name)), name


@kinds
def test_every_parameter_of_the_layers_learns(kind):
    model, swap, inputs = swapped(kind)
    model.train()(**inputs((3, 4))).sample.square().sum().backward()
    for layer in swap.layers.values():
        for name, parameter in layer.named_parameters():
            assert parameter.grad.abs().sum() > 0, name


@kinds
@torch.no_grad()
def test_saved_and_loaded_to_the_bit(kind, tmp_path):
    model, _, inputs = swapped(kind)
    stir(model)
    model.save_pretrained(tmp_path)
    cls = KINDS[kind][2]
    assert type(model) is cls
    for options in ({}, {"low_cpu_mem_usage": False}):
        loaded = cls.from_pretrained(tmp_path, **options)
        assert torch.equal(loaded(**inputs((3, 4))).sample, model(**inputs((3, 4))).sample)
    with torch.device("meta"):
        empty = cls.from_config(model.config)
    assert {name: each.shape for name, each in empty.state_dict().items()} == {
        name: each.shape for name, each in model.state_dict().items()
    }
    assert all(each.is_meta for each in empty.parameters())


@kinds
@torch.no_grad()
def test_reverted_to_the_bit(kind):
    make, inputs, _ = KINDS[kind]
    model = make()
    keys, before = list(model.state_dict()), model(**inputs((3, 4))).sample
    swap = swap_attention(model, select="all", joint="split", calib=[inputs((3, 4))])
    assert not torch.equal(model(**inputs((3, 4))).sample, before)
    for layer in swap.layers.values():  # nothing is shared with the attention
        for parameter in layer.parameters():
            parameter.add_(1)
    swap.revert()
    assert type(model) is type(make())
    assert list(model.state_dict()) == keys
    assert not model._forward_pre_hooks
    assert torch.equal(model(**inputs((3, 4))).sample, before)


@kinds
@torch.no_grad()
def test_copies_are_whole_and_apart(kind):
    model, _, inputs = swapped(kind)
    stir(model)
    before = model(**inputs((3, 4))).sample
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(**inputs((5, 2)))  # a grid of its own, which the first must not see
        assert torch.equal(model(**inputs((3, 4))).sample, before)
        assert torch.equal(other(**inputs((3, 4))).sample, before)


@kinds
def test_gradient_checkpointing_has_the_same_gradients(kind):
    model, _, inputs = swapped(kind)
    stir(model)

    def gradients():
        model.zero_grad()
        losses = [model(**inputs(grid)).sample.square().sum() for grid in ((3, 4), (4, 3))]
        sum(losses).backward()  # the first pass's blocks are computed anew after the second pass
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    plain = gradients()
    model.enable_gradient_checkpointing()
    for ours, wanted in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, wanted)


@kinds
@torch.no_grad()
def test_prompt_reaches_the_image(kind):
    model, _, inputs = swapped(kind)
    first, second = inputs((3, 4)), inputs((3, 4))
    second["encoder_hidden_states"] = second["encoder_hidden_states"] + 1
    difference = (model(**first).sample - model(**second).sample).norm() / model(**first).sample.norm()
    assert difference > 1e-3


@kinds
@torch.no_grad()
def test_batch_does_not_matter_nor_what_came_before(kind):
    model, _, inputs = swapped(kind)
    stir(model)
    for grid in [(3, 4), (4, 3), (2, 6), (3, 4)]:
        both = inputs(grid)
        whole = model(**both).sample
        for index in range(2):
            one = {n: each[index : index + 1] if n not in ("img_ids", "txt_ids") else each for n, each in both.items()}
            torch.testing.assert_close(model(**one).sample[0], whole[index], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "whole"), [("sd3", True), ("flux", True), ("flux", False)])
@torch.no_grad()
def test_compiled_in_one_graph_for_all_grids(kind, whole):
    make, inputs, _ = KINDS[kind]
    model = make(**({"num_layers": 2} if kind == "sd3" else {"num_layers": 1, "num_single_layers": 1}))
    swap_attention(model, select="all", joint="split", init="copy_vo", calib=[inputs((3, 4))])
    stir(model)
    grids = [(3, 4), (5, 2), (4, 4), (2, 6), (3, 4)]
    wanted = [model(**inputs(grid)).sample for grid in grids]
    torch._dynamo.reset()
    compiled = model
    if whole:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for count, (grid, expected) in enumerate(zip(grids, wanted, strict=True)):
        with torch._dynamo.config.patch(error_on_recompile=count > 1):
            torch.testing.assert_close(compiled(**inputs(grid)).sample, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@kinds
def test_the_attention_backend_is_the_texts_too(kind, monkeypatch):
    model, _, inputs = swapped(kind)
    used = []

    def recording(*args, backend=None, **kwargs):
        used.append(backend)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    def output():
        used.clear()
        with torch.no_grad():
            return model(**inputs(GRIDS[0])).sample

    monkeypatch.setattr("sit_atconv.layers.attention.dispatch_attention_fn", recording)
    expected = output()
    layers = sum(isinstance(each, JointATConv) for each in model.modules())
    assert len(used) >= layers > 1
    assert set(used) == {None}
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(output(), expected, rtol=1e-4, atol=1e-5)
    assert set(used) == {AttentionBackendName._NATIVE_MATH}
    assert torch.equal(copy.deepcopy(model)(**inputs(GRIDS[0])).sample, output())
    with pytest.raises(ValueError, match="backend"):
        model.set_attention_backend("no_such_backend")
    output()
    assert set(used) == {AttentionBackendName._NATIVE_MATH}
    model.reset_attention_backend()
    output()
    assert set(used) == {None}


@kinds
def test_regression_in_half_precision_asks_no_backend_for_fp32(kind, monkeypatch):
    model, swap, inputs = swapped(kind, dtype=torch.bfloat16)
    given = inputs(GRIDS[0])
    model.set_attention_backend("_native_math")  # as flash is set, which takes half precision alone
    used = []

    def recording(query, *args, backend=None, **kwargs):
        used.append((query.dtype, backend))
        return dispatch_attention_fn(query, *args, backend=backend, **kwargs)

    monkeypatch.setattr("sit_atconv.layers.attention.dispatch_attention_fn", recording)
    history = regress(swap, [given], steps=2)
    assert len(history) == 2
    assert set(used) == {(torch.float32, AttentionBackendName.NATIVE)}
    used.clear()
    with torch.no_grad():
        model(**given)
    assert {backend for _, backend in used} == {AttentionBackendName._NATIVE_MATH}


def test_sd3_keeps_its_joint_attention_unless_told():
    model = sd3()
    swap = swap_attention(model, select="all", calib=[sd3_inputs((3, 4))])
    assert list(swap.layers) == ["transformer_blocks.0.attn2"]
    assert model(**sd3_inputs((3, 4))).sample.shape == (2, 4, 6, 8)
    with pytest.raises(InputError, match=r"3 layers.*joint='split'"):
        swap_attention(sd3(dual_attention_layers=()), select="all", init="copy_vo")


def test_sd3_without_norms():
    model = sd3(qk_norm=None)
    swap = swap_attention(model, select="all", joint="split", calib=[sd3_inputs((3, 4))])
    assert not any("norm" in name for name in swap.layers["transformer_blocks.1.attn"].state_dict())
    model(**sd3_inputs((5, 2))).sample.sum().backward()


@torch.no_grad()
def test_flux_has_examples_of_its_own_and_guidance():
    model = flux(num_layers=1, num_single_layers=1, guidance_embeds=True)
    swap = swap_attention(model, select="all", joint="split", init="copy_vo")
    assert all(0 < row.error < float("inf") for row in swap.report(measure=False).layers)
    assert swap.sites[0].grid == (64, 64)


def test_flux_reads_rasters_of_every_kind_and_refuses_the_rest():
    model, swap, inputs = swapped("flux")
    layer, grids = next(iter(swap.layers.values())), []
    layer.register_forward_hook(lambda *_: grids.append(layer.reference.get()))
    with torch.no_grad():
        for ids in (raster((3, 4)), raster((3, 4))[None], raster((3, 4)) * torch.tensor([1, 0.5, 2]) + 7):
            model(**{**inputs((3, 4)), "img_ids": ids})
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
        model(*(inputs((2, 6))[name] for name in names))
    assert grids == [(3, 4), (3, 4), (3, 4), (2, 6)]
    two, folded, holed = raster((3, 4)), raster((3, 4)), raster((4, 4))
    two[6:, 0] = 1
    holed = torch.cat([holed[:5], holed[6:13]])  # as many tokens, one of them from the next row
    across = raster((4, 3))[torch.arange(12).view(4, 3).T.flatten()]
    folded[:, 1] = folded[:, 1] % 2
    for ids, said in (
        (two, "2 images"),
        (holed, "no full raster"),
        (across, "no full raster"),
        (folded, "no full"),
        (raster((3, 4)).flip(0), "no full"),
    ):
        with pytest.raises(InputError, match=said):
            model(**{**inputs((3, 4)), "img_ids": ids})
    with pytest.raises(InputError, match="img_ids: none were given"):
        model(**{**inputs((3, 4)), "img_ids": None})


def test_what_a_layer_cannot_do_it_refuses():
    model, swap, inputs = swapped("flux")
    grid = (3, 4)
    with pytest.raises(InputError, match="attention_mask was given"):
        model(**inputs(grid), joint_attention_kwargs={"attention_mask": torch.ones(1)})
    with pytest.raises(InputError, match="ip_hidden_states was given"):
        model(**inputs(grid), joint_attention_kwargs={"ip_hidden_states": [torch.ones(1)]})
    with pytest.raises(InputError, match="attention_mask was given"):
        swap.layers["transformer_blocks.0.attn"](torch.zeros(1, 12, 16), torch.zeros(1, 5, 16), torch.ones(1))
    single = swap.layers["single_transformer_blocks.0.attn"]
    with pytest.raises(InputError, match="12 tokens has no text beside an image of 3 x 4"):
        single(hidden_states=torch.zeros(1, 12, 16))
    model, swap, inputs = swapped("sd3")
    model(**inputs(grid))
    with pytest.raises(InputError, match="without encoder_hidden_states"):
        swap.layers["transformer_blocks.1.attn"](torch.zeros(1, 12, 16))
    with pytest.raises(InputError, match="ip_hidden_states was given"):
        model(**inputs(grid), joint_attention_kwargs={"ip_hidden_states": torch.ones(1)})


def test_what_cannot_be_swapped_stays_as_it_was():
    def adapted():
        model = flux()
        model.transformer_blocks[1].attn.processor = FluxIPAdapterAttnProcessor(16, 12)
        return model

    def fused():
        model = flux()
        model.fuse_qkv_projections()
        return model

    def fused_sd3():
        model = sd3()
        model.fuse_qkv_projections()
        return model

    for make, said in (
        (adapted, r"blocks\.1\.attn runs FluxIPAdapterAttnProcessor"),
        (fused, "has fused projections"),
        (fused_sd3, "runs FusedJointAttnProcessor2_0"),
    ):
        model = make()
        keys = list(model.state_dict())
        with pytest.raises(InputError, match=said):
            swap_attention(model, select="all", joint="split", init="copy_vo")
        assert list(model.state_dict()) == keys
        assert not model._forward_pre_hooks
    with pytest.raises(InputError, match=r"is joint attention.*joint='split'"):
        swap_attention(sd3(), select=["transformer_blocks.1.attn"])


def test_flux_within_a_traced_function_says_to_compile_its_blocks():
    model = flux(num_layers=1, num_single_layers=0)
    swap_attention(model, select="all", joint="split", init="random", calib=[flux_inputs((3, 4))])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile_repeated_blocks"):
        torch.compile(lambda **inputs: model(**inputs), fullgraph=True, backend="eager")(**flux_inputs((3, 4)))


@pytest.mark.parametrize(("kind", "grid"), [("sd3", (3, 4)), ("flux", (16, 16))])
def test_auto_states_the_error_of_the_whole_model(kind, grid, monkeypatch):
    """Alone and together the layers give text and image as in the model that is swapped in the end."""
    monkeypatch.setattr(calibration, "in_turn", lambda *_: [(2.0, 1.0)] * 8)
    make, inputs = {"sd3": (sd3, sd3_inputs), "flux": (flux, flux_inputs)}[kind]
    model, call = make(), inputs(grid)
    with torch.no_grad():
        before = model(**call).sample.double()
        swap = swap_attention(model, "auto", joint="split", calib=[call], max_error=10)
        off = (model(**call).sample.double() - before).norm() / before.norm()
    report = swap.report(measure=False)
    assert len(report.layers) > 1
    assert report.output_error == pytest.approx(off.item(), rel=1e-5)
    assert 0 < min(row.output_error for row in report.layers) < report.output_error


@pytest.mark.parametrize("init", ["closed_form", "copy_vo"])
def test_layers_that_calibration_does_not_reach_have_box_kernels(init):
    """A joint one and one over the image alone, in a block that the inputs leave out."""
    model, calls = sd3(), [sd3_inputs((3, 4)) | {"skip_layers": [0]}]
    swap = swap_attention(model, "all", joint="split", init=init, calib=calls)
    for name in ("transformer_blocks.0.attn", "transformer_blocks.0.attn2"):
        layer = swap.layers[name]
        kernels = layer.kernels(torch.randn(2, 3, 4, 16))
        torch.testing.assert_close(kernels, torch.full_like(kernels, 1 / 9))
    assert [row.error is None for row in swap.report(measure=False).layers] == [True, True, False, False]


def test_regression_is_on_the_layers_that_an_input_reaches():
    whole, none = sd3_inputs((3, 4)), sd3_inputs((3, 4)) | {"skip_layers": [0, 1, 2]}
    swap = swap_attention(sd3(), "all", joint="split", init="copy_vo", calib=[whole])
    wanted = [site.error**2 for site in swap.sites]
    found = regress(swap, [whole, whole | {"skip_layers": [1, 2]}], steps=2, lr=1e-12)
    assert found == [pytest.approx(sum(wanted) / 4, rel=1e-5), pytest.approx(sum(wanted[:2]) / 2, rel=1e-5)]
    with pytest.raises(InputError, match="step 2 of the regression: the model calls none of the swapped layers"):
        regress(swap, [whole, none], steps=2)
