import json

import accelerate
import peft
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import sit_atconv
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import calibration, register_adapter, regress, swap_attention
from sit_atconv.swap.adapters import _ADAPTERS

X, T = torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.long)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def refused(tiny, model, says, **options):
    """One line, and the model as it was."""
    before = tiny.snapshot(model)
    with pytest.raises(InputError, match=says) as info:
        swap_attention(model, **{"select": "all", **options})
    assert "\n" not in str(info.value)
    tiny.assert_as(before, model)


def test_a_class_without_adapter(tiny):
    with pytest.raises(InputError, match=r"no adapter for Linear; known are .*register_adapter") as info:
        swap_attention(nn.Linear(2, 2))
    for adapter in _ADAPTERS:
        assert adapter.model.__name__ in str(info.value)
    assert callable(register_adapter)
    with pytest.raises(InputError, match="dict: give a model, or a pipeline with"):
        swap_attention({})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init": "closed-form"}, "init='closed-form': did you mean 'closed_form'"),
        ({"joint": "spilt"}, "joint='spilt': did you mean 'split'"),
        ({"prefix": "atend"}, "prefix='atend': did you mean 'attend'"),
        ({"pool": "rastr"}, "pool='rastr': did you mean 'raster'"),
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"kernel_size": 3.0}, r"kernel_size=3\.0"),
        ({"select": ["transformer_blocks.3.attn1"]}, "did you mean 'transformer_blocks.2.attn1'"),
        ({"select": "attn9"}, "leave nothing to swap; to be had are transformer_blocks.0.attn1"),
        ({"select": "odd", "exclude": "attn1"}, "select='odd', exclude='attn1' leave nothing to swap"),
        ({"exclude": "transformer_block.1.attn1"}, "did you mean 'transformer_blocks.1.attn1'"),
        ({"max_error": 0.1}, r"max_error=0\.1: a target needs select='auto', and select='all'"),
        ({"speedup": 2.0}, r"speedup=2\.0: a target needs select='auto'"),
        ({"select": "auto", "speedup": 1.0}, r"speedup=1\.0: must be greater than 1"),
        ({"select": "auto", "max_error": 0.0}, r"max_error=0\.0: must be greater than 0"),
        ({"select": "auto", "max_error": float("nan")}, "max_error=nan"),
        ({"calib": []}, "calib is empty"),
        ({"calib": {"hidden_states": torch.zeros(1)}}, "calib: give a list of inputs"),
        ({"calib": 5}, "calib: give a list of inputs"),
        ({"calib": "x"}, "calib: give a list of inputs"),
        ({"calib": [torch.zeros(2, 4, 8, 8)]}, r"calib\[0\] is Tensor; each input is a dict"),
        ({"calib": [None]}, r"calib\[0\] is NoneType"),
        ({"calib": [{}]}, r"calib\[0\] is dict; .*tensors among them"),
        ({"calib": [{"x": 1}]}, r"calib\[0\] is dict; .*tensors among them"),
        (
            {"calib": [{"timestep": T}]},
            r"calib\[0\] .* DiT.*: missing a required argument: 'hidden_states'; it takes hid",
        ),
        (
            {"calib": [{"hidden_states": X, "time": T}]},
            r"calib\[0\] .* unexpected keyword argument 'time'; it takes .*time",
        ),
        (
            {"calib": [(X, T, T, None, True, 1)]},
            r"calib\[0\] .*: too many positional arguments; it takes hidden_states",
        ),
        (
            {"calib": [{"hidden_states": X}]},
            r"calib: DiT.* needs more arguments .* leave out timestep, class_labels, cros",
        ),
        (
            {"calib": [(X, T)]},
            r"calib: DiT.* needs more arguments .* leave out class_labels, cross_attention_kwargs: giv",
        ),
        (
            {"calib": [{"hidden_states": X[:, :3], "timestep": T, "class_labels": T}]},
            r"calib: DiT.* does not take inputs of these shapes \(.*channels.*\); give those",
        ),
        ({"select": None}, "select=None: give 'all'"),
        ({"select": 3 + 1j}, r"select=\(3\+1j\): give 'all'"),
        ({"exclude": None}, "exclude=None: give names"),
        ({"exclude": [5]}, r"exclude=\[5\]: give names"),
        ({"select": "auto", "max_error": "x"}, "max_error='x': give a number"),
        ({"select": "auto", "speedup": "2x"}, "speedup='2x': give a number"),
    ],
)
def test_options_that_cannot_be(tiny, options, says):
    refused(tiny, tiny.model("dit"), says, **options)


