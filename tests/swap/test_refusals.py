"""What each class that a swap takes does not take: one clear error, the model as it was, and right calls work after."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import ContextParallelConfig
from diffusers.pipelines.audioldm2 import AudioLDM2UNet2DConditionModel
from swap_families import ADAPTERS, few

from sit_atconv.runtime.compat.torch import tree_leaves, tree_map
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import load_delta, save_delta, swap_attention
from sit_atconv.swap.adapters import adapter_of, randomised
from sit_atconv.swap.blank import blank
from sit_atconv.swap.refused import REFUSED, candidates


def model_of(name):
    torch.manual_seed(0)
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


def swapped(name, model=None):
    """(model, inputs of it, swap)."""
    model = model_of(name) if model is None else model
    inputs = inputs_of(name, model)
    return model, inputs, swap_attention(model, "all", joint="split", init="copy_vo", calib=[inputs])


def refused(tiny, model, says, call):
    """One line, and the model as it was."""
    before = tiny.snapshot(model)
    with pytest.raises(InputError, match=says) as info:
        call()
    assert "\n" not in str(info.value)
    tiny.assert_as(before, model)


def is_parallel_in_vain(model, monkeypatch, tiny):
    """Before a swap."""
    with monkeypatch.context() as patch:
        patch.setattr(model, "_parallel_config", object())
        call = lambda: swap_attention(model, "all", joint="split", init="random")  # noqa: E731
        refused(tiny, model, "context or tensor parallelism, which swapped layers do not; swap before", call)


def becomes_parallel_in_vain(model, tiny):
    """After it, whatever the plan."""
    for options in ({}, {"cp_plan": {}}):
        call = lambda options=options: model.enable_parallelism(  # noqa: E731
            config=ContextParallelConfig(ulysses_degree=2), **options
        )
        refused(tiny, model, "has no context or tensor parallelism: .*layers need all tokens", call)


def cut(value, count):
    """Of tokens (B, N or more, dim), too few."""
    fits = isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] >= count
    return value[:, : count - 1] if fits else value


def said_to(module, args, kwargs, caplog) -> str:
    """What a module does of a keyword that it does not know."""
    caplog.clear()
    try:
        module.forward(*args, **kwargs, no_such_keyword=1)
    except TypeError as error:
        return "refused" if "no_such_keyword" in str(error) else str(error)
    told = any("['no_such_keyword'] are not expected by" in each.getMessage() for each in caplog.records)
    return "told" if told else "nothing"


def is_called_wrongly(site, layer, args, kwargs, caplog):
    """The layer, within a pass: with tokens that do not fill the grid, and with a keyword that means nothing."""
    tokens = args[0] if args else kwargs["hidden_states"]
    if tokens.ndim == 3:  # of maps, the grid is their own
        count = torch.Size(layer.reference.get()).numel() + getattr(layer, "prefix", 0)
        few = tree_map(lambda value: cut(value, count), (args, {k: v for k, v in kwargs.items() if "rotary" not in k}))
        with pytest.raises(ValueError, match=r"do not fill a grid of|has no text beside an image of") as info:
            layer.forward(*few[0], **few[1])
        assert "\n" not in str(info.value)
    if type(site.attention).__module__.startswith("diffusers"):  # timm's take no others, transformers' any, in silence
        assert said_to(site.attention, args, kwargs, caplog) in ("told", "refused")
        assert said_to(layer, args, kwargs, caplog) in ("told", "refused")


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """Deltas of two classes, by their names."""
    folder = tmp_path_factory.mktemp("strange")
    for name in ("SiTTransformer2DModel", "DiTTransformer2DModel"):
        save_delta(swapped(name)[0], folder / name)
    return folder


@pytest.mark.parametrize("name", few(sorted(ADAPTERS)))
def test_what_goes_with_no_swap_is_told_and_harms_nothing(name, tiny, strange, tmp_path, monkeypatch, caplog):
    model, parallel = model_of(name), hasattr(ADAPTERS[name].model, "enable_parallelism")
    options = {"joint": "split", "init": "random"}
    refused(tiny, model, "leave nothing to swap", lambda: swap_attention(model, "no such name", **options))
    if all(graft.joint for graft in ADAPTERS[name].find(model).values()):
        refused(tiny, model, "joint attention over text and image only", lambda: swap_attention(model, "all"))
    if parallel:
        is_parallel_in_vain(model, monkeypatch, tiny)
    model, inputs, swap = swapped(name, model)
    before, seen = outputs(model, inputs), set()
    assert not [each for each in caplog.records if "are not expected by" in each.getMessage()]
    if parallel:
        becomes_parallel_in_vain(model, tiny)
    save_delta(model, tmp_path / "own")

    def once(site, layer, args, kwargs):
        if site.name not in seen:
            seen.add(site.name)
            is_called_wrongly(site, layer, args, kwargs, caplog)

    for site in swap.sites:
        site.layer.register_forward_pre_hook(partial(once, site), with_kwargs=True)
    outputs(model, inputs)
    assert seen == swap.layers.keys()
    assert all(map(torch.equal, outputs(model, inputs), before))

    swap.revert()
    other = "SiT" if name.startswith("DiT") else "DiT"
    says = f"is for {other}Transformer2DModel .* this model is {name} "
    refused(tiny, model, says, lambda: load_delta(model, strange / f"{other}Transformer2DModel"))
    weight = next(each for each in model.parameters() if each.ndim > 1).data
    weight.add_(1)
    says = f"is for {name} .* and this model is {name} "
    refused(tiny, model, says, lambda: load_delta(model, tmp_path / "own"))
    weight.copy_(next(each for each in model_of(name).parameters() if each.ndim > 1).data)
    load_delta(model, tmp_path / "own")
    assert all(map(torch.equal, outputs(model, inputs), before))


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
TOLD = {
    "img_ids": ("Bria", "BriaFibo", "Chroma", "Flux", "Flux2", "Flux3", "LongCatImage", "OvisImage"),
    "position_ids": ("Krea2",), "img_shapes": ("QwenImage",), "x": ("ZImage",), "num_frames": ("LTX2Video", "LTXVideo"),
}  # fmt: skip
TOLD = [(name, key) for key, starts in TOLD.items() for name in ADAPTERS if name.split("Transformer")[0] in starts]


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


@pytest.mark.parametrize("name", ["LTX2VideoTransformer3DModel", "Kandinsky6Transformer3DModel"])
def test_sound_beside_a_video_is_not_swapped(name, tiny):
    model = model_of(name)
    assert any("audio" in each for each, _ in model.named_modules())
    assert not [each for each in ADAPTERS[name].find(model) if "audio" in each]
    refused(tiny, model, "'audio', .*leave nothing to swap", lambda: swap_attention(model, "audio", init="random"))


def test_sound_as_an_image_of_a_class_of_its_own():
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
            (f"{family}Transformer2DModel", {f"{kind}_kwargs": {"attention_mask": packed_mask(4)}}, "on_mask was giv")
            for family, kind in (("Flux", "joint_attention"), ("Flux2", "joint_attention"), ("QwenImage", "attention"))
        ),
    ],
)  # fmt: skip
def test_packed_samples(name, changed, says):
    model, inputs, _ = swapped(name)
    before = outputs(model, inputs)
    with pytest.raises(InputError, match=says):
        outputs(model, inputs | changed)
    assert all(map(torch.equal, outputs(model, inputs), before))


def test_a_mask_that_lets_the_whole_image_count_is_taken():
    """Of Bria FIBO, as its pipeline makes one of a padded text: it changes what the image reads."""
    model, inputs, _ = swapped("BriaFiboTransformer2DModel")
    for value in (True, 1.0):
        mask = torch.full((1, 1, 1, 29), value)
        same = outputs(model, inputs | {"joint_attention_kwargs": {"attention_mask": mask}})
        torch.testing.assert_close(same, outputs(model, inputs), rtol=1e-4, atol=1e-5)
    mask = torch.arange(29).ge(2)[None, None, None]
    other = outputs(model, inputs | {"joint_attention_kwargs": {"attention_mask": mask}})
    assert not torch.allclose(other[0], outputs(model, inputs)[0], rtol=1e-3)


CUT = {  # classes called with latents or images: what they do of a row and a column that are no whole patch
    **dict.fromkeys(("PixArt", "SD3", "HunyuanDiT", "Latte", "Wan", "ChronoEdit", "EasyAnimate", "SkyReelsV2"), "crop"),
    **dict.fromkeys(("HunyuanVideo", "HunyuanVideo15", "HunyuanImage", "MotifVideo"), "crop"),
    **dict.fromkeys(("AuraFlow", "CogView4", "Lumina2", "ZImage", "Cosmos", "Mochi", "Allegro"), "fail"),
    **dict.fromkeys(("CogVideoX", "CogView3Plus", "AnyFlow", "ErnieImage", "Kandinsky5", "Kandinsky6", "SiT"), "fail"),
    **dict.fromkeys(("ViTModel", "Dinov2Model", "DINOv3ViTModel", "CLIPVisionModel"), "crop"),
    "VisionTransformer": "fail",
}  # fmt: skip


def with_patches(model):
    """The model, or one like it that cuts patches of 2 where it has patches of 1."""
    if getattr(getattr(model, "config", None), "patch_size", None) not in (1, [1, 1], (1, 1)):
        return model
    patch = 2 if model.config.patch_size == 1 else (2, 2)
    torch.manual_seed(0)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return randomised(type(model)(**config | {"patch_size": patch}))


def one_more(name, inputs):
    """A row and a column more."""
    key = next(each for each in ("hidden_states", "pixel_values", "x") if each in inputs)
    pad = (0, 0, 0, 1, 0, 1) if name.startswith("Kandinsky") else (0, 1, 0, 1)
    value = inputs[key]
    return inputs | {key: [F.pad(each, pad) for each in value] if isinstance(value, list) else F.pad(value, pad)}


@pytest.mark.parametrize("start", CUT)
def test_a_size_that_patches_do_not_divide_is_taken_as_the_class_takes_it(start):
    name = next(
        name
        for name in ADAPTERS
        if name in (start, f"{start}Transformer2DModel", f"{start}Transformer3DModel", f"{start}2DModel")
    )
    plain, model = with_patches(model_of(name)), with_patches(model_of(name))
    inputs = inputs_of(name, model)
    more, whole = one_more(name, inputs), outputs(plain, inputs)
    swap = swap_attention(model, "all", joint="split", init="copy_vo", calib=[inputs])
    before, grids = outputs(model, inputs), {site.name: site.grid for site in swap.sites}
    try:
        wanted = [each.shape for each in outputs(plain, more)]
    except (RuntimeError, ValueError, AssertionError) as error:
        assert CUT[start] == "fail"
        with pytest.raises(type(error)):
            outputs(model, more)
    else:
        assert CUT[start] == "crop"
        assert wanted == [each.shape for each in whole]
        seen = {}
        for site in swap.sites:
            keep = lambda layer, *_, key=site.name: seen.update({key: layer.reference.get()})  # noqa: E731
            site.layer.register_forward_hook(keep)
        assert [each.shape for each in outputs(model, more)] == wanted
        assert seen == grids
    assert all(map(torch.equal, outputs(model, inputs), before))
