"""The model as diffusers sees it: what the testers of its own models check, for every mixer."""

import inspect

import pytest
import torch
from conftest import slowly
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import attention_backend
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from sit_atconv import SiTTransformer2DModel
from sit_atconv.layers.attention import SiTAttnProcessor

MIXERS = ("attention", "atconv", "hybrid")
SHARED = {
    "sample_size": (12, 8), "patch_size": 4, "in_channels": 3, "hidden_size": 24, "depth": 4, "num_heads": 3,
    "mlp_ratio": 2.0, "num_classes": 7, "class_dropout_prob": 0.2, "learn_sigma": False, "pos_embed": True,
    "path": "gvp", "prediction": "noise",
}  # fmt: skip
ATCONV = {"kernel_size": 5, "activation": "silu", "pool": "grid", "inhibition": "full"}
ATTENTION = {"qk_norm": True}
LINEARS = {
    "attention": ["qkv", "attn.proj"],
    "atconv": ["kernel_proj", "kernel_gen", "x_proj", "attn.proj"],
    "hybrid": ["qkv", "attn.proj", "kernel_proj", "kernel_gen", "x_proj"],
}


def options(mixer: str, **more) -> dict:
    """Every option that the mixer has, at another value than its default."""
    own = {"attention": ATTENTION, "atconv": ATCONV, "hybrid": ATTENTION | ATCONV}[mixer]
    return {**SHARED, **own, "token_mixer": mixer, **more}


def make(mixer: str, **more) -> SiTTransformer2DModel:
    torch.manual_seed(0)
    return SiTTransformer2DModel(**options(mixer, **more))


def inputs(height=12, width=8, batch=2) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 3, height, width, generator=generator),
        "timestep": torch.linspace(0.2, 0.7, batch),
        "class_labels": torch.arange(batch),
    }


@torch.no_grad()
def output(model, **kwargs) -> torch.Tensor:
    return model(**{**inputs(), **kwargs}, return_dict=False)[0]


def test_every_option_is_tested_at_another_value_than_its_default():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(SiTTransformer2DModel.__init__).parameters.items()
        if name != "self"
    }
    # Of a MeanFlow model, whose prediction is the default one; tests/sampling/test_meanflow.py stores and loads it.
    average = {"use_meanflow": True, "trained_guidance": 2.0}
    tested = options("hybrid") | {"routing": "static"} | average
    assert tested.keys() == defaults.keys()
    assert not [name for name in defaults if tested[name] == defaults[name]]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_block_is_kept_whole_and_compiled(mixer):
    model = make(mixer)
    kinds = {type(block).__name__ for block in model.blocks}
    assert kinds <= set(model._no_split_modules)
    assert kinds <= set(model._repeated_blocks)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("routing", ["adaptive", "static"])
