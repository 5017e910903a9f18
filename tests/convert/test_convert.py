"""Other people's checkpoints come in by their tensors alone, run nothing, and go back to the bit."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from golden_vectors import assert_golden, golden
from safetensors.torch import load_file, save_file
from torch import nn

import sample
from sampling.__main__ import main as sampling
from sit_atconv import SiTTransformer2DModel, create_model
from sit_atconv.convert import convert, export_public, load_public, read_public
from sit_atconv.convert.__main__ import main
from sit_atconv.convert.reading import read_source
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.layers.projectors import Projectors
from sit_atconv.pipelines.export import main as export
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.sampling.sampling import generate
from sit_atconv.sampling.settings import Sampling
from sit_atconv.training.checkpoint import load_trained

SIT = ("sit_attn", "sit_atconv", "sit_hybrid")
MIXERS = {"sit_attn": "attention", "sit_atconv": "atconv", "sit_hybrid": "hybrid", "repa_hybrid": "hybrid"}
REPA = {"num_heads": 4, "encoder_depth": 2}


def write(path: Path, content) -> Path:
    """torch.save or save_file, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def golden_file(tmp_path: Path, name: str) -> Path:
    return write(tmp_path / f"{name}.pt", {"ema": golden(name)[1], "args": argparse.Namespace(num_heads=4)})


def tiny(**options) -> SiTTransformer2DModel:
    """A tiny model, none of whose tensors is zero."""
    torch.manual_seed(0)
    shape = {"sample_size": 8, "num_classes": 5, "hidden_size": 24, "depth": 2, "num_heads": 2}
    model = create_model(None, **{**shape, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def state(**options) -> dict[str, torch.Tensor]:
    return tiny(**options).state_dict()


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# Golden vectors


@pytest.mark.parametrize("name", SIT)
def test_golden_models_through_the_converter(tmp_path, name):
    info, _, tensors = golden(name)
    out = tmp_path / "out"
    convert(golden_file(tmp_path, name), out, sample_size=16)
    model = SiTTransformer2DModel.from_pretrained(out)
    for key in ("patch_size", "in_channels", "hidden_size", "depth", "num_classes", "num_heads", "learn_sigma"):
        assert model.config[key] == info[key], key
    assert (model.config.token_mixer, model.config.sample_size) == (MIXERS[name], info["input_size"])
    assert_golden(model(tensors["x"], tensors["t"], tensors["y"]).sample, tensors["out"])


def test_golden_repa_with_its_time_folded_and_its_projectors_kept(tmp_path):
    tensors = golden("repa_hybrid")[2]
    out = tmp_path / "out"
    record = convert(golden_file(tmp_path, "repa_hybrid"), out, encoder_depth=2)
    assert (record["form"], len(record["folded"])) == ("repa", 2)
    assert record["projectors"] == {"encoder_depth": 2, "z_dims": [24]}
    model, projectors = SiTTransformer2DModel.from_pretrained(out), Projectors.load(out)
    velocity, z = projectors.with_model(model, tensors["x"], 1 - tensors["t"], tensors["y"])
    assert_golden(-velocity, tensors["out"])
    assert_golden(z[0], tensors["z0"])
    assert (model.config.activation, model.config.learn_sigma) == ("silu", False)


# Round trips


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", SIT)
def test_public_to_ours_to_public_is_bit_exact(tmp_path, name, suffix):
    convert(golden_file(tmp_path, name), tmp_path / "out")
    export_public(tmp_path / "out", tmp_path / f"back{suffix}")
    assert_equal(read_source(tmp_path / f"back{suffix}").tensors, golden(name)[1])


def test_repa_goes_back_with_its_time_its_convolutions_and_its_projectors(tmp_path):
    convert(golden_file(tmp_path, "repa_hybrid"), tmp_path / "out", **REPA)
    export_public(tmp_path / "out", tmp_path / "back.pt")
    back, expected = torch.load(tmp_path / "back.pt", weights_only=True), golden("repa_hybrid")[1]
    assert back["args"]["encoder_depth"] == 2
    time = "t_embedder.mlp.0.weight"
    torch.testing.assert_close(back["ema"].pop(time), expected.pop(time), rtol=0, atol=1e-6)
    assert_equal(back["ema"], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"token_mixer": ["atconv", "atconv", "attention"], "depth": 3, "patch_size": 4, "in_channels": 3},
        {"token_mixer": "hybrid", "kernel_size": 5, "qk_norm": True, "learn_sigma": False, "mlp_ratio": 1.7},
        {"token_mixer": "atconv", "pos_embed": True, "sample_size": (8, 12), "num_classes": 1},
        {"token_mixer": "atconv", "sample_size": (8, 12), "class_dropout_prob": 0.0},
        {"token_mixer": "attention", "pos_embed": False, "path": "gvp", "prediction": "score", "hidden_size": 20},
        {"token_mixer": "hybrid", "activation": "silu", "num_classes": 7},
    ],
)
def test_ours_to_public_to_ours_keeps_the_model_and_its_options(tmp_path, options):
    model = tiny(**options)
    model.save_pretrained(tmp_path / "model0")
    form = "repa" if options.get("activation") == "silu" else "sit"
    export_public(tmp_path / "model0", tmp_path / "public.safetensors", form=form)
    back = load_public(tmp_path / "public.safetensors")
    for key, value in model.config.items():
        if key not in ("pos_embed", "mlp_ratio") and not key.startswith("_"):
            assert back.config[key] == value, key
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=1e-7 if form == "repa" else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_stored_precision_is_kept(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in state(token_mixer="hybrid").items()}
    record = convert(write(tmp_path / "a.pt", tensors), tmp_path / "out", num_heads=2)
    assert record["pos_embed"] == "sincos"
    stored = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    export_public(tmp_path / "out", tmp_path / "back.pt")
    assert_equal(read_source(tmp_path / "back.pt").tensors, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_repa_of_another_precision_is_folded_in_fp32_at_least_and_goes_back_as_it_came(tmp_path, dtype):
    time = "t_embedder.mlp.0.weight"
    tensors = {name: tensor.to(dtype) for name, tensor in golden("repa_hybrid")[1].items()}
    record = convert(write(tmp_path / "a.pt", tensors), tmp_path / "out", num_heads=4, encoder_depth=2)
    assert record["dtype"] == str(dtype).removeprefix("torch.")
    model = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    wide = torch.promote_types(dtype, torch.float32)
    assert {tensor.dtype for tensor in model.values()} == {wide}
    # The fold of the same weights in fp64; fp16 and bf16 would be 1e-4 off, fp32 in the place of fp64 1e-9.
    double = write(tmp_path / "exact.pt", {name: tensor.double() for name, tensor in tensors.items()})
    exact = read_public(double, **REPA).model
    limit = 1e-14 if dtype == torch.float64 else 1e-7
    torch.testing.assert_close(model[time].double(), exact.state_dict()[time], rtol=0, atol=limit)
    export_public(tmp_path / "out", tmp_path / "back.pt")
    back = read_source(tmp_path / "back.pt").tensors
    torch.testing.assert_close(back.pop(time), tensors.pop(time), rtol=0, atol=torch.finfo(dtype).eps)
    assert_equal(back, tensors)


def test_mixed_precision_goes_to_the_wider(tmp_path):
    tensors = state()
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"].half()
    model = load_public(write(tmp_path / "a.pt", tensors), num_heads=2)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_attention_repa_without_projectors_is_told_by_form_alone(tmp_path):
    tensors = state(token_mixer="attention", learn_sigma=False)
    source = write(tmp_path / "a.pt", tensors)
    plain, reversed_ = (load_public(source, form=form, num_heads=2) for form in ("sit", "repa"))
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 4, 5])
    expected = -plain(x, 1 - t, y).sample
    torch.testing.assert_close(reversed_(x, t, y).sample, expected, rtol=0, atol=1e-5)
    assert (plain(x, t, y).sample - expected).abs().max() > 1e-2
    reversed_.save_pretrained(tmp_path / "ours")
    export_public(tmp_path / "ours", tmp_path / "sit.pt", form="sit")
    assert load_public(tmp_path / "sit.pt").config.num_heads == 2
    assert_equal(read_source(tmp_path / "sit.pt").tensors, reversed_.state_dict())


