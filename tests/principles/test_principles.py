"""The measures against closed forms and plain loops, and the command on a digits SiT and a ViT."""

import itertools
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import run_recipe
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vit import save_vit
from torch import nn

from experiments.principles import main
from sit_atconv import SiTTransformer2DModel, swap_attention
from sit_atconv.data.digits import Digits
from sit_atconv.data.folder import Folder
from sit_atconv.data.images import in_range
from sit_atconv.latents.codecs import VaeCodec
from sit_atconv.layers.atconv import ATConv
from sit_atconv.layers.attention import Attention
from sit_atconv.models.attnet import ATConv2d
from sit_atconv.ops.atconv import dynamic_depthwise_conv
from sit_atconv.principles import measures, plots
from sit_atconv.principles.layers import attention_kernels, factors, find_layers, recording, unmeasured
from sit_atconv.principles.report import describe_field, measure, table
from sit_atconv.principles.targets import load, show
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError
from sit_atconv.training import checkpoint

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_routing_is_the_varying_share_of_the_kernels_square_and_exactly_0_for_static_ones():
    kernel = randn(1, 1, 9, 5).abs() + 0.1
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    moved = kernel * (1 + 0.5 * signs[:, None, None, None]).expand(4, 3, 1, 1)
    share = 0.25 / 1.25  # of k (1 +- 1/2): variance k^2 / 4, mean square k^2 5 / 4
    assert measures.routing(moved) == {"over_samples": pytest.approx(share), "over_times": 0.0}
    assert measures.routing(moved.transpose(0, 1))["over_times"] == pytest.approx(share)
    assert measures.routing(-2 * kernel * signs[:, None, None, None])["over_samples"] == pytest.approx(1)
    static = (kernel.double() / 3).expand(7, 49, -1, -1)  # the mean of 49 equal numbers need not be that number
    assert measures.routing(static) == {"over_samples": 0.0, "over_times": 0.0}
    assert measures.routing(kernel) == {"over_samples": None, "over_times": None}


@pytest.mark.parametrize("setting", ["learned", "full", "none"])
def test_inhibition_tells_the_factors_and_the_mean_that_the_layers_own_kernels_have(setting):
    torch.manual_seed(0)
    layer, x = ATConv(6, inhibition=setting), randn(2, 3, 4, 6) + 1
    nn.init.normal_(layer.kernel_gen.bias, mean=0.5)
    if setting == "learned":
        nn.init.normal_(layer.difference_control, std=2)
    with recording(nn.ModuleList([layer]), {"0": "ATConv"}, None) as seen:
        output = layer(x)
    shares = {"learned": getattr(layer, "difference_control", torch.zeros(6)).sigmoid(), "full": torch.ones(6)}
    expected = shares.get(setting, torch.zeros(6)).double()
    assert torch.equal(factors(layer, 6).double(), expected)
    before, after = seen["0"].before[:, None], seen["0"].kernels[:, None]
    found = measures.inhibition(before, factors(layer, 6))
    assert found["mean"] == pytest.approx(expected.mean().item())
    assert found["std"] == pytest.approx(expected.std(correction=0).item())
    assert (found["min"], found["max"]) == (expected.min().item(), expected.max().item())
    assert found["quantiles"][2] == pytest.approx(np.median(expected.detach().numpy()))
    assert found["mean_before"] == pytest.approx(
        (before.mean(2).square().mean() / before.square().mean()).sqrt().item()
    )
    assert found["mean_after"] == pytest.approx(measures.mean_share(after), abs=1e-7)
    assert found["mean_before"] > 0.1
    if setting == "full":
        assert found["mean_after"] == 0
    # The layer is as it was.
    assert layer.inhibition == setting
    assert "kernels" not in vars(layer)
    assert not layer.proj._forward_pre_hooks
    assert torch.equal(output, layer(x))
    assert torch.equal(after[:, 0], layer.kernels(x))