@pytest.mark.parametrize("init", ["closed_form", "copy_vo"])
def test_a_model_without_its_weights(tiny, init):
    with torch.device("meta"):
        model = tiny.model("dit")
    with pytest.raises(InputError, match=r"has no data here .*; swap first and offload after"):
        swap_attention(model, "all", init=init)
    model = tiny.model("dit")
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(InputError, match="is offloaded or dispatched by hooks; swap first and offload after"):
        swap_attention(model, "all", init=init)
    model, _ = accelerate.cpu_offload_with_hook(tiny.model("dit"), torch.device("cpu"))
    refused(tiny, model, "the model is offloaded or dispatched by hooks; swap first", init=init)


@pytest.mark.parametrize("what", ["report", "regress", "revert"])
def test_a_swapped_model_that_was_offloaded_keeps_its_attentions(tiny, what):
    model, plain = tiny.model("dit"), tiny.snapshot(tiny.model("dit"))
    swap = swap_attention(model, "all", init="copy_vo")
    swapped = tiny.run(model, "dit")
    accelerate.cpu_offload(model, torch.device("cpu"))
    call = {"report": swap.report, "regress": lambda: regress(swap, steps=1), "revert": swap.revert}[what]
    with pytest.raises(InputError, match=r"has no data here .*; end the offloading first"):
        call()
    assert torch.equal(tiny.run(model, "dit"), swapped)
    accelerate.hooks.remove_hook_from_submodules(model)
    swap.report()
    swap.revert()
    assert all(torch.equal(tensor, plain["state"][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["dit", "pixart", "unet"])
def test_a_class_that_derives_from_a_known_one(tiny, kind):
    model = tiny.model(kind)
    known = type(model)
    model.__class__ = type("Mine", (known,), {})
    refused(tiny, model, f"Mine derives from {known.__name__}, .*; swap the {known.__name__}, or register an adapter")
    refused(tiny, model, "Mine derives from", dry_run=True)


@pytest.mark.parametrize("init", ["closed_form", "copy_vo"])
def test_calibration_that_is_not_finite(tiny, init):
    inputs = tiny.inputs("dit")
    inputs["hidden_states"][0, 0, 0, 0] = float("nan")
    refused(tiny, tiny.model("dit"), "transformer_blocks.0.attn1 gives NaN or infinity", init=init, calib=[inputs])


def test_an_attention_that_gives_zeros_is_met_exactly(tiny, monkeypatch):
    model = tiny.model("dit")
    for parameter in model.transformer_blocks[1].attn1.to_out[0].parameters():
        nn.init.zeros_(parameter)
    monkeypatch.setattr(calibration, "in_turn", lambda *_: [(2.0, 1.0)] * 8)
    swap = swap_attention(model, "auto", max_error=1e-6)
    assert list(swap.layers) == ["transformer_blocks.1.attn1"]
    assert swap.sites[0].error == 0.0


def test_a_model_that_does_not_tell_its_size(tiny):
    model = tiny.model("unet")
    model.register_to_config(sample_size=None)
    refused(tiny, model, "UNet2DConditionModel has no synthetic inputs; give calib=")
    assert swap_attention(model, "all", init="copy_vo").layers


def test_weights_in_eight_bits(tiny):
    model = tiny.model("dit")
    model.transformer_blocks[1].attn1.to_v.to(torch.float8_e4m3fn)
    refused(tiny, model, r"attn1 has to_v with weights in torch\.float8_e4m3fn; swap before casting layerwise")


def test_a_report_changes_nothing(tiny):
    model = tiny.model("dit").bfloat16()
    swap = swap_attention(model, "all", init="copy_vo")
    layer = next(iter(swap.layers.values()))
    layer.to_v.weight.data = layer.to_v.weight.data.float()  # as an adapter in fp32 has it, or a cast of some weights
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    swap.report(measure=False)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before
    swap = swap_attention(tiny.model("dit"), "all", init="copy_vo")
    draws = torch.get_rng_state()
    swap.report()
    assert torch.equal(torch.get_rng_state(), draws)


def test_layers_that_save_no_time(tiny, monkeypatch):
    monkeypatch.setattr(calibration, "in_turn", lambda *_: [(1.0, 1.3)] * 8)
    refused(tiny, tiny.model("dit"), "no layer saves time at this size", select="auto", max_error=1e9)


def test_regression_without_inputs_or_with_frozen_layers(tiny):
    model = tiny.model("dit")
    swap = swap_attention(model, "all", init="copy_vo")
    for inputs, says in (
        ([], "inputs is empty"),
        ({"x": 1}, "inputs: give a list"),
        ([3], r"inputs\[0\] is int"),
        ([{"timestep": T}], r"inputs\[0\] does not fit .*: missing a required argument: 'hidden_states'"),
        ([(X, T)], "inputs: ATConvDiT.* leave out class_labels"),
    ):
        with pytest.raises(InputError, match=says):
            regress(swap, inputs, steps=1)
    with pytest.raises(InputError, match=r"^regress was given a ATConvDiT.*; give it the swap: swap = swap_attention"):
        regress(model)
    model.requires_grad_(False)
    with pytest.raises(InputError, match=r"frozen: .*requires_grad_"):
        regress(swap, steps=1)
    for layer in swap.layers.values():
        layer.requires_grad_()
    with torch.no_grad():
        assert len(regress(swap, steps=1)) == 1


@pytest.mark.parametrize("kind", ["sit", "dit", "unet"])
@pytest.mark.parametrize("what", ["lora", "subclass", "weight"])
def test_maps_that_are_no_plain_linears(tiny, kind, what):
    model = tiny.model(kind)
    name = tiny.layers[kind][1]
    target = "qkv" if kind == "sit" else "to_k" if what == "lora" else "to_out.0"
    if what == "lora":
        peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=[f"{name}.{target}"]), model)
    elif what == "subclass":
        model.get_submodule(f"{name}.{target}").__class__ = type("Linear8bit", (nn.Linear,), {})
    else:
        linear = model.get_submodule(f"{name}.{target}")
        linear.weight = type("Quantised", (nn.Parameter,), {})(linear.weight.data)
    kinds = {
        "lora": r"of type peft.*\.Linear, not torch's",
        "subclass": r"of type \S+\.Linear8bit",
        "weight": "of type Quantised",
    }
    refused(tiny, model, rf"{name} has {target} .*{kinds[what]}.*exclude='{name}'")
    swap = swap_attention(model, "all", exclude=name)
    assert name not in swap.layers


