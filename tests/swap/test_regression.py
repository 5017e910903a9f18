"""Blockwise regression: its loss against the calibration's, its schedule, half precision, and how it ends badly."""

import itertools
import math

import pytest
import timm
import torch

from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import regress, swap_attention


def squared_errors(swap) -> float:
    return sum(site.error**2 for site in swap.sites) / len(swap.sites)


def test_its_first_loss_is_the_mean_squared_error_of_calibration(tiny):
    swap = swap_attention(tiny.model("dit"), "all", init="copy_vo", calib=[tiny.inputs("dit")])
    assert regress(swap, [tiny.inputs("dit")], steps=1) == [pytest.approx(squared_errors(swap), rel=1e-5)]


def test_its_loss_is_of_the_tokens_that_are_approximated():
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "reg_tokens": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **shape).eval()
    inputs = [(torch.randn(2, 3, 16, 16),)]
    swap = swap_attention(model, "all", init="copy_vo", calib=inputs)
    assert regress(swap, inputs, steps=1) == [pytest.approx(squared_errors(swap), rel=1e-5)]


def test_its_losses_are_on_the_grids_of_the_inputs(tiny):
    """Of as many tokens and other sides: the number tells nothing."""
    inputs = [tiny.inputs("pixart", size) for size in ((4, 12), (12, 4))]
    wanted = [swap_attention(tiny.model("pixart"), "all", init="copy_vo", calib=[each]) for each in inputs]
    swap = swap_attention(tiny.model("pixart"), "all", init="copy_vo")
    found = regress(swap, inputs, steps=2, lr=1e-12)
    assert found == [pytest.approx(squared_errors(each), rel=1e-5) for each in wanted]


def test_its_learning_rate_falls_by_a_cosine(tiny, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def recording(self, *args, **kwargs):
        rates.extend(group["lr"] for group in self.param_groups)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    regress(swap_attention(tiny.model("dit"), "all", init="copy_vo"), [tiny.inputs("dit")], steps=4, lr=0.1)
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * index / 4)) for index in range(4)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_in_half_precision_are_trained_in_fp32(tiny, dtype):
    inputs, histories = tiny.inputs("dit"), {}
    half = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    for kind, given in ((dtype, half), (torch.float32, inputs)):
        model = tiny.model("dit").to(dtype).to(kind)
        swap = swap_attention(model, "all", init="copy_vo", calib=[given])
        histories[kind] = torch.tensor(regress(swap, [given], steps=30, lr=1e-2))
        assert {parameter.dtype for parameter in model.parameters()} == {kind}
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(histories[dtype], histories[torch.float32], rtol=0.05, atol=0)
    assert histories[dtype][-1] < 0.7 * histories[dtype][0]


def test_it_takes_no_more_inputs_than_steps(tiny):
    taken = []

    def endless():
        for seed in itertools.count():
            taken.append(seed)
            yield tiny.inputs("dit", seed=seed)

    swap = swap_attention(tiny.model("dit"), "all", init="copy_vo")
    assert len(regress(swap, endless(), steps=3)) == len(taken) == 3


def test_an_error_that_is_not_finite_leaves_the_weights_of_the_step_before(tiny):
    model, good = tiny.model("dit").half(), tiny.inputs("dit", dtype=torch.float16)
    swap = swap_attention(model, "all", init="copy_vo", calib=[good])
    bad = {**good, "hidden_states": good["hidden_states"] * float("nan")}
    with pytest.raises(InputError, match="the error is nan in step 3 of the regression"):
        regress(swap, [good, good, bad], steps=3, lr=1e-2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    swap.revert()
    plain = tiny.model("dit").half().state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["dit", "pixart", "unet"])
def test_errors_on_other_inputs_are_those_of_a_swap_that_was_measured_on_them(tiny, kind):
    first, other = tiny.inputs(kind), tiny.inputs(kind, (12, 4) if kind == "pixart" else (8, 8), seed=1)
    measured = {
        name: {row.name: row.error for row in swap.report(measure=False).layers}
        for name, swap in (
            (name, swap_attention(tiny.model(kind), "all", init="copy_vo", calib=[each]))
            for name, each in (("first", first), ("other", other))
        )
    }
    model = tiny.model(kind)
    with pytest.raises(InputError, match="dry run; swap first"):
        swap_attention(model, "all", calib=[first], dry_run=True).errors([other])
    swap = swap_attention(model, "all", init="copy_vo", calib=[first])
    before = tiny.snapshot(model)
    assert swap.errors([first]) == measured["first"]
    assert swap.errors([other]) == measured["other"]
    tiny.assert_as(before, model)
    assert {row.name: row.error for row in swap.report(measure=False).layers} == measured["first"]
    swap.revert()
    with pytest.raises(InputError, match="was reverted"):
        swap.errors([other])


def test_errors_are_of_the_layers_as_they_are_now(tiny):
    inputs = [tiny.inputs("dit")]
    swap = swap_attention(tiny.model("dit"), "all", init="copy_vo", calib=inputs)
    before = swap.errors(inputs)
    last = regress(swap, inputs, steps=30, lr=1e-2)[-1]
    after = swap.errors(inputs)
    assert all(after[name] < before[name] for name in before)
    assert sum(error**2 for error in after.values()) / len(after) == pytest.approx(last, rel=1e-2)


def test_errors_need_inputs_of_the_model_and_leave_it_as_it_was(tiny):
    model = tiny.model("dit")
    swap = swap_attention(model, "all", init="copy_vo", calib=[tiny.inputs("dit")])
    before, right = tiny.snapshot(model), tiny.inputs("dit")
    for wrong, says in (
        ([], "is empty"), ([{"hidden": torch.zeros(1)}], "does not fit ATConvDiT"), (3, "give a list"),
        ([{**right, "hidden_states": right["hidden_states"][:, :3]}, right], "does not take inputs of these shapes"),
    ):  # fmt: skip
        for call in (swap.errors, lambda inputs: regress(swap, inputs, steps=2)):
            with pytest.raises(InputError, match=f"inputs.*{says}"):
                call(wrong)
    tiny.assert_as(before, model)
    assert all(model.get_submodule(name) is layer for name, layer in swap.layers.items())


def test_shapes_are_told_in_half_precision_and_of_other_libraries_too(tiny):
    model = tiny.model("dit").bfloat16()
    inputs = {**tiny.inputs("dit"), "timestep": torch.tensor([1.0, 2.0])}  # which the model casts
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    swap = swap_attention(model, "all", init="copy_vo", calib=[inputs])
    with pytest.raises(InputError, match=r"inputs: .* does not take inputs of these shapes"):
        swap.errors([{**inputs, "hidden_states": inputs["hidden_states"][:, :3]}])
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    swap = swap_attention(vit, "all", init="copy_vo")
    for shape in ((1, 3, 48, 32), (1, 4, 32, 32)):
        with pytest.raises(InputError, match="inputs: VisionTransformer does not take inputs of these shapes"):
            swap.errors([(torch.zeros(shape),)])