def test_mean_share_is_1_for_box_kernels_and_0_for_kernels_without_mean():
    assert measures.mean_share(randn(2, 1, 1, 4).expand(-1, -1, 9, -1)) == pytest.approx(1)
    kernels = randn(2, 1, 9, 4).double()
    assert measures.mean_share(kernels - kernels.mean(2, keepdim=True)) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("vectors", "mean", "rms", "rank"),
    [
        (torch.tensor([[1.0], [2], [3], [4]]).expand(-1, 3), 1, 1, 1),
        (torch.tensor([[1.0], [2], [3], [4]]) * torch.tensor([1.0, -1]), -1, 1, 1),
        (torch.eye(4)[:, :3] * 2, 0, 0, 3),
        (torch.eye(4) * torch.tensor([2.0, 1, 1, 0]), 0, 0, 2 * math.sqrt(2)),  # shares 1/2, 1/4, 1/4
        (torch.tensor([[1.0, 1, 0], [0, 1, 1]]), math.sqrt(2) / 3, math.sqrt(1 / 3), None),
    ],
    ids=["identical", "mirrored", "orthogonal", "with zeros", "at 45 degrees"],
)
def test_redundancy_of_known_vectors(vectors, mean, rms, rank):
    """The kernels of the channels, and as many feature maps."""
    kernels = measures.kernel_redundancy(vectors[None, None])
    channels = measures.channel_redundancy(vectors.T @ vectors, len(vectors))
    for found in (kernels, channels):
        assert found["cosine"] == pytest.approx(mean, abs=1e-7)
        assert found["cosine_rms"] == pytest.approx(rms, abs=1e-7)
        assert found["rank"] == pytest.approx(rank or found["rank"], abs=1e-6)
        assert found["rank_limit"] == min(vectors.shape)
    assert kernels["rank"] == pytest.approx(channels["rank"], abs=1e-6)


def test_kernel_redundancy_is_a_mean_over_samples_and_times():
    both = torch.stack([torch.ones(4, 3), torch.eye(4)[:, :3]])
    for kernels in (both[:, None], both[None]):
        found = measures.kernel_redundancy(kernels)
        assert (found["cosine"], found["rank"]) == (pytest.approx(0.5), pytest.approx(2))


def test_offsets_of_attention_are_those_of_a_plain_loop():
    (height, width), heads = (2, 4), 3
    maps = randn(2, heads, 8, 8).softmax(-1).double()
    means, squares = measures.offset_moments(maps, (height, width))
    inside, by_tap = 0.0, torch.zeros(2, 9, heads, dtype=torch.float64)
    for tap, (down, right) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
        pairs = [
            (row * width + column, (row + down) * width + column + right)
            for row, column in itertools.product(range(height), range(width))
            if 0 <= row + down < height and 0 <= column + right < width
        ]
        found = torch.stack([maps[:, :, query, key] for query, key in pairs])
        by_tap[:, tap] = found.mean(0)
        assert torch.allclose(squares[:, tap], found.square().mean(0))
        inside += found.sum().item()
    assert torch.allclose(means, by_tap)
    assert measures.share_within(means, (height, width)) == pytest.approx(inside / (2 * heads * 8))
    assert measures.share_within(means[:, None], (height, width)) == pytest.approx(inside / (2 * heads * 8))
    # One row: nobody is above or below.
    row, _ = measures.offset_moments(randn(1, 1, 3, 3).softmax(-1), (1, 3))
    assert not row[:, [0, 1, 2, 6, 7, 8]].any()
    assert row[:, [3, 4, 5]].all()


def test_attention_that_is_the_same_at_all_queries_does_not_differ_between_positions():
    means = torch.full((2, 9, 3), 0.2).double()
    assert measures.over_positions(means, means.square()) == pytest.approx(0, abs=1e-12)
    assert measures.over_positions(means, 4 * means.square()) == pytest.approx(0.75)


