"""Swaps of attention over volumes: the grid that layers are told, taps fitted in one pass and in two, warm starts."""

import pytest
import torch
from conftest import slowly
from diffusers.models.attention_processor import Attention
from torch import nn

from sit_atconv.layers.atconv import ATConv
from sit_atconv.ops.atconv.reference import dynamic_depthwise_conv
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import SwapAdapter, register_adapter, swap_attention
from sit_atconv.swap.adapters import _ADAPTERS
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.regression import regress
from sit_atconv.swap.start import TapFit, start_as_box, start_as_fitted

GRID, HEADS, CHANNELS = (5, 6, 4), 4, 16
SIZES = {"full": (3, 3, 3), "factored": (1, 3, 3)}
FREQUENCIES = torch.arange(1, 4) * 0.5
PLACES = 6 * len(FREQUENCIES)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolved(values, taps):
    kernels = taps.repeat_interleave(CHANNELS // len(taps), 0).T.expand(len(values), -1, -1)
    return dynamic_depthwise_conv(values, kernels)


def fitted(values, targets) -> TapFit:
    fit = TapFit(HEADS, 3, dims=3)
    fit.add(values.flatten(1, 3), targets.flatten(1, 3), GRID)
    return fit


def forms(taps: int, seed: int):
    """Taps (heads, K) of the form that ATConv expresses."""
    return drawn(seed, HEADS, 1) * drawn(seed + 1, taps) + drawn(seed + 2, taps)


def product(space, time):
    return (time[:, :, None] * space[:, None]).flatten(1)


@pytest.mark.parametrize("bytes_", [1, 2**31])
def test_taps_of_a_volume_are_found_however_many_heads_go_together(monkeypatch, bytes_):
    monkeypatch.setattr("sit_atconv.swap.start.SEEN_BYTES", bytes_)
    values, taps = drawn(0, 2, *GRID, CHANNELS), drawn(1, HEADS, 27)
    torch.testing.assert_close(fitted(values, convolved(values, taps)).taps(), taps)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_two_passes_meet_noisy_products_of_two_at_least_as_well_as_those(noise):
    values, space, time = drawn(10, 2, *GRID, CHANNELS), forms(9, 11), forms(3, 14)
    targets = convolved(values, product(space, time))
    fit = fitted(values, targets + noise * targets.std() * drawn(5, *targets.shape))
    found = fit.factors()
    best, ours, true = (fit.loss(taps) for taps in (fit.taps(), product(*found), product(space, time)))
    slack = 1e-5 * abs(true)
    assert best - slack <= ours <= true + slack
    for taps in found:  # one line through all heads' taps
        assert torch.linalg.matrix_rank(taps - taps[:1], rtol=1e-6) <= 1
    torch.testing.assert_close(*(each.square().mean().sqrt() for each in found))


@pytest.mark.parametrize("volume", SIZES)
def test_a_layer_starts_with_its_taps_whatever_it_is_given(volume):
    values, x = drawn(0, 2, *GRID, CHANNELS), drawn(1, 2, *GRID, CHANNELS)
    fit = fitted(values, convolved(values, product(forms(9, 1), forms(3, 4))))
    layer = ATConv(CHANNELS, volume=volume).double()
    start_as_fitted(layer, fit)
    taps = fit.expressible() if volume == "full" else product(*fit.factors())
    torch.testing.assert_close(layer.convolve(x, values), convolved(values, taps), rtol=1e-6, atol=1e-6)
    layer.convolve(x, values).square().sum().backward()  # each pass can learn to look at its input
    parts = [layer] if volume == "full" else [layer, layer.time]
    assert all(part.kernel_proj.weight.grad.abs().max() > 1e-3 for part in parts)
    start_as_box(layer)
    torch.testing.assert_close(layer.convolve(x, values), convolved(values, torch.full_like(taps, 1 / 27)))


def test_heads_without_values_do_not_matter():
    layer = ATConv(CHANNELS, volume="factored").double()
    start_as_fitted(layer, fitted(0 * drawn(0, 2, *GRID, CHANNELS), drawn(1, 2, *GRID, CHANNELS)))
    assert not layer.convolve(drawn(2, 1, *GRID, CHANNELS), drawn(3, 1, *GRID, CHANNELS)).any()


# ---- a model of volumes


class Volume(nn.Module):
    """One attention over the tokens of a volume (B, C, T, H, W), as a model that knows its grid."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.attention(hidden_states.flatten(2).transpose(1, 2))


@pytest.fixture
def adapter():
    adapter = SwapAdapter(
        Volume,
        {"attention": SelfAttentionGraft()},
        Volume,
        lambda module, args, kwargs: tuple(args[0].shape[-3:]),
        sides=3,
    )
    register_adapter(adapter)
    yield adapter
    _ADAPTERS.remove(adapter)


def positional(reach: tuple[float, float]) -> Volume:
    """Attention by position alone, as far as reach[0] in time and reach[1] in space; of half of the heads twice that.

    Its inputs bring sines of their position.
    """
    generator = torch.Generator().manual_seed(4)
    attention = Attention(CHANNELS + PLACES, heads=HEADS, dim_head=PLACES, bias=True, out_dim=HEADS * PLACES)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        for head in range(HEADS):
            cells = torch.tensor([reach[0], reach[1], reach[1]]) * (1 + head % 2)
            strength = (PLACES**0.5 / (cells.repeat_interleave(2) ** 2 * len(FREQUENCIES))).sqrt()
            gain = torch.zeros(PLACES, CHANNELS + PLACES)
            gain[:, CHANNELS:] = torch.diag((strength / FREQUENCIES[:, None]).flatten())
            rows = slice(head * PLACES, (head + 1) * PLACES)
            attention.to_q.weight[rows], attention.to_k.weight[rows] = gain, gain
        attention.to_q.bias.zero_(), attention.to_k.bias.zero_()
    return Volume(attention).eval()


def inputs(number: int, seed: int, grid=GRID) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.arange(side).float() for side in grid), indexing="ij")
    places = torch.stack([wave(f * axis) for f in FREQUENCIES for axis in axes for wave in (torch.sin, torch.cos)])
    content = torch.randn(number, 3, CHANNELS, *grid, generator=generator)
    condition = 2 * torch.rand(number, 3, 1, 1, 1, 1, generator=generator) - 1  # shifts content, widens the reach
    content = content + condition * torch.randn(CHANNELS, 1, 1, 1, generator=torch.Generator().manual_seed(7)) / 2
    return [(each,) for each in torch.cat([content, (1 + 0.2 * condition) * places.expand(number, 3, -1, *grid)], 2)]


def held_out(model: Volume, teacher: Volume) -> float:
    with torch.no_grad():
        pairs = [(model(*each), teacher(*each)) for each in inputs(6, seed=99)]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


LOCAL, IN_SPACE, IN_TIME, SMOOTH = (0.4, 0.4), (4.0, 0.4), (0.4, 4.0), (4.0, 4.0)


@pytest.mark.parametrize(
    ("volume", "reach"),
    [
        ("factored", LOCAL), *slowly([("full", LOCAL)]),
        *slowly([(volume, reach) for volume in SIZES for reach in (IN_SPACE, IN_TIME, SMOOTH)]),
    ],
    ids=str,
)  # fmt: skip
def test_the_closed_form_beats_box_kernels_and_regression_beats_both(adapter, volume, reach):
    errors, teacher = {}, positional(reach)
    for init in ("closed_form", "copy_vo", "random"):
        torch.manual_seed(5)
        model = positional(reach)
        swap = swap_attention(model, "all", init=init, calib=inputs(4, seed=0), volume=volume)
        assert swap.layers["attention"].sizes == SIZES[volume]
        errors[init] = held_out(model, teacher)
        if init == "closed_form":
            regress(swap, inputs(300, seed=1), steps=300, lr=1e-2)
            errors["regressed"] = held_out(model, teacher)
    print(volume, reach, errors)
    assert errors["closed_form"] < errors["copy_vo"] < errors["random"]
    assert errors["regressed"] < 0.7 * errors["closed_form"]


@pytest.mark.parametrize("volume", SIZES)
def test_a_swapped_model_takes_other_volumes_and_goes_back(adapter, volume):
    model, other = positional(LOCAL), (inputs(1, 2, (3, 2, 7))[0], inputs(1, 3, (7, 3, 2))[0])
    before = [model(*each) for each in other]
    swap = swap_attention(model, "all", calib=inputs(1, 0), volume=volume)
    layer = swap.layers["attention"]
    row = swap.report(measure=True).layers[0]
    for each, grid in zip(other, ((3, 2, 7), (7, 3, 2)), strict=True):
        tokens = each[0].flatten(2).transpose(1, 2)
        x = tokens.unflatten(1, grid)
        mixed = layer.convolve(x, layer.to_v(x)).flatten(1, 3)
        torch.testing.assert_close(model(*each), layer.to_out[0](mixed))
    assert row.macs_after < row.macs_before
    assert swap.config["volume"] == volume
    with pytest.raises(InputError, match="after grids of as many tokens"):
        layer(tokens)
    layer.reference.set((7, 3, 2), "cpu")
    torch.testing.assert_close(layer(tokens), model(*other[1]))
    swap.revert()
    torch.testing.assert_close([model(*each) for each in other], before, rtol=0, atol=0)


def test_wrong_options_are_refused_and_leave_the_model_alone(adapter):
    model = positional(LOCAL)
    for options, says in [({"volume": "ful"}, "did you mean 'full'"), ({"kernel_size": 4}, "kernel_size=")]:
        with pytest.raises(InputError, match=says):
            swap_attention(model, "all", init="random", **options)
    images = SwapAdapter(Volume, adapter.sites, Volume, lambda module, args, kwargs: tuple(args[0].shape[-2:]))
    register_adapter(images)
    try:
        with pytest.raises(InputError, match=r"volume='full': the tokens of Volume lie on a grid of rows"):
            swap_attention(model, "all", init="random", volume="full")
    finally:
        _ADAPTERS.remove(images)
    assert isinstance(model.attention, Attention)