def test_a_training_checkpoint_of_ours_goes_to_the_public_layout(tmp_path):
    from sit_atconv.training import checkpoint
    from sit_atconv.training.checkpoint import write_pretrained

    model, ema = tiny(token_mixer="hybrid"), tiny(token_mixer="hybrid", num_classes=5)
    nn.init.ones_(ema.final_layer.linear.bias)
    parts = [checkpoint.Part("model", model, write_pretrained), checkpoint.Part("ema", ema, write_pretrained)]
    checkpoint.save(tmp_path / "run", 3, parts, model, torch.optim.SGD(model.parameters()), {}, {})
    for source, expected in (("run", ema), ("run/step-0000003/model", model)):
        out = tmp_path / f"{Path(source).name}.safetensors"
        export_public(tmp_path / source, out)
        assert_equal(load_file(out), expected.state_dict())


@pytest.mark.parametrize(
    ("options", "form", "says"),
    [
        ({"token_mixer": "atconv", "routing": "static"}, "sit", "routing='static': the public sit form"),
        ({"token_mixer": "atconv", "inhibition": "full"}, "sit", "inhibition='full'"),
        ({"token_mixer": "atconv", "pool": "grid"}, "sit", "pool='grid'"),
        ({"token_mixer": "atconv", "activation": "silu"}, "sit", "activation='silu': the public sit form has"),
        ({"token_mixer": "hybrid"}, "repa", "activation='gelu_tanh': the public repa form has 'silu'"),
        ({"prediction": "noise"}, "repa", "prediction='noise'"),
        ({"pos_embed": False}, "repa", "position embedding"),
        ({}, "dit", "form='dit'"),
    ],
)
def test_what_a_public_form_cannot_express_is_refused(tmp_path, options, form, says):
    tiny(**options).save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match=says):
        export_public(tmp_path / "ours", tmp_path / "out.pt", form=form)
    assert not list(tmp_path.glob("*out.pt*"))


# Containers and names


def containers():
    """(what is stored, weights asked for, which of the two is meant)."""
    ema, model = state(), state(num_classes=5)
    model["final_layer.linear.bias"] = model["final_layer.linear.bias"] + 1
    full = {"model": model, "ema": ema, "opt": {"state": {0: {"step": 3}}}, "args": argparse.Namespace(lr=1e-4)}
    return {
        "bare": (ema, None, ema),
        "full": (full, None, ema),
        "full, ema": (full, "ema", ema),
        "full, model": (full, "model", model),
        "ema alone": ({"ema": ema}, None, ema),
        "model alone": ({"model": model, "steps": 7}, None, model),
        "args of a dict": ({"ema": ema, "args": {"num_heads": 3}}, None, ema),
        "args of None": ({"ema": ema, "args": None}, None, ema),
    }


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("name", containers())
def test_every_container(tmp_path, name, suffix):
    content, weights, expected = containers()[name]
    found = read_public(write(tmp_path / f"a{suffix}", content), weights=weights, num_heads=2)
    assert_equal(found.model.state_dict(), expected)
    assert found.record["weights"] == {"bare": None, "full, model": "model", "model alone": "model"}.get(name, "ema")


def test_the_format_of_torch_before_1_6(tmp_path):
    torch.save({"ema": state()}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_equal(load_public(tmp_path / "a.pt", num_heads=2).state_dict(), state())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_prefixes_of_wrappers_are_stripped(tmp_path, prefix):
    wrapped = {prefix + name: tensor for name, tensor in state().items()}
    assert_equal(load_public(write(tmp_path / "a.safetensors", wrapped), num_heads=2).state_dict(), state())


def test_prefixes_are_stripped_in_the_middle_of_a_name(tmp_path):
    wrapped = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in state().items()}
    assert len(wrapped.keys() - state().keys()) > 5
    assert_equal(load_public(write(tmp_path / "a.pt", wrapped), num_heads=2).state_dict(), state())


