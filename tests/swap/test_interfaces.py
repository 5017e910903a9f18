"""What others put on a model before or after a swap: honoured whole, or refused in one line, the model as it was."""

import copy
import hashlib
import io
import pickle

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft import LoraConfig
from torch import nn
from torch.utils._pytree import tree_map

import sit_atconv
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import (
    SelfAttentionGraft,
    SwapAdapter,
    adapters,
    load_delta,
    register_adapter,
    regress,
    save_delta,
    swap_attention,
)
from sit_atconv.swap.calibration import macs_of_call
from sit_atconv.swap.grid import latent_grid
from sit_atconv.swap.identity import fingerprint

CPU = torch.device("cpu")


def refused(tiny, says, call, model):
    """In one line that says so, the model as it was."""
    before = tiny.snapshot(model)
    with pytest.raises(InputError, match=says) as info:
        call()
    assert "\n" not in str(info.value)
    tiny.assert_as(before, model)


def sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, dual_attention_layers=(0,),
    ).eval()  # fmt: skip


def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


# IP-Adapters


def image_projection(width):
    generator = torch.Generator().manual_seed(1)
    return {
        "proj.weight": torch.randn(4 * width, 6, generator=generator), "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip


def load_images(model):
    """An IP-Adapter of random weights, as a pipeline's load_ip_adapter loads one."""
    generator, state, maps = torch.Generator().manual_seed(2), {}, "kv"
    if isinstance(model, UNet2DConditionModel):
        names = [name for name in model.attn_processors if "attn2" in name]
        widths = [model.get_submodule(name.removesuffix(".processor")).to_q.out_features for name in names]
        widths = {2 * index + 1: width for index, width in enumerate(widths)}
    else:
        widths = {0: 16}
    for key, width in widths.items():
        state |= {f"{key}.to_{each}_ip.weight": torch.randn(width, 12, generator=generator) for each in maps}
        state |= {f"{key}.to_{each}_ip.bias": torch.zeros(width) for each in maps}
    if isinstance(model, UNet2DConditionModel):
        state = {name: each for name, each in state.items() if "bias" not in name}
    model._load_ip_adapter_weights([{"image_proj": image_projection(12), "ip_adapter": state}])


def with_image(tiny, model, sign=1.0):
    inputs = tiny.inputs("unet")
    inputs["added_cond_kwargs"] = {"image_embeds": [sign * torch.linspace(-1, 1, 12).view(2, 1, 6)]}
    with torch.no_grad():
        return model(**inputs).sample


def test_an_image_prompt_goes_through_swap_and_revert(tiny):
    first, then, plain = (tiny.model("unet") for _ in range(3))
    load_images(plain)
    load_images(first)
    one = swap_attention(first, "all", init="copy_vo")
    two = swap_attention(then, "all", init="copy_vo")
    load_images(then)
    for model in (first, then, copy.deepcopy(first), pickle.loads(pickle.dumps(then))):
        assert model.config.encoder_hid_dim_type == "ip_image_proj"
        assert torch.equal(with_image(tiny, model), with_image(tiny, first))
        assert (with_image(tiny, model) - with_image(tiny, model, -1)).norm() > 0.01 * with_image(tiny, model).norm()
    for swap, model in ((one, first), (two, then)):
        swap.revert()
        assert "atconv" not in model.config
        assert not hasattr(model.config, "atconv")
        for sign in (1, -1):
            assert torch.equal(with_image(tiny, model, sign), with_image(tiny, plain, sign))


def test_an_image_prompt_has_no_synthetic_inputs(tiny, tmp_path):
    model = tiny.model("unet")
    load_images(model)
    refused(tiny, "no synthetic inputs; give calib=", lambda: swap_attention(model, "all"), model)
    inputs = tiny.inputs("unet") | {"added_cond_kwargs": {"image_embeds": [torch.ones(2, 1, 6)]}}
    swap_attention(model, "all", calib=[inputs])
    refused(
        tiny,
        "to_k_ip.* is new, and from_pretrained of ATConvUNet",
        lambda: model.save_pretrained(tmp_path),
        model,
    )
    model = tiny.model("unet")
    swap_attention(model, "all", init="copy_vo")
    load_images(model)
    refused(tiny, "is new since the swap", lambda: save_delta(model, tmp_path / "delta"), model)
    assert not list(tmp_path.iterdir())


def test_an_image_prompt_of_the_attention_that_is_swapped(tiny):
    for model in (sd3(), flux()):
        swap_attention(model, "all", init="copy_vo", joint="split")
        refused(
            tiny,
            r"attention transformer_blocks\.0\.attn2?, which is swapped",
            lambda model=model: load_images(model),
            model,
        )
    model = flux()
    load_images(model)
    refused(
        tiny,
        "attn runs FluxIPAdapterAttnProcessor",
        lambda: swap_attention(model, "all", joint="split", init="copy_vo"),
        model,
    )
    refused(tiny, "no synthetic inputs", lambda: swap_attention(model, "^single", joint="split"), model)
    swap_attention(model, "^single", joint="split", init="copy_vo")
    other = flux()
    swap_attention(other, "^single", joint="split", init="copy_vo")
    load_images(other)
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, 12, 4), "encoder_hidden_states": torch.randn(1, 5, 12),
        "pooled_projections": torch.randn(1, 10), "timestep": torch.full((1,), 0.3), "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1),
    }  # fmt: skip

    def run(each, sign):
        images = {"ip_adapter_image_embeds": [sign * torch.ones(1, 1, 6)]}
        with torch.no_grad():
            return each(**inputs, joint_attention_kwargs=images).sample

    model.load_state_dict(other.state_dict())  # with the share of text of synthetic inputs, which the other had
    assert torch.equal(run(model, 1), run(other, 1))
    assert not torch.allclose(run(model, 1), run(model, -1), rtol=1e-3)


