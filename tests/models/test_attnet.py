"""AttNet against golden vectors, its sizes and starting weights, public checkpoints, and its options."""

import json
import warnings

import pytest
import timm
import torch
from golden_vectors import assert_golden, golden
from safetensors.torch import save_file
from timm.layers import DropPath
from torch import nn

from sit_atconv.layers import atconv as layers
from sit_atconv.layers.atconv import INHIBITIONS, ROUTINGS
from sit_atconv.models.attnet import ATConv2d, AttNet, AttNetBlock, checkpoint_filter_fn
from sit_atconv.ops.atconv import POOLS
from sit_atconv.runtime.errors import InputError

TINY = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
MILLIONS = {"xxs": 2.85, "xs": 5.55, "s": 7.68, "t1": 13.71, "t2": 27.01, "t3": 49.18, "t4": 87.32}
FORMATS = [torch.contiguous_format, torch.channels_last]


def draw(module: nn.Module) -> nn.Module:
    """The module in eval mode with weights that leave no branch of it without effect."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        scale = name.endswith(("gamma", "norm_layer.weight")) or (parameter.ndim == 1 and name.endswith("weight"))
        nn.init.normal_(parameter, float(scale), 0.2, generator=generator)
    return module.eval()


def tiny(name: str = "attnet_t1", **options) -> AttNet:
    torch.manual_seed(0)
    return draw(timm.create_model(name, **{"num_classes": 5, **TINY, **options}))


def images(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def golden_options(info: dict) -> dict:
    """The arguments of AttNet that a golden file was made with."""
    return {
        "depths": info["depths"],
        "dims": info["dims"],
        "mlp_ratios": info["exp_rates"],
        "glu_norm": info["glu_norm"],
        "layer_scale": 1e-6 if info["use_layer_scale"] else None,
    }


def pre_logits(model: AttNet, x: torch.Tensor) -> torch.Tensor:
    return model.forward_head(model.forward_features(x), pre_logits=True)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["attnet_t", "attnet_s"])
def test_golden(name, layout):
    info, state, tensors = golden(name)
    model = AttNet(num_classes=info["num_classes"], **golden_options(info)).eval()
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    x = tensors["x"].contiguous(memory_format=layout)
    assert_golden(pre_logits(model, x), tensors["features"])
    assert_golden(model(x), tensors["out"])


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("form", ["forward", "_portable"])
@pytest.mark.parametrize("name", ["op_attnet_k3", "op_attnet_k5"])
def test_golden_operator_and_its_gradients(name, form, layout):
    info, state, tensors = golden(name)
    layer = ATConv2d(info["dim"], info["dim"], kernel_size=info["kernel_size"])
    layer.load_state_dict(state, strict=True)
    x = tensors["x"].contiguous(memory_format=layout).requires_grad_()
    y = getattr(layer, form)(x)
    assert_golden(y, tensors["y"])
    y.backward(tensors["grad_y"])
    assert_golden(x.grad, tensors["grad_x"], factor=10)
    for key, parameter in layer.named_parameters():
        assert_golden(parameter.grad.flatten(), tensors[f"grad.{key}"].flatten(), factor=10)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("inhibition", INHIBITIONS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_scripted_layer_equals_the_eager_one(routing, inhibition, pool, kernel_size):
    options = {"routing": routing, "inhibition": inhibition, "pool": pool, "kernel_size": kernel_size}
    layer = ATConv2d(6, 6, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    scripted = torch.jit.script(layer)
    for grid in ((5, 7), (8, 4), (6, 6), (1, 1), (2, 1)):
        for layout in FORMATS:
            x = images(*grid, channels=6).double().contiguous(memory_format=layout)
            expected = layer(x)
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(scripted(x), expected)


def test_channels_last_maps_are_neither_copied_nor_left_in_another_format(monkeypatch):
    layer = ATConv2d(8, 8)
    seen = []
    monkeypatch.setattr(layer, "kernels", lambda x: seen.append(x) or torch.zeros(2, 9, 8))
    layer.x_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = images(6, 5, channels=8).contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert len(seen) == 2
    for each in seen:
        assert each.shape == (2, 6, 5, 8)
        assert each.data_ptr() == x.data_ptr()
        assert each.is_contiguous()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_models_maps_are_not_copied_on_their_way_through_atconv(monkeypatch, batch):
    model, places = tiny(), []
    convolve = layers.dynamic_depthwise_conv

    def see(x):
        assert x.is_contiguous()
        places.append(x.data_ptr())
        return x

    monkeypatch.setattr(
        layers, "dynamic_depthwise_conv", lambda v, *rest, **named: see(convolve(see(v), *rest, **named))
    )
    for layer in (module for module in model.modules() if isinstance(module, ATConv2d)):
        layer.register_forward_pre_hook(lambda _, args: places.append(args[0].data_ptr()))
        for linear in (layer.x_proj, layer.proj):
            linear.register_forward_hook(lambda _, args, y: (see(args[0]), see(y))[1])
    model(images(64, 96)[:batch].contiguous())
    assert len(places) == 7 * sum(TINY["depths"])
    for given, x, projected, v, mixed, read, _ in zip(*[iter(places)] * 7, strict=True):
        assert (given, projected, mixed) == (x, v, read)


def test_a_model_is_channels_last_inside_whatever_comes_in():
    model, formats = tiny(), []
    for module in model.modules():
        if isinstance(module, AttNetBlock):
            module.register_forward_hook(
                lambda _module, _inputs, y: formats.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    assert model(images(64, 96).contiguous()).shape == (2, 5)
    assert formats == [True] * sum(TINY["depths"])


@pytest.mark.parametrize("size", MILLIONS)
def test_parameter_counts(size):
    model = timm.create_model(f"attnet_{size}", device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / 1e6:.2f}" == f"{MILLIONS[size]:.2f}"


@pytest.mark.parametrize("size", MILLIONS)
def test_layer_scale_and_norm_in_the_mlp_are_where_the_published_models_have_them(size):
    names = [name for name, _ in timm.create_model(f"attnet_{size}", device="meta").named_parameters()]
    blocks = sum(name.endswith("difference_control") for name in names)
    assert sum("layer_scale" in name for name in names) == (0 if size in ("xxs", "s") else 2 * blocks)
    assert sum("norm_layer" in name for name in names) == (blocks if size in ("t1", "t2", "t3", "t4") else 0)


def check_starting_weights(model: AttNet) -> None:
    matrices = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            matrices.setdefault(name.split(".")[-2], []).append(parameter.detach().flatten())
        elif name.endswith("gamma"):
            assert (parameter == 1e-6).all(), name
        else:
            assert (parameter == float(name.endswith("weight"))).all(), name
    mixer, mlp = {"kernel_proj", "kernel_gen", "x_proj", "proj"}, {"fc1_g", "fc1_x", "dwconv", "fc2"}
    assert {"conv", "fc"} | mixer | mlp == matrices.keys()
    for name, parts in matrices.items():
        values = torch.cat(parts)
        spread = 5 * (2 * len(values)) ** -0.5  # five standard errors of a standard deviation
        assert values.std().item() == pytest.approx(0.02, rel=spread), name
        assert abs(values.mean()) < 0.1 * spread, name
    for name, buffer in model.named_buffers():
        assert (buffer == float(name.endswith("running_var"))).all(), name


@pytest.mark.parametrize("size", ["xxs", "xs", "t1"])
def test_starting_weights_also_of_a_model_made_without_memory(size):
    torch.manual_seed(0)
    check_starting_weights(timm.create_model(f"attnet_{size}", depths=(1, 1, 2, 1)))
    late = timm.create_model(f"attnet_{size}", depths=(1, 1, 2, 1), device="meta").to_empty(device="cpu")
    for tensor in late.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    late.init_weights()
    check_starting_weights(late)


def test_drop_path_rates_rise_linearly_and_are_zero_unless_asked_for():
    def rates(**options):
        model = timm.create_model("attnet_t2", device="meta", **options)
        blocks = [module for module in model.modules() if isinstance(module, AttNetBlock)]
        return [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0 for block in blocks]

    assert rates() == [0.0] * 25
    assert rates(drop_path_rate=0.2) == pytest.approx([0.2 * index / 24 for index in range(25)])


def test_drop_path_drops_both_branches_of_a_block_in_training():
    model = tiny(drop_path_rate=0.5)
    block = model.stages[-1].blocks[-1].train()
    block.drop_path.drop_prob = 1.0 - 1e-12
    x = images(3, 2, channels=32)
    assert torch.equal(block(x), x)
    assert not torch.allclose(block.eval()(x), x)


def saved(folder, state: dict) -> str:
    save_file(state, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def test_public_weights_load_through_timm(tmp_path):
    info, state, tensors = golden("attnet_t")
    file = saved(tmp_path, state)
    options = golden_options(info)
    overlay = {"file": file, "num_classes": info["num_classes"]}

    def load(**others):
        return timm.create_model("attnet_t2", True, pretrained_cfg_overlay=overlay, **options, **others).eval()

    model = load()
    assert_golden(model(tensors["x"]), tensors["out"])

    other_classes = load(num_classes=3)
    assert other_classes(tensors["x"]).shape == (2, 3)
    assert_golden(pre_logits(other_classes, tensors["x"]), tensors["features"])

    grey = tensors["x"][:, :1]
    torch.testing.assert_close(load(in_chans=1)(grey), model(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)

    config = {
        "architecture": "attnet_t2",
        "model_args": options,
        "pretrained_cfg": {"num_classes": info["num_classes"], "input_size": [3, 96, 96]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_golden(timm.create_model(f"local-dir:{tmp_path}", True).eval()(tensors["x"]), tensors["out"])


def test_own_weights_and_those_of_a_training_run_pass_the_filter_as_they_are():
    state = tiny().state_dict()
    assert checkpoint_filter_fn(state) is state
    assert checkpoint_filter_fn({"state_dict_ema": state, "state_dict": {}}) is state
    _, public, _ = golden("attnet_s")
    assert checkpoint_filter_fn({"model": public}).keys() == checkpoint_filter_fn(public).keys()


MISFITS = {
    "one missing": lambda state: state.pop("stages.2.1.token_mixer.difference_control"),
    "one too many": lambda state: state.update({"stages.2.1.token_mixer.other": torch.zeros(1)}),
    "one of another shape": lambda state: state.update({"stages.0.0.token_mixer.kernel_gen.bias": torch.zeros(25)}),
    "a name of no rule": lambda state: state.update({"tail.weight": state.pop("norm.weight")}),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_are_refused(tmp_path, misfit):
    info, state, _ = golden("attnet_t")
    MISFITS[misfit](state)
    overlay = {"file": saved(tmp_path, state), "num_classes": info["num_classes"]}
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key|size mismatch"):
        timm.create_model("attnet_t2", True, pretrained_cfg_overlay=overlay, **golden_options(info))


def test_autocast_computes_in_bf16_and_keeps_gradients_in_fp32():
    model, x = tiny(), images(64, 48)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")  # a norm that cannot be fused warns
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert ((y - expected).norm() / expected.norm()).item() < 3e-2
    y.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model_is_one_graph_and_equal_to_the_eager_one(training):
    torch._dynamo.reset()
    options = {"depths": (1, 1), "dims": (8, 16), "mlp_ratios": (4, 4)}  # every kind of layer, and quick to compile
    model, x = draw(AttNet(num_classes=5, pos_embed=True, **options)).train(training), images(24, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def results(form):
        model.zero_grad()
        with torch.set_grad_enabled(training):
            y = form(x)
        if training:
            y.square().mean().backward()
        return y.detach(), [parameter.grad for parameter in model.parameters()]

    (y, gradients), (expected, expected_gradients) = results(compiled), results(model)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    if training:
        largest = max(gradient.abs().max().item() for gradient in expected_gradients)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("strides", "size", "expected"),
    [
        ((2, 2), (96, 64), [(24, 16), (12, 8), (6, 4), (3, 2)]),
        ((2, 1), (33, 50), [(17, 25), (9, 13), (5, 7), (3, 4)]),
        ((1, 1), (8, 5), [(8, 5), (4, 3), (2, 2), (1, 1)]),
        ((2, 2), (1, 1), [(1, 1)] * 4),
    ],
)
def test_stem_strides_set_the_size_of_the_maps(strides, size, expected):
    model = tiny(stem_strides=strides)
    maps = model.forward_intermediates(images(*size), intermediates_only=True)
    assert [tuple(one.shape[2:]) for one in maps] == expected
    reductions = [strides[0] * strides[1] * 2**stage for stage in range(4)]
    assert [info["reduction"] for info in model.feature_info] == reductions
    assert all(one.isfinite().all() for one in maps)


def test_position_embedding_is_added_after_the_stem_if_asked_for():
    plain, with_positions, entering = tiny(), tiny(pos_embed=True), []
    assert plain.state_dict().keys() == with_positions.state_dict().keys()
    for model in (plain, with_positions):
        model.stages[0].register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0]))
        model(images(20, 12))
    added = entering[1] - entering[0]
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(3.0), indexing="ij")
    for channel, angle in enumerate((columns, columns / 100)):  # two frequencies of 8 channels: 1 and 1 / 100
        torch.testing.assert_close(added[0, channel], angle.sin(), rtol=0, atol=1e-5)
        torch.testing.assert_close(added[1, 2 + channel], angle.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(added[0, 4], rows.sin(), rtol=0, atol=1e-5)
    torch.testing.assert_close(added[0, 6], rows.cos(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dims": (8, 16)}, r"dims=\[8, 16\].*2 entries"),
        ({"mlp_ratios": (8, 8, 4, 4, 4)}, r"mlp_ratios=.*5 entries"),
        ({"depths": (1, 1, 0, 1)}, r"depths=\[1, 1, 0, 1\]"),
        ({"dims": (8, 16, -24, 32)}, r"dims=\[8, 16, -24, 32\]"),
        ({"depths": (), "dims": (), "mlp_ratios": ()}, r"depths=\[\]"),
        ({"stem_strides": (2, 2, 2)}, r"stem_strides=\[2, 2, 2\]"),
        ({"stem_strides": (2, 0)}, r"stem_strides=\[2, 0\]"),
        ({"pos_embed": True, "dims": (10, 16, 24, 32)}, r"dims\[0\]=10.*multiple of 4"),
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"pool": "max"}, "pool='max'"),
        ({"routing": "dynamic"}, "routing='dynamic'"),
        ({"inhibition": "half"}, "inhibition='half'"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, says):
    with pytest.raises(InputError, match=f"^{says}") as error:
        AttNet(device="meta", **{**TINY, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{"routing": "static"}, {"inhibition": "none"}, {"pool": "grid"}, {"kernel_size": 5}], ids=str
)
def test_options_of_the_operator_reach_every_block(options):
    (name, value), layers = *options.items(), [m for m in tiny(**options).modules() if isinstance(m, ATConv2d)]
    assert [getattr(layer, name) for layer in layers] == [value] * sum(TINY["depths"])
