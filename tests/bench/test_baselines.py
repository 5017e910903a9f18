"""The baselines compute what they stand for: the paper's form the same function, the matrix products the same MACs."""

import pytest
import torch
from golden_vectors import assert_golden, golden

from sit_atconv import ATConv
from sit_atconv.bench.baselines import MatrixProducts, PaperForm, attention_twin, in_paper_form
from sit_atconv.bench.speed import random_model
from sit_atconv.models.cost import count_macs, without_weights
from sit_atconv.ops.atconv import on_grid, operator


def test_paper_form_is_the_published_layer():
    _, state, tensors = golden("op_sit")
    layer = ATConv(12)
    layer.load_state_dict(state)
    assert_golden(PaperForm(layer)(on_grid(tensors["x"], (16, 16))).flatten(1, 2), tensors["y"])


def test_paper_form_does_the_paper_s_work(monkeypatch):
    layer = ATConv(8)
    rows = []
    layer.kernel_proj.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[1:3].numel()))
    monkeypatch.setattr(operator, "dynamic_depthwise_conv", None)
    PaperForm(layer)(torch.randn(2, 4, 5, 8))
    assert rows == [20]


@pytest.mark.parametrize("options", [{"pool": "grid"}, {"routing": "static"}, {"inhibition": "none"}])
def test_paper_form_refuses_what_the_paper_does_not_have(options):
    with pytest.raises(ValueError, match="the paper's form has"):
        PaperForm(ATConv(8, **options))


@pytest.mark.parametrize("name", ["SiT-ATConv-S/8", "SiT-ATConv-S/8-Hybrid"])
def test_model_in_paper_form_shares_its_weights_and_its_function(name):
    model = random_model(name, 16)
    twin = in_paper_form(model)
    assert sum(isinstance(block.attn, PaperForm) for block in twin.blocks) == (6 if "Hybrid" in name else 12)
    ours, theirs = ({parameter.data_ptr() for parameter in one.parameters()} for one in (model, twin))
    assert ours == theirs
    inputs = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([3, 5])
    with torch.no_grad():
        torch.testing.assert_close(twin(*inputs).sample, model(*inputs).sample, rtol=1e-4, atol=1e-4)


def test_paper_form_costs_what_the_paper_s_does():
    model = in_paper_form(without_weights(random_model("SiT-ATConv-S/8", 16)))
    ours = count_macs(random_model("SiT-ATConv-S/8", 16))
    # kernel_proj on 4 tokens instead of 9 taps: on a grid this small the pool first costs more.
    assert count_macs(model) - ours == 12 * (4 - 9) * 384 * 384


def test_attention_twin_has_size_and_patch():
    assert attention_twin("SiT-ATConv-XL/2-Hybrid") == "SiT-XL/2"
    assert attention_twin("SiT-ATConv-B/4") == "SiT-B/4"
    assert attention_twin("SiT-S/8") == "SiT-S/8"


@pytest.mark.parametrize("name", ["SiT-S/8", "SiT-ATConv-S/8", "SiT-ATConv-S/8-Hybrid"])
def test_matrix_products_are_all_that_the_model_multiplies(name):
    model = random_model(name, 16)
    inputs = torch.randn(1, 4, 16, 16), torch.rand(1), torch.tensor([3])
    products = MatrixProducts(model, *inputs)
    convolutions = sum(4 * 384 * 9 for block in model.blocks if isinstance(block.attn, ATConv))
    assert products.macs == count_macs(model) - convolutions
    products()
    both = MatrixProducts(model, *inputs, backward=True)
    without_gradient = 4 * (4 * 8 * 8) * 384 + 256 * 384  # of the patches and of the frequencies of time
    assert both.macs == 3 * products.macs - without_gradient
    both()


def test_matrix_products_use_the_model_s_weights_and_leave_the_model_alone():
    model = random_model("SiT-ATConv-S/8", 16)
    inputs = torch.randn(1, 4, 16, 16), torch.rand(1), torch.tensor([3])
    with torch.no_grad():
        before = model(*inputs).sample
    products = MatrixProducts(model, *inputs)
    assert not any(module._forward_pre_hooks for module in model.modules())
    seen = set()
    with Recorder(seen):
        products()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    assert {linear.weight.data_ptr() for linear in linears} <= seen
    with torch.no_grad():
        assert torch.equal(model(*inputs).sample, before)


class Recorder(torch.overrides.TorchFunctionMode):
    """Collects the addresses of what is multiplied."""

    def __init__(self, seen: set):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.addmm, torch.mm):
            self.seen |= {argument.data_ptr() for argument in args}
        return function(*args, **(kwargs or {}))