def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path, mixer, routing):
    model = make(mixer, routing=routing) if mixer != "attention" else make(mixer)
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert dict(loaded.config).items() >= options(mixer).items() - {("sample_size", (12, 8))}
    assert tuple(loaded.config.sample_size) == (12, 8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(output(loaded), output(model))


@pytest.mark.slow
def test_it_loads_in_a_fresh_process(bare_server, tmp_path):
    model = make("hybrid")
    model.save_pretrained(tmp_path)
    torch.save({"inputs": inputs(), "output": output(model)}, tmp_path / "case.pt")
    code = (
        "import sys, torch\n"
        "from sit_atconv import SiTTransformer2DModel\n"
        "case = torch.load(sys.argv[1] + '/case.pt', weights_only=True)\n"
        "with torch.no_grad():\n"
        "    actual = SiTTransformer2DModel.from_pretrained(sys.argv[1])(**case['inputs']).sample\n"
        "assert torch.equal(actual, case['output'])\n"
    )
    codes, said = bare_server(code, tmp_path, [tmp_path])
    assert codes == [0], said


def test_a_variant_is_saved_and_found_under_its_name_alone(tmp_path):
    model = make("hybrid")
    model.save_pretrained(tmp_path, variant="fp16")
    assert torch.equal(output(SiTTransformer2DModel.from_pretrained(tmp_path, variant="fp16")), output(model))
    with pytest.raises(OSError, match=r"no file named diffusion_pytorch_model\.bin"):
        SiTTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_loads_and_runs_in_every_dtype(tmp_path, mixer, dtype):
    model = make(mixer)
    make(mixer).to(dtype).save_pretrained(tmp_path / "cast")
    model.save_pretrained(tmp_path / "full")
    for folder, low in (("cast", True), ("cast", False), ("full", True)):
        loaded = SiTTransformer2DModel.from_pretrained(tmp_path / folder, dtype=dtype, low_cpu_mem_usage=low)
        assert loaded.dtype == dtype
        assert {p.dtype for p in loaded.parameters()} == {dtype}
    actual = output(loaded, hidden_states=inputs()["hidden_states"].to(dtype))
    assert actual.dtype == dtype
    tolerance = {torch.float32: 0, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert (actual.float() - output(model)).norm() <= tolerance * output(model).norm()


@pytest.mark.parametrize("parallel", [False, True])
def test_shards_are_joined_again(tmp_path, monkeypatch, parallel):
    from diffusers.utils import constants

    model = make("hybrid")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", parallel)
    assert torch.equal(output(SiTTransformer2DModel.from_pretrained(tmp_path)), output(model))


def test_outputs_are_deterministic_and_equal_as_tuple_and_as_object():
    model = make("hybrid")
    with torch.no_grad():
        assert torch.equal(model(**inputs()).sample, model(**inputs(), return_dict=False)[0])
        assert torch.equal(model(**inputs())[0], output(model))


def test_config_values_are_attributes_with_a_warning_and_others_are_missing():
    model = make("hybrid")
    model.register_to_config(an_option=5)
    with pytest.warns(FutureWarning):
        assert model.an_option == 5
    with pytest.raises(AttributeError, match="'SiTTransformer2DModel' object has no attribute 'nothing'"):
        model.nothing  # noqa: B018


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_is_trained_and_diffusers_ema_follows(mixer):
    model = make(mixer).train()
    ema = EMAModel(model.parameters())
    sample = model(**inputs()).sample
    (sample - torch.randn_like(sample)).square().mean().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    ema.step(model.parameters())


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradient_checkpointing_is_applied_and_changes_nothing(mixer):
    plain, saving = make(mixer), make(mixer)
    assert not saving.is_gradient_checkpointing
    saving.enable_gradient_checkpointing()
    assert saving.is_gradient_checkpointing
    calls = {id(plain): 0, id(saving): 0}

    def count(model):
        def hook(*_):
            calls[id(model)] += 1

        for block in model.blocks:
            block.register_forward_pre_hook(hook)

    for model in (plain, saving):
        count(model)
        model(**inputs()).sample.square().sum().backward()
    assert calls == {id(plain): 4, id(saving): 8}  # every block runs again in the backward pass
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    saving.disable_gradient_checkpointing()
    assert not saving.is_gradient_checkpointing


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mixer", ["hybrid", *slowly(mixer for mixer in MIXERS if mixer != "hybrid")])
class TestCompiled:
    @pytest.mark.slow
    def test_whole_in_one_graph_and_once(self, mixer):
        model = make(mixer)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                torch.testing.assert_close(output(compiled), output(model))

    def test_block_by_block_with_one_graph_for_each_kind(self, mixer):
        model, compiled = make(mixer), make(mixer)
        compiled.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(recompile_limit=1):
            for _ in range(2):
                torch.testing.assert_close(output(compiled), output(model))

    @pytest.mark.slow
    def test_whole_with_open_sizes(self, mixer):
        model = make(mixer, sample_size=(48, 40), depth=2)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        open_sizes = torch.fx.experimental._config.patch(use_duck_shape=False)
        with open_sizes, torch._dynamo.config.patch(error_on_recompile=True):
            for height, width in ((48, 40), (48, 64), (64, 64), (44, 56)):
                x = inputs(height, width)["hidden_states"]
                torch.testing.assert_close(
                    output(compiled, hidden_states=x), output(model, hidden_states=x), atol=1e-5, rtol=1e-4
                )

    def test_exported(self, mixer):
        model = make(mixer).eval()
        program = torch.export.export(model, args=(), kwargs=inputs())
        with torch.no_grad():
            torch.testing.assert_close(program.module()(**inputs()).sample, output(model))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    "kind", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
def test_group_offload(mixer, kind):
    model, offloaded = make(mixer), make(mixer)
    offloaded.enable_group_offload(torch.device("cpu"), **kind)
    assert any(hasattr(module, "_diffusers_hook") for module in offloaded.modules())
    assert torch.equal(output(offloaded), output(model))


@pytest.mark.parametrize("mixer", MIXERS)
def test_offload_to_disk(tmp_path, mixer):
    model = make(mixer)
    model.save_pretrained(tmp_path)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    loaded = SiTTransformer2DModel.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": int(0.7 * size)}, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(output(loaded), output(model))


@pytest.mark.parametrize("mixer", MIXERS)
def test_layerwise_casting_stores_the_mixers_in_eight_bits_and_trains(mixer):
    model = make(mixer)
    full = output(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    linears = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".attn." in f"{name}."
    }
    assert {f"{name}.weight" for name in linears} <= stored
    kept = ("embed", "norm", "adaLN_modulation", "difference_control")
    assert not [name for name in stored if any(part in name for part in kept)]
    near = output(model)
    assert 0 < (near - full).norm() < 0.2 * full.norm()
    model(**inputs()).sample.square().mean().backward()


def lora(mixer: str, **more) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, target_modules=LINEARS[mixer], init_lora_weights=False, **more)


def is_adapted(model) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@pytest.mark.parametrize("mixer", MIXERS)
class TestLora:
    def test_adapters_sit_on_every_linear_of_the_mixer_change_the_output_and_train(self, mixer):
        model = make(mixer)
        before = output(model)
        model.add_adapter(lora(mixer))
        adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        linears = {
            name
            for name, module in make(mixer).named_modules()
            if isinstance(module, torch.nn.Linear) and ".attn." in name
        }
        assert {name for name in adapted if not name.endswith(("lora_A", "lora_B"))} == linears
        for name, module in model.named_modules():  # each alone has an effect: none is bypassed
            if isinstance(module, BaseTunerLayer):
                weight = module.lora_B["default"].weight
                kept = weight.detach().clone()
                with_it = output(model)
                with torch.no_grad():
                    weight.zero_()
                    assert not torch.equal(output(model), with_it), name
                    weight.copy_(kept)
        assert not torch.allclose(output(model), before, atol=1e-4)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2 * len(linears)
        optimizer = torch.optim.SGD(trained, lr=0.1)
        losses = []
        for _ in range(2):
            loss = model(**inputs()).sample.square().mean()
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.any() for p in trained)
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]
        model.disable_adapters()
        assert torch.equal(output(model), before)
        model.enable_adapters()
        assert not torch.equal(output(model), before)

    def test_saved_unloaded_and_loaded_again(self, mixer, tmp_path):
        model = make(mixer)
        before = output(model)
        model.add_adapter(lora(mixer))
        after, metadata = output(model), model.peft_config["default"].to_dict()
        model.save_lora_adapter(tmp_path)
        saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
        assert len(saved) == 2 * sum(isinstance(module, BaseTunerLayer) for module in model.modules())
        with pytest.raises(ValueError, match="Adapter name foo not found in the model"):
            model.save_lora_adapter(tmp_path, adapter_name="foo")
        model.unload_lora()
        assert not is_adapted(model)
        assert torch.equal(output(model), before)
        model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        torch.testing.assert_close(output(model), after)
        loaded = model.peft_config["default_0"].to_dict()
        assert {key: loaded[key] for key in ("r", "lora_alpha")} == {key: metadata[key] for key in ("r", "lora_alpha")}

    def test_fused_unfused_and_scaled(self, mixer):
        model = make(mixer)
        before = output(model)
        model.add_adapter(lora(mixer))
        after = output(model)
        model.fuse_lora()
        torch.testing.assert_close(output(model), after, atol=1e-4, rtol=1e-4)
        model.unfuse_lora()
        torch.testing.assert_close(output(model), after, atol=1e-4, rtol=1e-4)
        model.set_adapters("default", weights=0.0)
        torch.testing.assert_close(output(model), before)
        model.set_adapters("default", weights=1.0)
        torch.testing.assert_close(output(model), after)
        model.delete_adapters("default")
        torch.testing.assert_close(output(model), before)  # adding and taking away rounds


