"""Forward-mode derivatives of layers: every option of ATConv, and attention by whatever backend."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tangents import assert_reverse_over_forward, assert_tangent
from torch.func import jvp

from sit_atconv import ATConv
from sit_atconv.layers.attention import Attention
from sit_atconv.layers.blocks import SiTBlock

OPTIONS = {
    "as it is": {}, "5x5": {"kernel_size": 5}, "grid": {"pool": "grid"}, "static": {"routing": "static"},
    "full inhibition": {"inhibition": "full"}, "no inhibition": {"inhibition": "none"}, "no bias": {"bias": False},
    "silu": {"activation": "silu"}, "gelu": {"activation": "gelu"},
}  # fmt: skip


def drawn(layer, *shape):
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.double(), torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_atconv(options):
    layer, x, dx = drawn(ATConv(6, **options), 2, 4, 5, 6)

    def f(x):
        return layer(x) * x

    assert_tangent(f, (x,), (dx,))
    assert_reverse_over_forward(f, x, dx, list(layer.parameters()))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention(qk_norm):
    layer, x, dx = drawn(Attention(8, 2, qk_norm), 2, 6, 8)
    assert_tangent(layer, (x,), (dx,))
    assert_reverse_over_forward(layer, x, dx, list(layer.parameters()))


def test_attention_leaves_a_kernel_that_has_no_forward_mode(monkeypatch):
    layer, x, dx = drawn(Attention(8, 2), 2, 6, 8)
    expected = jvp(layer, (x,), (dx,))
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.FLASH)
    layer.processor._attention_backend = "flash"
    torch.testing.assert_close(jvp(layer, (x,), (dx,)), expected, rtol=0, atol=0)
    layer.processor._parallel_config = object()
    with pytest.raises(RuntimeError, match="context-parallel attention has no forward-mode"):
        jvp(layer, (x,), (dx,))


@pytest.mark.parametrize("mixer", ["attention", "atconv"])
def test_block(mixer):
    torch.manual_seed(0)
    block = SiTBlock(8, Attention(8, 2, qk_norm=True) if mixer == "attention" else ATConv(8))
    block, x, dx = drawn(block, 2, 3, 4, 8)
    c = torch.randn(2, 8, dtype=torch.float64)
    assert_tangent(lambda x, c: block(x, c), (x, c), (dx, c.flip(0)))
    assert_reverse_over_forward(lambda x: block(x, c), x, dx, list(block.parameters()))
