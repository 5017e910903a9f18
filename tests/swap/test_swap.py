import copy
import json
import pickle

import pytest
import timm
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

import sit_atconv
from sit_atconv.layers.atconv import ATConv
from sit_atconv.layers.blocks import SiTATConvBlock, SiTBlock
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import AttentionSwap, SwapAdapter, adapters, register_adapter, regress, save_delta, swap_attention
from sit_atconv.swap.calibration import LayerReport, SwapReport
from sit_atconv.swap.families import ATConvDiTTransformer2DModel
from sit_atconv.swap.grid import GridHook
from sit_atconv.swap.layers import SelfATConv

KINDS = ("sit", "dit", "pixart", "unet")
CLASSES = {
    "sit": "SiTTransformer2DModel",
    "dit": "ATConvDiTTransformer2DModel",
    "pixart": "ATConvPixArtTransformer2DModel",
    "unet": "ATConvUNet2DConditionModel",
}
SAME_TOKENS = ((16, 4), (8, 8))  # grids of as many tokens
SIZES = [(8, 8), (16, 4), (4, 16), (12, 8), (8, 12)]

every = pytest.mark.parametrize("kind", KINDS)


def grid_hooks(model) -> int:
    return sum(isinstance(hook, GridHook) for each in model.modules() for hook in each._forward_pre_hooks.values())


@every
def test_swapped_layers_take_the_place_of_all_attentions(tiny, kind):
    model = tiny.model(kind)
    before, text = tiny.run(model, kind), {name for name in model.state_dict() if "attn2" in name}
    swap = swap_attention(model, select="all")
    assert isinstance(swap, AttentionSwap)
    assert type(model).__name__ == CLASSES[kind]
    assert list(swap.layers) == list(swap.attentions) == tiny.layers[kind]
    for name, layer in swap.layers.items():
        assert model.get_submodule(name) is layer
        assert type(layer) is (ATConv if kind == "sit" else SelfATConv)
    assert text <= model.state_dict().keys()
    after = tiny.run(model, kind)
    assert after.isfinite().all()
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    assert not [name for name in model.state_dict() if "attn1" in name and ("to_q" in name or "to_k" in name)]
    assert not any(each is attention for each in model.modules() for attention in swap.attentions.values())
    assert grid_hooks(model) == {"sit": 0, "dit": 1, "pixart": 1, "unet": 4}[kind]


@every
def test_a_start_by_copy_is_the_attention_of_equal_shares(tiny, kind):
    """With queries at zero an attention is the mean over all tokens, and so is a box kernel where 3 x 3 are all."""
    model, size = tiny.model(kind), (6, 6) if kind != "unet" else (4, 4)
    swap = swap_attention(model, "all", init="copy_vo", kernel_size=3)
    torch.manual_seed(1)
    for name, layer in swap.layers.items():
        attention = swap.attentions[name]
        value = attention.qkv if kind == "sit" else attention.to_v
        dim = value.in_features
        x = torch.randn(2, 3, 3, dim) if kind == "sit" else torch.randn(2, 9, dim)
        if kind == "sit":
            attention.qkv.weight.data[: 2 * dim] = 0
            attention.qkv.bias.data[: 2 * dim] = 0
            ours, theirs = (each(x).flatten(1, 2) for each in (layer, attention))
        else:
            attention.to_q.weight.data.zero_()
            if attention.to_q.bias is not None:
                attention.to_q.bias.data.zero_()
            layer.reference.set((3, 3), x.device)
            ours, theirs = layer(x), attention(x)
        torch.testing.assert_close(ours[:, 4], theirs[:, 4])
    assert tiny.run(model, kind, size).isfinite().all()


