import json

import pytest
import timm
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sit_atconv
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import load_delta, save_delta, swap_attention
from sit_atconv.swap.delta import KEY

KINDS = ("sit", "dit", "pixart", "unet")
every = pytest.mark.parametrize("kind", KINDS)


def swapped(tiny, kind, select="all"):
    """As after some training: every weight of the layers is its own."""
    model = tiny.model(kind)
    swap = swap_attention(model, select)
    with torch.no_grad():
        for layer in swap.layers.values():
            for parameter in layer.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def stored_in(path) -> tuple[dict, dict]:
    with safe_open(path, framework="pt") as file:
        assert file.metadata().keys() == {KEY}
        return json.loads(file.metadata()[KEY]), load_file(path)


@every
@pytest.mark.parametrize("select", ["all", "odd"])
def test_a_delta_makes_the_original_the_swapped_model(tiny, tmp_path, kind, select):
    model, original = swapped(tiny, kind, select), tiny.model(kind)
    before, output = tiny.snapshot(original), tiny.run(original, kind)
    save_delta(model, tmp_path / "new" / "delta.safetensors")
    swap = load_delta(original, tmp_path / "new" / "delta.safetensors")
    assert type(original) is type(model)
    assert dict(original.config) == dict(model.config)
    assert swap.config == model._swap_record.config
    assert (
        swap.config["layers"]
        == list(swap.layers)
        == tiny.layers[kind][slice(None) if select == "all" else slice(1, None, 2)]
    )
    assert list(original.state_dict()) == list(model.state_dict())
    for size in ((8, 8), (16, 4)):
        assert torch.equal(tiny.run(original, kind, size), tiny.run(model, kind, size))
    assert [(row.error, row.macs_after) for row in swap.report().layers] == [(None, None)] * len(swap.layers)
    swap.revert()
    tiny.assert_as(before, original)
    assert torch.equal(tiny.run(original, kind), output)


@every
def test_what_is_in_the_file(tiny, tmp_path, kind):
    model = swapped(tiny, kind, "odd")
    save_delta(model, tmp_path / "delta")
    stored, tensors = stored_in(tmp_path / "delta")
    layers = tiny.layers[kind][1::2]
    assert (stored["schema"], stored["layers"], stored["kernel_size"]) == (1, layers, 3)
    assert (stored["pool"], stored["prefix"]) == ("raster", "attend")
    assert stored["teacher"]["class"] == type(tiny.model(kind)).__name__
    assert len(stored["teacher"]["fingerprint"]) == 64
    state = model.state_dict()
    assert tensors.keys() == {name for name in state if name.startswith(tuple(f"{layer}." for layer in layers))}
    assert all(torch.equal(state[name], each) for name, each in tensors.items())
    save_delta(model, tmp_path / "again")
    assert (tmp_path / "delta").read_bytes() == (tmp_path / "again").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "delta"]


def test_a_delta_for_a_vit_of_timm(tmp_path):
    def vit():
        torch.manual_seed(0)
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "num_heads": 2, "depth": 2, "reg_tokens": 1}
        return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes).eval()

    model, original, images = vit(), vit(), torch.randn(2, 3, 16, 16)
    swap_attention(model, "all", init="random", calib=[(images,)])
    save_delta(model, tmp_path / "delta")
    with torch.no_grad():
        before = original(images)
        swap = load_delta(original, tmp_path / "delta")
        assert torch.equal(original(images), model(images))
        assert not torch.equal(model(images), before)
        swap.revert()
        assert torch.equal(original(images), before)


def test_a_delta_is_replaced_whole(tiny, tmp_path):
    path = tmp_path / "delta"
    save_delta(swapped(tiny, "dit", "odd"), path)
    save_delta(swapped(tiny, "dit"), path)
    assert len(stored_in(path)[0]["layers"]) == 3
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("")
    with pytest.raises(InputError, match=r"^delta '/.*/folder': exists already, and is a folder"):
        save_delta(swapped(tiny, "dit"), tmp_path / "folder")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["delta", "folder"]


