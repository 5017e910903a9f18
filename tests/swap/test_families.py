"""What every family of models that swap_attention knows has to go through, on its own tiny model."""

import copy
import json
import threading

import pytest
import torch
from conftest import ROOT, slowly
from peft import LoraConfig
from swap_families import ADAPTERS, FEW, Family, few, loss_of, outputs, same
from torch import nn

from sit_atconv.swap import load_delta, save_delta


@pytest.fixture
def family(request):
    return Family(request.param)


families = pytest.mark.parametrize("family", few(sorted(ADAPTERS)), indirect=True)


@families
def test_swapped_it_runs_on_other_grids_and_learns_and_reverted_it_is_what_it_was(family):
    model = family.model()
    state = {name: each.clone() for name, each in model.state_dict().items()}
    before = [outputs(model, family.inputs(model, which)) for which in (0, 1)]
    cls, swap = type(model), family.swapped(model)
    assert list(swap.layers) == list(family.adapter.find(model))
    for which in (0, 1, 0):
        after = outputs(model, family.inputs(model, which))
        assert [each.shape for each in after] == [each.shape for each in before[which]]
        assert all(each.isfinite().all() for each in after)
        assert not same(after, before[which])
    assert all(0 < row.error < float("inf") for row in swap.report(measure=False).layers)
    loss_of(model.train(), family.inputs(model, 1)).backward()
    model.eval()
    unread = {
        name
        for name, layer in swap.layers.items()
        if any(each.grad is None or not each.grad.any() for each in layer.parameters())
    }
    assert unread <= family.idle()
    swap.revert()
    assert type(model) is cls
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    assert all(same(outputs(model, family.inputs(model, which)), before[which]) for which in (0, 1))


@families
def test_a_copy_is_a_model_of_its_own(family):
    model = family.model()
    swap = family.swapped(model)
    twin, inputs = copy.deepcopy(model), family.inputs(model, 1)
    expected = outputs(model, inputs)
    for layer in swap.layers.values():
        for parameter in layer.parameters():
            parameter.data.zero_()
    assert same(outputs(twin, inputs), expected)
    assert not same(outputs(model, inputs), expected)


@families
def test_checkpointed_gradients_are_those_without(family):
    model = family.model()
    family.swapped(model)
    if not getattr(model, "_supports_gradient_checkpointing", False) and not hasattr(model, "set_grad_checkpointing"):
        pytest.skip("the class has no checkpointing")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "enable_gradient_checkpointing", None) or getattr(
                model, "gradient_checkpointing_enable", None
            )
            enable() if enable is not None else model.set_grad_checkpointing()
        model.train().zero_grad()
        torch.manual_seed(1)  # classes are dropped at random
        losses = [loss_of(model, family.inputs(model, which)) for which in (0, 1)]  # both before either goes back
        for loss in losses:
            loss.backward()
        gradients.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, each in plain.items():
        torch.testing.assert_close(checkpointed[name], each, rtol=1e-4, atol=1e-6, msg=name)


@families
def test_threads_have_grids_of_their_own(family):
    model = family.model()
    family.swapped(model)
    expected = [outputs(model, family.inputs(model, which)) for which in (0, 1)]
    found, gate = {}, threading.Barrier(2)

    def work(which: int) -> None:
        gate.wait()
        found[which] = [outputs(model, family.inputs(model, which)) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(each, expected[which]) for which in (0, 1) for each in found[which])


@families
def test_a_lora_on_the_layers_learns_and_comes_off(family):
    model = family.model()
    if not hasattr(model, "unload_lora"):
        pytest.skip("the class takes no LoRA by itself")
    swap = family.swapped(model)
    inputs = family.inputs(model, 1)
    plain = outputs(model, inputs)
    loss_of(model, inputs).backward()
    maps = [
        f"{name}.{each}"
        for name, layer in swap.layers.items()
        for each, module in layer.named_modules()
        if type(module) is nn.Linear and module.weight.grad is not None  # else it is of text that nothing reads
    ]
    model.add_adapter(LoraConfig(r=2, target_modules=maps, init_lora_weights=False))
    assert not same(outputs(model, inputs), plain)
    loss_of(model, inputs).backward()
    for name in swap.layers.keys() - family.idle():
        learnt = [each for key, each in model.get_submodule(name).named_parameters() if "lora_" in key]
        assert learnt
        assert all(each.grad is not None for each in learnt)
    model.unload_lora()
    model.requires_grad_()  # as before: by that too torch chooses how it multiplies
    assert same(outputs(model, inputs), plain)


LOADS = """
import json, sys
import torch, sit_atconv
from swap_families import aligned
from sit_atconv.swap import load_delta
from sit_atconv.swap.adapters import known_adapters
from sit_atconv.runtime.compat.torch import tree_leaves

torch.set_num_threads(int(sys.argv[2]))
adapters = {adapter.model.__name__: adapter for adapter in known_adapters()}
wrong = []
for name, cls in json.load(open(sys.argv[1] + "/classes.json")).items():
    inputs, expected = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False)
    if cls is not None:
        model = getattr(sit_atconv, cls).from_pretrained(f"{sys.argv[1]}/{name}")
    else:
        torch.manual_seed(0)
        model = adapters[name].tiny()
        load_delta(model, f"{sys.argv[1]}/{name}.safetensors")
    with torch.no_grad():
        output = aligned(model).eval()(**inputs)
    found = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor) and each.is_floating_point()]
    if not (len(found) == len(expected) and all(map(torch.equal, found, expected))):
        wrong.append(name)
print(json.dumps(wrong))
"""


@pytest.mark.parametrize("names", [FEW, *slowly([sorted(set(ADAPTERS) - set(FEW))])], ids=["few", "others"])
def test_all_are_saved_and_loaded_in_a_fresh_process(names, tmp_path, process_server):
    classes = {}
    for name in names:
        family, model = Family(name), Family(name).model()
        family.swapped(model)
        inputs = family.inputs(model, 1)
        torch.save((inputs, outputs(model, inputs)), tmp_path / f"{name}.pt")
        classes[name] = type(model).__name__ if type(model).__module__ == "sit_atconv" else None
        if classes[name] is not None:
            model.save_pretrained(tmp_path / name)
        save_delta(model, tmp_path / f"{name}.safetensors")
        fresh = family.model()
        load_delta(fresh, tmp_path / f"{name}.safetensors")
        assert same(outputs(fresh, inputs), outputs(model, inputs)), name
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    ours = {"environment": {"OWN": str(ROOT / "tests")}}
    codes, said = process_server(LOADS, tmp_path, [tmp_path, torch.get_num_threads()], ours)
    assert codes == [0], said
    assert json.loads((tmp_path / "printed-0").read_text().splitlines()[-1]) == []
