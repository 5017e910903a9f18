"""What each class that a swap takes does not take: one clear error, the model as it was, and right calls work after."""

import logging

import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.pipelines.audioldm2 import AudioLDM2UNet2DConditionModel

from sit_atconv.runtime.compat.torch import tree_leaves, tree_map
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import load_delta, save_delta, swap_attention
from sit_atconv.swap.adapters import adapter_of, known_adapters
from sit_atconv.swap.blank import blank
from sit_atconv.swap.refused import REFUSED, candidates

ADAPTERS = {adapter.model.__name__: adapter for adapter in known_adapters() if adapter.tiny is not None}
classes = pytest.mark.parametrize("name", sorted(ADAPTERS))


def model_of(name, seed=0):
    torch.manual_seed(seed)
    return ADAPTERS[name].tiny().eval()


def inputs_of(name, model, text=5):
    """On a small grid, or on the model's own."""
    adapter = ADAPTERS[name]
    grid = (4, 4) if name.startswith("DiT") else (2, 6, 4)[-adapter.sides :]
    given = [{"grid": grid, "text": text}, {"text": text}]
    found = (adapter.example(model, torch.Generator().manual_seed(0), **each) for each in given)
    return next(inputs for inputs in found if inputs is not None)


@torch.no_grad()
def outputs(model, inputs):
    leaves = tree_leaves(model(**inputs))
    return [each for each in leaves if isinstance(each, torch.Tensor) and each.is_floating_point()]


def swapped(name, **options):
    model = model_of(name)
    inputs = inputs_of(name, model)
    options = {"joint": "split", "init": "copy_vo", "calib": [inputs]} | options
    return model, inputs, swap_attention(model, "all", **options)


def refused(tiny, model, says, call):
    """One line, and the model as it was."""
    before = tiny.snapshot(model)
    with pytest.raises(InputError, match=says) as info:
        call()
    assert "\n" not in str(info.value)
    tiny.assert_as(before, model)


@classes
def test_a_selection_of_nothing_and_a_parallel_model(name, tiny, monkeypatch):
    model = model_of(name)
    options = {"joint": "split", "init": "random"}
    refused(tiny, model, "leave nothing to swap", lambda: swap_attention(model, "no such name", **options))
    grafts = ADAPTERS[name].find(model)
    if all(graft.joint for graft in grafts.values()):
        refused(tiny, model, "joint attention over text and image only", lambda: swap_attention(model, "all"))
    if hasattr(model, "enable_parallelism"):
        monkeypatch.setattr(model, "_parallel_config", object())
        refused(tiny, model, "context or tensor parallelism", lambda: swap_attention(model, "all", **options))


@classes
def test_a_swapped_model_is_not_made_parallel(name):
    model, inputs, swap = swapped(name)
    before = outputs(model, inputs)
    if hasattr(model, "enable_parallelism"):
        for options in ({}, {"cp_plan": {}}):
            with pytest.raises(InputError, match="no context or tensor parallelism: swapped layers need all tokens"):
                model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2), **options)
    assert all(map(torch.equal, outputs(model, inputs), before))
    swap.revert()
    assert (
        getattr(model.enable_parallelism, "__func__", None) is type(model).enable_parallelism
        if hasattr(model, "enable_parallelism")
        else True
    )


@classes
def test_a_delta_of_another_model_or_of_other_weights(name, tiny, tmp_path):
    model, inputs, _ = swapped(name)
    save_delta(model, tmp_path / "own")
    other = model_of(name)
    with torch.no_grad():
        next(each for each in other.parameters() if each.ndim > 1).add_(1)
    refused(tiny, other, f"is for {name} .* and this model is {name} ", lambda: load_delta(other, tmp_path / "own"))
    stranger = "SiTTransformer2DModel" if name != "SiTTransformer2DModel" else "DiTTransformer2DModel"
    save_delta(swapped(stranger)[0], tmp_path / "strange")
    plain = model_of(name)
    refused(tiny, plain, f"is for {stranger} .* this model is {name} ", lambda: load_delta(plain, tmp_path / "strange"))
    load_delta(plain, tmp_path / "own")
    assert all(map(torch.equal, outputs(plain, inputs), outputs(model, inputs)))