def replaced(model, **options):
    block = model.transformer_blocks[1]
    block.attn1 = Attention(16, heads=2, dim_head=8, bias=True, **options)
    return model


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cross_attention_dim": 12}, "attends to a context"),
        ({"norm_num_groups": 4}, "normalises by group"),
        ({"residual_connection": True}, "has a residual connection of its own"),
        ({"rescale_output_factor": 2.0}, "rescales its output"),
        ({"is_causal": True}, "is causal"),
        ({"kv_heads": 1}, "has fewer value heads"),
        ({"added_kv_proj_dim": 6}, "attends jointly with text"),
    ],
)
def test_attention_that_does_more(tiny, options, says):
    refused(tiny, replaced(tiny.model("dit"), **options), rf"transformer_blocks\.1\.attn1 .*{says}")


def test_attention_that_normalises_in_space(tiny):
    model = tiny.model("dit")
    model.transformer_blocks[0].attn1.spatial_norm = nn.Identity()
    refused(tiny, model, "normalises in space: ATConv does not stand for that")


def test_attention_with_a_processor_or_a_class_of_its_own(tiny):
    class Mine(AttnProcessor2_0):
        pass

    model = tiny.model("dit")
    model.transformer_blocks[0].attn1.set_processor(Mine())
    refused(tiny, model, r"transformer_blocks\.0\.attn1 runs Mine, whose work ATConv would not do")
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    swap_attention(model, "all")
    model = tiny.model("pixart")
    model.fuse_qkv_projections()
    refused(tiny, model, r"transformer_blocks\.0\.attn1 runs FusedAttnProcessor2_0")
    model = tiny.model("dit")
    model.transformer_blocks[0].attn1.__class__ = type("OtherAttention", (Attention,), {})
    refused(tiny, model, r"is a .*OtherAttention, not diffusers' Attention")


