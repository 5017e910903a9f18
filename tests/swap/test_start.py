"""Warm starts: taps fitted to attention, in the form that ATConv can express, and what regression makes of them."""

import copy
import dataclasses

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from sit_atconv.layers.atconv import ATConv
from sit_atconv.ops.atconv.reference import dynamic_depthwise_conv, shifts
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import SwapAdapter, register_adapter, swap_attention
from sit_atconv.swap.adapters import _ADAPTERS
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.regression import regress
from sit_atconv.swap.start import TapFit, set_kernels

GRID, HEADS, CHANNELS = (12, 10), 4, 32
FREQUENCIES = torch.arange(1, 5) * 0.35


def drawn(generator, batch=2):
    """Inputs (B, H, W, C) of a layer."""
    return torch.randn(batch, *GRID, CHANNELS, generator=generator, dtype=torch.float64)


def add(fit, values, targets):
    """Both (B, H, W, C); a fit takes tokens, as attention does."""
    fit.add(values.flatten(1, 2), targets.flatten(1, 2), GRID)


def convolved(values, taps):
    """values (B, H, W, C) under the taps (heads, K) of their heads, by the oracle."""
    kernels = taps.repeat_interleave(CHANNELS // len(taps), 0).T.expand(len(values), -1, -1)
    return dynamic_depthwise_conv(values, kernels)


def test_sums_are_of_what_the_taps_of_a_depthwise_convolution_see():
    values, targets = drawn(torch.Generator().manual_seed(0)), drawn(torch.Generator().manual_seed(1))
    fit = TapFit(HEADS, 3)
    add(fit, values, targets)
    padded = torch.nn.functional.pad(values, (0, 0, 1, 1, 1, 1))
    taps = [padded[:, i : i + GRID[0], j : j + GRID[1]] for i in range(3) for j in range(3)]
    for head, part in enumerate(torch.arange(CHANNELS).chunk(HEADS)):
        seen = [tap[..., part] for tap in taps]
        gram = torch.stack([torch.stack([(a * b).sum() for b in seen]) for a in seen])
        torch.testing.assert_close(fit.gram[head], gram)
        torch.testing.assert_close(fit.cross[head], torch.stack([(a * targets[..., part]).sum() for a in seen]))


@pytest.mark.parametrize("detail", [1.0, 0.01])
def test_taps_that_are_there_are_found(detail):
    generator = torch.Generator().manual_seed(0)
    taps = torch.randn(HEADS, 9, generator=generator, dtype=torch.float64)
    fit = TapFit(HEADS, 3)
    for _ in range(2):
        values = drawn(generator)
        values = detail * values + (1 - detail) * values[:, :1, :1]  # nearly flat: all taps see nearly the same
        add(fit, values, convolved(values, taps))
    torch.testing.assert_close(fit.taps(), taps)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_taps_of_the_form_that_atconv_expresses_are_kept(heads):
    generator = torch.Generator().manual_seed(1)
    u, w, g = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (9, 9, heads))
    taps = g[:, None] * u + w
    fit = TapFit(heads, 3)
    values = drawn(generator)
    add(fit, values, convolved(values, taps))
    torch.testing.assert_close(fit.expressible(), taps)


def test_other_taps_are_met_better_than_by_mean_and_singular_vector():
    generator = torch.Generator().manual_seed(2)
    fit = TapFit(8, 3)
    scales = torch.logspace(-1, 1, 8, dtype=torch.float64).repeat_interleave(4)
    values = drawn(generator, 4) * scales
    row = values.flatten(1, 2)
    row[:, 1:] += 0.9 * row[:, :-1]  # correlated: the metric of the fit is not the plain one
    add(fit, values, drawn(generator, 4) + shifts(values, 3)[3])

    def loss(taps):
        return (torch.einsum("hk,hkl,hl->", taps, fit.gram, taps) - 2 * (taps * fit.cross).sum()).item()

    taps = fit.taps()
    mean = taps.mean(0)
    left, singular, right = torch.linalg.svd(taps - mean, full_matrices=False)
    plain = mean + left[:, :1] * singular[0] * right[:1]
    found = fit.expressible()
    assert loss(taps) < loss(found) < loss(plain)
    assert torch.linalg.matrix_rank(found - found[:1], rtol=1e-8) <= 1
    # A stationary point: the slope vanishes along w, along u, and along every head's g.
    slope = torch.einsum("hkl,hl->hk", fit.gram, found) - fit.cross
    u = torch.linalg.svd(found - found.mean(0)).Vh[0]
    g = (found - found.mean(0)) @ u
    for left in (slope.sum(0), (g / g.norm()) @ slope, slope @ u):
        assert left.norm() < 1e-3 * fit.cross.norm()