@every
def test_all_parameters_of_the_layers_learn(tiny, kind):
    model = tiny.model(kind).train()
    swap = swap_attention(model, "all", init="copy_vo")
    model(**tiny.inputs(kind)).sample.square().mean().backward()
    for name, layer in swap.layers.items():
        for parameter_name, parameter in layer.named_parameters():
            assert parameter.grad is not None, (name, parameter_name)
            assert parameter.grad.abs().max() > 0, (name, parameter_name)
    assert all(parameter.grad is None for each in swap.attentions.values() for parameter in each.parameters())


@every
@pytest.mark.parametrize("select", ["all", "odd"])
def test_reverted_it_is_what_it_was(tiny, kind, select):
    model = tiny.model(kind)
    model.register_forward_hook(lambda *_: None)
    before, output = tiny.snapshot(model), tiny.run(model, kind)
    swap = swap_attention(model, select)
    tiny.run(model, kind, (16, 4))
    swap.revert()
    tiny.assert_as(before, model)
    assert torch.equal(tiny.run(model, kind), output)
    with pytest.raises(InputError, match="nothing to revert"):
        swap.revert()


@every
@pytest.mark.parametrize("first", [0, 1])
def test_two_swaps_are_reverted_in_both_orders(tiny, kind, first):
    model = tiny.model(kind)
    before, output = tiny.snapshot(model), tiny.run(model, kind)
    names = tiny.layers[kind]
    swaps = [swap_attention(model, names[1:2]), swap_attention(model, "all")]
    assert swaps[1].config["layers"] == names
    assert list(swaps[1].layers) == [name for name in names if name != names[1]]
    both = tiny.run(model, kind)
    other = 1 - first
    swaps[first].revert()
    left = [name for name in names if name in swaps[other].layers]
    if kind == "sit":
        mixers = ["atconv" if name in left else "attention" for name in names]
        assert model.config.token_mixer == mixers
        assert [type(block) for block in model.blocks] == [
            SiTATConvBlock if mixer == "atconv" else SiTBlock for mixer in mixers
        ]
    else:
        assert model.config.atconv["layers"] == left
    assert not torch.equal(tiny.run(model, kind), both)
    swaps[other].revert()
    tiny.assert_as(before, model)
    assert torch.equal(tiny.run(model, kind), output)


@every
def test_a_second_swap_of_the_same_layers_is_refused(tiny, kind):
    model, names = tiny.model(kind), tiny.layers[kind]
    swap_attention(model, names[:1])
    before = tiny.snapshot(model)
    with pytest.raises(InputError, match="swapped already; leave it out"):
        swap_attention(model, names[:1])
    with pytest.raises(InputError, match="kernel_size=5: this model has layers swapped with 3"):
        swap_attention(model, "all", kernel_size=5)
    tiny.assert_as(before, model)
    swap_attention(model, "all")
    with pytest.raises(InputError, match=f"all {len(names)} attentions of this model are swapped already"):
        swap_attention(model, "all")


@every
def test_copies_and_pickles_are_models_of_their_own(tiny, kind):
    model = tiny.model(kind)
    swap = swap_attention(model, "all")
    output, wide = tiny.run(model, kind), tiny.run(model, kind, (16, 4))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert twin.config == model.config
        assert not {id(each) for each in twin.modules()} & {id(each) for each in model.modules()}
        assert torch.equal(tiny.run(twin, kind, (16, 4)), wide)
        assert torch.equal(tiny.run(twin, kind), output)
        layers = [twin.get_submodule(name) for name in tiny.layers[kind]]
        if kind != "sit":
            ours = {id(layer.reference) for layer in layers}
            assert not ours & {id(layer.reference) for layer in swap.layers.values()}
            assert len(ours) == grid_hooks(twin)
        with torch.no_grad():
            next(layers[0].parameters()).add_(1)
    assert torch.equal(tiny.run(model, kind), output)
    swap.revert()
    assert torch.equal(tiny.run(twin, kind, (16, 4)), tiny.run(copy.deepcopy(twin), kind, (16, 4)))


