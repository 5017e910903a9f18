"""REPA: the encoder's features against a ViT and a resize written out, the loss, and the model with its projectors."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import slowly
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_vit import ARGS, HEADS, MEAN, PATCH, STD, WIDTH, save_vit
from torch import nn

from sit_atconv.config import Repa
from sit_atconv.layers.projectors import Projectors
from sit_atconv.models.sit import create_model
from sit_atconv.runtime.errors import InputError
from sit_atconv.training.objectives.repa import AlignedModel, ImageEncoder, align, repa_loss


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("repa") / "vit")


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(C, H, W) by Pillow's bicubic filter, which is antialiased, in floats."""
    return np.stack([np.array(Image.fromarray(part).resize((width, height), Image.BICUBIC)) for part in image])


def written_out(state: dict[str, torch.Tensor], image: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """Features (h * w, D) of one RGB image in [-1, 1], in float64."""
    s = {name: tensor.double() for name, tensor in state.items()}
    x = torch.from_numpy(resized(image, grid[0] * PATCH, grid[1] * PATCH)).double()
    x = ((x + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    cells = [
        x[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH].reshape(-1)
        for i in range(grid[0])
        for j in range(grid[1])
    ]
    tokens = torch.stack(cells) @ s["patch_embed.proj.weight"].flatten(1).T + s["patch_embed.proj.bias"]
    prefix, positions = s["pos_embed"][0, :3], s["pos_embed"][0, 3:].T.view(1, WIDTH, 4, 4)
    if grid != (4, 4):
        positions = F.interpolate(positions, grid, mode="bicubic", antialias=True)
    tokens = tokens + positions[0].flatten(1).T
    x = torch.cat([torch.cat([s["cls_token"][0], s["reg_token"][0]]) + prefix, tokens])

    def norm(x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    for block in ("blocks.0", "blocks.1"):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").view(-1, 3, HEADS, WIDTH // HEADS).unbind(1)
        weights = (torch.einsum("nhd,mhd->hnm", q, k) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        mixed = torch.einsum("hnm,mhd->nhd", weights, v).flatten(1)
        x = x + linear(mixed, f"{block}.attn.proj") * s[f"{block}.ls1.gamma"]
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2") * s[f"{block}.ls2.gamma"]
    return norm(x, "norm")[3:]


@pytest.mark.parametrize("grid", [(4, 4), (2, 2), (3, 6)])
@pytest.mark.parametrize("channels", [3, 1])
def test_features_are_those_written_out(vit, grid, channels):
    """Images larger and smaller than the encoder's, native and other grids, grey ones."""
    encoder, state = ImageEncoder(vit), load_file(f"{vit.removeprefix('local-dir:')}/model.safetensors")
    images = torch.rand(2, channels, 20, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    features = encoder.features(images, grid)
    assert features.shape == (2, grid[0] * grid[1], encoder.width) == (2, grid[0] * grid[1], WIDTH)
    assert not features.requires_grad
    expected = [written_out(state, image.expand(3, -1, -1).numpy().copy(), grid) for image in images]
    torch.testing.assert_close(features.double(), torch.stack(expected), rtol=1e-3, atol=1e-3)


def test_images_are_resized_in_float32_under_autocast(vit):
    encoder, images = ImageEncoder(vit), torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder.features(images, (4, 4))
    assert F.cosine_similarity(rounded.float(), encoder.features(images, (4, 4)), dim=-1).min() > 0.99


PLAIN = {name: ARGS[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}


@pytest.mark.parametrize(
    ("architecture", "args", "prefix"),
    [
        ("vit_small_patch14_dinov2", PLAIN, 1),
        ("vit_small_patch14_reg4_dinov2", PLAIN, 5),
        ("vit_tiny_patch16_224", {**PLAIN, "class_token": False, "global_pool": "avg"}, 0),
        ("vit_small_patch16_dinov3", {**PLAIN, "embed_dim": 16}, 5),  # rotary, of another class
    ],
)
def test_kinds_of_vit(tmp_path, architecture, args, prefix):
    """Against timm's own intermediate features."""
    encoder = ImageEncoder(save_vit(tmp_path / "vit", architecture, num_classes=0, args=args))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    normalised = ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    (expected,) = encoder.vit.forward_intermediates(
        normalised, indices=[1], norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert encoder.vit.num_prefix_tokens == prefix
    torch.testing.assert_close(encoder.features(images, (4, 4)), expected, rtol=1e-4, atol=1e-4)
    assert encoder.features(images, (3, 5)).shape == (2, 15, encoder.width)


def test_the_encoder_is_frozen_and_describes_what_it_is(vit, tmp_path):
    encoder = ImageEncoder(vit)
    assert not encoder.vit.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    described = encoder.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["name"] == "vit_tiny_patch16_224.made_up"
    assert len(described["sha256"]) == 64
    assert ImageEncoder(save_vit(tmp_path / "moved")).describe() == described  # the same weights, elsewhere
    assert ImageEncoder(save_vit(tmp_path / "head", num_classes=7)).describe() == described  # which is not used
    assert ImageEncoder(save_vit(tmp_path / "norm", mean=(0.5, 0.5, 0.5))).describe() != described
    name = save_vit(tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = load_file(path)
    tensors["blocks.1.norm1.bias"][3] += 1e-6
    save_file(tensors, path)
    assert ImageEncoder(name).describe()["sha256"] != described["sha256"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth", "other.safetensors"])
def test_other_files_than_the_safetensors_are_never_opened(tmp_path, file):
    name = save_vit(tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    torch.save({"bomb": Bomb(tmp_path / "ran")}, tmp_path / "vit" / file)
    with pytest.raises(InputError, match=r"holds no model\.safetensors; give a folder with the config\.json and"):
        ImageEncoder(name)
    assert not (tmp_path / "ran").exists()


def test_encoders_that_cannot_be_used_are_named(tmp_path):
    def refused(name, message):
        with pytest.raises(InputError, match=message) as raised:
            ImageEncoder(name)
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)

    refused(f"local-dir:{tmp_path}/none", r"holds no config\.json")
    refused("vit_base_patch14_dinov", "did you mean 'vit_")
    refused("vit_base_patch14_dinov2.nope", "Invalid pretrained tag")
    refused("hf-hub:some/vit", "there are [0-9]+ choices")
    refused("vit_giant_patch16_gap_224.in22k_ijepa", "no weights of it on the Hugging Face hub")
    resnet = tmp_path / "resnet"
    resnet.mkdir()
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), resnet / "model.safetensors")
    (resnet / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": {}}))
    refused(f"local-dir:{resnet}", "cannot be loaded by timm")
    grey = save_vit(tmp_path / "grey", args={**ARGS, "in_chans": 1}, input_size=[1, 16, 16])
    refused(grey, "no ViT of RGB images")
    broken = save_vit(tmp_path / "broken")
    path, config = tmp_path / "broken" / "model.safetensors", tmp_path / "broken" / "config.json"
    tensors = load_file(path)
    del tensors["blocks.0.norm1.bias"]
    save_file(tensors, path)
    refused(broken, "Error.* in loading state_dict")
    path.write_bytes(path.read_bytes()[:-1])
    refused(broken, "cannot be loaded")
    save_file(load_file(tmp_path / "grey" / "model.safetensors"), path)
    for text in ("{", "[]", "{}", "[" * 100_000, '{"architecture": "vit_none", "pretrained_cfg": {}}'):
        config.write_text(text)
        refused(broken, "cannot be loaded")
    whole, found = save_vit(tmp_path / "whole"), json.loads((tmp_path / "whole" / "config.json").read_text())
    for option, value, says in (
        ("depth", 1000, "of another, larger model"), ("embed_dim", 1 << 16, "of another, larger model"),
        ("img_size", 10**5, "of another, larger model"), ("depth", 10**5, "1 to 1000"),
        ("depth", "x", "cannot be loaded"), ("embed_dim", 1 << 40, "must be at most"), ("num_heads", 7, "divisible"),
    ):  # fmt: skip
        changed = {**found, "model_args": {**found["model_args"], option: value}}
        (tmp_path / "whole" / "config.json").write_text(json.dumps(changed))
        refused(whole, says)
    for key, value in (("std", [0, 1, 1]), ("mean", [1, 1]), ("mean", "x"), ("std", [1, 1, None])):
        changed = {**found, "pretrained_cfg": {**found["pretrained_cfg"], key: value}}
        (tmp_path / "whole" / "config.json").write_text(json.dumps(changed))
        refused(whole, key)
    for edits, says in (
        ({"model_args": {**ARGS, "act_layer": 5}}, "cannot be loaded by timm"),
        ({"pretrained_cfg": {**found["pretrained_cfg"], "mean": ["x"]}}, "mean.0 is 'x', and must be a finite number"),
    ):
        (tmp_path / "whole" / "config.json").write_text(json.dumps({**found, **edits}))
        refused(whole, says)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hugging Face cache without a network; fills it with a repository's file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def fill(repository: str, file: str, write) -> None:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        commit = folder / "snapshots" / ("0" * 40)
        commit.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit.name)
        write(commit / file)

    return fill


# The second has weights of another kind as timm's first source.
@pytest.mark.parametrize(
    ("asked", "name"), [("test_vit", "test_vit.r160_in1k"), 2 * ("vit_tiny_patch16_224.augreg_in21k",)]
)
def test_a_name_is_taken_from_the_cache_of_the_hub(hub, asked, name):
    torch.manual_seed(0)
    stored = timm.create_model(name)
    hub(f"timm/{name}", "model.safetensors", lambda path: save_file(stored.state_dict(), path))
    encoder = ImageEncoder(asked)
    assert encoder.describe()["name"] == name
    for key, tensor in encoder.vit.state_dict().items():
        assert torch.equal(tensor, stored.state_dict()[key]), key
    assert encoder.mean.flatten().tolist() == pytest.approx(timm.get_pretrained_cfg(name).mean)
    images, grid = torch.rand(1, 3, 32, 32), (4, 4)
    assert encoder.features(images, grid).shape == (1, 16, stored.embed_dim)


def test_a_name_that_is_not_there_says_what_to_download(hub, tmp_path):
    message = (
        r"model\.safetensors of it is not in the Hugging Face cache .*download config\.json and model\.safetensors "
        r"from https://huggingface\.co/timm/test_vit\.r160_in1k .*repa\.encoder=local-dir:FOLDER"
    )
    with pytest.raises(InputError, match=message):
        ImageEncoder("test_vit")
    hub("timm/test_vit.r160_in1k", "pytorch_model.bin", lambda path: torch.save(Bomb(tmp_path / "ran"), path))
    with pytest.raises(InputError, match=message):
        ImageEncoder("test_vit")
    assert not (tmp_path / "ran").exists()


# The loss


def test_loss_is_minus_the_mean_cosine():
    angles = torch.tensor([[0.0, 0.5, 1.0], [2.0, 3.0, -1.0]], dtype=torch.float64)
    lengths = torch.tensor([[1.0, 5.0, 0.1], [2.0, 3.0, 1e3]], dtype=torch.float64)
    z = torch.stack([angles.cos(), angles.sin()], -1) * lengths[..., None]
    features = torch.tensor([3.0, 0.0]).expand(2, 3, 2).double()
    torch.testing.assert_close(repa_loss(z, features).double(), -angles.cos().mean(1), rtol=1e-6, atol=1e-6)
    assert repa_loss(features.bfloat16(), features.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(repa_loss(-features, features), torch.ones(2))


# The model with its projectors

DEPTH, BLOCKS = 2, 4


def small_model(**options):
    torch.manual_seed(0)
    model = create_model(
        None, sample_size=8, num_classes=3, patch_size=2, in_channels=3, hidden_size=8, depth=BLOCKS, num_heads=2,
        **{"token_mixer": "hybrid", **options},
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def small_aligned(vit, seed=0, **options) -> AlignedModel:
    encoder = ImageEncoder(vit)
    return align(small_model(**options), encoder, Repa(encoder=vit, depth=DEPTH, projector_dim=16), seed)


def inputs():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    return x, torch.tensor([0.2, 0.7]), torch.tensor([1, 2])


def test_the_aligned_model_is_the_model_and_its_tokens_projected(vit):
    aligned, (x, t, labels) = small_aligned(vit), inputs()
    velocity, z = aligned(x, t, labels)
    assert torch.equal(velocity, aligned.model(x, t, labels).sample)
    model = aligned.model
    tokens = model.x_embedder(x) + model.pos_embed.view(1, 4, 4, 8)
    c = model.t_embedder(t, x.dtype) + model.y_embedder(labels)
    for block in model.blocks[:DEPTH]:
        tokens = block(tokens, c)
    weights = aligned.projectors.projectors[0].state_dict()
    expected = tokens.flatten(1, 2)
    for index in (0, 2, 4):
        expected = expected @ weights[f"{index}.weight"].T + weights[f"{index}.bias"]
        expected = F.silu(expected) if index < 4 else expected
    assert z.shape == (2, 16, WIDTH)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in aligned.modules())


def gradients(aligned: AlignedModel, encoder: ImageEncoder, weight: float = 1.0) -> dict[str, torch.Tensor]:
    x, t, labels = inputs()
    aligned.zero_grad()
    velocity, z = aligned(x, t, labels)
    (weight * velocity.square().mean() + repa_loss(z, encoder.features(x.clamp(-1, 1), (4, 4))).mean()).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in aligned.named_parameters()}


def test_the_loss_reaches_the_blocks_up_to_the_depth_and_the_projector_alone(vit):
    aligned, encoder = small_aligned(vit), ImageEncoder(vit)
    x, t, labels = inputs()
    _, z = aligned(x, t, labels)
    repa_loss(z, encoder.features(x.clamp(-1, 1), (4, 4))).sum().backward()
    reached = {name for name, parameter in aligned.named_parameters() if parameter.grad is not None}
    before = (
        "projectors.",
        "model.x_embedder",
        "model.t_embedder",
        "model.y_embedder",
        "model.blocks.0",
        "model.blocks.1",
    )
    assert reached == {name for name, _ in aligned.named_parameters() if name.startswith(before)}
    assert all(aligned.get_parameter(name).grad.abs().max() > 0 for name in reached)
    assert not any(parameter.grad is not None for parameter in encoder.parameters())
    assert {name.partition(".")[0] for name in aligned.state_dict()} == {"model", "projectors"}


@pytest.mark.parametrize("compiled", [False, *slowly([True])])
def test_checkpointing_and_compiled_blocks_give_the_same_gradients(vit, compiled):
    aligned, encoder = small_aligned(vit), ImageEncoder(vit)
    expected = gradients(aligned, encoder)
    assert all(gradient is not None for gradient in expected.values())
    changed = copy.deepcopy(aligned)
    if compiled:
        changed.model.compile_repeated_blocks(backend="aot_eager")
        changed.model(*inputs())  # compiled before anybody listens
        torch.testing.assert_close(gradients(changed, encoder), expected, rtol=1e-3, atol=1e-5)
    changed.model.enable_gradient_checkpointing()
    for _ in range(2):
        torch.testing.assert_close(gradients(changed, encoder), expected, rtol=1e-3, atol=1e-5)


def test_ddp_sees_all_parameters_in_one_module(vit, tmp_path):
    aligned, encoder = small_aligned(vit), ImageEncoder(vit)
    expected = gradients(aligned, encoder)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(aligned)
        for _ in range(2):  # a parameter without a gradient would stop the second pass
            found = gradients(wrapped, encoder)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close({f"module.{name}": value for name, value in expected.items()}, found)


def test_projectors_are_drawn_from_the_seed_alone(vit):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small_aligned(vit, seed=5).projectors.state_dict()
    torch.manual_seed(2)
    again, other = (small_aligned(vit, seed=seed).projectors.state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    encoder, model = ImageEncoder(vit), small_model()
    torch.set_rng_state(before)
    align(model, encoder, Repa(encoder=vit, depth=1, projector_dim=16), 5)
    assert torch.equal(torch.get_rng_state(), before)
    weight = first["projectors.0.0.weight"]  # torch's default: uniform within 1 / sqrt(inputs)
    assert weight.shape == (16, 8)
    assert 0.9 * 8**-0.5 < weight.abs().max() <= 8**-0.5


def test_projectors_do_not_share_the_models_draws(vit):
    model = create_model(None, sample_size=8, num_classes=3, patch_size=1, in_channels=8, hidden_size=8, depth=2,
                         num_heads=2)  # fmt: skip
    aligned = align(model, ImageEncoder(vit), Repa(encoder=vit, depth=1, projector_dim=16), 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Linear(8, 16)
    weight = aligned.projectors.projectors[0][0].weight
    assert abs(np.corrcoef(weight.detach().flatten(), plain.weight.detach().flatten())[0, 1]) < 0.4


def test_a_depth_that_the_model_lacks_is_refused(vit):
    encoder, model = ImageEncoder(vit), small_model()
    with pytest.raises(InputError, match="encoder depth 5: the model has 4 blocks"):
        align(model, encoder, Repa(encoder=vit, depth=5), 0)(*inputs())
    align(model, encoder, Repa(encoder=vit, depth=4), 0)(*inputs())


def test_what_fsdp_shards_are_the_blocks_there_are(vit):
    assert small_aligned(vit)._no_split_modules == ["SiTATConvBlock", "SiTBlock"]
    assert small_aligned(vit, token_mixer="attention")._no_split_modules == ["SiTBlock"]


def test_projectors_are_saved_with_one_key_of_metadata(vit, tmp_path):
    """safetensors writes several keys in an order that changes from process to process."""
    projectors = small_aligned(vit).projectors
    projectors.save(tmp_path)
    with safe_open(tmp_path / "projectors.safetensors", framework="pt") as file:
        assert file.metadata() == {"encoder_depth": "2"}
    loaded = Projectors.load(tmp_path)
    assert loaded.encoder_depth == DEPTH
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in projectors.state_dict().items())