def test_a_compiled_model(tiny):
    model = tiny.model("dit")
    compiled = torch.compile(model, backend="eager")
    before = tiny.snapshot(model)
    with pytest.raises(InputError, match="the model is compiled, or blocks of it; swap first"):
        swap_attention(compiled, "all")
    tiny.assert_as(before, model)
    model.compile(backend="eager")
    refused(tiny, model, "the model is compiled")
    model = tiny.model("unet")
    model.compile_repeated_blocks(backend="eager")
    refused(tiny, model, "the model is compiled")


def test_parallelism(tiny, monkeypatch):
    model = tiny.model("dit")
    monkeypatch.setattr(model, "_parallel_config", object(), raising=False)
    refused(tiny, model, "context or tensor parallelism, which swapped layers do not")
    model = tiny.model("dit")
    swap_attention(model, "all")
    before = tiny.snapshot(model)
    with pytest.raises(InputError, match="ATConvDiTTransformer2DModel has no context or tensor parallelism"):
        model.enable_parallelism(config=None)
    tiny.assert_as(before, model)


def test_sits_with_atconv_of_another_setting(tiny):
    def sit(**options):
        mixers = ["attention", "atconv", "attention"]
        return sit_atconv.SiTTransformer2DModel(
            sample_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=10, token_mixer=mixers, **options
        ).eval()

    for options, says in (
        ({"pool": "grid"}, "pool: this SiT has ATConv blocks with 'grid', and swapped ones would have 'raster'"),
        ({"kernel_size": 5}, "kernel_size: this SiT has ATConv blocks with 5"),
        ({"routing": "static"}, "routing: this SiT has ATConv blocks with 'static'"),
        ({"inhibition": "none"}, "inhibition"),
        ({"activation": "silu"}, "activation"),
    ):
        refused(tiny, sit(**options), says)
    swap = swap_attention(sit(pool="grid"), "all", pool="grid")
    assert list(swap.layers) == ["blocks.0.attn", "blocks.2.attn"]


def test_tokens_that_are_no_grid(tiny):
    model = tiny.model("dit")
    layer = swap_attention(model, "all").layers["transformer_blocks.0.attn1"]
    tiny.run(model, "dit", (8, 8))
    with pytest.raises(ValueError, match=r"\(2, 15, 16\) do not fill a grid of 4 x 4; give \(B, 16, C\) tokens"):
        layer(torch.zeros(2, 15, 16))
    with pytest.raises(InputError, match="attention_mask was given to a layer swapped for ATConv"):
        layer(torch.zeros(2, 16, 16), attention_mask=torch.zeros(2, 16))
    with pytest.raises(InputError, match="encoder_hidden_states was given"):
        layer(torch.zeros(2, 16, 16), torch.zeros(2, 5, 16))


