"""Codecs: scale and shift, the posterior, and which autoencoder a checkpoint belongs to."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from no_synchronisation import fake_cuda
from safetensors.torch import load_file, save_file
from torch import nn

from sit_atconv.config import Latents
from sit_atconv.latents.codecs import IdentityCodec, VaeCodec, open_codec, reopen_codec
from sit_atconv.runtime.errors import InputError


def test_identity_leaves_pixels_alone():
    images = torch.randn(2, 1, 8, 8)
    codec = open_codec(Latents())
    assert isinstance(codec, IdentityCodec)
    assert torch.equal(codec.decode(codec.encode(images)), images)
    assert codec.latent_shape(1, 8) == (1, 8, 8)


def test_vae_latents_are_scaled_draws_of_the_posterior(vae_folder):
    codec = VaeCodec(str(vae_folder), batch_size=2)
    images, posterior = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 4, 4, 4)
    distribution = AutoencoderKL.from_pretrained(vae_folder).encode(images).latent_dist
    expected = (distribution.mean + distribution.std * posterior - 0.1) * 0.5
    torch.testing.assert_close(codec.encode(images, posterior), expected)
    assert codec.latent_shape(3, 16) == (4, 4, 4)
    decoded = AutoencoderKL.from_pretrained(vae_folder).decode(expected / 0.5 + 0.1).sample
    torch.testing.assert_close(codec.decode(expected), decoded, rtol=1e-4, atol=1e-5)


def test_on_cuda_alone_an_autoencoder_lies_channels_last(vae_folder):
    """Weights and what a convolution is given; results are contiguous."""
    codec, last = VaeCodec(str(vae_folder), batch_size=2), torch.channels_last
    described, seen = codec.describe(), []

    def look(module, args):
        seen.append((args[0].is_contiguous(memory_format=last), module.weight.is_contiguous(memory_format=last)))

    images, latents = torch.zeros(3, 3, 16, 16, dtype=torch.uint8), torch.zeros(3, 4, 4, 4)
    for side in (codec.vae.encoder, codec.vae.decoder):
        side.conv_in.register_forward_pre_hook(look)
    assert codec.moments(images).is_contiguous()
    assert codec.decode(latents).is_contiguous()
    assert seen == [(False, False)] * 4
    with fake_cuda() as cuda:
        seen.clear()
        moved = cuda.moved(codec)
        with cuda.no_synchronisation():
            assert moved.moments(torch.empty_like(images, device="cuda")).is_contiguous()
            assert moved.decode(torch.empty_like(latents, device="cuda")).is_contiguous()
        assert seen == [(True, True)] * 4
    nn.Module.to(codec, memory_format=last)
    assert codec.describe() == described


def test_a_checkpoints_codec_is_found_again_and_another_one_refused(vae_folder, tmp_path):
    description = VaeCodec(str(vae_folder), 4).describe()
    assert (description["scale"], description["shift"]) == (0.5, 0.1)
    assert reopen_codec(description, None, 4).source == str(vae_folder)
    other = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="sha256"):
        reopen_codec(description, str(tmp_path), 4)
    moved = {**description, "vae": "/nowhere/vae"}
    assert reopen_codec(moved, str(vae_folder), 4).scale == 0.5
    with pytest.raises(InputError, match="say with vae where"):
        reopen_codec(moved, None, 4)


def test_a_codec_that_a_model_leaves_open_is_the_one_named_or_pixels(vae_folder):
    for channels in (1, 3):
        assert isinstance(reopen_codec({"codec": "open", "channels": channels}, None, 4), IdentityCodec)
    codec = reopen_codec({"codec": "open", "channels": 4}, str(vae_folder), 4)
    assert (codec.source, codec.scale, codec.batch_size) == (str(vae_folder), 0.5, 4)
    with pytest.raises(InputError, match=r"4 latent channels.*name it with vae"):
        reopen_codec({"codec": "open", "channels": 4}, None, 4)
    beside = {"codec": "open", "channels": 4, "vae": str(vae_folder)}
    assert reopen_codec(beside, None, 4).source == str(vae_folder)
    assert reopen_codec({**beside, "vae": "/nowhere"}, str(vae_folder), 4).source == str(vae_folder)
    with pytest.raises(InputError, match="its latents have 4 channels, this model has 16"):
        reopen_codec({"codec": "open", "channels": 16}, str(vae_folder), 4)


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 18)])
def test_images_that_do_not_fit_the_autoencoder(vae_folder, channels, size):
    with pytest.raises(InputError, match="multiples of 4"):
        VaeCodec(str(vae_folder), 4).latent_shape(channels, size)


def test_a_missing_autoencoder_is_named_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        VaeCodec(str(tmp_path), 4)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors"):
        VaeCodec(str(tmp_path), 4)


NAMES_OF_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_an_autoencoder_of_before_the_attentions_were_renamed_is_read(vae_folder, tmp_path):
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    file, old = folder / "diffusion_pytorch_model.safetensors", {}
    for name, tensor in load_file(file).items():
        for new, before in NAMES_OF_OLD.items():
            name = name.replace(new, before)
        old[name] = tensor
    assert any("query" in name for name in old)
    save_file(old, file, {"format": "pt"})
    assert VaeCodec(str(folder), 1).describe()["sha256"] == VaeCodec(str(vae_folder), 1).describe()["sha256"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "no JSON that can be read: it is nested too deeply"),
        ({"sample_size": 10**6}, "sample_size is 1000000, and must be"),
        ({"block_out_channels": [10**6]}, "block_out_channels.0 is 1000000"),
        ({"block_out_channels": [1 << 16, 1 << 16]}, "another, larger model"),
        ({"layers_per_block": 10**6}, "layers_per_block is 1000000"),
        ({"layers_per_block": 900}, "another, larger model"),
        ({"layers_per_block": "x"}, "layers_per_block is 'x'"),
        ({"force_upcast": 10**20}, "force_upcast is 100000000000000000000, and must be at most"),
        ({"scaling_factor": 0}, "scaling_factor=0: must be at least"),
        ({"scaling_factor": 1e300}, "scaling_factor=1e"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"scaling_factor": "x"}, "scaling_factor is 'x'"),
        ({"shift_factor": [1]}, r"shift_factor is \[1\]"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantization_config is"),
        ({"mid_block_add_attention": False}, "unexpected_keys"),
        ({"act_fn": "x"}, "activation function x"),
    ],
)
def test_an_autoencoder_of_another_configuration_is_refused_in_one_line(options, says, vae_folder, tmp_path):
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | options) if options else "[" * 100_000)
    with pytest.raises(InputError, match=f"latents.vae='{folder}' cannot be loaded.*{says}"):
        VaeCodec(str(folder), 1)


def test_an_autoencoder_that_lacks_tensors_is_refused(vae_folder, tmp_path):
    """diffusers would draw them at random."""
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"missing_keys.*decoder\.conv_out\.bias"):
        VaeCodec(str(folder), 1)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"block_out_channels": 5}, "block_out_channels is 5, and must be a list"),
        ({"norm_num_groups": 3}, "cannot be loaded"),
        ({"act_fn": None}, "cannot be loaded"),
        ({"layers_per_block": 2}, "its tensors are not those of its config.json"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "its tensors are not those of its config.json"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0: must be at least 1e-06"),
        ({"shift_factor": 1e300}, "shift_factor=1e\\+300: must be at least"),
        ({"latents_mean": [0.5] * 4}, "normalises each channel"),
    ],
)
def test_an_autoencoder_with_a_config_of_something_else_is_refused(vae_folder, tmp_path, edit, says):
    shutil.copytree(vae_folder, tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | edit))
    with pytest.raises(InputError, match=says):
        VaeCodec(str(tmp_path / "vae"), 4)