def test_names_that_meet_without_their_prefixes_are_refused(tmp_path):
    twice = {**state(), "module.final_layer.linear.bias": torch.zeros(32)}
    with pytest.raises(InputError, match=r"two tensors are called 'final_layer\.linear\.bias'"):
        load_public(write(tmp_path / "a.pt", twice))


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_weights_that_are_not_there_are_refused(tmp_path, weights):
    with pytest.raises(InputError, match=f"weights='{weights}'.*one set of weights"):
        load_public(write(tmp_path / "bare.pt", state()), weights=weights)
    other = {"ema": "model", "model": "ema"}[weights]
    with pytest.raises(InputError, match=f"weights='{weights}'.*holds {other}"):
        load_public(write(tmp_path / "one.pt", {other: state()}), weights=weights)


def test_a_sharded_folder(tmp_path):
    names = list(state())
    parts = {"a-1.safetensors": names[:9], "a-2.safetensors": names[9:]}
    for file, part in parts.items():
        write(tmp_path / "folder" / file, {name: state()[name] for name in part})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "folder" / "a.safetensors.index.json").write_text(json.dumps(index))
    record = convert(tmp_path / "folder", tmp_path / "out", num_heads=2)
    assert record["source_sha256"] == {file: sha256(tmp_path / "folder" / file) for file in parts}
    assert_equal(SiTTransformer2DModel.from_pretrained(tmp_path / "out").state_dict(), state())
    (tmp_path / "folder" / "a-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"not whole.*a-2\.safetensors"):
        load_public(tmp_path / "folder", num_heads=2)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    write(tmp_path / "secret.safetensors", state())
    (tmp_path / "folder").mkdir()
    index = {"weight_map": {"pos_embed": "../secret.safetensors"}}
    (tmp_path / "folder" / "a.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lists '\.\./secret\.safetensors', which is no name of a file beside it"):
        load_public(tmp_path / "folder")


@pytest.mark.parametrize("values", [[3], ["a.safetensors", 3], [["a.safetensors"]], [None]])
def test_an_index_of_no_names_is_refused(fails, tmp_path, values):
    write(tmp_path / "folder" / "a.safetensors", state())
    index = {"weight_map": dict(zip(state(), values, strict=False))}
    (tmp_path / "folder" / "a.safetensors.index.json").write_text(json.dumps(index))
    assert "which is no name of a file" in fails(main, tmp_path / "folder", "--out", tmp_path / "out")


def test_of_several_files_or_indices_the_one_of_the_usual_name_is_read(tmp_path):
    for kind, suffix in (("one", ""), ("many", ".index.json")):
        folder = tmp_path / kind
        write(folder / "model.safetensors", state())
        write(folder / "other.safetensors", {"other": torch.ones(1)})
        if suffix:
            for name in ("model", "other"):
                index = {"weight_map": {"any": f"{name}.safetensors"}}
                (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
        assert_equal(load_public(folder, num_heads=2).state_dict(), state())
        (folder / f"model.safetensors{suffix}").rename(folder / f"mine.safetensors{suffix}")
        with pytest.raises(
            InputError, match=rf"holds \['mine\.safetensors{suffix}', 'other.*a folder with one of these"
        ):
            load_public(folder, num_heads=2)


@pytest.mark.parametrize("args", ["{", "[1]", "null", "some words", "[" * 100_000])
def test_a_header_whose_args_are_no_options_is_refused(fails, tmp_path, args):
    save_file(state(), tmp_path / "a.safetensors", metadata={"format": "pt", "args": args})
    says = fails(main, tmp_path / "a.safetensors", "--out", tmp_path / "out", "--num-heads", 2)
    assert "args in its header are not a JSON object" in says
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "args", [{"prediction": torch.ones(2)}, {"form": torch.ones(2), "path_type": 3}, {"prediction": ["v"]}]
)
def test_stored_options_of_any_kind_are_refused_by_name(fails, tmp_path, args):
    source = write(tmp_path / "a.pt", {"ema": state(), "args": argparse.Namespace(**args)})
    assert "choose from" in fails(main, source, "--out", tmp_path / "out", "--num-heads", 2)


@pytest.mark.filterwarnings("ignore:.*[Qq]uanti.*", "ignore:Sparse")
@pytest.mark.parametrize("kind", ["sparse", "csr", "quantised", "meta", "no rows", "no columns"])
def test_tensors_without_plain_numbers_are_refused_by_name(fails, tmp_path, kind):
    weight = state()["t_embedder.mlp.0.weight"]
    made = {
        "sparse": lambda: weight.to_sparse(),
        "csr": lambda: weight.to_sparse_csr(),
        "quantised": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "meta": lambda: weight.to("meta"),
        "no rows": lambda: weight[:0],
        "no columns": lambda: weight[:, :0],
    }[kind]()
    for form in ("sit", "repa"):
        source = write(tmp_path / "a.pt", {**state(), "t_embedder.mlp.0.weight": made})
        says = fails(main, source, "--out", tmp_path / "out", "--num-heads", 2, "--form", form)
        assert "'t_embedder.mlp.0.weight' is a " in says
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


# Nothing is executed, and damage is one line


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return shutil.copyfile, (__file__, str(self.path))


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("place", ["ema", "args", "opt"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_is_run(fails, tmp_path, place, new_format):
    content = {"ema": state(), "args": argparse.Namespace(), "opt": {}, place: Bomb(tmp_path / "ran")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=new_format)
    message = fails(main, tmp_path / "a.pt", "--out", tmp_path / "out")
    assert "shutil.copyfile" in message
    assert "nothing in it was run" in message
    assert "weights_only" not in message  # torch's advice to switch the protection off
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(("thing", "name"), [(Path("/tmp"), "pathlib"), (nn.Linear(2, 2), "Linear")])
def test_whatever_is_not_on_the_list_is_named(tmp_path, thing, name):
    with pytest.raises(InputError, match=f"it asks for .*{name}"):
        load_public(write(tmp_path / "a.pt", {"ema": state(), "args": argparse.Namespace(data=thing)}))


def test_the_allow_list_does_not_outlive_the_reading(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    load_public(write(tmp_path / "a.pt", {"ema": state(), "args": argparse.Namespace()}), num_heads=2)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_gives_one_line_and_leaves_nothing(fails, tmp_path, suffix, share):
    path = write(tmp_path / f"a{suffix}", state())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    message = fails(main, path, "--out", tmp_path / "out")
    assert "cut" in message
    assert path.name in message
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(1)], "holds a list"),
        ({"state_dict": state()}, "'state_dict' is a OrderedDict"),
        ({**state(), "epoch": 3}, "'epoch' is a int"),
        ({}, "missing x_embedder"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, says):
    with pytest.raises(InputError, match=says):
        load_public(write(tmp_path / "a.pt", content))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_public(tmp_path / "nowhere.pt")
    (tmp_path / "a.ckpt").write_text("x")
    with pytest.raises(InputError, match=r"must end in \.pt"):
        load_public(tmp_path / "a.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file of weights"):
        load_public(tmp_path / "empty")
    tiny().save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match="a model of this library already"):
        load_public(tmp_path / "ours")


# Another architecture


def foreign():
    vit = nn.TransformerEncoderLayer(24, 2, 48)
    vit = {"cls_token": torch.zeros(1, 1, 24), **{f"blocks.0.{name}": t for name, t in vit.state_dict().items()}}
    unet = {"conv_in.weight": torch.zeros(8, 4, 3, 3), "down_blocks.0.resnets.0.norm1.weight": torch.zeros(8)}
    counted = {"bn.num_batches_tracked": torch.tensor(3)}
    rope = {name.replace("mlp.fc1", "mlp.w12"): tensor for name, tensor in state().items()}
    return {
        "vit": (vit, "unexpected cls_token, .* missing pos_embed|unexpected cls_token, .* missing x_embedder"),
        "unet": (unet, r"unexpected conv_in\.weight, down_blocks.* missing x_embedder\.proj\.weight"),
        "batch norm": (counted, r"unexpected bn\.num_batches_tracked"),
        "gated mlp": (rope, r"unexpected blocks\.0\.mlp\.w12\.weight, .* missing blocks\.0\.mlp\.fc1\.weight"),
    }


@pytest.mark.parametrize("name", foreign())
def test_another_architecture_is_refused_by_the_tensor_that_gave_it_away(fails, tmp_path, name):
    content, says = foreign()[name]
    message = fails(main, write(tmp_path / "a.pt", content), "--out", tmp_path / "out")
    assert "is not of the SiT architecture" in message
    with pytest.raises(InputError, match=says):
        raise InputError(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost", sorted(state(token_mixer="hybrid", qk_norm=True)))
def test_every_missing_tensor_is_named(tmp_path, lost):
    tensors = state(token_mixer="hybrid", qk_norm=True)
    del tensors[lost]
    source = write(tmp_path / "a.safetensors", tensors)
    if lost == "pos_embed":  # the one tensor that a model may do without
        assert load_public(source, num_heads=2, sample_size=8).pos_embed is None
    else:
        with pytest.raises(InputError, match=f"missing {lost}"):
            load_public(source, num_heads=2)


def test_a_tensor_too_many_is_named_however_deep_it_claims_to_be(tmp_path):
    for name in ("blocks.0.attn.extra", "blocks.999999999.attn.qkv.weight", "head.weight"):
        with pytest.raises(InputError, match=f"unexpected {name}|unexpected.*{name}"):
            load_public(write(tmp_path / "a.pt", {**state(), name: torch.zeros(1)}), num_heads=2)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("x_embedder.proj.weight", (24, 16), r"\(24, 16\), 4 dimensions"),
        ("x_embedder.proj.weight", (24, 4, 3, 3), "patches are"),
        ("final_layer.linear.weight", (33, 24), r"\(33, 24\), \(16, 24\) fits"),
        ("blocks.1.attn.qkv.weight", (24, 24), r"blocks\.1\.attn\.qkv\.weight has the shape \(24, 24\), \(72, 24\)"),
        ("blocks.1.attn.qkv.weight", (72, 24, 1, 1), r"\(72, 24, 1, 1\)"),
        ("t_embedder.mlp.0.weight", (24, 128), r"\(24, 256\) fits"),
        ("y_embedder.embedding_table.weight", (1, 24), "a class and a null class"),
        ("pos_embed", (1, 16, 20), r"pos_embed has the shape \(1, 16, 20\), \(1, 16, 24\)"),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, name, shape, says):
    assert name in state()
    with pytest.raises(InputError, match=says):
        load_public(write(tmp_path / "a.pt", {**state(), name: torch.zeros(shape)}), num_heads=2)


def test_the_kernel_of_a_square_number_of_taps(tmp_path):
    tensors = {**state(token_mixer="atconv"), "blocks.0.attn.kernel_gen.weight": torch.zeros(16, 16)}
    for shape in ((16, 16), ()):
        tensors["blocks.0.attn.kernel_gen.weight"] = torch.zeros(shape)
        with pytest.raises(InputError, match="square of an odd kernel size"):
            load_public(write(tmp_path / "a.pt", tensors))


def test_a_number_in_the_place_of_a_norm_is_no_head(tmp_path):
    tensors = {**state(qk_norm=True), "blocks.0.attn.q_norm.weight": torch.tensor(1.0)}
    with pytest.raises(InputError, match=r"q_norm\.weight has the shape \(\), \(12,\)"):
        load_public(write(tmp_path / "a.pt", {"ema": tensors, "args": {"num_heads": 2}}))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("name", ["t_embedder.mlp.0.weight", "final_layer.linear.bias"])
def test_what_repa_folds_is_made_of_floats(tmp_path, name, dtype):
    tensors = {**state(), name: torch.ones(state()[name].shape).to(dtype)}
    with pytest.raises(InputError, match=f"{name} .*finite floats"):
        load_public(write(tmp_path / "a.pt", tensors), form="repa", num_heads=2)


@pytest.mark.parametrize("value", [torch.full((24,), torch.nan), torch.ones(24, dtype=torch.int64)])
def test_weights_that_are_no_finite_floats_are_refused(tmp_path, value):
    with pytest.raises(InputError, match=r"x_embedder\.proj\.bias .*finite floats"):
        load_public(write(tmp_path / "a.pt", {**state(), "x_embedder.proj.bias": value}), num_heads=2)


# What the tensors leave open


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_published_widths(tmp_path, width, heads):
    tensors = state(hidden_size=width, num_heads=1, depth=1, mlp_ratio=0.1)
    assert load_public(write(tmp_path / "a.pt", tensors)).config.num_heads == heads
    stored = {"ema": tensors, "args": argparse.Namespace(num_heads=2)}
    assert load_public(write(tmp_path / "b.pt", stored)).config.num_heads == 2
    assert load_public(tmp_path / "b.pt", num_heads=4).config.num_heads == 4


def test_heads_of_another_width_are_asked_for_exactly_where_they_matter(fails, tmp_path):
    source = write(tmp_path / "a.pt", state())
    assert "hidden_size=24" in fails(main, source, "--out", tmp_path / "out")
    assert "num_heads=5 does not divide" in fails(main, source, "--out", tmp_path / "out", "--num-heads", 5)
    assert "--num-heads 0: must be at least 1" in fails(main, source, "--out", tmp_path / "out", "--num-heads", 0)
    plain = write(tmp_path / "b.pt", state(token_mixer="atconv"))
    load_public(plain, sample_size=8)
    says = fails(main, plain, "--out", tmp_path / "out", "--sample-size", 8, "--num-heads", 2)
    assert "num_heads=2 would do nothing: no block has attention; leave it out" in says
    normed = write(tmp_path / "c.pt", state(qk_norm=True, num_heads=3))
    assert load_public(normed).config.num_heads == 3
    with pytest.raises(InputError, match=r"q_norm\.weight has the shape \(8,\), \(12,\)"):
        load_public(normed, num_heads=2)


@pytest.mark.parametrize(
    ("args", "told", "size"),
    [
        ({"image_size": 128}, None, 16),
        ({"resolution": 512}, None, 64),
        ({"resolution": 512}, 8, 8),
        ({"input_size": [8, 12]}, None, (8, 12)),
        ({}, (4, 6), (4, 6)),
        ({}, (6, 6), 6),
    ],
)
def test_the_size_of_a_model_without_position_embedding(tmp_path, args, told, size):
    content = {"ema": state(token_mixer="atconv"), "args": argparse.Namespace(**args)}
    found = read_public(write(tmp_path / "a.pt", content), sample_size=told)
    assert found.model.config.sample_size == size
    assert not found.record["notes"]


def test_a_size_that_nothing_gives_is_assumed_and_said(tmp_path, capsys):
    source = write(tmp_path / "a.pt", state(token_mixer="atconv"))
    with pytest.warns(UserWarning, match="32 assumed"):
        assert load_public(source).config.sample_size == 32
    main([str(source), "--out", str(tmp_path / "out")])
    assert "note: nothing in the checkpoint gives its latent size: 32 assumed" in capsys.readouterr().out


def test_a_grid_that_is_not_square_is_taken_when_told(fails, tmp_path):
    model = tiny(sample_size=(8, 12))
    source = write(tmp_path / "a.pt", model.state_dict())
    command = [source, "--out", tmp_path / "out", "--num-heads", 2]
    assert "24 positions, which is no square grid" in fails(main, *command)
    assert "sample size (8, 8): pos_embed has 24 positions" in fails(main, *command, "--sample-size", 8, 8)
    assert "one number, or height and width" in fails(main, *command, "--sample-size", 8, 8, 12)
    main([*map(str, command), "--sample-size", "8", "12"])
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path / "out")
    x, y = torch.randn(2, 4, 8, 12), torch.tensor([0, 5])
    assert torch.equal(loaded(x, 0.3, y).sample, model(x, 0.3, y).sample)


