"""Caches of diffusers on swapped models: they leave out of a swapped model what they leave out of its original."""

import re
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, ModelMixin, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin
from swap_families import ADAPTERS, Family, few, outputs, same
from torch import nn

from sit_atconv.runtime.compat.torch import tree_map

CALLS = 3
OF_DIFFUSERS = sorted(name for name, each in ADAPTERS.items() if issubclass(each.model, ModelMixin))


def first_block(layers, strict: bool) -> FirstBlockCacheConfig:
    return FirstBlockCacheConfig(0.0 if strict else 1e9)


def mag(layers, strict: bool) -> MagCacheConfig:
    return MagCacheConfig(0.0 if strict else 1e9, num_inference_steps=CALLS, mag_ratios=[1.1] * CALLS)


def taylorseer(layers, strict: bool) -> TaylorSeerCacheConfig:
    """On the attentions by name: by default diffusers looks for names that end in "attn", which few have."""
    return TaylorSeerCacheConfig(
        cache_interval=1 if strict else 2, disable_cache_before_step=1, max_order=0, taylor_factors_dtype=torch.float32,
        cache_identifiers=[re.escape(name) for name in layers],
    )  # fmt: skip


# Each makes a cache that leaves nothing out (strict), or as much as it can; and in how many of the calls runs then what
# it leaves out.
KINDS = {first_block: 1, mag: 1, taylorseer: 2}
# What diffusers refuses a class unswapped for: it does not know the blocks, or sees none.
UNKNOWN = r"Model class .* not registered|pop from empty list"
# Blocks that it knows, and whose arguments or results are not as it takes them to be: {class: (what it raises, kinds)}.
MISTAKEN = {
    "Flux2Transformer2DModel": (r"unsupported operand .*'Tensor' and 'list'", ["first_block"]),
    "Kandinsky5Transformer3DModel": ("Parameter 'hidden_states' not found", ["first_block"]),
    "LatteTransformer3DModel": ("size of tensor a .* must match", ["first_block", "mag"]),
    "MotifVideoTransformer3DModel": ("size of tensor a .* must match", ["first_block"]),
    "SD3Transformer2DModel": (r"unsupported operand .*'NoneType' and 'Tensor'", ["first_block"]),
    "ZImageTransformer2DModel": ("hidden_states", ["first_block", "mag"]),
}


def later(inputs: dict, call: int) -> dict:
    """The inputs of a later call: at other times, on other latents and with another text."""

    def fade(each):
        if not isinstance(each, torch.Tensor) or not each.is_floating_point():
            return each
        return each * (1 - 0.1 * call)

    found = {name: value if "mask" in name else tree_map(fade, value) for name, value in inputs.items()}
    if "timestep" in inputs and not inputs["timestep"].is_floating_point():
        found["timestep"] = inputs["timestep"] - 7 * call
    return found


@contextmanager
def counted(model: nn.Module, names):
    """{name: in how many calls of the model any of the maps below it ran}."""
    calls, ran = Counter(dict.fromkeys(names, 0)), set()

    def note(name: str):
        return lambda *_: ran.add(name)

    def ended(*_):
        calls.update(ran)
        ran.clear()

    inside = [(name, each) for name in names for each in model.get_submodule(name).modules()]
    hooks = [each.register_forward_pre_hook(note(name)) for name, each in inside if isinstance(each, nn.Linear)]
    hooks.append(model.register_forward_hook(ended))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def taking_caches(model: nn.Module) -> nn.Module:
    """The model, given diffusers' own `enable_cache` if its class has none."""
    if not isinstance(model, CacheMixin):
        model.__class__ = type(type(model).__name__, (CacheMixin, type(model)), {})
    return model


def run(model: nn.Module, config, layers: list[str], calls: list[dict]) -> tuple[list, Counter]:
    """The outputs of calls with a cache, and in how many of them the layers ran."""
    model.enable_cache(config)
    try:
        with counted(model, layers) as runs, model.cache_context("one"):
            return [outputs(model, inputs) for inputs in calls], runs
    finally:
        model.disable_cache()


def tried(family: Family, kind, calls: list[dict]) -> Counter | str:
    """On the unswapped class, how often its attentions run under a cache; or what diffusers raises."""
    model = taking_caches(family.model())
    layers = list(family.adapter.find(model))
    try:
        return run(model, kind(layers, strict=False), layers, calls)[1]
    except Exception as error:  # of any kind: nobody meant it
        return f"{type(error).__name__}: {error}".splitlines()[0]


@pytest.mark.parametrize("name", few(OF_DIFFUSERS))
def test_a_cache_leaves_out_of_a_swapped_model_what_it_does_of_the_original(name):
    family = Family(name)
    model = family.model()
    inputs, cls = family.inputs(model, 0), type(model)
    calls = [later(inputs, call) for call in range(CALLS)]
    original = outputs(model, inputs)
    unswapped = {kind: tried(family, kind, calls) for kind in KINDS}
    for kind, found in unswapped.items():
        if isinstance(found, str):
            says, kinds = MISTAKEN.get(name, ("", []))
            assert re.search(says if kind.__name__ in kinds else UNKNOWN, found), (kind.__name__, found)
    swap = family.swapped(model, init="random")
    layers, swapped_class = list(swap.layers), type(model)
    plain = [outputs(model, each) for each in calls]
    assert not same(plain[0], plain[1])
    assert isinstance(model, CacheMixin) == (issubclass(cls, CacheMixin) or name == "DiTTransformer2DModel")
    taking_caches(model)
    for kind, least in KINDS.items():
        if isinstance(unswapped[kind], str):
            continue
        drawn, runs = run(model, kind(layers, strict=True), layers, calls)
        assert all(map(same, drawn, plain))
        assert set(runs.values()) == {CALLS}
        drawn, runs = run(model, kind(layers, strict=False), layers, calls)
        assert runs == unswapped[kind]
        if kind is mag and "pop from empty" in str(unswapped[first_block]):  # it warns that it sees no blocks
            continue
        assert min(runs.values()) == least
        assert same(drawn[0], plain[0])
        assert not same(drawn[1], plain[1])
    model.__class__ = swapped_class
    assert same(outputs(model, inputs), plain[0])
    swap.revert()
    assert type(model) is cls
    assert same(outputs(model, inputs), original)