class Twice(SiTAttnProcessor):
    """A processor that can be told from the one it replaces."""

    def __call__(self, attn, hidden_states):
        return 2 * super().__call__(attn, hidden_states)


@pytest.mark.parametrize(("mixer", "count"), [("attention", 4), ("hybrid", 2)])
def test_attention_processors_are_set_one_by_one_and_all_at_once(mixer, count):
    model = make(mixer)
    before = output(model)
    processors = model.attn_processors
    assert len(processors) == count
    for module in model.modules():
        if isinstance(module, AttentionModuleMixin):
            assert isinstance(module.get_processor(), SiTAttnProcessor)
            assert not module.is_cross_attention  # diffusers' hooks on self-attention ask for it
    model.set_attn_processor({name: Twice() for name in processors})
    assert not torch.equal(output(model), before)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({next(iter(processors)): Twice()})
    model.set_attn_processor(SiTAttnProcessor())
    assert torch.equal(output(model), before)
    model.fuse_qkv_projections()  # q, k and v are one linear already
    assert torch.equal(output(model), before)
    model.unfuse_qkv_projections()


@pytest.mark.parametrize("mixer", ["attention", "hybrid"])
def test_attention_backends_are_chosen_by_the_model_and_by_context(mixer, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model = make(mixer)
    expected, used = output(model), []
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    math = AttentionBackendName._NATIVE_MATH

    def recording(**kwargs):
        used.append(math)
        return native(**kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, math, recording)
    with attention_backend(math):
        torch.testing.assert_close(output(model), expected)
    blocks = len(model.attn_processors)
    assert len(used) == blocks
    model.set_attention_backend(math.value)
    torch.testing.assert_close(output(model), expected)
    assert len(used) == 2 * blocks
    model.reset_attention_backend()
    with attention_backend(AttentionBackendName.NATIVE):
        output(model)
    assert len(used) == 2 * blocks


@pytest.mark.parametrize("mixer", MIXERS)
def test_first_block_cache_skips_the_other_blocks_and_goes_without_a_trace(mixer):
    model = make(mixer)
    calls = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, _: calls.append(module))
    plain = output(model)
    near = inputs()["hidden_states"] + 0.01
    full = output(model, hidden_states=near)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    assert model.is_cache_enabled
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(FirstBlockCacheConfig())
    with model.cache_context("one"):
        calls.clear()
        assert torch.equal(output(model), plain)
        assert len(calls) == 4
        calls.clear()
        cached = output(model, hidden_states=near)
        assert len(calls) == 1
    assert not torch.equal(cached, full)
    torch.testing.assert_close(cached, full, atol=0.05, rtol=0.1)
    with model.cache_context("another"):  # nothing is left of the first
        assert torch.equal(output(model), plain)
    model.disable_cache()
    assert not model.is_cache_enabled
    assert torch.equal(output(model, hidden_states=near), full)


@pytest.mark.parametrize("mixer", ["attention", "hybrid"])
def test_pyramid_attention_broadcast_reuses_attention(mixer):
    model = make(mixer)
    calls = []
    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(lambda module, _: calls.append(module))
    output(model)
    every = len(calls)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    model.enable_cache(config)
    output(model)
    calls.clear()
    output(model, hidden_states=inputs()["hidden_states"] + 0.1)
    assert len(calls) == every - len(model.attn_processors)
    model.disable_cache()
