"""One rule for the files of weights in a folder, and diffusers' `from_pretrained` is what it is held against."""

import shutil
from itertools import combinations

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from sit_atconv import SiTPipeline, create_model
from sit_atconv.convert import export_public, read_public
from sit_atconv.convert.__main__ import main as convert_main
from sit_atconv.latents.codecs import VaeCodec
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.pipelines.export import main as export_main
from sit_atconv.pipelines.exporting import export, open_source
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.weights import own_variant, variants, weight_files
from sit_atconv.training.checkpoint import load_trained, load_weights

SHAPE = {"sample_size": 8, "num_classes": 3, "in_channels": 3, "hidden_size": 24, "depth": 1, "num_heads": 2}
MARK = "x_embedder.proj.bias"
SHARDED = {"max_shard_size": "8KB"}  # several files of such a model
# What can lie in a folder, each with weights of its own.
LAYOUTS = {
    "file": {},
    "shards": SHARDED,
    "fp16": {"variant": "fp16"},
    "fp16 shards": {"variant": "fp16", **SHARDED},
    "pickle": {"safe_serialization": False},
}


def model(value: float = 0.0) -> SiTTransformer2DModel:
    made = create_model(None, patch_size=2, token_mixer="atconv", **SHAPE)
    torch.nn.init.constant_(made.get_parameter(MARK), value)
    return made.eval()


def lay(folder, names, part=model):
    """Write a model in several layouts; the mark of each is its place in LAYOUTS, from 1 on."""
    for name in names:
        made = part(1.0 + list(LAYOUTS).index(name))
        made.save_pretrained(folder / "one", **LAYOUTS[name])
        shutil.copytree(folder / "one", folder, dirs_exist_ok=True)
        shutil.rmtree(folder / "one")
    return folder


def mark(tensors) -> float:
    return float(tensors[MARK][0])


@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
@pytest.mark.parametrize("names", [c for n in (1, 2) for c in combinations(LAYOUTS, n)], ids=", ".join)
def test_it_is_the_files_that_diffusers_loads(tmp_path, names, variant):
    folder = lay(tmp_path, names)
    try:
        theirs = SiTTransformer2DModel.from_pretrained(folder, variant=variant, use_safetensors=True).state_dict()
    except OSError:
        theirs = None
    if theirs is None:
        with pytest.raises(InputError, match="no diffusion_pytorch_model"):
            weight_files(folder, variant)
        return
    tensors = {}
    for file in weight_files(folder, variant):
        tensors |= load_file(file)
    assert mark(tensors) == mark(theirs)
    assert tensors.keys() == theirs.keys()
    assert mark(load_trained(folder, variant=variant).model.state_dict()) == mark(theirs)


def test_all_who_look_take_the_same(tmp_path):
    folder = lay(tmp_path / "model", ["file", "fp16"])
    pipe = SiTPipeline(model(), scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path / "pipe")
    shutil.copytree(folder, tmp_path / "pipe" / "transformer", dirs_exist_ok=True)
    for variant, wanted in ((None, 1.0), ("fp16", 3.0)):
        for number, source in enumerate((folder, tmp_path / "pipe")):
            assert mark(open_source(source, variant=variant).pipeline.transformer.state_dict()) == wanted
            out = tmp_path / f"out-{variant}-{number}"
            export(open_source(source, variant=variant), out)
            assert mark(SiTTransformer2DModel.from_pretrained(out / "transformer").state_dict()) == wanted
            assert variants(out / "transformer") == []
            export_public(source, tmp_path / f"{out.name}.safetensors", variant=variant)
            assert mark(load_file(tmp_path / f"{out.name}.safetensors")) == wanted
        assert mark(SiTPipeline.from_pretrained(tmp_path / "pipe", variant=variant).transformer.state_dict()) == wanted
    into = model()
    load_weights(folder, into)
    assert mark(into.state_dict()) == 1.0
    plain = folder / "diffusion_pytorch_model.safetensors"
    assert load_trained(folder).files == {each.name: sha256(each) for each in (folder / "config.json", plain)}