def test_a_position_embedding_of_another_kind_is_kept(tmp_path):
    tensors = state()
    tensors["pos_embed"] = torch.randn(1, 16, 24)
    source = write(tmp_path / "a.pt", tensors)
    record = convert(source, tmp_path / "out", num_heads=2)
    assert record["pos_embed"] == "stored"
    assert record["notes"] == ["pos_embed is not the fixed one, which takes its place at any other latent size"]
    assert torch.equal(SiTTransformer2DModel.from_pretrained(tmp_path / "out").pos_embed, tensors["pos_embed"])
    record = read_public(write(tmp_path / "b.pt", state()), num_heads=2).record
    assert (record["pos_embed"], record["notes"]) == ("sincos", [])
    without = write(tmp_path / "c.pt", state(pos_embed=False))
    assert read_public(without, num_heads=2, sample_size=8).record["pos_embed"] is None


@pytest.mark.parametrize(
    ("form", "args", "told", "expected"),
    [
        ("sit", {}, {}, ("linear", "velocity")),
        ("sit", {"path_type": "GVP", "prediction": "score"}, {}, ("gvp", "score")),
        ("sit", {"path_type": "VP", "prediction": "noise"}, {"path": "linear"}, ("linear", "noise")),
        ("repa", {"path_type": "cosine", "prediction": "v"}, {}, ("gvp", "velocity")),
        ("dit", {}, {}, ("ddpm", "noise")),
        ("dit", {"path_type": "Linear", "prediction": "velocity"}, {}, ("ddpm", "noise")),
    ],
)
def test_what_the_output_means(tmp_path, form, args, told, expected):
    content = {"ema": state(), "args": argparse.Namespace(**args)}
    config = load_public(write(tmp_path / "a.pt", content), form=form, num_heads=2, **told).config
    assert (config.path, config.prediction) == expected