@every
def test_checkpointed_gradients_are_those_of_each_grid(tiny, kind):
    """Two passes of as many tokens on other grids, and one backward, which runs the blocks of both again."""

    def gradients(checkpointing: bool):
        model = tiny.model(kind).train()
        swap_attention(model, "all", init="copy_vo")
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls = []
        block = (model.blocks if kind == "sit" else model.mid_block.attentions[0].transformer_blocks if kind == "unet"
                 else model.transformer_blocks)[0]  # fmt: skip
        block.register_forward_pre_hook(lambda *_: calls.append(1))
        sum(model(**tiny.inputs(kind, size)).sample.square().mean() for size in SAME_TOKENS).backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}, len(calls)

    (plain, once), (checkpointed, twice) = gradients(False), gradients(True)
    assert (once, twice) == (2, 4)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_revert_takes_its_wrapping_off_checkpointing(tiny, kind):
    model = tiny.model(kind)
    model.enable_gradient_checkpointing()
    before = tiny.snapshot(model)
    swap = swap_attention(model, "all")
    model(**tiny.inputs(kind))
    swap.revert()
    tiny.assert_as(before, model)


@every
def test_grids_leave_nothing_behind(tiny, kind):
    model = tiny.model(kind)
    swap_attention(model, "all")
    alone = {}
    for size in SIZES:
        twin = tiny.model(kind)
        swap_attention(twin, "all")
        alone[size] = tiny.run(twin, kind, size)
        assert alone[size].shape[2:] == size
    for index in (1, 0, 3, 2, 4, 0, 1):
        assert torch.equal(tiny.run(model, kind, SIZES[index]), alone[SIZES[index]])