# Quantised weights


class Eight(torch.Tensor):
    """A weight in eight bits that knows the product of a linear, its copy and its move, and nothing else."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, bias = args
            return _product(x, weight.whole, weight.scale) + bias
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            return cls(args[0].whole.clone(), args[0].scale.clone())
        raise NotImplementedError(f"Eight does not know {function}")


class Flattened(Eight):
    """One of those that tell what they are made of."""

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Flattened(inner["whole"], inner["scale"])


@torch.library.custom_op("sit_atconv_tests::product", mutates_args=())
def _product(x: torch.Tensor, whole: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As kernels for eight bits are: no counter knows it."""
    return x @ (whole * scale).T


class Packed(nn.Module):
    """A linear of a class of its own, its weights packed into one tensor of bytes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        eight = Eight.of(linear.weight.data)
        self.weight = nn.Parameter(eight.whole.view(torch.uint8).reshape(-1, 1), requires_grad=False)
        self.register_buffer("scale", eight.scale)

    def forward(self, x):
        whole = self.weight.view(torch.int8).view(self.out_features, self.in_features)
        return _product(x, whole, self.scale) + self.bias


QUANTISED = {"subclass": Eight, "flattened": Flattened, "packed": Packed}
quantised = pytest.mark.parametrize("how", QUANTISED)


def quantise(model, how, where):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and where in name:
            if how == "packed":
                model.set_submodule(name, Packed(module))
            else:
                module.weight = nn.Parameter(QUANTISED[how].of(module.weight.data), requires_grad=False)
    return model


@quantised
def test_a_quantised_model_is_swapped_where_it_is_not_quantised(tiny, tmp_path, how):
    model = quantise(tiny.model("dit"), how, "")
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.attn1 has to_q .*; swap before .*quantis"):
        swap_attention(model, "all", init="copy_vo")
    assert type(model) is DiTTransformer2DModel
    model, plain = (quantise(tiny.model("dit"), how, ".ff.") for _ in range(2))
    swap = swap_attention(model, "all")
    assert not torch.allclose(tiny.run(model, "dit"), tiny.run(plain, "dit"), rtol=1e-3)
    save_delta(model, tmp_path / "delta")
    twin = quantise(tiny.model("dit"), how, ".ff.")
    load_delta(twin, tmp_path / "delta")
    assert torch.equal(tiny.run(twin, "dit"), tiny.run(model, "dit"))
    other = tiny.model("dit")
    other.transformer_blocks[0].ff.net[2].weight.data[3, 5] *= -2
    for each in (tiny.model("dit"), quantise(other, how, ".ff.")):
        with pytest.raises(InputError, match="load it onto the weights that it was made from"):
            load_delta(each, tmp_path / "delta")
    assert len(regress(swap, [tiny.inputs("dit")], steps=1)) == 1
    swap.revert()
    assert torch.equal(tiny.run(model, "dit"), tiny.run(plain, "dit"))


class Around(nn.Module):
    """An adapter that is switched off."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = linear, linear.in_features, linear.out_features

    def forward(self, x):
        return self.base_layer(x)