@classes
def test_tokens_that_do_not_fill_the_grid(name):
    """Every layer, called within a pass as the model calls it, but for tokens: they are fewer than the grid has."""
    model, inputs, swap = swapped(name)
    before = outputs(model, inputs)
    for site in swap.sites:
        count, said = torch.Size(site.grid).numel(), []

        def cut(value, count=count, layer=site.layer):
            fits = isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] >= count
            return value[:, : getattr(layer, "prefix", 0) + count - 1] if fits else value

        def call(layer, args, kwargs, cut=cut, said=said):
            if not said:
                said.append(None)
                args, kwargs = tree_map(cut, (args, {k: v for k, v in kwargs.items() if "rotary" not in k}))
                with pytest.raises(InputError) as info:
                    layer.forward(*args, **kwargs)
                said[0] = str(info.value)

        if len(site.call[0][0].shape if site.call[0] else site.call[1]["hidden_states"].shape) != 3:
            continue  # maps, whose grid is their own
        handle = site.layer.register_forward_pre_hook(call, with_kwargs=True)
        outputs(model, inputs)
        handle.remove()
        assert "do not fill a grid of" in said[0] or "has no text beside an image of" in said[0], (site.name, said)
    assert all(map(torch.equal, outputs(model, inputs), before))


def said_to(module, args, kwargs, caplog) -> str:
    """What a module does of a keyword that it does not know."""
    caplog.clear()
    try:
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            module.forward(*args, **kwargs, no_such_keyword=1)
    except TypeError as error:
        return "refused" if "no_such_keyword" in str(error) else str(error)
    told = any("['no_such_keyword'] are not expected by" in each.getMessage() for each in caplog.records)
    return "told" if told else "nothing"


@classes
def test_a_keyword_that_an_attention_tells_of_is_told_of_by_its_layer(name, caplog):
    model, inputs, swap = swapped(name)
    with caplog.at_level(logging.WARNING):
        outputs(model, inputs)
    assert not [each for each in caplog.records if "are not expected by" in each.getMessage()]
    if type(model).__module__ != "sit_atconv":
        return  # timm's take no others; transformers' take any in silence
    found = {}
    for site in swap.sites:

        def call(layer, args, kwargs, site=site):
            if site.name not in found:
                found[site.name] = ""
                found[site.name] = [said_to(each, args, kwargs, caplog) for each in (site.attention, layer)]

        site.layer.register_forward_pre_hook(call, with_kwargs=True)
    outputs(model, inputs)
    assert found.keys() == swap.layers.keys()
    for theirs, ours in found.values():
        assert theirs in ("told", "refused")
        assert ours in ("told", "refused")