def test_a_path_that_is_not_known_is_refused(tmp_path):
    source = write(tmp_path / "a.pt", {"ema": state(), "args": argparse.Namespace(path_type="EDM")})
    with pytest.raises(InputError, match="path='edm'"):
        load_public(source, num_heads=2)
    with pytest.raises(InputError, match="reversed for velocities alone"):
        load_public(source, num_heads=2, form="repa", path="linear", prediction="noise")
    for told in ({"path": "linear"}, {"prediction": "velocity"}):
        with pytest.raises(InputError, match=r"a DiT predicts noise at its own times, 0 to 999; leave it out"):
            load_public(source, num_heads=2, form="dit", **told)


def test_a_class_count_without_a_null_row_is_known_from_the_stored_options(tmp_path):
    content = {"ema": state(class_dropout_prob=0.0), "args": argparse.Namespace(num_classes=5)}
    model = load_public(write(tmp_path / "a.pt", content), num_heads=2)
    assert (model.config.num_classes, model.null_label) == (5, None)
    model = load_public(write(tmp_path / "b.pt", content["ema"]), num_heads=2)
    assert (model.config.num_classes, model.null_label) == (4, 4)


def test_projectors_are_dropped_or_placed(fails, tmp_path, capsys):
    source, out = golden_file(tmp_path, "repa_hybrid"), tmp_path / "out"
    assert "encoder depth 8: the model has 4 blocks" in fails(main, source, "--out", out)
    assert "encoder depth 5" in fails(main, source, "--out", out, "--encoder-depth", 5)
    dropped = [source, "--out", out, "--projectors", "drop"]
    assert "no projectors to keep" in fails(main, *dropped, "--encoder-depth", 2)
    main([str(part) for part in dropped])
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "conversion.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"holds no projectors\.safetensors"):
        Projectors.load(out)
    stored = {"ema": golden("repa_hybrid")[1], "args": argparse.Namespace(num_heads=4, encoder_depth=3)}
    assert read_public(write(tmp_path / "b.pt", stored)).projectors.encoder_depth == 3
    number = {**stored["ema"], "projectors.0.4.weight": torch.tensor(1.0)}
    with pytest.raises(InputError, match=r"the projectors are not three linears"):
        read_public(write(tmp_path / "d.pt", {**stored, "ema": number}))
    del stored["ema"]["projectors.0.2.bias"]
    with pytest.raises(InputError, match=r"projectors\.0\.2\.bias"):
        read_public(write(tmp_path / "c.pt", stored))