def test_a_model_in_shards_goes_all_ways(tmp_path):
    folder = lay(tmp_path / "model", ["shards"])
    files = load_trained(folder).files
    assert len(files) > 3
    assert files == {each.name: sha256(each) for each in folder.iterdir()}  # the index too
    export_main([str(folder), "--out", str(tmp_path / "out")])
    assert mark(SiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer").state_dict()) == 2.0
    next(folder.glob("*-00002-*")).unlink()
    with pytest.raises(InputError, match=r"not whole: .*index\.json lists '.*-00002-.*not there"):
        load_trained(folder)


def dit(value: float) -> DiTTransformer2DModel:
    made = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3,
    )  # fmt: skip
    torch.nn.init.constant_(made.pos_embed.proj.bias, value)
    return made


def test_a_dit_is_converted_from_what_diffusers_would_load(tmp_path, fails):
    folder = lay(tmp_path / "dit", ["file", "fp16"], dit)
    for variant, wanted in ((None, 1.0), ("fp16", 3.0)):
        assert mark(read_public(folder, variant=variant).model.state_dict()) == wanted
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    command = (convert_main, folder, "--out", tmp_path / "out", "--num-heads", 2)
    assert "there are variants ['fp16'] alone; name one with variant" in fails(*command)
    assert "no diffusion_pytorch_model.bf16.safetensors, and there are variants ['fp16']" in fails(
        *command, "--variant", "bf16"
    )
    file = next(folder.glob("*.safetensors"))
    assert "is no folder of diffusers" in fails(
        convert_main, file, "--out", tmp_path / "no", "--num-heads", 2, "--variant", "fp16"
    )
    convert_main([str(folder), "--out", str(tmp_path / "out"), "--variant", "fp16"])
    assert mark(SiTTransformer2DModel.from_pretrained(tmp_path / "out").state_dict()) == 3.0


def test_parts_of_a_pipeline_without_the_variant_are_loaded_as_they_are(vae_folder, tmp_path, fails):
    options = {**SHAPE, "in_channels": 4}
    transformer = create_model(None, patch_size=2, token_mixer="atconv", **options)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    SiTPipeline(transformer, vae, scheduler=FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "pipe")
    torch.nn.init.constant_(vae.decoder.conv_out.bias, 5.0)
    vae.save_pretrained(tmp_path / "pipe" / "vae", variant="fp16")
    for variant, same in ((None, False), ("fp16", True)):
        found = open_source(tmp_path / "pipe", variant=variant).pipeline
        theirs = SiTPipeline.from_pretrained(tmp_path / "pipe", variant=variant)
        assert bool((found.vae.decoder.conv_out.bias == 5).all()) is same
        assert torch.equal(found.vae.decoder.conv_out.bias, theirs.vae.decoder.conv_out.bias)
    with pytest.raises(InputError, match=r"no .*\.bf16\.safetensors, and there are no variants; leave the variant out"):
        open_source(tmp_path / "pipe", variant="bf16")
    (tmp_path / "pipe" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"variants \['fp16'\] alone"):
        VaeCodec(str(tmp_path / "pipe" / "vae"), 1)
    assert VaeCodec(str(tmp_path / "pipe" / "vae"), 1, "fp16").vae.decoder.conv_out.bias[0] == 5


def test_a_variant_may_have_a_hyphen(tmp_path):
    folder = lay(tmp_path / "plain", ["file"])
    for options in ({}, SHARDED):
        made = folder if not options else tmp_path / "shards"
        model(7.0).save_pretrained(made, variant="fp8-e4m3", **options)
        assert variants(made) == ["fp8-e4m3"]
        assert own_variant(made, "fp8-e4m3") == "fp8-e4m3"
        assert mark(load_trained(made, variant="fp8-e4m3").model.state_dict()) == 7.0


def test_pickles_are_refused_where_they_would_be_run(tmp_path, fails):
    folder = lay(tmp_path / "model", ["pickle"])
    for main in (export_main, convert_main):
        back = ["--to", "public"] if main is convert_main else []
        says = fails(main, folder, "--out", tmp_path / "out.safetensors", *back)
        assert "pickles can run code; save the model with safetensors" in says


def test_of_tensors_in_two_dtypes_the_wider_is_exported(tmp_path):
    made = model().to(torch.bfloat16)
    made.blocks[0].attn.difference_control.data = made.blocks[0].attn.difference_control.data.float() + 0.3
    made.save_pretrained(tmp_path / "model")
    exported = open_source(tmp_path / "model")
    assert exported.dtype == torch.float32
    found = exported.pipeline.transformer.blocks[0].attn.difference_control
    assert torch.equal(found, made.blocks[0].attn.difference_control)