@every
def test_samples_of_a_batch_do_not_see_each_other(tiny, kind):
    model = tiny.model(kind)
    swap_attention(model, "all")
    inputs = tiny.inputs(kind, (12, 8), batch=2)
    first = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    second = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.no_grad():
        together, alone = model(**inputs).sample, [model(**each).sample for each in (first, second)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@every
def test_conditions_still_decide(tiny, kind):
    """Guidance: one batch of both, as separate passes, on the same latents; and they differ."""
    model = tiny.model(kind)
    swap_attention(model, "all")
    inputs = tiny.inputs(kind, batch=1)
    name = "class_labels" if kind in ("sit", "dit") else "encoder_hidden_states"
    other = {**inputs, name: inputs[name] + 1}
    both = {
        key: torch.cat([value, other[key]]) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }
    with torch.no_grad():
        cond, uncond = model(**both).sample.chunk(2)
        torch.testing.assert_close(cond, model(**inputs).sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(uncond, model(**other).sample, rtol=1e-4, atol=1e-5)
    assert (cond - uncond).norm() > 1e-3 * cond.norm()


def unswapped(tiny, kind, **shape):
    model = tiny.model(kind, **shape)
    if kind == "dit":  # whose own forward takes squares alone
        model.__class__ = ATConvDiTTransformer2DModel
    return model


class Graphs:
    """A backend that counts what it is given and runs it as it is."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, _):
        self.count += 1
        return graph.forward


def graphs_over_sizes(tiny, kind, model, compiled=None) -> int:
    """How many graphs five grids take; what they yield must be as without compiling."""
    torch._dynamo.reset()
    plain = {size: tiny.run(model, kind, size) for size in SIZES}
    graphs = Graphs()
    run = model
    if compiled is None:
        run = torch.compile(model, backend=graphs, fullgraph=True)
    else:
        compiled(model, graphs)
    for index in (0, 3, 1, 4, 2, 0, 3, 1):
        torch.testing.assert_close(tiny.run(run, kind, SIZES[index]), plain[SIZES[index]], rtol=1e-4, atol=1e-5)
    return graphs.count


@pytest.mark.slow
@every
def test_compiled_it_takes_no_more_graphs_than_before(tiny, kind):
    shape = {} if kind == "unet" else {"depth": 1}
    model = tiny.model(kind, **shape)
    swap_attention(model, "all", init="copy_vo")
    ours, theirs = (graphs_over_sizes(tiny, kind, each) for each in (model, unswapped(tiny, kind, **shape)))
    assert 0 < ours <= theirs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sit", "unet"])
def test_compiled_blocks_take_no_more_graphs_than_before(tiny, kind):
    def blocks(model, backend):
        model.compile_repeated_blocks(backend=backend, fullgraph=True)

    model = tiny.model(kind)
    swap_attention(model, "all", init="copy_vo")
    ours, theirs = (graphs_over_sizes(tiny, kind, each, blocks) for each in (model, tiny.model(kind)))
    assert 0 < ours <= theirs


def test_the_hook_that_tells_the_grid_is_no_graph_of_its_own(tiny):
    model, graphs = tiny.model("dit", depth=1), Graphs()
    swap_attention(model, "all", init="copy_vo")
    torch._dynamo.reset()
    tiny.run(torch.compile(model, backend=graphs, fullgraph=True), "dit")
    assert graphs.count == 1


@pytest.mark.slow
@every
def test_inductor_yields_the_same(tiny, kind):
    model = tiny.model(kind)
    swap_attention(model, "all")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for size in SIZES[:3]:
        torch.testing.assert_close(tiny.run(compiled, kind, size), tiny.run(model, kind, size), rtol=1e-3, atol=1e-4)


@every
@pytest.mark.parametrize("failing", [False, True])
def test_a_dry_run_or_a_failing_calibration_leaves_the_model_alone(tiny, kind, failing):
    model = tiny.model(kind)
    model.train()
    next(iter(model.children())).eval()
    if kind == "dit":
        model.enable_gradient_checkpointing()
    before, output = tiny.snapshot(model), tiny.run(model.eval(), kind)
    model.train()
    next(iter(model.children())).eval()
    if failing:
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("calibration broke")

        handle = model.get_submodule(tiny.layers[kind][-1]).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="calibration broke"):
            swap_attention(model, "all")
        handle.remove()
    else:
        swap = swap_attention(model, "all", dry_run=True)
        assert swap.config["layers"] == tiny.layers[kind]
        assert all(0 < row.error < 2 for row in swap.report(measure=False).layers)
        with pytest.raises(InputError, match="dry run"):
            swap.revert()
    tiny.assert_as(before, model)
    assert torch.equal(tiny.run(model.eval(), kind), output)


@every
def test_modes_of_training_are_kept(tiny, kind):
    model, names = tiny.model(kind), tiny.layers[kind]
    model.train()
    model.get_submodule(names[0]).eval()
    modes = {name: each.training for name, each in model.named_modules() if not name.startswith(tuple(names))}
    swap = swap_attention(model, "all")
    assert [swap.layers[name].training for name in names[:2]] == [False, True]
    assert {name: model.get_submodule(name).training for name in modes} == modes
    model.eval()
    swap.revert()
    assert not any(each.training for each in model.modules())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(tiny, kind, dtype):
    model, full = tiny.model(kind).to(dtype), tiny.model(kind)
    swap, reference = swap_attention(model, "all"), swap_attention(full, "all")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for ours, theirs in zip(swap.report(False).layers, reference.report(False).layers, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=0.1)
    output = tiny.run(model, kind, (16, 4), dtype=dtype)
    assert output.dtype == dtype
    expected = tiny.run(full, kind, (16, 4))
    assert (output.float() - expected).norm() < 0.05 * expected.norm()


def test_revert_follows_the_model(tiny):
    model = tiny.model("dit")
    swap = swap_attention(model, "all")
    model.to(torch.float64).train()
    swap.revert()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert all(each.training for each in model.modules())


def test_dit_in_its_subclass_is_the_same_on_squares(tiny):
    model, twin = tiny.model("dit"), unswapped(tiny, "dit")
    for size in ((8, 8), (4, 4), (12, 12)):
        assert torch.equal(tiny.run(model, "dit", size), tiny.run(twin, "dit", size))
    inputs = tiny.inputs("dit")
    assert torch.equal(twin(**inputs, return_dict=False)[0], model(**inputs, return_dict=False)[0])


def test_dit_puts_patches_where_they_were_cut(tiny):
    model, seen = unswapped(tiny, "dit"), []
    model.proj_out_2.register_forward_hook(lambda _, __, output: seen.append(output))
    sample = tiny.run(model, "dit", (12, 4))
    patches = seen[0].reshape(2, 12, 2, 2, 8)  # 6 x 2 tokens of 2 x 2 pixels
    for token in range(12):
        row, column = divmod(token, 2)
        cut = sample[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(cut, patches[:, token].permute(0, 3, 1, 2))


@pytest.mark.parametrize("pool", ["raster", "grid"])
@pytest.mark.parametrize("kernel_size", [1, 5])
def test_options_reach_the_layers_and_the_configuration(tiny, pool, kernel_size):
    for kind in ("sit", "dit"):
        model = tiny.model(kind)
        swap = swap_attention(model, "all", pool=pool, kernel_size=kernel_size)
        assert {(layer.pool, layer.kernel_size) for layer in swap.layers.values()} == {(pool, kernel_size)}
        stored = model.config if kind == "sit" else model.config.atconv
        assert (stored["pool"], stored["kernel_size"]) == (pool, kernel_size)
        tiny.run(model, kind, (16, 8))


def test_a_swapped_sit_is_a_hybrid_that_loads(tiny, tmp_path):
    for select in ("odd", "all"):
        model = tiny.model("sit")
        swap_attention(model, select, pool="grid")
        model.save_pretrained(tmp_path / select)
        loaded = sit_atconv.SiTTransformer2DModel.from_pretrained(tmp_path / select).eval()
        assert torch.equal(tiny.run(loaded, "sit"), tiny.run(model, "sit"))
        assert torch.equal(tiny.run(loaded, "sit", (16, 4)), tiny.run(model, "sit", (16, 4)))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["token_mixer"] == ["atconv"] * 3


def test_initialisations_differ_and_the_fitted_one_is_nearest(tiny):
    errors = {}
    for init in ("closed_form", "copy_vo", "random"):
        torch.manual_seed(0)
        swap = swap_attention(tiny.model("dit"), "all", init=init)
        errors[init] = [row.error for row in swap.report(measure=False).layers]
    for fitted, copied, random in zip(*errors.values(), strict=True):
        assert fitted < copied < random


def test_calibration_comes_in_several_forms(tiny):
    inputs = [tiny.inputs("dit", seed=seed) for seed in range(2)]
    tuples = [(each["hidden_states"], each["timestep"], each["class_labels"]) for each in inputs]
    errors = []
    for calib in (inputs, tuples, iter(inputs), inputs[:1]):
        swap = swap_attention(tiny.model("dit"), "all", calib=calib)
        errors.append([row.error for row in swap.report(measure=False).layers])
    assert errors[0] == errors[1] == errors[2] != errors[3]


def test_calibration_runs_without_dropout(tiny):
    errors = []
    for dropout in (0.0, 0.5):
        model = tiny.model("dit").train()
        for block in model.transformer_blocks:
            block.attn1.to_out[1].p = dropout
        errors.append([row.error for row in swap_attention(model, "all").report(measure=False).layers])
    assert errors[0] == errors[1]


def test_calibration_on_a_grid_that_is_not_square(tiny):
    model = tiny.model("unet")
    swap = swap_attention(model, "all", calib=[tiny.inputs("unet", (8, 4))])
    grids = {site.name.split(".")[0]: site.grid for site in swap.sites}
    assert grids == {"down_blocks": (8, 4), "up_blocks": (8, 4), "mid_block": (4, 2)}


def test_report_counts_what_the_layers_do(tiny):
    model, (batch, tokens, dim, taps) = tiny.model("dit"), (2, 16, 16, 9)
    swap = swap_attention(model, ["transformer_blocks.1.attn1"], calib=[tiny.inputs("dit", batch=batch)])
    (row,) = swap.report().layers
    assert row.name == "transformer_blocks.1.attn1"
    assert row.params_before == 4 * (dim * dim + dim)
    assert row.params_after == 3 * (dim * dim + dim) + taps * taps + taps + dim
    maps = batch * tokens * dim * dim
    assert row.macs_before == 4 * maps + 2 * batch * tokens * tokens * dim
    kernels = batch * taps * dim * dim + batch * dim * taps * taps
    assert row.macs_after == 2 * maps + kernels + batch * tokens * dim * taps
    assert row.ms_before > 0 < row.ms_after
    assert 0 < row.error < 1
    text = str(swap.report(measure=False))
    assert f"`{row.name}`" in text
    assert f"{row.error:.3f}" in text
    assert "not measured" in text


def test_report_measures_the_grid_of_the_calibration_before_and_after(tiny):
    model = tiny.model("dit", depth=1)
    swap = swap_attention(model, "all")
    (site,) = swap.sites
    tiny.run(model, "dit", (16, 8))
    tokens = {"before": set(), "after": set()}
    for when, module in (("before", swap.attentions[site.name]), ("after", swap.layers[site.name])):
        module.register_forward_hook(lambda _, __, output, when=when: tokens[when].add(output.shape[1]))
    (row,) = swap.report().layers
    height, width = site.grid
    assert tokens == {"before": {height * width}, "after": {height * width}}
    assert row.ms_before > 0 < row.ms_after


def test_report_as_a_table():
    rows = [LayerReport("a", 1500, 499, 2_340_000, 1_000_000, 4.0, 1.5004, 0.25), LayerReport("b", 4_000_000, 0)]
    assert str(SwapReport(rows)).splitlines()[2:] == [
        "| `a` | 1.5 -> 0.5 | 2.3 -> 1.0 | 4.000 -> 1.500 | unsteady | 0.250 |",
        "| `b` | 4,000.0 -> 0.0 | not measured | not measured | not measured | not measured |",
    ]


def test_the_error_is_that_of_the_layers_output(tiny):
    model, inputs = tiny.model("dit"), tiny.inputs("dit")
    name, seen = "transformer_blocks.0.attn1", []
    swap = swap_attention(model, [name], calib=[inputs])
    swap.layers[name].register_forward_hook(lambda _, args, kwargs, out: seen.append((args, kwargs, out)),
                                            with_kwargs=True)  # fmt: skip
    tiny.run(model, "dit")
    args, kwargs, ours = seen[0]
    with torch.no_grad():
        theirs = swap.attentions[name](*args, **kwargs)
    expected = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    assert swap.report(measure=False).layers[0].error == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def pipe(tiny, vae_folder):
    pipe = DiTPipeline(tiny.model("dit"), AutoencoderKL.from_pretrained(vae_folder), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipelines_model_is_swapped_in_it(pipe):
    def draw():
        return pipe([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images

    model, config, before = pipe.transformer, dict(pipe.config), draw()
    swap = swap_attention(pipe, "odd")
    assert pipe.transformer is model is swap.model
    assert type(model) is ATConvDiTTransformer2DModel
    assert pipe.config["transformer"] == ("sit_atconv", "ATConvDiTTransformer2DModel")
    assert abs(draw() - before).max() > 0
    swap.revert()
    assert type(pipe.transformer) is DiTTransformer2DModel
    assert dict(pipe.config) == config
    assert (draw() == before).all()
    swap_attention(pipe, "all", dry_run=True)
    assert dict(pipe.config) == config


class OwnAttention(nn.Module):
    """Of a user's own model: one head, called with tokens, which go through one linear."""

    def __init__(self, dim):
        super().__init__()
        self.heads, self.inner, self.out = 1, nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, tokens):
        return self.out(self.inner(tokens).mean(1, keepdim=True).expand_as(tokens))


class OwnModel(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.layers = nn.ModuleList(OwnAttention(dim) for _ in range(2))

    def forward(self, image):
        tokens = image.flatten(2).mT
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return tokens.mT.unflatten(2, image.shape[2:])


class OwnGraft(sit_atconv.swap.Graft):
    def refusal(self, attention):
        return None

    def build(self, attention, reference, options):
        return SelfATConv(attention.inner, attention.out, reference, options)

    def copy(self, attention, layer):
        layer.to_v.load_state_dict(attention.inner.state_dict())
        layer.to_out[0].load_state_dict(attention.out.state_dict())

    def observe(self, attention, layer, args, kwargs):
        values = attention.inner(args[0])
        return values, values.mean(1, keepdim=True).expand_as(values)


def test_a_model_of_ones_own(monkeypatch):
    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    torch.manual_seed(0)
    model = OwnModel()
    image = torch.randn(2, 6, 3, 3)
    with pytest.raises(InputError, match="no adapter for OwnModel"):
        swap_attention(model, "all", calib=[(image,)])
    register_adapter(
        SwapAdapter(
            OwnModel, {r"layers\.\d+": OwnGraft()}, owner=OwnModel, grid=lambda _, args, __: tuple(args[0].shape[2:])
        )
    )
    with torch.no_grad():
        before = model(image)
        with pytest.raises(InputError, match="no synthetic inputs; give calib="):
            swap_attention(model, "all")
        swap = swap_attention(model, "all", calib=[(image,)])
        assert type(model) is OwnModel
        assert model(image).shape == image.shape
        assert model(torch.randn(1, 6, 2, 5)).shape == (1, 6, 2, 5)
        swap.revert()
        assert torch.equal(model(image), before)
    assert not hasattr(model, "_swap_record")


@pytest.mark.parametrize("kind", ["sit", "dit", "unet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_handle_follows_a_model_that_was_cast(tiny, kind, dtype):
    model = tiny.model(kind)
    swap = swap_attention(model, "all", init="copy_vo")
    planned = swap_attention(tiny.model(kind), "all", init="copy_vo", dry_run=True)
    planned.model.to(dtype)
    model.to(dtype)
    for each in (swap, planned):
        assert all(row.ms_before > 0 and row.ms_after > 0 for row in each.report().layers)
    assert len(regress(swap, steps=2)) == 2
    swap.revert()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_regression_runs_the_model_in_evaluation_mode_on_new_inputs_each_step(tiny):
    model = tiny.model("dit").train()
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.9
    swap = swap_attention(model, "all", init="copy_vo")
    seen, modes = [], []

    def note(module, args, kwargs):
        seen.append(kwargs["hidden_states"])
        modes.append(module.training)

    model.register_forward_pre_hook(note, with_kwargs=True)
    fixed = swap.layers["transformer_blocks.0.attn1"].to_out[0].bias
    fixed.requires_grad_(False)
    before = fixed.clone()
    regress(swap, steps=8)
    assert len({tuple(each.flatten().tolist()) for each in seen}) == 8
    assert modes == [False] * 8
    assert all(module.training for module in model.modules())
    assert torch.equal(fixed, before)


def test_a_model_that_was_cut_short_is_reverted_where_it_is_left():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    swap = swap_attention(model, "all", init="copy_vo", calib=[(images,)])
    original = swap.attentions["blocks.0.attn"]
    model.prune_intermediate_layers([0])
    with pytest.raises(InputError, match=r"blocks\.\d\.attn was cut off since the swap"):
        save_delta(model, "unwritten.safetensors")
    with pytest.raises(InputError, match="all 1 attentions of this model are swapped already"):
        swap_attention(model, "all", init="copy_vo", calib=[(images,)])
    swap.revert()
    assert model.blocks[0].attn is original
    assert not hasattr(model, "_swap_record")
    swap_attention(model, "all", init="copy_vo", calib=[(images,)])