def test_the_model_is_left_as_it_was_by_the_projectors(tmp_path):
    found = read_public(golden_file(tmp_path, "repa_hybrid"), **REPA)
    tensors = golden("repa_hybrid")[2]
    found.projectors.with_model(found.model, tensors["x"], 0.5, tensors["y"])
    with pytest.raises(ValueError, match="channels"):
        found.projectors.with_model(found.model, tensors["x"][:, :1], 0.5, tensors["y"])
    assert not any(module._forward_hooks for module in found.model.modules())


def test_gradients_of_the_projectors_reach_the_blocks_before_them_alone(tmp_path):
    found = read_public(golden_file(tmp_path, "repa_hybrid"), **REPA)
    tensors = golden("repa_hybrid")[2]
    for checkpointing in (False, True):
        if checkpointing:
            found.model.enable_gradient_checkpointing()
        found.model.zero_grad()
        _, z = found.projectors.with_model(found.model, tensors["x"], 0.5, tensors["y"])
        z[0].square().sum().backward()
        reached = [block.mlp.fc2.weight.grad is not None for block in found.model.blocks]
        assert reached == [True, True, False, False]


@pytest.mark.parametrize(("name", "form"), [("repa_hybrid", "sit"), ("repa_hybrid", "dit"), ("sit_attn", "vit")])
def test_a_form_that_the_tensors_contradict_is_refused(tmp_path, name, form):
    with pytest.raises(InputError, match=f"form='{form}'"):
        load_public(golden_file(tmp_path, name), form=form)


# DiT


def diffusers_dit(folder: Path, same: bool = True, **options) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, num_layers=3, sample_size=8, patch_size=2,
        **{"num_embeds_ada_norm": 5, "out_channels": 8, "norm_eps": 1e-6, **options},
    )  # fmt: skip
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    if same:
        for block in dit.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    dit.save_pretrained(folder)
    return dit.eval()


def dit_inputs():
    torch.manual_seed(1)
    return torch.randn(4, 4, 8, 8), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 1, 4, 5])


@pytest.mark.parametrize(("norm_eps", "out_channels"), [(1e-6, 8), (1e-5, 4)])
def test_diffusers_dit_with_the_frequencies_of_dit(tmp_path, norm_eps, out_channels):
    dit = diffusers_dit(tmp_path / "dit", norm_eps=norm_eps, out_channels=out_channels)
    record = convert(tmp_path / "dit", tmp_path / "out")
    ours = SiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert (ours.config.num_heads, ours.config.num_classes, ours.config.prediction) == (2, 5, "noise")
    assert torch.equal(ours.pos_embed, dit.pos_embed.pos_embed)
    assert len(record["notes"]) == (2 if norm_eps == 1e-5 else 1)
    x, steps, labels = dit_inputs()
    output = ours(x, steps, labels).sample
    # diffusers spaces its frequencies by i / 127, DiT and ours by i / 128: the same at t = 0, and far apart at 999.
    theirs = dit(x, steps, class_labels=labels).sample[:, :4]
    torch.testing.assert_close(output[0], theirs[0], rtol=0, atol=1e-5)
    assert (output[3] - theirs[3]).abs().max() > 1e-2
    for block in dit.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    theirs = dit(x, steps, class_labels=labels).sample[:, :4]
    torch.testing.assert_close(output, theirs, rtol=0, atol=1e-5)