def test_heads_without_values_do_not_matter():
    generator = torch.Generator().manual_seed(8)
    u, w, g = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (9, 9, HEADS))
    taps = g[:, None] * u + w
    values = drawn(generator)
    values[..., : CHANNELS // HEADS] = 0
    targets = convolved(values, taps)
    fit = TapFit(HEADS, 3)
    add(fit, values, targets)
    found = fit.expressible()
    torch.testing.assert_close(found[1:], taps[1:])
    assert found.isfinite().all()
    fit = TapFit(HEADS, 3)
    add(fit, 0 * values, targets)
    assert torch.equal(fit.expressible(), torch.zeros_like(taps))
    layer = ATConv(CHANNELS).double()
    set_kernels(layer, fit.expressible())
    assert not layer.kernels(values).any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_row_of_weights_is_zero_and_no_sum_notices(dtype):
    """What quantises by the greatest of a row divides by it."""
    layer = ATConv(24, dtype=dtype)
    set_kernels(layer, torch.rand(3, 9))
    assert all(each.weight.any(1).all() for each in (layer.kernel_proj, layer.kernel_gen))
    x = torch.randn(2, 4, 5, 24, dtype=dtype)
    kernels = layer.kernels(x)
    layer.kernel_proj.weight.zero_()
    assert torch.equal(layer.kernels(x), kernels)


@pytest.mark.parametrize("size", [0.1, 30.0])
def test_heads_that_share_their_taps_can_learn_to_differ(size):
    generator = torch.Generator().manual_seed(9)
    layer, taps = ATConv(CHANNELS).double(), size * torch.randn(9, generator=generator, dtype=torch.float64)
    set_kernels(layer, taps.expand(HEADS, -1))
    kernels = layer.kernels(drawn(generator))
    torch.testing.assert_close(kernels, taps[:, None].expand(2, -1, CHANNELS))
    (kernels * torch.randn(kernels.shape, generator=generator, dtype=torch.float64)).sum().backward()
    assert layer.kernel_proj.weight.grad.norm() > size  # slopes of the order of the taps


@pytest.mark.parametrize("inhibition", [0.0, 1.5])
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "gelu"])
def test_the_layer_starts_with_the_taps_whatever_it_is_given(activation, inhibition):
    generator = torch.Generator().manual_seed(3)
    layer = ATConv(CHANNELS, activation=activation).double()
    nn.init.constant_(layer.difference_control, inhibition)
    u, w, g = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (9, 9, HEADS))
    taps = 40 * g[:, None] * u + w
    set_kernels(layer, taps)
    x = drawn(generator, 3)
    wanted = taps.repeat_interleave(CHANNELS // HEADS, 0).T.expand(3, -1, -1)
    torch.testing.assert_close(layer.kernels(x), wanted, rtol=1e-9, atol=1e-9)
    layer.kernels(x).square().sum().backward()  # from where it starts it can learn to look at its input
    assert layer.kernel_proj.weight.grad.abs().max() > 1e-3


class Grid(nn.Module):
    """One attention over the tokens of a feature map, as a model that knows its grid."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.attention(hidden_states.flatten(2).transpose(1, 2))


@pytest.fixture
def adapter():
    adapter = SwapAdapter(
        Grid, {"attention": SelfAttentionGraft()}, Grid, lambda module, args, kwargs: tuple(args[0].shape[-2:])
    )
    register_adapter(adapter)
    yield adapter
    _ADAPTERS.remove(adapter)


def positional(reach: list[float]) -> Grid:
    """Attention by position alone: head h looks about reach[h] cells far. Its inputs bring sines of their position."""
    generator = torch.Generator().manual_seed(4)
    places = 4 * len(FREQUENCIES)
    attention = Attention(CHANNELS + places, heads=HEADS, dim_head=places, bias=True, out_dim=HEADS * places)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        for head, cells in enumerate(reach):
            gain = torch.zeros(places, CHANNELS + places)
            # q.k / sqrt(d) = c sum_f cos(f dx) / f^2 + ... is -c |d|^2 / 2 * const nearby: a bump of that reach
            strength = (places**0.5 / (cells**2 * len(FREQUENCIES))) ** 0.5
            gain[:, CHANNELS:] = torch.diag(strength / FREQUENCIES.repeat_interleave(4))
            rows = slice(head * places, (head + 1) * places)
            attention.to_q.weight[rows], attention.to_k.weight[rows] = gain, gain
        attention.to_q.bias.zero_(), attention.to_k.bias.zero_()
    return Grid(attention).eval()


def inputs(number: int, seed: int, batch: int = 4, span: float = 0.2) -> list[tuple[torch.Tensor]]:
    """As adaLN makes them of a condition c in [-1, 1]: content is shifted, and position scaled by 1 + span c.

    A head of reach r then looks r / (1 + span c) cells far.
    """
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(CHANNELS, 1, 1, generator=torch.Generator().manual_seed(7)) / 2
    rows, columns = torch.meshgrid(*(torch.arange(side).float() for side in GRID), indexing="ij")
    angles = [f * axis for f in FREQUENCIES for axis in (rows, columns)]
    places = torch.stack([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)])
    found = []
    for _ in range(number):
        content = torch.randn(batch, CHANNELS, *GRID, generator=generator)
        condition = 2 * torch.rand(batch, 1, 1, 1, generator=generator) - 1
        found.append((torch.cat([content + condition * shift, (1 + span * condition) * places], 1),))
    return found


def held_out(model: Grid, teacher: Grid, span: float) -> float:
    with torch.no_grad():
        pairs = [(model(*each), teacher(*each)) for each in inputs(6, seed=99, span=span)]
    square = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    return square.sqrt().item()


class FreshAttention(SelfAttentionGraft):
    """The control: attention of the same sizes, which could do all that the teacher does, and has to learn it."""

    def build(self, attention, reference, options):
        fresh = copy.deepcopy(attention).train()
        for module in fresh.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        fresh.reference = reference
        return fresh


SMOOTH, LOCAL, MIXED = [4.0] * 4, [0.55] * 4, [0.4, 0.6, 1.0, 4.0]


@pytest.mark.parametrize(
    ("reach", "span"),
    [
        pytest.param(LOCAL, 0.2, id="local"),
        pytest.param(SMOOTH, 0.2, id="smooth", marks=pytest.mark.slow),
        pytest.param(MIXED, 0.2, id="mixed", marks=pytest.mark.slow),
        pytest.param(LOCAL, 0.5, id="local-wide", marks=pytest.mark.slow),
    ],
)
def test_the_closed_form_beats_box_kernels_and_regression_halves_its_error(adapter, reach, span):
    errors, teacher = {}, positional(reach)
    training = inputs(300, seed=1, span=span)
    for init in ("closed_form", "copy_vo", "random"):
        torch.manual_seed(5)
        model = positional(reach)
        swap = swap_attention(model, "all", init=init, calib=inputs(4, seed=0, span=span))
        errors[init] = held_out(model, teacher, span)
        if init == "closed_form":
            assert swap.report(measure=False).layers[0].error == pytest.approx(errors[init], rel=0.15)
            regress(swap, training, steps=len(training), lr=1e-2)
            errors["regressed"] = held_out(model, teacher, span)
    assert errors["closed_form"] < errors["copy_vo"] < errors["random"]
    assert errors["regressed"] < errors["closed_form"] / 2
    if reach == LOCAL and span == 0.2:  # kernels that are the same for every sample do not follow a wide span
        assert errors["closed_form"] < 0.2

    torch.manual_seed(6)
    control = positional(reach)
    registered = dataclasses.replace(adapter, sites={"attention": FreshAttention()})
    register_adapter(registered)
    try:
        regress(swap_attention(control, "all", init="random"), training, steps=len(training), lr=1e-2)
    finally:
        _ADAPTERS.remove(registered)
    errors["control"] = held_out(control, teacher, span)
    assert errors["control"] < errors["random"] / 2, "the recipe trains"
    # Nothing but the wide averages of the smooth case is out of reach for 3 x 3 cells.
    assert (errors["regressed"] < errors["control"]) == (reach != SMOOTH)


def test_regression_trains_the_layers_alone_and_leaves_the_model_as_it_was(adapter):
    model = nn.Sequential(nn.Conv2d(3, CHANNELS + 16, 1), positional(MIXED)).eval()
    whole = SwapAdapter(nn.Sequential, {"1.attention": SelfAttentionGraft()}, Grid, adapter.grid)
    register_adapter(whole)
    try:
        swap = swap_attention(model, "all", calib=[(torch.randn(2, 3, *GRID),)])
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        attention = {name: tensor.clone() for name, tensor in swap.attentions["1.attention"].state_dict().items()}
        history = regress(swap, [(torch.randn(2, 3, *GRID),)], steps=3)
        assert len(history) == 3
        after = model.state_dict()
        assert [name for name in before if not name.startswith("1.attention")] == ["0.weight", "0.bias"]
        assert all(torch.equal(after[name], before[name]) != name.startswith("1.attention") for name in before), (
            "every tensor of the layer and no other"
        )
        for name, tensor in swap.attentions["1.attention"].state_dict().items():
            assert torch.equal(tensor, attention[name])
        assert not model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        swap.revert()
        with pytest.raises(InputError, match="was reverted"):
            regress(swap, [(torch.randn(2, 3, *GRID),)])
    finally:
        _ADAPTERS.remove(whole)