def with_two_images(ids):
    """The latter half of the tokens of an image belongs to a second one."""
    changed = ids.clone()
    changed[..., -ids.shape[-2] // 4 :, 0] += 1
    return changed


def out_of_order(ids):
    changed = ids.clone()
    changed[..., [-1, -2], :] = changed[..., [-2, -1], :]
    return changed


GRIDS = {  # by the argument that tells the grid, others in its place
    "img_ids": [
        (with_two_images, "number 2 images"),
        (out_of_order, "no full raster"),
        (lambda ids: ids[..., :-1, :], "no full raster|tell the grid of 23 tokens"),
        (lambda ids: ids[..., :-4, :], "tell the grid of 20 tokens"),
        (lambda ids: None, "img_ids: none were given"),
    ],
    "position_ids": [(with_two_images, "number 2 images"), (out_of_order, "no full raster")],
    "img_shapes": [
        (lambda shapes: [[(1, 6, 4), (1, 6, 4)]], "one image a sample"),
        (lambda shapes: [[(1, 6, 5)]], "tell the grid of 30 tokens"),
        (lambda shapes: None, "img_shapes: none were given"),
    ],
    "x": [
        (lambda x: [list(x)], "several images in one sequence"),
        (lambda x: [x[0].repeat(1, 2, 1, 1)], "of one frame"),
    ],
    "num_frames": [(lambda count: count + 1, "these are no volume of"), (lambda count: None, "these are no volume of")],
}  # fmt: skip
TOLD = [
    (name, key)
    for name in sorted(ADAPTERS)
    for key in GRIDS
    if key in inputs_of(name, model_of(name)) and name.partition("Trans")[0] not in ("VisionTransformer", "Eva", "Beit")
]


@pytest.mark.parametrize(("name", "key"), TOLD)
def test_arguments_that_tell_no_grid(name, key):
    model, inputs, _ = swapped(name)
    before = outputs(model, inputs)
    for change, says in GRIDS[key]:
        with pytest.raises(InputError, match=says):
            outputs(model, inputs | {key: change(inputs[key])})
        assert all(map(torch.equal, outputs(model, inputs), before))


@pytest.mark.parametrize("library", REFUSED)
def test_every_refused_class_is_told_why(library):
    """Of sound, of packed samples, of several images in a sequence, ..."""
    for name, cls in candidates()[library].items():
        if (reason := REFUSED[library].get(name)) is not None:
            with pytest.raises(InputError, match="cannot be swapped as it is") as info:
                adapter_of(cls.__new__(cls))
            assert f"{name} {reason}" in str(info.value)
            with pytest.raises(InputError, match="cannot be swapped as it is"):
                blank(name)


@classes
def test_sound_is_never_swapped(name):
    """Neither beside a video, nor as a model of its own."""
    model = model_of(name)
    assert not [each for each in ADAPTERS[name].find(model) if "audio" in each]
    if any("audio" in each for each, _ in model.named_modules()):
        with pytest.raises(InputError, match="select='audio'"):
            swap_attention(model, "audio", joint="split", init="random")
    with pytest.raises(InputError, match="no adapter for AudioLDM2UNet2DConditionModel"):
        adapter_of(AudioLDM2UNet2DConditionModel.__new__(AudioLDM2UNet2DConditionModel))


def packed_mask(shape):
    """Of two samples of 3 and 2 tokens of text, and of half of the image each."""
    sample = torch.tensor([0] * 3 + [1] * 2 + [0] * 12 + [1] * 12)
    return (sample[:, None] == sample).expand(1, 1, -1, -1) if shape == 4 else (sample == 0)[None]


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        *(
            ("CogView4Transformer2DModel", {"attention_kwargs": {key: torch.ones(1)}}, f"{key} was given")
            for key in ("latent_attn_mask", "text_attn_mask", "batch_flag")
        ),
        ("ChromaTransformer2DModel", {"attention_mask": packed_mask(2)}, "leaves out image tokens"),
        *(
            ("BriaFiboTransformer2DModel", {"joint_attention_kwargs": {"attention_mask": mask}}, "leaves out image tok")
            for mask in (packed_mask(4), packed_mask(2)[:, None, None], packed_mask(4).float().log())
        ),
        *(
            (f"{family}Transformer2DModel", {argument: {"attention_mask": packed_mask(4)}}, "attention_mask was given")
            for family, argument in (
                ("Flux", "joint_attention_kwargs"), ("Flux2", "joint_attention_kwargs"), ("Bria", "attention_kwargs"),
                ("QwenImage", "attention_kwargs"), 
            )
        ),
    ],
)  # fmt: skip
def test_packed_samples(name, changed, says):
    model, inputs, _ = swapped(name)
    before = outputs(model, inputs)
    with pytest.raises(InputError, match=says):
        outputs(model, inputs | changed)
    assert all(map(torch.equal, outputs(model, inputs), before))
