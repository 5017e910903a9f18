"""AttNet does what timm asks of a model: what timm's own tests look at, at tiny sizes where real ones add nothing."""

import copy
import fnmatch
import inspect
import math
import re

import pytest
import torch
from conftest import slowly
from timm import create_model, list_models, set_scriptable
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from sit_atconv.models.attnet import ATConv2d, AttNet, AttNetBlock

NAMES = [f"attnet_{size}" for size in ("s", "t1", "t2", "t3", "t4", "xs", "xxs")]
TINY = {"depths": (1, 2, 2, 1), "dims": (8, 16, 24, 32)}  # for t1: with layer scale and the norm in the MLP
# xxs as published, and the kind of block that it has not.
MODELS = {"xxs": ("attnet_xxs", {}), "tiny t1": ("attnet_t1", TINY)}
FX = {
    "tracer_kwargs": {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
}


def make(which: str = "tiny t1", draw: bool = True, **options) -> nn.Module:
    name, own = MODELS[which]
    torch.manual_seed(0)
    model = create_model(name, **own, **options).eval()
    if draw:  # a layer scale of 1e-6 hides what a block does
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gamma"):
                nn.init.ones_(parameter)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def images(size: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def traced(model: nn.Module) -> nn.Module:
    """torch.fx's form of the model, from the image to the logits."""
    train_nodes, eval_nodes = get_graph_node_names(model, **FX)
    return create_feature_extractor(
        model, train_return_nodes=[train_nodes[-1]], eval_return_nodes=[eval_nodes[-1]], **FX
    )


def logits(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    (only,) = outputs.values()
    return only


def test_the_family_is_registered():
    assert list_models("attnet_*") == NAMES


@pytest.mark.parametrize("which", MODELS)
def test_every_parameter_gets_a_gradient_also_with_checkpointing(which):
    model, x, results = make(which, num_classes=42).train(), images(), []
    calls = []
    model.stages[2].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        twin = copy.deepcopy(model)
        twin.set_grad_checkpointing(checkpointing)
        calls.clear()
        y = twin(x)
        y.square().mean().backward()
        assert y.shape == (2, 42)
        assert len(calls) == 1 + checkpointing
        found = gradients(twin)
        assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
        assert all(gradient.any() for name, gradient in found.items() if not name.endswith("conv.bias")), "dead"
        results.append((y.detach(), found))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "name", ["attnet_xxs", "attnet_t1", *slowly(name for name in NAMES if name not in ("attnet_xxs", "attnet_t1"))]
)
def test_default_cfg_says_what_the_model_is(name):
    options = {"device": "meta", "dtype": torch.float32}
    model = create_model(name, **options).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert {cfg["first_conv"] + ".weight", cfg["classifier"] + ".weight"} <= state.keys()
    assert (model.num_classes, model.in_chans) == (cfg["num_classes"], cfg["input_size"][0]) == (1000, 3)
    assert model.get_classifier() is model.head.fc
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

    x = torch.randn(1, *cfg["input_size"], device="meta")
    assert model.forward_features(x).shape == (1, model.num_features, *cfg["pool_size"])


def test_heads_are_as_they_are_asked_for():
    name, options = "attnet_xxs", {"device": "meta", "dtype": torch.float32}
    model = create_model(name, **options).eval()
    x = torch.randn(1, *model.default_cfg["input_size"], device="meta")
    width, map_shape = model.num_features, (1, model.num_features, *model.default_cfg["pool_size"])
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (1, width) == (1, model.head_hidden_size)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    model.float()

    model.reset_classifier(0)
    assert (model.num_classes, model(x).shape) == (0, (1, width))
    model.reset_classifier(0, "")
    assert model(x).shape == map_shape
    assert create_model(name, num_classes=0, **options)(x).shape == (1, width)
    assert create_model(name, num_classes=0, global_pool="", **options)(x).shape == map_shape

    model.double().train()
    model.reset_classifier(2, "avg")
    assert all((tensor.is_meta, tensor.dtype) == (True, torch.float64) for tensor in model.head.parameters())
    assert all(module.training for module in model.modules())
    with pytest.raises(TypeError, match="not_an_option"):
        create_model(name, not_an_option=1, **options)


def test_reset_classifier_keeps_the_pool_and_what_is_frozen():
    assert inspect.signature(AttNet.reset_classifier).parameters["global_pool"].default is None
    model, x = make(global_pool="max"), images()
    features = model.forward_features(x)
    expected = model.forward_head(features, pre_logits=True)
    model.reset_classifier(5)
    assert torch.equal(model.forward_head(features, pre_logits=True), expected)
    assert model(x).shape == (2, 5)
    model.reset_classifier(5, "avg")
    assert not torch.allclose(model.forward_head(features, pre_logits=True), expected)
    model.requires_grad_(False)
    for pool in (None, ""):
        model.reset_classifier(0, pool)
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factory_dtype_and_a_change_of_it_after_a_forward(dtype):
    made = make(dtype=dtype, pos_embed=True)
    assert all(t.dtype == dtype for t in (*made.parameters(), *made.buffers()) if t.is_floating_point())
    changed = make(pos_embed=True)
    changed(images())
    changed.to(dtype).load_state_dict(made.state_dict())
    y = changed(images().to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, made(images().to(dtype)))


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_grouped_in_the_order_in_which_they_run(name):
    model = create_model(name, device="meta")
    names = [parameter for parameter, _ in model.named_parameters()]
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert [layers[parameter] for parameter in names] == sorted(layers.values())
    depth = sum(isinstance(module, AttNetBlock) for module in model.modules())
    assert set(layers.values()) == set(range(1 + depth + 1))
    # A downsampling learns with the block after it.
    assert layers["stages.1.downsample.conv.weight"] == layers["stages.1.blocks.0.norm_1.weight"]
    assert layers["head.fc.weight"] - layers["stages.1.blocks.0.norm_1.weight"] == sum(
        len(later.blocks) for later in model.stages[1:]
    )
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(coarse.values()) == set(range(1 + 4 + 1))


def test_difference_control_has_no_weight_decay_even_where_vectors_have_one():
    model = make(draw=False)
    (pattern,) = model.no_weight_decay()
    matched = [name for name, _ in model.named_parameters() if fnmatch.fnmatch(name, pattern)]
    assert len(matched) == sum(isinstance(module, ATConv2d) for module in model.modules())
    assert make(draw=False, inhibition="full").no_weight_decay() == set()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, False, model.no_weight_decay())
    spared = [names[id(parameter)] for group in groups if not group["weight_decay"] for parameter in group["params"]]
    assert matched == [name for name in spared if not name.endswith("bias")]


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_features_only_are_the_maps_after_the_stages(feature_cls):
    x = images(65)
    whole = make()
    _, expected = whole.forward_intermediates(x)
    state = whole.state_dict()
    model = make(features_only=True, feature_cls=feature_cls)
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = re.sub(r"^(stem|stages)_", r"\1.", re.sub(r"^(model|graph_module)\.", "", name))
        tensor.data.copy_(state[own])
    maps = model(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert model.feature_info.channels() == list(TINY["dims"])
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(one.shape[2:]) for one in maps] == [(math.ceil(65 / r),) * 2 for r in (4, 8, 16, 32)]
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_features_only_picks_indices_and_trains_with_checkpointing():
    found = []
    for checkpointing in (False, True):
        model = make(features_only=True, out_indices=(1, 3)).train()
        model.set_grad_checkpointing(checkpointing)
        maps = model(images())
        assert [one.shape[1] for one in maps] == [16, 32]
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in maps)
        sum(one.square().mean() for one in maps).backward()
        found.append(gradients(model))
        assert all(gradient is not None for gradient in found[-1].values())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("which", MODELS)