def test_a_delta_of_a_loaded_model_and_onto_a_copy_in_half_precision(tiny, tmp_path):
    model = swapped(tiny, "dit")
    model.save_pretrained(tmp_path / "model")
    loaded = sit_atconv.ATConvDiTTransformer2DModel.from_pretrained(tmp_path / "model")
    save_delta(loaded, tmp_path / "delta")
    original = tiny.model("dit").to(torch.bfloat16)
    load_delta(original, tmp_path / "delta")
    model.to(torch.bfloat16)
    assert {each.dtype for each in original.parameters()} == {torch.bfloat16}
    assert torch.equal(*(tiny.run(each, "dit", dtype=torch.bfloat16) for each in (original, model)))


def pipeline_of(model, vae_folder):
    pipe = DiTPipeline(model, AutoencoderKL.from_pretrained(vae_folder), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_delta_of_and_for_a_pipeline(tiny, tmp_path, vae_folder):
    pipe, twin = (pipeline_of(each, vae_folder) for each in (swapped(tiny, "dit"), tiny.model("dit")))
    save_delta(pipe, tmp_path / "delta")
    swap = load_delta(twin, tmp_path / "delta")
    assert dict(twin.config) == dict(pipe.config)
    assert torch.equal(tiny.run(twin.transformer, "dit"), tiny.run(pipe.transformer, "dit"))
    swap.revert()
    assert twin.config["transformer"] == ("diffusers", "DiTTransformer2DModel")


FRESH = """
import json, sys
import torch
import sit_atconv
from diffusers import DiTPipeline
from sit_atconv.swap import load_delta

folder, kinds = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(int(sys.argv[3]))
for kind, (name, original) in kinds.items():
    told = torch.load(f"{folder}/{kind}.pt", weights_only=True)

    def check(model):
        with torch.no_grad():
            for inputs, output in told:
                assert torch.equal(model.eval()(**inputs).sample, output), kind

    cls = getattr(sit_atconv, name)
    model = cls.from_pretrained(f"{folder}/{kind}")
    assert type(model) is cls
    check(model)
    base = getattr(__import__("diffusers"), original, None) or getattr(sit_atconv, original)
    model = base.from_pretrained(f"{folder}/{kind}-original").eval()
    load_delta(model, f"{folder}/{kind}.delta")
    assert type(model) is cls
    check(model)

pipe = DiTPipeline.from_pretrained(f"{folder}/pipe")
assert type(pipe.transformer) is sit_atconv.ATConvDiTTransformer2DModel
pipe.set_progress_bar_config(disable=True)
image = pipe([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
assert torch.equal(torch.from_numpy(image), torch.load(f"{folder}/image.pt", weights_only=True))
"""


def test_all_of_it_in_a_fresh_process(tiny, tmp_path, vae_folder, process_server):
    kinds = {}
    for kind in KINDS:
        original, model = tiny.model(kind), swapped(tiny, kind)
        kinds[kind] = (type(model).__name__, type(original).__name__)
        original.save_pretrained(tmp_path / f"{kind}-original")
        model.save_pretrained(tmp_path / kind)
        save_delta(model, tmp_path / f"{kind}.delta")
        told = [(tiny.inputs(kind, size), tiny.run(model, kind, size)) for size in ((8, 8), (16, 4))]
        torch.save(told, tmp_path / f"{kind}.pt")
    pipe = pipeline_of(swapped(tiny, "dit"), vae_folder)
    image = pipe([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    torch.save(torch.from_numpy(image), tmp_path / "image.pt")
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["transformer"] == ["sit_atconv", "ATConvDiTTransformer2DModel"]
    codes, said = process_server(FRESH, tmp_path, [tmp_path, json.dumps(kinds), torch.get_num_threads()])
    assert codes == [0], said[0][-2000:]


def refused(tiny, model, path, says):
    before = tiny.snapshot(model)
    with pytest.raises(InputError, match=says) as info:
        load_delta(model, path)
    assert "\n" not in str(info.value)
    tiny.assert_as(before, model)


def test_a_delta_for_another_revision(tiny, tmp_path):
    folder = tmp_path / "models--them--DiT/snapshots" / ("0123abcd" * 5) / "transformer"
    tiny.model("dit").save_pretrained(folder)
    model = type(tiny.model("dit")).from_pretrained(folder, use_safetensors=True)
    swap_attention(model, "all")
    save_delta(model, tmp_path / "delta")
    other = tiny.model("dit", seed=1)
    other.register_to_config(_name_or_path="us/DiT")
    refused(
        tiny,
        other,
        tmp_path / "delta",
        rf"delta' is for DiTTransformer2DModel {folder} \(revision (0123abcd){{5}}, weights [0-9a-f]{{12}}\), and this "
        r"model is DiTTransformer2DModel us/DiT \(revision unknown, weights [0-9a-f]{12}\): load it onto the weights",
    )
    changed = tiny.model("dit")  # one value of an attention that the layers take the place of
    changed.transformer_blocks[2].attn1.to_q.weight.data[0, 0] += 1
    refused(tiny, changed, tmp_path / "delta", "and this model is DiTTransformer2DModel without a name")


def test_a_delta_for_another_class(tiny, tmp_path):
    save_delta(swapped(tiny, "dit"), tmp_path / "delta")
    refused(
        tiny, tiny.model("pixart"), tmp_path / "delta", "is for DiTTransformer2DModel .* is PixArtTransformer2DModel"
    )
    refused(tiny, tiny.model("sit"), tmp_path / "delta", "is for DiTTransformer2DModel .* is SiTTransformer2DModel")


def test_a_delta_of_a_model_trained_elsewhere_too(tiny, tmp_path):
    model = swapped(tiny, "dit")
    with torch.no_grad():
        model.proj_out_2.bias[0] += 1
    save_delta(model, tmp_path / "delta")
    refused(tiny, tiny.model("dit"), tmp_path / "delta", "trained outside of its swapped layers too.*save_pretrained")


def test_a_delta_onto_a_swapped_model(tiny, tmp_path):
    save_delta(swapped(tiny, "dit", [tiny.layers["dit"][0]]), tmp_path / "delta")
    refused(tiny, swapped(tiny, "dit", "odd"), tmp_path / "delta", "has swapped layers already; revert them")


def test_a_file_that_is_no_whole_delta(tiny, tmp_path):
    path, model = tmp_path / "delta", tiny.model("dit")
    refused(tiny, model, path, "no such file")
    save_delta(swapped(tiny, "dit"), path)
    whole = path.read_bytes()
    for length in (0, 7, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(tiny, model, path, "delta' is cut or damaged")
    save_file({"x": torch.zeros(1)}, path)
    refused(tiny, model, path, "was not written by save_delta")
    save_file({"x": torch.zeros(1)}, path, metadata={KEY: "{"})
    refused(tiny, model, path, "is cut or damaged")
    path.write_bytes(whole)
    load_delta(model, path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "atconv schema 2: this version reads 1"),
        ({"schema": None}, "atconv schema None"),
        ({"pool": None}, "atconv: pool is missing; it is not as"),
        ({"layers": ["transformer_blocks.0.attn"]}, "did you mean 'transformer_blocks.0.attn1'"),
        ({"layers": ["transformer_blocks.0.attn1"]}, "transformer_blocks.1.attn1.* surplus"),
        ({"kernel_size": 5}, "kernel_gen.weight is missing, surplus or misshapen"),
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"pool": "rooster"}, "pool='rooster': did you mean 'raster'"),
        (
            {"volume": "full"},
            "atconv: volume='full': the tokens of DiTTransformer2DModel .*; it is not as swap",
        ),
        ({"volume": "ful"}, "atconv: volume"),
    ],
)
def test_a_delta_whose_settings_do_not_fit(tiny, tmp_path, change, says):
    path = tmp_path / "delta"
    save_delta(swapped(tiny, "dit"), path)
    stored, tensors = stored_in(path)
    if "layers" in change:  # the rest of the model is another then
        del stored["rest"]
    stored = {name: value for name, value in {**stored, **change}.items() if value is not None}
    save_file(tensors, path, metadata={KEY: json.dumps(stored)})
    if "layers" in change:
        from sit_atconv.swap import delta

        rest = delta.fingerprint(delta._rest(tiny.model("dit"), change["layers"]))
        save_file(tensors, path, metadata={KEY: json.dumps({**stored, "rest": rest})})
    refused(tiny, tiny.model("dit"), path, says)