@pytest.mark.parametrize("prefix", [0, 2])
def test_attention_kernels_are_of_the_probabilities_that_the_layer_uses(prefix):
    torch.manual_seed(0)
    ours = Attention(12, 3, qk_norm=True)
    theirs = timm.layers.Attention(12, 3, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    nn.init.normal_(ours.qkv.weight)
    nn.init.normal_(ours.q_norm.weight)
    assert not theirs.load_state_dict(ours.state_dict()).missing_keys
    theirs.fused_attn, seen, x = False, [], randn(2, prefix + 6, 12)
    theirs.attn_drop.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    assert torch.allclose(theirs(x), ours(x), atol=1e-5)
    (probabilities,) = seen
    for layer in (ours, theirs):
        for found, expected in zip(
            attention_kernels(layer, x, (2, 3)),
            measures.offset_moments(probabilities[:, :, prefix:, prefix:], (2, 3)),
            strict=True,
        ):
            assert torch.allclose(found, expected, atol=1e-6)


def test_receptive_field_of_one_convolution_is_the_square_of_its_weights():
    convolution = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    weights = torch.tensor([[0.0, 3, 0], [0, 2, 0], [1, 0, 0]])
    convolution.weight.data[0, 0] = weights
    inputs = randn(2, 1, 8, 9).requires_grad_()
    fields = measures.receptive_field(convolution(inputs), inputs)
    expected = torch.zeros(8, 9, dtype=torch.float64)
    expected[3:6, 3:6] = weights.square()  # a cross-correlation reads with its weights as they lie
    assert torch.equal(fields, expected.expand(2, -1, -1))
    found = describe_field(measures.mean_field(fields))
    # 9 of 14 at (3, 4), 4 at (4, 4), 1 at (5, 3).
    centre = 48 / 14, 55 / 14
    assert found["centre"] == pytest.approx(centre)
    assert found["radius_50"] == pytest.approx(math.dist(centre, (3, 4)))
    assert found["radius_90"] == pytest.approx(math.dist(centre, (4, 4)))
    assert found["share_90"] == pytest.approx(math.dist(centre, (4, 4)) / 4.5)
    assert measures.radius(expected, (4, 4), 4 / 14) == 0
    assert measures.radius(expected, (4, 4), 0.95) == pytest.approx(math.sqrt(2))
    assert np.allclose(found["map"], expected / 14, atol=1e-4)


def test_fields_count_alike_and_the_centre_of_a_shrunk_map_is_in_the_middle_of_its_cell():
    one, other = torch.zeros(2, 4, 4).unbind()
    one[0, 0], other[3, 3] = 100, 1
    field = measures.mean_field(torch.stack([one, other, torch.zeros(4, 4)]))
    assert (field[0, 0], field[3, 3], field.sum()) == (0.5, 0.5, 1)
    assert measures.centroid(field) == (1.5, 1.5)
    assert describe_field(torch.zeros(4, 4))["radius_50"] is None
    assert describe_field(torch.zeros(4, 3))["centre"] == [1.5, 1.0]
    assert describe_field(torch.ones(2, 120))["size"] == [2, 120]


def test_a_strided_padded_network_has_the_radius_of_its_field_and_not_of_a_cell():
    """Two 3 x 3 convolutions of stride 2 and padding 1: position i looks about pixel 4 i, and not 4 i + 1.5."""
    layers = nn.Sequential(*(nn.Conv2d(1, 1, 3, 2, padding=1, bias=False) for _ in range(2)))
    for layer in layers:
        nn.init.ones_(layer.weight)
    x = randn(1, 1, 32, 24).requires_grad_()
    found = describe_field(measures.mean_field(measures.receptive_field(layers(x), x)))
    assert found["centre"] == pytest.approx([16, 12])
    assert found["radius_90"] <= math.hypot(3, 3)


def test_a_depthwise_convolution_is_measured_by_its_weights_and_its_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=6), nn.Conv2d(6, 2, 1))
    x = randn(2, 3, 5, 4)
    with torch.no_grad(), recording(model, find_layers(model), None) as seen:
        model(x)
    assert set(seen) == {"1"}
    weights = torch.stack([model[1].weight[channel, 0, :, 0] for channel in range(6)], 1)
    assert torch.equal(seen["1"].kernels, weights.expand(2, 3, 6))
    assert torch.equal(seen["1"].mixed, model[:2](x))