def test_a_diffusers_pipeline_and_its_old_weights_file(tmp_path):
    dit = diffusers_dit(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.warns(UserWarning, match="frequencies"):
        expected = load_public(tmp_path / "pipe").state_dict()
    (tmp_path / "pipe/transformer/diffusion_pytorch_model.safetensors").unlink()
    torch.save(dit.state_dict(), tmp_path / "pipe/transformer/diffusion_pytorch_model.bin")
    assert_equal(read_public(tmp_path / "pipe").model.state_dict(), expected)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"norm_type": "ada_norm"}, "norm_type='ada_norm' has no counterpart"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"norm_eps": 1e-3}, "norm_eps=0.001"),
        ({"sample_size": None}, "sample_size is None"),
        ({"sample_size": 16}, "sample size 16: pos_embed has 16 positions"),
        ({"_class_name": "PixArtTransformer2DModel"}, "is a PixArtTransformer2DModel"),
        ({"_class_name": None}, "is a None"),
    ],
)
def test_a_diffusers_model_of_another_architecture_is_refused_by_name(tmp_path, changed, says):
    dit = diffusers_dit(tmp_path / "dit")
    config = json.loads((tmp_path / "dit" / "config.json").read_text())
    (tmp_path / "dit" / "config.json").write_text(json.dumps({**config, **changed}))
    if changed == {"sample_size": 16}:  # old versions of diffusers stored the position embedding
        stored = {**dit.state_dict(), "pos_embed.pos_embed": dit.pos_embed.pos_embed}
        save_file(stored, tmp_path / "dit" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=says):
        load_public(tmp_path / "dit")


def test_embedders_that_differ_between_blocks_are_refused_by_name(tmp_path):
    diffusers_dit(tmp_path / "dit", same=False)
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.norm1\.emb\.\S+ differs from the one of block 0"):
        load_public(tmp_path / "dit")


def test_a_diffusers_config_cannot_be_overruled_and_lost_tensors_are_named(tmp_path):
    dit = diffusers_dit(tmp_path / "dit")
    for told in ({"num_heads": 4}, {"sample_size": 16}, {"form": "sit"}):
        with pytest.raises(InputError, match="leave it out"):
            load_public(tmp_path / "dit", **told)
    for lost, says in (
        ("transformer_blocks.1.attn1.to_k.weight", r"unexpected transformer_blocks\.1\.attn1\.to_q\.weight"),
        ("transformer_blocks.2.ff.net.2.bias", r"missing blocks\.2\.mlp\.fc2\.bias"),
        ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight", "differs from the one of block 0"),
    ):
        tensors = dit.state_dict()
        del tensors[lost]
        save_file(tensors, tmp_path / "dit" / "diffusion_pytorch_model.safetensors")
        with pytest.raises(InputError, match=says):
            load_public(tmp_path / "dit")
    for shape in ((24, 3), ()):
        tensors = {**dit.state_dict(), "transformer_blocks.1.attn1.to_k.weight": torch.zeros(shape)}
        save_file(tensors, tmp_path / "dit" / "diffusion_pytorch_model.safetensors")
        with pytest.raises(InputError, match=r"unexpected transformer_blocks\.1\.attn1\.to_k\.weight"):
            load_public(tmp_path / "dit")
    tensors = dit.state_dict()
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    save_file({**tensors, name: tensors[name].half()}, tmp_path / "dit" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="differs from the one of block 0"):
        load_public(tmp_path / "dit")


def test_a_dit_file_keeps_its_time_and_no_sampler_of_ours_draws_from_it(fails, tmp_path, vae_folder):
    source = write(tmp_path / "dit.pt", {"ema": state(), "args": argparse.Namespace(num_heads=2)})
    convert(source, tmp_path / "out", form="dit")
    # The model itself says so, also where it was saved again without the record of its conversion.
    load_public(source, form="dit").save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "out", tmp_path / "again"):
        options = ["--ckpt", folder]
        latent = [*options, "--vae", vae_folder]
        for command in (
            [sample.main, *latent],
            [sampling, "generate", *latent, "--num", 2],
            [sampling, "likelihood", *options, "--num", 1],
        ):
            says = fails(*command, "--out", tmp_path / "samples.png")
            assert "path='ddpm': a DiT with time 0..999, 999 being noise" in says
        assert "path='ddpm'" in fails(export, folder, "--vae", vae_folder, "--out", tmp_path / "exported")
        assert not (tmp_path / "exported").exists()
        back = tmp_path / f"{folder.name}.pt"
        export_public(folder, back)
        assert_equal(read_source(back).tensors, state())
        assert read_public(back).record["form"] == "dit"
        assert load_public(back).config.path == "ddpm"
        for sampler in ("euler", "euler-maruyama"):
            with pytest.raises(InputError, match="path='ddpm'"):
                generate(load_public(back), IdentityCodec(), [0], [0], Sampling(sampler))


# The folder, the command, and sampling from it


def test_the_folder_says_where_it_came_from(tmp_path):
    source = write(tmp_path / "SiT.pt", {"model": state(), "ema": state(), "args": argparse.Namespace(num_heads=2)})
    returned = convert(source, tmp_path / "deep" / "out", weights="model")
    record = json.loads((tmp_path / "deep" / "out" / "conversion.json").read_text())
    assert returned == record
    assert (record["source"], record["source_sha256"]) == ("SiT.pt", {"SiT.pt": sha256(source)})
    assert (record["weights"], record["form"], record["folded"]) == ("model", "sit", [])
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["files"].keys() == {"config.json", "diffusion_pytorch_model.safetensors"}
    for name, digest in record["files"].items():
        assert sha256(tmp_path / "deep" / "out" / name) == digest


@pytest.mark.parametrize("to", ["ours", "public"])
def test_a_fault_while_writing_leaves_nothing(tmp_path, monkeypatch, to):
    source = write(tmp_path / "a.pt", state())
    convert(source, tmp_path / "ours", num_heads=2)
    before = sorted(tmp_path.rglob("*"))
    writing = {
        "ours": lambda: convert(source, tmp_path / "out", num_heads=2),
        "public": lambda: export_public(tmp_path / "ours", tmp_path / "out.pt"),
    }

    def fault(*_args, **_kwargs):
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fault)
        with pytest.raises(InputError, match=r"out.* cannot be written: disk"):
            writing[to]()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["a.pt/out", "a.pt/below/out", "x" * 300, "x" * 256])