@pytest.mark.parametrize("change", ["missing", "surplus", "misshapen"])
def test_a_delta_whose_tensors_do_not_fit(tiny, tmp_path, change):
    path = tmp_path / "delta"
    save_delta(swapped(tiny, "dit"), path)
    stored, tensors = stored_in(path)
    name = "transformer_blocks.1.attn1.kernel_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "surplus":
        tensors[name := "transformer_blocks.1.attn1.to_q.weight"] = torch.zeros(16, 16)
    else:
        tensors[name] = tensors[name][:, :8].contiguous()
    save_file(tensors, path, metadata={KEY: json.dumps(stored)})
    refused(tiny, tiny.model("dit"), path, rf"{name} is missing, surplus or misshapen in the weights \(1 such")


def test_what_there_is_no_delta_of(tiny, tmp_path):
    with pytest.raises(InputError, match="DiTTransformer2DModel has no swapped layers to save; swap_attention"):
        save_delta(tiny.model("dit"), tmp_path / "delta")
    model = swapped(tiny, "unet")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_v"]))
    with pytest.raises(InputError, match=r"to_v\.base_layer\.weight: an adapter is on a swapped layer; fuse"):
        save_delta(model, tmp_path / "delta")
    assert not list(tmp_path.iterdir())


def test_published_weights_take_the_place_of_all_options(tiny, tmp_path, monkeypatch):
    model = swapped(tiny, "dit", "odd")
    expected = tiny.run(model, "dit")
    save_delta(model, tmp_path / "atconv-delta.safetensors")
    asked = []

    def hub(repository, file, revision=None):
        asked.append((repository, file, revision))
        if repository != "some/delta-2.1":
            raise FileNotFoundError(repository)
        return str(tmp_path / file)

    monkeypatch.setattr("sit_atconv.swap.delta.hf_hub_download", hub)
    for source in (tmp_path, tmp_path / "atconv-delta.safetensors", "some/delta-2.1", "some/delta-2.1@v1.0"):
        fresh = tiny.model("dit")
        swap = swap_attention(fresh, weights=source)
        assert list(swap.layers) == tiny.layers["dit"][1::2]
        assert torch.equal(tiny.run(fresh, "dit"), expected)
    assert asked == [("some/delta-2.1", "atconv-delta.safetensors", each) for each in (None, "v1.0")]
    fresh = tiny.model("dit")
    before = tiny.snapshot(fresh)
    other = tiny.model("dit", seed=1)
    for given, options, said in (
        (fresh, {"select": "all"}, "select='all': weights="),
        (fresh, {"kernel_size": 5}, "kernel_size=5: weights="),
        (fresh, {"weights": "no/delta"}, "the hub does not give atconv-delta.safetensors of such a repository"),
        (fresh, {"weights": tmp_path / "nothing.safetensors"}, "no such file"),
        (other, {}, "load it onto the weights that it was made from"),
    ):
        with pytest.raises(InputError, match=said):
            swap_attention(given, **{"weights": tmp_path, **options})
    tiny.assert_as(before, fresh)
