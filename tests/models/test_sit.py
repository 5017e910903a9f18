"""The model against golden vectors, its presets against the published sizes, and its options."""

import copy

import pytest
import torch
from conftest import slowly
from golden_vectors import assert_golden, golden
from torch._dynamo.utils import counters

from sit_atconv import SiTTransformer2DModel, create_model, list_models
from sit_atconv.models.cost import count_macs, count_parameters
from sit_atconv.models.sit import mixer_names

MIXERS = {"sit_attn": "attention", "sit_atconv": "atconv", "sit_hybrid": "hybrid"}
TINY = {"patch_size": 2, "in_channels": 4, "hidden_size": 24, "depth": 2, "num_heads": 2}


def tiny(**options) -> SiTTransformer2DModel:
    """A tiny model whose output is not zero."""
    torch.manual_seed(0)
    model = create_model(None, **{"sample_size": 8, "num_classes": 5, **TINY, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch=2, height=8, width=8, num_classes=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, height, width, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % num_classes


@pytest.mark.parametrize("name", MIXERS)
def test_golden(name):
    info, state, tensors = golden(name)
    options = {key: info[key] for key in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads")}
    model = create_model(None, info["input_size"], info["num_classes"], token_mixer=MIXERS[name], **options)
    if "pos_embed" in state:
        assert_golden(model.pos_embed, state["pos_embed"])
    model.load_state_dict(state, strict=True)
    assert_golden(model(tensors["x"], tensors["t"], tensors["y"]).sample, tensors["out"])


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("SiT-S/2", 32.96), ("SiT-B/2", 130.5), ("SiT-L/2", 458.1), ("SiT-XL/2", 675.1),
        ("SiT-ATConv-S/2", 31.10), ("SiT-ATConv-B/2", 123.2), ("SiT-ATConv-L/2", 432.7), ("SiT-ATConv-XL/2", 637.7),
        ("SiT-ATConv-S/2-Hybrid", 32.08), ("SiT-ATConv-B/2-Hybrid", 127.0), ("SiT-ATConv-L/2-Hybrid", 445.5),
        ("SiT-ATConv-XL/2-Hybrid", 656.6),
    ],
)  # fmt: skip
def test_presets_have_the_published_parameter_counts(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    count = count_parameters(model) / 1e6
    assert f"{count:.2f}" == f"{millions:.2f}" or f"{count:.1f}" == f"{millions:.1f}"


@pytest.mark.parametrize(
    ("name", "size", "giga"),
    [
        ("SiT-XL/2", 64, 524.5), ("SiT-ATConv-XL/2", 32, 95.8),
        *slowly([("SiT-XL/2", 32, 118.6), ("SiT-ATConv-XL/2", 64, 381.4)]),
    ],
)  # fmt: skip
def test_macs_of_xl(name, size, giga):
    with torch.device("meta"):
        model = create_model(name, sample_size=size)
    assert round(count_macs(model) / 1e9, 1) == giga


def test_list_models_is_every_size_mixer_and_patch():
    names = list_models()
    assert len(names) == len(set(names)) == 4 * 3 * 3
    assert {"SiT-XL/2", "SiT-ATConv-XL/2", "SiT-ATConv-XL/2-Hybrid", "SiT-S/8"} <= set(names)


def test_hybrid_puts_attention_in_even_blocks_and_a_list_is_taken_as_it_is():
    def kinds(token_mixer):
        return [type(block.attn).__name__ for block in tiny(depth=3, token_mixer=token_mixer).blocks]

    assert kinds("hybrid") == ["Attention", "ATConv", "Attention"]
    assert kinds("atconv") == ["ATConv"] * 3
    assert kinds(["atconv", "atconv", "attention"]) == ["ATConv", "ATConv", "Attention"]


@pytest.mark.parametrize("token_mixer", ["attention", "atconv", "hybrid"])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_non_square_latents_and_every_patch(token_mixer, patch_size):
    model = tiny(sample_size=(8, 16), patch_size=patch_size, token_mixer=token_mixer)
    x, t, labels = inputs(height=8, width=16)
    assert model(x, t, labels).sample.shape == x.shape


def test_axes_are_not_swapped_on_a_non_square_grid():
    # The last patch row of a taller latent must not reach the first row of an ATConv stack of depth 2.
    model = tiny(token_mixer="atconv", patch_size=1, routing="static", pos_embed=True)
    x, t, labels = inputs(height=12, width=5)
    far, near = x.clone(), x.clone()
    far[:, :, 3:, :] += 1
    near[:, :, 2:, :] += 1
    base = model(x, t, labels).sample
    torch.testing.assert_close(model(far, t, labels).sample[:, :, 0], base[:, :, 0])
    assert not torch.allclose(model(near, t, labels).sample[:, :, 0], base[:, :, 0])


@pytest.mark.parametrize(
    "options",
    [
        {"sample_size": (8, 8, 8)}, {"sample_size": 8.0}, {"sample_size": (8, 0)}, {"depth": 2.5}, {"depth": True},
        {"num_classes": 2.5}, {"hidden_size": -24}, {"num_heads": 0}, {"in_channels": None},
        {"mlp_ratio": float("nan")}, {"mlp_ratio": 0.01}, {"mlp_ratio": "4"},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_are_none_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^{name}=") as error:
        SiTTransformer2DModel(**{"sample_size": 8, "num_classes": 5, **TINY, **options})
    assert repr(value) in str(error.value) or repr(value[1]) in str(error.value)


def test_position_embedding_rule_and_other_sizes():
    assert tiny(token_mixer="atconv").pos_embed is None
    assert tiny(token_mixer="atconv", pos_embed=True).pos_embed.shape == (1, 16, 24)
    assert tiny(token_mixer="hybrid").pos_embed is not None
    assert tiny(token_mixer="attention", pos_embed=False).pos_embed is None
    own_size, other_size = tiny(sample_size=(8, 12)), tiny(sample_size=8)
    other_size.load_state_dict({**own_size.state_dict(), "pos_embed": other_size.pos_embed})
    x, t, labels = inputs(height=8, width=12)
    torch.testing.assert_close(other_size(x, t, labels).sample, own_size(x, t, labels).sample, rtol=1e-5, atol=1e-6)


def test_learn_sigma_drops_the_second_half_of_the_channels():
    with_sigma, without = tiny(learn_sigma=True), tiny(learn_sigma=False)
    state = with_sigma.state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = (
            state[name].unflatten(0, (4, 8))[:, :4].flatten(0, 1)
        )  # (patch * patch, 2 C) -> (patch * patch, C)
    without.load_state_dict(state)
    x, t, labels = inputs()
    torch.testing.assert_close(without(x, t, labels).sample, with_sigma(x, t, labels).sample)


def test_timestep_forms_and_return_dict():
    model = tiny()
    x, _, labels = inputs()
    expected = model(x, torch.full((2,), 0.25), labels).sample
    assert torch.equal(model(x, 0.25, labels, return_dict=False)[0], expected)
    assert torch.equal(model(x, torch.tensor(0.25), labels)[0], expected)
    assert not torch.allclose(model(x, 0.5, labels).sample, expected)


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients():
    model = tiny(token_mixer="hybrid")
    x, t, labels = inputs()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        model.zero_grad()
        calls.clear()
        model(x, t, labels).sample.square().mean().backward()
        return len(calls), [parameter.grad.clone() for parameter in model.parameters()]

    plain_calls, plain = gradients()
    model.enable_gradient_checkpointing()
    checkpointed_calls, checkpointed = gradients()
    assert (plain_calls, checkpointed_calls) == (1, 2)
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


RESOLUTIONS = {
    "own size first": [(8, 8), (12, 12), (16, 16), (20, 20), (24, 24)],
    "one side at a time": [(8, 8), (12, 8), (12, 16), (20, 16), (20, 24)],
    "never the own size": [(16, 16), (8, 16), (16, 8), (24, 8), (12, 20)],
}


@pytest.mark.slow
@pytest.mark.parametrize("order", RESOLUTIONS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("token_mixer", ["attention", "atconv", "hybrid"])
def test_compiled_blocks_need_one_graph_per_mixer_beside_that_of_the_own_size(token_mixer, training, order):
    torch._dynamo.reset()
    counters.clear()
    model = tiny(token_mixer=token_mixer, patch_size=1, depth=4)
    compiled = copy.deepcopy(model)
    compiled.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for size in RESOLUTIONS[order]:
        x = torch.randn(2, 4, *size)
        with torch.set_grad_enabled(training):
            ours, plain = (m(x, 0.3, torch.tensor([0, 1]), return_dict=False)[0] for m in (compiled, model))
        torch.testing.assert_close(ours, plain)
        if training:
            ours.square().mean().backward()
    kinds = len(set(mixer_names(token_mixer, 4)))
    own_size = (8, 8) in RESOLUTIONS[order]
    assert counters["stats"]["unique_graphs"] == kinds * (1 + own_size)


def test_save_and_load_keep_options_and_weights(tmp_path):
    model = tiny(token_mixer=["atconv", "attention"], sample_size=(8, 4), pos_embed=True, pool="grid", qk_norm=True)
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert dict(loaded.config)["token_mixer"] == ["atconv", "attention"]
    x, t, labels = inputs(height=8, width=4)
    assert torch.equal(loaded(x, t, labels).sample, model(x, t, labels).sample)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_null_class_has_its_row_exactly_with_class_dropout():
    assert tiny().null_label == 5
    assert tiny().y_embedder.embedding_table.num_embeddings == 6
    assert tiny(class_dropout_prob=0.0).null_label is None
    assert tiny(class_dropout_prob=0.0).y_embedder.embedding_table.num_embeddings == 5


def test_a_new_model_predicts_zero_velocity():
    torch.manual_seed(0)
    model = create_model(None, 8, 5, **TINY)
    assert not model(*inputs()).sample.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_low_precision(dtype):
    model = tiny(token_mixer="hybrid")
    x, t, labels = inputs()
    expected = model(x, t, labels).sample
    output = model.to(dtype)(x.to(dtype), t, labels).sample
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"token_mixer": "atconvv"}, "did you mean 'atconv'"),
        ({"token_mixer": ["atconv"]}, "one name per block"),
        ({"token_mixer": ["atconv", "hybrid"]}, "hybrid"),
        ({"patch_size": 3}, "patch_size=3"),
        ({"patch_size": 8, "sample_size": 12}, "patches of 8"),
        ({"num_heads": 7}, "num_heads=7"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob"),
        ({"pos_embed": "maybe"}, "pos_embed='maybe'"),
        ({"hiden_size": 4}, "did you mean 'hidden_size'"),
        ({"token_mixer": "atconv", "qk_norm": True}, "qk_norm=True needs a block with attention"),
        ({"token_mixer": "attention", "routing": "static"}, "routing='static' needs a block with ATConv"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        tiny(**options)


def test_unknown_model_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'SiT-ATConv-XL/2'"):
        create_model("SiT-ATConvXL/2")


def test_inputs_that_do_not_fit_are_refused():
    x, t, labels = inputs()
    with pytest.raises(ValueError, match="3 channels"):
        tiny()(x[:, :3], t, labels)
    with pytest.raises(ValueError, match="patches of 2"):
        tiny()(x[:, :, :7], t, labels)