@torch.no_grad()
def test_forward_intermediates(which):
    model, x = make(which), images(96)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(final, maps[-1])
    assert [one.shape[1] for one in maps] == [info["num_chs"] for info in model.feature_info]
    assert [one.shape[2] for one in maps] == [24, 12, 6, 3]
    for last, (indices, wanted) in zip((3, 2), ((2, maps[2:]), ([0, 2], [maps[0], maps[2]])), strict=True):
        some = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        torch.testing.assert_close(some, list(wanted), rtol=0, atol=0)
        end, some = model.forward_intermediates(x, indices=indices, stop_early=True)
        torch.testing.assert_close(some, list(wanted), rtol=0, atol=0)
        assert torch.equal(end, maps[last])
    with pytest.raises(AssertionError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")
    model.set_grad_checkpointing()
    with torch.enable_grad():
        checkpointed = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(checkpointed, maps)


@pytest.mark.parametrize("index", range(4))
def test_a_pruned_model_ends_at_the_map_and_leaves_no_weight_unused(index):
    model, x = make(num_classes=5, drop_rate=0.5), images()
    with torch.no_grad():
        expected, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
        if index == 3:
            whole = copy.deepcopy(model)
            assert whole.prune_intermediate_layers([3], prune_head=False) == [3]
            assert torch.equal(whole(x), expected)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([index]) == [index]
    with torch.no_grad():
        assert torch.equal(pruned.forward_features(x), maps[index])
        assert torch.equal(pruned.forward_intermediates(x, [index], intermediates_only=True)[0], maps[index])
        assert torch.equal(pruned(x), maps[index])  # no pool and no classifier, as without a head
        assert not any(module.training for module in pruned.modules())
    pruned.reset_classifier(7, "avg")
    assert pruned.num_features == pruned.head_hidden_size == TINY["dims"][index]
    assert pruned.forward_head(pruned.forward_features(x), pre_logits=True).shape[1] == TINY["dims"][index]
    pruned.train()(x).sum().backward()
    assert all(gradient is not None for gradient in gradients(pruned).values())


@pytest.mark.parametrize(
    ("which", "options"), [*((which, {}) for which in MODELS), ("tiny t1", {"pos_embed": True, "routing": "static"})]
)
@torch.no_grad()
def test_torchscript_equals_eager(which, options, tmp_path):
    with set_scriptable(True):
        model = make(which, **options)
    torch.jit.script(model).save(str(tmp_path / "scripted.pt"))
    loaded = torch.jit.load(str(tmp_path / "scripted.pt"))
    for size in (64, 97):
        torch.testing.assert_close(loaded(images(size)), model(images(size)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", MODELS)
def test_fx_equals_eager_to_the_bit_forward_and_backward_and_can_be_scripted(which):
    with set_scriptable(True):
        model = make(which, num_classes=42)
    x = images()
    fx = traced(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(logits(fx(x)), model(x))
        assert torch.equal(logits(fx(images(96))), model(images(96)))
        torch.testing.assert_close(logits(torch.jit.script(fx)(x)), model(x), rtol=1e-4, atol=1e-5)
    logits(fx.train()(x)).square().mean().backward()
    model.train()(x).square().mean().backward()
    found, expected = gradients(fx), gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
