"""Weights of swapped models quantised by torchao: in place, after loading and while loading."""

import copy

import pytest
import torch
from diffusers import TorchAoConfig
from swap_families import ADAPTERS, Family, outputs, same
from torch import nn

from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import load_delta, regress, save_delta

pytest.importorskip("torchao", reason="needs torchao, which is in no extra of this project")
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

CONFIGS = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}
# Half a step of 127 to a row's greatest, and half of the last of three bits behind the leading one, are these shares of
# it.
STEPS = {"int8": 1 / 254, "fp8": 1 / 16}
# A kind of layer each: of image tokens, of a volume, of two streams, and of one.
KINDS = ["DiTTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"]
config = pytest.mark.parametrize("config", CONFIGS)
kind = pytest.mark.parametrize("name", KINDS)


def quantise(model: nn.Module, config: str, wanted=lambda name: True) -> nn.Module:
    """The linears whose names are wanted."""
    quantize_(model, CONFIGS[config](), lambda module, name: isinstance(module, nn.Linear) and wanted(name))
    return model


def within(names):
    return lambda name: name.startswith(tuple(f"{each}." for each in names))


def dequantised(model: nn.Module) -> nn.Module:
    """A copy with plain weights of the same values."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.weight = nn.Parameter(module.weight.dequantize().detach())
    return model


def error(ours: list, theirs: list) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def refused(says: str, *calls) -> None:
    for call in calls:
        with pytest.raises(InputError, match=says) as info:
            call()
        assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "config"), [*((name, "int8") for name in sorted(ADAPTERS)), *((name, "fp8") for name in KINDS)]
)
def test_quantised_layers_compute_with_their_rounded_weights(name, config):
    family, model = Family(name), Family(name).model()
    swap, inputs = family.swapped(model, init="random"), family.inputs(model, 1)
    plain, weights = outputs(model, inputs), {key: each.clone() for key, each in model.state_dict().items()}
    quantise(model, config, within(swap.layers))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and within(swap.layers)(name):
            assert type(module.weight) is not nn.Parameter, name
            weight = weights[f"{name}.weight"]
            rounding = (module.weight.dequantize() - weight).abs()
            assert (rounding <= 1.01 * STEPS[config] * weight.abs().amax(1, keepdim=True)).all(), name
    found = outputs(model, inputs)
    torch.testing.assert_close(found, outputs(dequantised(model), inputs), rtol=1e-4, atol=1e-5)
    assert error(found, plain) > 0


@config
@kind
def test_quantised_after_a_load_and_while_loading(tmp_path, name, config):
    family, model = Family(name), Family(name).model()
    family.swapped(model)
    inputs = family.inputs(model, 1)
    model.save_pretrained(tmp_path / "model")
    save_delta(model, tmp_path / "delta")
    plain = outputs(model, inputs)
    found = outputs(quantise(model, config), inputs)
    assert 0 < error(found, plain) < 0.5
    loaded = type(model).from_pretrained(tmp_path / "model").eval()
    assert same(outputs(quantise(loaded, config), inputs), found)
    again = family.model()
    load_delta(again, tmp_path / "delta")
    assert same(outputs(quantise(again, config), inputs), found)
    while_loading = type(model).from_pretrained(
        tmp_path / "model", quantization_config=TorchAoConfig(CONFIGS[config]()), torch_dtype=torch.float32
    )
    kept = type(model)._keep_in_fp32_modules or ()  # by diffusers, which quantises the others
    in_part = type(model).from_pretrained(tmp_path / "model").eval()
    quantise(in_part, config, lambda name: not any(each in name.split(".") for each in kept))
    assert same(outputs(while_loading.eval(), inputs), outputs(in_part, inputs))
    refused(
        "plain tensor|since the swap",
        lambda: model.save_pretrained(tmp_path / "not"), lambda: save_delta(model, tmp_path / "not"),
    )  # fmt: skip
    assert not (tmp_path / "not").exists()


@config
@kind
def test_a_model_quantised_before(tmp_path, name, config):
    """Its attentions are refused, and a delta made elsewhere; with its attentions plain, it has a delta of its own."""
    family = Family(name)
    names, plain = list(family.adapter.find(family.model())), family.model()
    inputs = family.inputs(plain, 0)
    family.swapped(plain)
    save_delta(plain, tmp_path / "plain")
    whole = quantise(family.model(), config)
    before = outputs(whole, inputs)
    refused("has to_q with weights of type .*; swap before sharding or quantising", lambda: family.swapped(whole))
    refused("load it onto the weights that it was made from", lambda: load_delta(whole, tmp_path / "plain"))
    assert same(outputs(whole, inputs), before)

    def outside(name: str) -> bool:
        return not within(names)(name)

    model, twin = (quantise(family.model(), config, outside) for _ in range(2))
    before = outputs(model, inputs)
    refused("load it onto the weights that it was made from", lambda: load_delta(model, tmp_path / "plain"))
    swap = family.swapped(model)
    save_delta(model, tmp_path / "own")
    load_delta(twin, tmp_path / "own")
    assert same(outputs(twin, inputs), outputs(model, inputs))
    refused("load it onto the weights that it was made from", lambda: load_delta(family.model(), tmp_path / "own"))
    swap.revert()
    assert same(outputs(model, inputs), before)


@config
@kind
def test_a_swapped_model_that_is_quantised_is_reported_and_reverted(name, config):
    family, model = Family(name), Family(name).model()
    swap, inputs = family.swapped(model), family.inputs(model, 0)
    rows = swap.report().layers
    quantise(model, config)
    found = swap.report().layers
    assert [(row.macs_after, row.params_after) for row in found] == [(row.macs_after, row.params_after) for row in rows]
    refused("quantised", lambda: regress(swap, [inputs], steps=1))
    names = list(swap.layers)
    swap.revert()
    original = quantise(family.model(), config, lambda name: not within(names)(name))
    assert same(outputs(model, inputs), outputs(original, inputs))