@pytest.mark.parametrize(("name", "kind"), [("attnet_xxs", "ATConv"), ("convnext_atto", "depthwise")])
def test_an_attnet_and_a_convnext_are_measured_alike(name, kind, recwarn):
    target = load(name)
    target.images = randn(3, 3, 64, 64)
    layers = measure(target, 1, 2, CPU)["layers"]
    assert not [each for each in recwarn.list if "of no kind" in str(each.message)]
    first = next(each for each in layers if each["kind"] == kind)
    module, given = target.model.get_submodule(first["name"]), []
    if kind == "ATConv":
        module.proj.register_forward_pre_hook(lambda _, args: given.append(args[0].flatten(0, -2)))
    else:
        module.register_forward_hook(lambda *args: given.append(args[2].permute(0, 2, 3, 1).flatten(0, 2)))
    with torch.no_grad():
        target.model(target.images)
    unit = F.normalize(given[0].double(), dim=0).numpy()  # over positions and samples
    cosines = unit.T @ unit
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    assert first["channel_redundancy"]["cosine"] == pytest.approx(pairs.mean(), abs=1e-4)
    assert all((each["routing"]["over_samples"] > 0) == (each["kind"] == "ATConv") for each in layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_nan_is_not_measured(value):
    target = load("attnet_xxs")
    target.images = randn(1, 3, 64, 64)
    layer = next(module for module in target.model.modules() if isinstance(module, ATConv2d))
    with torch.no_grad():
        layer.kernel_proj.weight.view(-1)[0] = value
    with pytest.raises(InputError, match=r"attnet_xxs: what .* gives is not finite"):
        measure(target, 1, 1, CPU)


@pytest.mark.parametrize(("name", "number"), [("coatnet_0_rw_224", 14), ("swin_tiny_patch4_window7_224", 0)])
def test_attention_that_is_not_measured_is_named(name, number):
    with torch.device("meta"):
        model = timm.create_model(name)
    if number:
        assert len(unmeasured(model)) >= number / 2
        assert all("attn" in each for each in unmeasured(model))
        assert set(find_layers(model).values()) == {"depthwise"}
    else:
        with pytest.raises(InputError, match=r"attention of this library's or timm's .*attn is a WindowAttention"):
            find_layers(model)
    assert unmeasured(nn.ModuleDict({"attention": Attention(4, 2), "conv": nn.Conv2d(4, 4, 3, groups=4)})) == []


@pytest.mark.parametrize("volume", ["full", "factored"])
def test_a_layer_over_volumes_is_named_and_not_passed_over_in_silence(volume):
    model = nn.ModuleDict({"volume": ATConv(4, volume=volume)})
    with pytest.raises(InputError, match=r"has no ATConv, .*; its volume is a ATConv over volumes, which are not mea"):
        find_layers(model)
    model["grid"], model["attention"] = ATConv(4), nn.ModuleDict({"mixer": ATConv(4, volume=volume)})
    assert find_layers(model) == {"grid": "ATConv"}
    assert unmeasured(model) == ["volume", "attention.mixer"]


def test_every_layer_that_mixes_positions_is_found_and_no_other():
    model = nn.ModuleDict({
        "adaptive": ATConv2d(4, 4), "static": ATConv(4, routing="static"), "attention": Attention(4, 2),
        "timm": timm.layers.Attention(4, 2), "depthwise": nn.Conv2d(4, 4, (1, 3), groups=4),
        "pointwise": nn.Conv2d(4, 4, 1, groups=4), "dense": nn.Conv2d(4, 4, 3), "grey": nn.Conv2d(1, 1, 3),
        "grouped": nn.Conv2d(4, 4, 3, groups=2), "linear": nn.Linear(4, 4),
    })  # fmt: skip
    assert find_layers(model) == {
        "adaptive": "ATConv", "static": "static ATConv", "attention": "attention", "timm": "attention",
        "depthwise": "depthwise",
    }  # fmt: skip


def test_a_swapped_vit_is_measured_where_its_patches_are_convolved(tmp_path):
    folder = tmp_path / "vit"
    save_vit(folder)
    target = load(str(folder))
    target.images = randn(2, 3, 16, 16)
    swap_attention(target.model, select=["blocks.1.attn"], calib=[(target.images,)])
    names = find_layers(target.model)
    assert names == {"blocks.0.attn": "attention", "blocks.1.attn": "ATConv"}
    layer, given = target.model.blocks[1].attn, []
    layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad(), recording(target.model, names, target.grid()) as seen:
        target.run(target.images, slice(0, 2), None)
        patches = layer.v_proj(given[0])[:, 3:]  # after a class token and two registers
        expected = dynamic_depthwise_conv(patches, seen["blocks.1.attn"].kernels, (4, 4))
    assert torch.allclose(seen["blocks.1.attn"].mixed.flatten(2).mT, expected, atol=1e-5)
    for each in seen.values():
        assert each.mixed.shape == (2, 12, 4, 4)
    assert seen["blocks.0.attn"].kernels.shape == (2, 9, 2)
    assert seen["blocks.1.attn"].kernels.shape == (2, 9, 12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A hybrid SiT after 8 steps on digits."""
    import yaml

    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "run": {"out": str(folder / "hybrid")},
        "model": {"patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "token_mixer": "hybrid"},
        "train": {"max_steps": 8, "batch_size": 8, "lr": 1e-2, "warmup_steps": 0},
        "checkpoint": {"every": 8},
        "preview": {"every": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run_recipe(folder / "recipe.yaml").parent


def test_a_sit_is_shown_points_of_its_path_whatever_the_batch(run):
    target = show(load(str(run)), "digits", 5, seed=3)
    noise = draws.normal((1, 8, 8), 3, Stream.NOISE, 0, int(draws.generator(3, Stream.ORDER, 0).permutation(360)[2]))
    shown = target.inputs(slice(2, 3), 0.25, CPU)[0]
    assert torch.allclose(shown, 0.25 * target.images[2] + 0.75 * noise)
    whole, parts = (measure(target, 3, batch, CPU)["layers"] for batch in (5, 2))
    assert [layer["kind"] for layer in whole] == ["attention", "ATConv"]

    kernels = []  # of ATConv by t and sample, from what its block was given
    layer = checkpoint.load_trained(run).model.blocks[1].attn
    target.model.blocks[1].attn.register_forward_pre_hook(lambda _, args: kernels.append(layer.kernels(args[0])))
    with torch.no_grad():
        for t in (1 / 6, 3 / 6, 5 / 6):
            x = t * target.images + (1 - t) * target.noise
            target.model(x, t, target.labels)
    kernels = torch.stack(kernels)
    power = kernels.square().mean()
    for layers in (whole, parts):
        routing = layers[1]["routing"]
        assert routing["over_samples"] == pytest.approx((kernels.var(1, correction=0).mean() / power).item(), rel=1e-4)
        assert routing["over_times"] == pytest.approx((kernels.var(0, correction=0).mean() / power).item(), rel=1e-4)
    assert len({0.0, *whole[1]["routing"].values()}) == 3
    for one, other in zip(whole, parts, strict=True):
        for key in ("kernel_redundancy", "channel_redundancy"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)
        for key in ("over_samples", "over_times", "over_positions"):
            assert one["routing"][key] == pytest.approx(other["routing"][key], rel=1e-4)
        assert np.allclose(one["receptive_field"]["map"], other["receptive_field"]["map"], atol=1e-4)
    assert 0 < whole[0]["routing"]["over_positions"] < 1
    assert 0 < whole[0]["within_window"] < 1


def test_the_command_writes_record_table_and_figures(run, tmp_path, capsys):
    save_vit(tmp_path / "vit")
    out = tmp_path / "out"
    main([str(run), str(tmp_path / "vit"), "--data", "digits", "--num", "3", "--times", "2", "--out", str(out)])
    record = json.loads((out / "principles.json").read_text())
    assert record["command"].startswith("sit-atconv principles ")
    assert record["versions"]["timm"] == timm.__version__
    sit, vit = record["targets"]
    assert (sit["target"], sit["input"], sit["times"], sit["num"]) == ("hybrid", [1, 8, 8], [0.25, 0.75], 3)
    assert vit["times"] is None
    assert vit["input"] == [3, 16, 16]
    assert vit["layers"][0]["routing"]["over_times"] is None
    text = (out / "principles.md").read_text()
    assert table(sit) in text
    last = table(sit).splitlines()[3].split(" | ")
    assert last[6].startswith(f"{sit['layers'][1]['inhibition']['mean']:.3f} ± ")
    assert float(last[9]) == pytest.approx(sit["layers"][1]["inhibition"]["mean_after"], rel=1e-2)
    assert float(last[9]) == pytest.approx(sit["layers"][1]["kernel_mean"], rel=1e-2)
    assert text.count("\n| 1 | blocks.0.attn | attention |") == 2
    for name in plots.FIGURES:
        with Image.open(out / name) as image:
            assert image.width > 800
    assert "inhibition.png" in capsys.readouterr().out
    # Attention alone has no inhibition to be drawn, and an old figure would speak for it.
    assert plots.draw([vit], out) == [name for name in plots.FIGURES if name != "inhibition.png"]
    assert not (out / "inhibition.png").exists()


def test_a_recipe_or_the_checkpoints_own_is_taken_for_data(run):
    own, named = (show(load(str(run)), data, 4, 0) for data in (None, str(run / "recipe.yaml")))
    digits = show(load(str(run / "step-0000008" / "ema")), "digits", 4, 0)
    assert digits.name == "hybrid"
    for target in (own, named):
        assert torch.equal(target.images, digits.images)
        assert torch.equal(target.labels, digits.labels)


def test_a_sit_whose_recipe_holds_images_out_is_shown_those(image_folder, recipe_file, tmp_path):
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8, "held_out": 0.5}
    SiTTransformer2DModel(
        sample_size=8, in_channels=3, hidden_size=8, depth=1, num_heads=1, num_classes=3, token_mixer="atconv"
    ).save_pretrained(tmp_path / "model")
    target = show(load(str(tmp_path / "model")), str(recipe_file(data=data)), 6, 0)
    whole = Folder(str(image_folder), 8)
    order = draws.generator(0, Stream.ORDER, 0).permutation(6)
    expected = [in_range(whole[int(np.arange(1, 12, 2)[place]), False][0]) for place in order]
    assert torch.equal(target.images, torch.stack(expected))


def test_a_latent_model_is_shown_a_folder_through_its_autoencoder(tmp_path, vae_folder, fails):
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = np.random.default_rng(ord(name)).integers(256, size=(20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name / "1.png")
    SiTTransformer2DModel(
        sample_size=4, in_channels=4, hidden_size=8, depth=1, num_heads=1, num_classes=2, token_mixer="atconv"
    ).save_pretrained(tmp_path / "model")
    target = show(load(str(tmp_path / "model")), str(tmp_path / "images"), 2, 5, str(vae_folder))
    first = int(draws.generator(5, Stream.ORDER, 0).permutation(2)[0])
    image, label = Folder(str(tmp_path / "images"), 16)[(first, False)]
    posterior = draws.normal((4, 4, 4), 5, Stream.POSTERIOR, 0, first)
    with torch.no_grad():
        latent = VaeCodec(str(vae_folder), 1).encode(image[None], posterior[None])[0]
    assert target.labels[0] == label
    assert torch.allclose(target.images[0], latent, atol=1e-5)
    message = fails(main, tmp_path / "model", "--data", tmp_path / "images", "--num", 2, "--out", tmp_path / "out")
    assert "name it with --vae" in message


def test_a_run_of_a_classifier_is_loaded_whole_and_shown_the_held_out_images_of_its_recipe(tmp_path, fails):
    step = tmp_path / "mine" / "step-0000003"
    step.mkdir(parents=True)
    save_vit(step / "ema")
    files = {f"ema/{path.name}": checkpoint.sha256(path) for path in (step / "ema").iterdir()}
    recipe = {"run": {"out": "mine"}, "data": {"kind": "digits"}}
    (step / "manifest.json").write_text(json.dumps({"format_version": 1, "step": 3, "recipe": recipe, "files": files}))
    for folder in (step.parent, step, step / "ema"):
        target = show(load(str(folder)), None, 3, 0)
        assert (target.name, target.facts["step"], target.facts["which"]) == ("mine", 3, "ema")
    assert torch.equal(target.model.pos_embed, load_file(step / "ema" / "model.safetensors")["pos_embed"])
    order = draws.generator(0, Stream.ORDER, 0).permutation(360)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(target.model))
    assert torch.equal(target.images[1], transform(Digits("test").picture(order[1])[0].convert("RGB")))
    with open(step / "ema" / "model.safetensors", "r+b") as file:
        file.truncate(100)
    assert "is damaged: ema/model.safetensors was changed or cut" in fails(main, step.parent)


def test_weights_are_those_of_the_file_and_else_drawn_from_the_seed(tmp_path, fails):
    one, other = (load("attnet_xxs", seed=seed).model.state_dict() for seed in (1, 2))
    assert not torch.equal(one["head.fc.weight"], other["head.fc.weight"])
    file = str(tmp_path / "weights.safetensors")
    save_file(one, file)
    loaded = load("attnet_xxs", file, seed=2)
    assert all(torch.equal(tensor, one[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.facts["sha256"] == checkpoint.sha256(tmp_path / "weights.safetensors")
    assert "do not fit attnet_xs" in fails(main, "attnet_xs", "--weights", file, "--data", "digits")


def test_bad_input_is_one_line(run, fails, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "neither a folder nor a model of timm; did you mean 'attnet_t2'?" in fails(main, "attnet_t22", *out)
    assert "no such safetensors file" in fails(main, "attnet_xxs", "--weights", tmp_path / "none.bin", *out)
    assert "has its own weights" in fails(main, run, "--weights", "some.safetensors", *out)
    assert "ResNet has no ATConv, depthwise convolution or attention" in fails(main, "resnet10t", *out)
    assert "--data is missing: attnet_xxs" in fails(main, "attnet_xxs", *out)
    assert "no-such.yaml" in fails(main, run, "--data", tmp_path / "no-such.yaml", *out)
    assert "no images" in fails(main, run, "--data", tmp_path, *out)
    assert "there are 360 images" in fails(main, run, "--num", 361, *out)
    assert "--num 1" in fails(main, run, "--num", 1, *out)
    assert "is not a checkpoint" in fails(main, tmp_path, *out)
    assert not (tmp_path / "out").exists()