@quantised
def test_a_quantised_model_has_the_multiply_accumulates_of_a_plain_one(tiny, how):
    """By which speedup counts, and once for all modules around a map."""
    model = tiny.model("dit")
    plain = macs_of_call(model, lambda: tiny.run(model, "dit"))
    quantise(model, how, ".ff.")
    for name, module in list(model.named_modules()):
        if name.endswith("net.2"):
            model.set_submodule(name, Around(module))
    assert macs_of_call(model, lambda: tiny.run(model, "dit")) == plain


@quantised
def test_a_swapped_model_that_was_quantised(tiny, tmp_path, how):
    model = tiny.model("dit")
    plain, swap = tiny.run(model, "dit"), swap_attention(model, "all", init="copy_vo")
    before = swap.report().layers
    quantise(model, how, "attn1")
    after = swap.report().layers
    assert [(row.macs_after, row.params_after) for row in after] == [
        (row.macs_after, row.params_after) for row in before
    ]
    for says, call in {
        "attn1 has kernel_proj quantised": lambda: regress(swap, steps=1),
        r"attn1\.\S+ is (new|a (Eight|Flattened)) since the swap": lambda: save_delta(model, tmp_path / "delta"),
        "from_pretrained of ATConvDiTTransformer2DModel would not": lambda: model.save_pretrained(tmp_path / "model"),
    }.items():
        with pytest.raises(InputError, match=says):
            call()
    assert not list(tmp_path.iterdir())
    swap.revert()
    assert torch.equal(tiny.run(model, "dit"), plain)


def test_the_fingerprint_of_plain_weights_stays(tiny):
    """Deltas that are in the world have it."""
    state, digest = tiny.model("dit").state_dict(), hashlib.sha256()
    for name in sorted(state):
        some = state[name].flatten()[:: max(1, state[name].numel() // 4096)]
        digest.update(
            f"{name} {tuple(state[name].shape)} ".encode() + some.bfloat16().view(torch.int16).numpy().tobytes()
        )
    assert fingerprint(state) == digest.hexdigest()
    assert fingerprint(state | {"dtype": torch.qint8}) != fingerprint(state | {"dtype": torch.quint8})
    assert fingerprint(state | {"pair": (torch.ones(2), None)}) != fingerprint(state | {"pair": (torch.zeros(2), None)})


# Hooks, casting, compiling, fused projections


def test_a_model_offloaded_by_groups(tiny, tmp_path):
    swapped = tiny.model("pixart")
    swap = swap_attention(swapped, "all", init="copy_vo")
    save_delta(swapped, tmp_path / "delta")
    output, model = tiny.run(swapped, "pixart"), tiny.model("pixart")
    for each in (model, swapped):
        apply_group_offloading(each, CPU, CPU, offload_type="leaf_level")
    assert torch.equal(tiny.run(swapped, "pixart"), output)
    says = "runs diffusers' hook 'group_offloading'"
    for call in (lambda: swap_attention(model, "all", init="copy_vo"), lambda: load_delta(model, tmp_path / "delta")):
        refused(tiny, says, call, model)
    for call in (swap.revert, swap.report, lambda: regress(swap, steps=1)):
        refused(tiny, says, call, swapped)


def test_hooks_that_skip_what_modules_do(tiny):
    model = tiny.model("dit")
    registry = HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1])
    registry.register_hook(ModelHook(), "fbc_block_hook")
    refused(
        tiny,
        r"transformer_blocks\.1 runs diffusers' hook 'fbc_block_hook'",
        lambda: swap_attention(model, "all"),
        model,
    )
    registry.remove_hook("fbc_block_hook")
    swap_attention(model, "all", init="copy_vo")