def test_a_place_that_cannot_be_written_is_named(fails, tmp_path, place):
    source = write(tmp_path / "a.pt", state())
    tiny().save_pretrained(tmp_path / "ours")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / place
    assert "--out '" in fails(main, source, "--num-heads", 2, "--out", out)
    assert "--out '" in fails(main, tmp_path / "ours", "--to", "public", "--out", f"{out}.pt")
    if "/" in place:  # said before anything is read
        assert "a.pt' is no folder" in fails(main, tmp_path / "nowhere", "--out", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_exists_is_never_written_over(fails, tmp_path):
    source = write(tmp_path / "a.pt", state())
    (tmp_path / "out").mkdir()
    assert "exists already" in fails(main, source, "--out", tmp_path / "out", "--num-heads", 2)
    assert not list((tmp_path / "out").iterdir())
    convert(source, tmp_path / "ours", num_heads=2)
    before = source.read_bytes()
    assert "exists already" in fails(main, tmp_path / "ours", "--to", "public", "--out", source)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    "option",
    [
        ("--weights", "ema"), ("--num-heads", 2), ("--sample-size", 8), ("--path", "linear"),
        ("--prediction", "velocity"), ("--projectors", "keep"), ("--encoder-depth", 2),
    ],
)  # fmt: skip
def test_options_of_the_other_direction_are_refused(fails, tmp_path, option):
    tiny().save_pretrained(tmp_path / "ours")
    message = fails(main, tmp_path / "ours", "--to", "public", "--out", tmp_path / "a.pt", *option)
    assert f"{option[0]} is for reading a public checkpoint" in message


def test_the_command_goes_there_and_back(fails, tmp_path, capsys):
    source = golden_file(tmp_path, "repa_hybrid")
    main([str(source), "--out", str(tmp_path / "out"), "--encoder-depth", "2"])
    printed = capsys.readouterr().out
    assert "repa checkpoint, ema weights" in printed
    assert "folded: t -> 1 - t into t_embedder.mlp.0.weight" in printed
    main([str(tmp_path / "out"), "--to", "public", "--out", str(tmp_path / "back.safetensors")])
    assert load_file(tmp_path / "back.safetensors").keys() == golden("repa_hybrid")[1].keys()
    capsys.readouterr()
    assert "must end in .pt" in fails(main, tmp_path / "out", "--to", "public", "--out", tmp_path / "back.onnx")
    assert "no such folder" in fails(main, tmp_path / "none", "--to", "public", "--out", tmp_path / "b.pt")
    assert "activation='silu'" in fails(
        main, tmp_path / "out", "--to", "public", "--form", "sit", "--out", tmp_path / "b.pt"
    )


def test_a_damaged_folder_is_noticed(tmp_path):
    source = golden_file(tmp_path, "repa_hybrid")
    convert(source, tmp_path / "out", **REPA)
    for name in ("projectors.safetensors", "config.json", "conversion.json", "diffusion_pytorch_model.safetensors"):
        shutil.copytree(tmp_path / "out", tmp_path / "damaged", dirs_exist_ok=True)
        content = (tmp_path / "damaged" / name).read_bytes()
        (tmp_path / "damaged" / name).write_bytes(content[:-1])
        for read in (load_trained, lambda folder: export_public(folder, tmp_path / "x.pt")):
            with pytest.raises(InputError, match=f"{name}"):
                read(tmp_path / "damaged")


@pytest.mark.parametrize(
    "name", ["other.json", "model.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.json"]
)
def test_a_file_that_the_record_does_not_list_is_noticed(tmp_path, name):
    convert(write(tmp_path / "a.pt", state()), tmp_path / "out", num_heads=2)
    (tmp_path / "out" / "notes.txt").write_text("")
    load_trained(tmp_path / "out")
    (tmp_path / "out" / name).write_text("{}")
    for read in (load_trained, lambda folder: export_public(folder, tmp_path / "x.pt")):
        with pytest.raises(InputError, match=f"conversion.json does not list .*{name}"):
            read(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"dtype": "int8"}, "dtype in conversion.json='int8'"), ({"form": 3}, None), ({"files": {}}, "does not list")],
)
def test_a_record_of_other_values(tmp_path, change, says):
    convert(write(tmp_path / "a.pt", state()), tmp_path / "out", num_heads=2)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    (tmp_path / "out" / "conversion.json").write_text(json.dumps({**record, **change}))
    if says is None:  # a form that it does not know is one that nothing is undone for
        export_public(tmp_path / "out", tmp_path / "x.pt")
        assert_equal(read_source(tmp_path / "x.pt").tensors, state())
    else:
        with pytest.raises(InputError, match=says):
            export_public(tmp_path / "out", tmp_path / "x.pt")


def test_samples_of_a_converted_folder_are_those_of_the_model(fails, tmp_path, capsys, vae_folder):
    out, grid = tmp_path / "out", tmp_path / "grid.png"
    convert(write(tmp_path / "a.pt", state(token_mixer="hybrid")), out, num_heads=2)
    command = ["--ckpt", str(out), "--steps", "2", "--num", "2"]
    assert "4 latent channels and does not say of which autoencoder" in fails(sample.main, *command, "--out", grid)
    sample.main([*command, "--vae", str(vae_folder), "--out", str(grid)])
    assert grid.is_file()
    sampling(["generate", *command, "--vae", str(vae_folder), "--out", str(tmp_path / "samples")])
    manifest = json.loads((tmp_path / "samples" / "manifest.json").read_text())
    assert manifest["checkpoint_sha256"] == json.loads((out / "conversion.json").read_text())["files"]
    assert manifest["checkpoint_sha256"]["diffusion_pytorch_model.safetensors"] == sha256(
        out / "diffusion_pytorch_model.safetensors"
    )


def test_pixels_need_no_autoencoder(fails, tmp_path, vae_folder, capsys):
    convert(write(tmp_path / "a.pt", state(in_channels=1, learn_sigma=False)), tmp_path / "out", num_heads=2)
    command = ["--ckpt", str(tmp_path / "out"), "--steps", "1", "--num", "1"]
    sample.main([*command, "--out", str(tmp_path / "grid.png")])
    capsys.readouterr()
    refused = fails(sample.main, *command, "--vae", vae_folder, "--out", tmp_path / "b.png")
    assert "its latents have 4 channels, this model has 1" in refused