def test_a_layer_called_alone(tiny, tmp_path):
    model = tiny.model("dit")
    swap_attention(model, "all")
    model.save_pretrained(tmp_path)
    model = sit_atconv.ATConvDiTTransformer2DModel.from_pretrained(tmp_path)
    layer = model.transformer_blocks[0].attn1
    with pytest.raises(InputError, match="called on its own, and knows no grid; call the model that it is part of"):
        layer(torch.zeros(2, 16, 16))
    layer.reference.set((4, 4), torch.device("cpu"))
    assert layer(torch.zeros(2, 16, 16)).shape == (2, 16, 16)


def test_a_class_without_its_entry(tiny):
    for name in ("DiT", "PixArt", "SD3", "Flux"):
        cls = getattr(sit_atconv, f"ATConv{name}Transformer2DModel")
        with pytest.raises(InputError, match=f"{cls.__name__} needs atconv, which names its swapped layers; make one"):
            cls(num_layers=1)
    with pytest.raises(InputError, match="ATConvUNet2DConditionModel needs atconv"):
        sit_atconv.ATConvUNet2DConditionModel.from_config(tiny.model("unet").config)
    with pytest.raises(AttributeError, match="has no attribute 'ATConvNet'"):
        sit_atconv.ATConvNet  # noqa: B018


@pytest.fixture
def saved(tiny, tmp_path):
    """Saves a swapped DiT with another configuration or other weights; returns a function that loads it."""
    model = tiny.model("dit")
    swap_attention(model, "all")
    model.save_pretrained(tmp_path)

    def load(change=None, **atconv):
        if change is not None:
            tensors = load_file(tmp_path / WEIGHTS)
            change(tensors)
            save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        config["atconv"] |= atconv
        (tmp_path / "config.json").write_text(json.dumps(config))
        return sit_atconv.ATConvDiTTransformer2DModel.from_pretrained(tmp_path)

    return load


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop("transformer_blocks.1.attn1.to_v.weight"), r"missing keys \['transformer_blocks"),
        (lambda tensors: tensors.pop("proj_out_2.bias"), r"missing keys \['proj_out_2\.bias'\] \(1 in all\)"),
        (lambda tensors: tensors.update({"proj_out_3.bias": torch.zeros(1)}), r"unexpected keys \['proj_out_3\.bias'"),
        (
            lambda tensors: tensors.update({"transformer_blocks.1.attn1.to_q.weight": torch.zeros(16, 16)}),
            r"unexpected keys \['transformer_blocks\.1\.attn1\.to_q\.weight'\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_not_loaded(saved, change, says):
    with pytest.raises(InputError, match=says):
        saved(change)


def test_position_embeddings_may_be_missing(saved, tiny):
    expected = tiny.run(saved(), "dit")
    assert torch.equal(tiny.run(saved(lambda tensors: tensors.pop("pos_embed.pos_embed", None)), "dit"), expected)


@pytest.mark.parametrize(
    ("atconv", "says"),
    [
        ({"schema": 7}, "atconv schema 7: this version reads 1; use the one that wrote it"),
        ({"layers": ["transformer_blocks.7.attn1"]}, "atconv layer='transformer_blocks.7.attn1': did you mean"),
        ({"pool": "gird"}, "pool='gird'"),
        (
            {"volume": "factored"},
            "atconv: volume='factored': the tokens of DiT.* no volume.*; it is not as swap_a",
        ),
    ],
)
def test_configurations_that_do_not_fit_are_not_loaded(saved, atconv, says):
    with pytest.raises(InputError, match=says):
        saved(**atconv)


def test_loading_says_what_it_loaded_and_unpickles_nothing(saved, tmp_path):
    assert isinstance(saved(), sit_atconv.ATConvDiTTransformer2DModel)
    load = sit_atconv.ATConvDiTTransformer2DModel.from_pretrained
    _, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with pytest.raises(InputError, match="use_safetensors=False: weights that are unpickled can run code"):
        load(tmp_path, use_safetensors=False)