def test_weights_cast_layerwise(tiny, tmp_path):
    model = tiny.model("dit")
    plain, swap = tiny.run(model, "dit"), swap_attention(model, "all", init="copy_vo")
    output = tiny.run(model, "dit")
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert 0 < (tiny.run(model, "dit") - output).norm() < 0.1 * output.norm()
    assert all(row.ms_after > 0 for row in swap.report().layers)
    refused(tiny, "runs diffusers' hook 'layerwise_casting'", lambda: regress(swap, steps=1), model)
    with pytest.raises(InputError, match=r"is a torch\.float8_e4m3fn since the swap"):
        save_delta(model, tmp_path / "delta")
    swap.revert()
    assert (tiny.run(model, "dit") - plain).norm() < 0.1 * plain.norm()
    assert {each.dtype for each in model.transformer_blocks[0].attn1.parameters()} == {torch.float32}
    model = tiny.model("dit")
    planned = swap_attention(model, "all", dry_run=True)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(
        InputError, match=r"attn1 has weights in torch\.float8_e4m3fn.*; report before casting layerwise"
    ):
        planned.report()
    assert {each.dtype for layer in planned.layers.values() for each in layer.parameters()} == {torch.float32}
    model = tiny.model("dit")
    model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    refused(tiny, "has to_q under diffusers' hook 'layerwise_casting'", lambda: swap_attention(model, "all"), model)


