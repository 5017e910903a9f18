import copy
import logging

import peft
import pytest
import torch
from peft import LoraConfig

import sit_atconv
from sit_atconv.swap import models, regress, swap_attention

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
GONE = ("to_q", "to_k")


def lora_of(tensors: dict, generator=None) -> dict:
    """A LoRA that does something: new ones have B at zero."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(each.shape, generator=generator) * 0.3 for name, each in tensors.items()}


@pytest.fixture
def unet_lora(tiny, tmp_path):
    """The folder and the tensors of a LoRA made on the unswapped U-Net."""
    model = tiny.model("unet")
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS))
    tensors = lora_of(peft.get_peft_model_state_dict(model, adapter_name="default"))
    peft.set_peft_model_state_dict(model, tensors)
    model.save_lora_adapter(tmp_path / "lora")
    return tmp_path / "lora", tensors


def with_deltas(model, tensors: dict, scale: float):
    """The model with scale * B A added to every map that the LoRA is for and the model has."""
    merged = copy.deepcopy(model)
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            try:
                linear = merged.get_submodule(path)
            except AttributeError:
                continue
            linear.weight.data += scale * tensors[f"{path}.lora_B.weight"] @ a
    return merged


def swapped_unet(tiny):
    model = tiny.model("unet")
    swap_attention(model, "all")
    return model


@pytest.mark.parametrize("form", ["folder", "tensors", "prefixed", "of old"])
def test_a_lora_of_the_unswapped_unet_attaches(tiny, unet_lora, caplog, form):
    folder, tensors = unet_lora
    model, scale = swapped_unet(tiny), 2.0 if form == "folder" else 1.0  # alpha / r is in the folder's metadata alone
    plain = copy.deepcopy(model)
    source, prefix = (folder, None) if form == "folder" else (tensors, None)
    if form == "prefixed":
        source, prefix = {f"unet.{name}": each for name, each in tensors.items()}, "unet"
        source["text_encoder.q_proj.lora_A.weight"] = torch.zeros(2, 4)
    elif form == "of old":
        source = {
            name.replace("to_out.0.", "to_out.").replace(".to_", ".processor.to_").replace(".lora_A.", "_lora.down.")
            .replace(".lora_B.", "_lora.up."): each
            for name, each in tensors.items()
        }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        model.load_lora_adapter(source, prefix=prefix)
    attached = {name for name, _ in model.named_parameters() if "lora_" in name}
    layers = tiny.layers["unet"]
    # 4 layers of 2 maps and 4 cross-attentions of 4 maps, A and B each
    assert len(attached) == 2 * (4 * 2 + 4 * 4)
    for layer in layers:
        inside = {name.removeprefix(f"{layer}.").split(".lora")[0] for name in attached if name.startswith(f"{layer}.")}
        assert inside == {"to_v", "to_out.0"}
    (warning,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "left out 16 tensors of the LoRA" in warning
    assert f"{layers[0]}.to_k, {layers[0]}.to_q" in warning
    assert "(8 in all)" in warning
    assert not [record for record in caplog.records if "unexpected" in record.getMessage()]
    expected = tiny.run(with_deltas(plain, tensors, scale), "unet")
    torch.testing.assert_close(tiny.run(model, "unet"), expected, rtol=1e-4, atol=1e-5)
    assert (expected - tiny.run(plain, "unet")).norm() > 1e-2 * expected.norm()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_second_lora_attaches_beside_the_first(tiny, unet_lora):
    _, tensors = unet_lora
    model = swapped_unet(tiny)
    plain = copy.deepcopy(model)
    model.load_lora_adapter(tensors, prefix=None, adapter_name="first")
    model.load_lora_adapter(tensors, prefix=None, adapter_name="second")
    model.set_adapters(["first", "second"])
    assert len([name for name, _ in model.named_parameters() if ".second" in name]) == 48
    expected = tiny.run(with_deltas(plain, tensors, 2.0), "unet")
    torch.testing.assert_close(tiny.run(model, "unet"), expected, rtol=1e-4, atol=1e-5)


def test_a_lora_that_is_all_there_is_said_nothing_of(tiny, unet_lora, caplog):
    _, tensors = unet_lora
    model = tiny.model("unet")
    swap_attention(model, [tiny.layers["unet"][0]])
    rest = {name: each for name, each in tensors.items() if not name.startswith(tiny.layers["unet"][0])}
    with caplog.at_level(logging.WARNING):
        model.load_lora_adapter(rest, prefix=None)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_peft_attaches_to_what_is_there(tiny, kind):
    """These classes have no loader of their own in diffusers: peft puts the adapter in."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS)
    original = peft.inject_adapter_in_model(config, tiny.model(kind))
    tensors = lora_of(peft.get_peft_model_state_dict(original))
    model = tiny.model(kind)
    swap_attention(model, "all")
    plain = copy.deepcopy(model)
    peft.inject_adapter_in_model(config, model)
    result = peft.set_peft_model_state_dict(model, tensors)
    gone = [name for name in tensors if "attn1" in name and any(f".{each}." in name for each in GONE)]
    assert sorted(result.unexpected_keys) == sorted(gone)
    attached = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(attached) == len(tensors) - len(gone) == {"dit": 12, "pixart": 24}[kind]
    expected = tiny.run(with_deltas(plain, tensors, 1.0), kind)
    torch.testing.assert_close(tiny.run(model, kind), expected, rtol=1e-4, atol=1e-5)
    assert (expected - tiny.run(plain, kind)).norm() > 1e-2 * expected.norm()


def test_regression_trains_the_lora_of_a_layer_and_not_what_it_froze(tiny):
    model = tiny.model("dit")
    swap = swap_attention(model, "all")
    first, second, *_ = swap.layers
    targets = [f"{first}.to_v", f"{second}.to_out.0", "transformer_blocks.0.ff.net.0.proj"]
    peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = regress(swap, [tiny.inputs("dit")], steps=20, lr=1e-2)
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.lora_{part}.default.weight" for name in targets[:2] for part in "AB"}


def test_only_models_that_load_loras_have_the_method():
    assert len(models.THIN) >= 14
    for cls in models.THIN.values():
        name = cls.__name__
        assert getattr(sit_atconv, name) is cls
        base = next(each for each in cls.__bases__ if issubclass(each, torch.nn.Module))
        assert hasattr(cls, "load_lora_adapter") == hasattr(base, "load_lora_adapter"), name