@pytest.fixture
def pipe(tiny, vae_folder):
    pipe = DiTPipeline(tiny.model("dit"), AutoencoderKL.from_pretrained(vae_folder), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_a_compiled_swapped_pipeline(tiny, pipe, tmp_path):
    plain, swap = tiny.run(pipe.transformer, "dit"), swap_attention(pipe, "all", init="copy_vo")
    output = tiny.run(pipe.transformer, "dit")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(tiny.run(pipe.transformer, "dit"), output)
    save_delta(pipe, tmp_path / "delta")
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = DiTPipeline.from_pretrained(tmp_path / "pipe")
    original = tiny.model("dit")
    load_delta(original, tmp_path / "delta")
    for model in (loaded.transformer.eval(), original):
        assert torch.equal(tiny.run(model, "dit"), output)
    with pytest.raises(InputError, match="the model is compiled"):
        swap_attention(pipe, "all")
    swap.revert()
    assert pipe.config["transformer"] == ("diffusers", "DiTTransformer2DModel")
    torch.testing.assert_close(tiny.run(pipe.transformer, "dit"), plain)
    assert (output - plain).norm() > 0.01 * plain.norm()


def test_blocks_that_are_wrapped_by_compile(tiny, tmp_path):
    model = tiny.model("dit")
    swap = swap_attention(model, "all", init="copy_vo")
    block = model.transformer_blocks[0]
    model.transformer_blocks[0] = torch.compile(block, backend="eager")
    for call in (swap.revert, lambda: save_delta(model, tmp_path / "delta")):
        refused(tiny, r"transformer_blocks\.0 is wrapped by torch\.compile; put the module itself back", call, model)
    model.transformer_blocks[0] = block
    swap.revert()


def test_projections_fused_after_a_swap(tiny):
    model = tiny.model("pixart")
    swap = swap_attention(model, "all", init="copy_vo")
    model.fuse_qkv_projections()
    refused(tiny, "fused projections; call unfuse_qkv_projections before revert", swap.revert, model)
    model.unfuse_qkv_projections()
    swap.revert()
    assert torch.equal(tiny.run(model, "pixart"), tiny.run(tiny.model("pixart"), "pixart"))
    swap_attention(model, "all", init="copy_vo")


# LoRA


@pytest.mark.parametrize("where", ["attn1", "attn2"])
def test_a_lora_is_neither_dropped_nor_stored_by_halves(tiny, tmp_path, where):
    model = tiny.model("unet")
    swap = swap_attention(model, "all", init="copy_vo")
    model.add_adapter(LoraConfig(r=2, target_modules=rf".*{where}\.to_v", init_lora_weights=False))
    refused(tiny, "would not read these weights", lambda: model.save_pretrained(tmp_path), model)
    refused(tiny, r"to_v\.base_layer\.weight", lambda: save_delta(model, tmp_path / "delta"), model)
    assert not list(tmp_path.iterdir())
    if where == "attn1":
        refused(tiny, r"attn1\.to_v carries an adapter .*; unload it first \(unload_lora", swap.revert, model)
        model.unload_lora()
    swap.revert()


# What is saved and what is derived


@pytest.fixture
def volume(monkeypatch):
    """A swapped model of a class made known by an adapter, and its inputs."""
    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    sites = {r"(.+\.)?attentions\.\d+\.transformer_blocks\.\d+\.attn1": SelfAttentionGraft()}
    register_adapter(SwapAdapter(UNet3DConditionModel, sites, Transformer2DModel, latent_grid))
    torch.manual_seed(0)
    model = UNet3DConditionModel(
        block_out_channels=(4, 8), norm_num_groups=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=8, attention_head_dim=2, out_channels=4,
        in_channels=4, layers_per_block=1, sample_size=8,
    ).eval()  # fmt: skip
    inputs = {
        "sample": torch.randn(1, 4, 2, 8, 8), "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 4, 8),
    }  # fmt: skip
    return model, inputs


def test_a_class_of_an_adapter_is_stored_as_a_delta(tiny, volume, tmp_path):
    model, inputs = volume
    original, before = copy.deepcopy(model), tiny.snapshot(model)
    swap = swap_attention(model, "all", calib=[inputs])
    says = "UNet3DConditionModel would load what it saves here without the swapped layers; store these by .*save_delta"
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for call in (each.save_pretrained, each.push_to_hub):
            with pytest.raises(InputError, match=says):
                call(str(tmp_path / "model"))
    assert not list(tmp_path.iterdir())
    save_delta(model, tmp_path / "delta")
    load_delta(original, tmp_path / "delta")
    with torch.no_grad():
        assert torch.equal(original(**inputs).sample, model(**inputs).sample)
    swap.revert()
    tiny.assert_as(before, model)
    model.save_pretrained(tmp_path / "model")


def test_what_others_make_of_a_swapped_model(tiny):
    models = {"sd3": sd3(), "flux": flux(), "unet": tiny.model("unet")}
    swaps = [swap_attention(each, "all", init="copy_vo", joint="split") for each in models.values()]
    made = (
        lambda: SD3ControlNetModel.from_transformer(models["sd3"], num_layers=1),
        lambda: FluxControlNetModel.from_transformer(
            models["flux"], num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
        ),
        lambda: ControlNetModel.from_unet(models["unet"]),
        lambda: UNetMotionModel.from_unet2d(models["unet"]),
        lambda: tiny.model("unet").load_state_dict(models["unet"].state_dict(), strict=False),
    )
    for call in made:
        with pytest.raises(
            InputError, match="weights are of a layer swapped for ATConv, and the module that loads them is"
        ):
            call()
    for swap in swaps:
        swap.revert()
    for call in made:
        call()


def test_swapped_layers_load_what_is_theirs(tiny):
    model = tiny.model("dit")
    layers = [*swap_attention(model, "all", init="copy_vo").layers.values()]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(torch.equal(state[name], each) for name, each in model.state_dict().items())
    for each in (state, model.state_dict(), copy.deepcopy(model.state_dict())):
        model.load_state_dict(each)
    model.load_state_dict(model.state_dict(), assign=True)
    layers[0].load_state_dict(layers[1].state_dict())
    assert torch.equal(layers[0].to_v.weight, layers[1].to_v.weight)


def test_variants_and_shards_are_loaded_as_they_were_saved(tiny, tmp_path):
    model = tiny.model("unet")
    swap_attention(model, "all", init="copy_vo")
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.fp16-*.safetensors"))) > 1
    loaded = sit_atconv.ATConvUNet2DConditionModel.from_pretrained(tmp_path, variant="fp16").eval()
    assert torch.equal(tiny.run(loaded, "unet"), tiny.run(model, "unet"))


# Calibration


def cast(inputs, dtype):
    return tree_map(lambda each: each.to(dtype) if torch.is_tensor(each) and each.is_floating_point() else each, inputs)


@pytest.mark.parametrize("kind", ["dit", "pixart", "unet"])
def test_calibration_of_another_dtype(tiny, kind):
    model, inputs = tiny.model(kind).to(torch.bfloat16), tiny.inputs(kind)
    says = (
        r"calib\[0\]\['\w+'\].*: torch\.float32 on cpu, which the model in torch\.bfloat16 on cpu does not take; give"
    )
    for init in ("closed_form", "copy_vo"):
        refused(tiny, says, lambda init=init: swap_attention(model, "all", init=init, calib=[inputs]), model)
    swap = swap_attention(model, "all", calib=[cast(inputs, torch.bfloat16)])
    with pytest.raises(InputError, match=r"inputs\[0\]\['\w+'\].*: torch\.float32 on cpu"):
        regress(swap, [inputs], steps=1)


def test_calibration_of_another_dtype_within_containers(monkeypatch):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention(query_dim=16, heads=2, dim_head=8)

        def forward(self, steps, given):
            return self.attention(given["tokens"][0])

    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    register_adapter(SwapAdapter(Nested, {"attention": SelfAttentionGraft()}, Nested, lambda *_: (3, 4)))
    calls = [(torch.tensor([3]), {"tokens": [torch.randn(1, 12, 16)]})]
    with pytest.raises(
        InputError, match=r"calib\[0\]\[1\]\['tokens'\]\[0\]: torch\.float32 on cpu, which the model in"
    ):
        swap_attention(Nested().bfloat16(), "all", calib=calls)


def test_a_dtype_that_the_model_takes_is_not_blamed_for_a_shape(tiny):
    model, inputs = tiny.model("dit"), tiny.inputs("dit")
    inputs["timestep"] = inputs["timestep"].double()  # which the model takes
    swap_attention(model, "all", calib=[inputs], dry_run=True)
    inputs["hidden_states"] = inputs["hidden_states"][:, :3]
    with pytest.raises(InputError, match=r"calib: DiT.* does not take inputs of these shapes \(.*channels"):
        swap_attention(model, "all", calib=[inputs])


def test_models_that_have_no_synthetic_inputs(tiny):
    pixart = type(tiny.model("pixart")).from_config({**tiny.model("pixart").config, "caption_channels": None})
    unet = UNet2DConditionModel.from_config(tiny.model("unet").config, num_class_embeds=5).eval()
    for model in (pixart, unet):
        refused(tiny, "has no synthetic inputs; give calib=", lambda model=model: swap_attention(model, "all"), model)
    captions = {"encoder_hidden_states": torch.randn(2, 5, 16)}
    assert swap_attention(pixart, "all", calib=[tiny.inputs("pixart") | captions]).layers
    assert swap_attention(unet, "all", calib=[tiny.inputs("unet") | {"class_labels": torch.arange(2)}]).layers
