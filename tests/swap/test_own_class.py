"""A class of one's own is known in a few lines: attention over the image alone, over two streams, and over one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv.ops.atconv import on_grid
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import (
    JointGraft,
    SelfAttentionGraft,
    Sequence,
    SingleStreamGraft,
    Streams,
    SwapAdapter,
    load_delta,
    register_adapter,
    save_delta,
    swap_attention,
)

DIM, HEADS, GRID, TEXT = 16, 2, (3, 5), 4


def attend(q, k, v):
    q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def linears(module, *names):
    for name in names:
        setattr(module, name, nn.Linear(DIM, DIM))


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        linears(self, "query", "key", "value", "out")
        self.num_heads = HEADS

    def forward(self, scale, image):
        return self.out(attend(scale * self.query(image), self.key(image), self.value(image)))


class Joint(nn.Module):
    def __init__(self):
        super().__init__()
        linears(self, "q", "k", "v", "tq", "tk", "tv", "o", "t_out")
        self.num_heads = HEADS

    def forward(self, text, image):
        q, k, v = (torch.cat([getattr(self, f"t{n}")(text), getattr(self, n)(image)], 1) for n in "qkv")
        mixed = attend(q, k, v)
        return self.t_out(mixed[:, : text.shape[1]]), self.o(mixed[:, text.shape[1] :])


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        linears(self, "q", "k", "v", "o")
        self.num_heads, self.q_scale = HEADS, nn.RMSNorm(DIM // HEADS)

    def forward(self, tokens):
        q = self.q_scale(self.q(tokens).unflatten(-1, (HEADS, -1))).flatten(2)
        return self.o(attend(q, self.k(tokens), self.v(tokens)))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.alone, self.joint, self.single = Alone(), Joint(), Single()

    def forward(self, image, text):
        tokens = image.flatten(2).mT
        tokens = tokens + self.alone(2.0, image=tokens)
        text, tokens = (a + b for a, b in zip((text, tokens), self.joint(text, tokens), strict=True))
        sequence = torch.cat([tokens, text], 1)
        return sequence + self.single(sequence)


class AloneGraft(SelfAttentionGraft):
    cls, value, out = Alone, "value", "out"

    def tokens(self, scale, image):
        return image


class TwoStreamGraft(JointGraft):
    cls, norms, out, text_out = Joint, (), "o", "t_out"
    image, text = ("q", "k", "v"), ("tq", "tk", "tv")

    def inputs(self, text, image):
        return Streams(image, text)

    def output(self, *args):
        return super().output(*args)[::-1]

    def approximated(self, layer, output, args, kwargs):
        return output[1]


class OneStreamGraft(SingleStreamGraft):
    cls, image, norms, out, image_first = Single, ("q", "k", "v"), ("q_scale", None), "o", True

    def inputs(self, tokens):
        return Sequence(tokens)


register_adapter(
    SwapAdapter(
        Tiny,
        {"alone": AloneGraft(), "joint": TwoStreamGraft(), "single": OneStreamGraft()},
        Tiny,
        lambda module, args, kwargs: tuple(args[0].shape[2:]),
    )
)


def call(grid=GRID, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, DIM, *grid, generator=generator), torch.randn(2, TEXT, DIM, generator=generator)


@torch.no_grad()
def test_swapped_stored_loaded_and_reverted(tmp_path):
    torch.manual_seed(0)
    model = Tiny()
    original, before = copy.deepcopy(model), model(*call())
    swap = swap_attention(model, "all", joint="split", calib=[call(), call((4, 2), 1)])
    assert list(swap.layers) == ["alone", "joint", "single"]
    assert all(0 < row.error < 1 for row in swap.report().layers)
    for layer in swap.layers.values():
        layer.kernel_proj.weight.add_(0.3 * torch.randn_like(layer.kernel_proj.weight))
    after, other = model(*call()), model(*call((2, 6)))
    assert not torch.allclose(after, before, atol=1e-3)
    save_delta(model, tmp_path / "delta.safetensors")
    loaded = load_delta(original, tmp_path / "delta.safetensors")
    assert torch.equal(original(*call()), after)
    assert torch.equal(original(*call((2, 6))), other)
    for each in (swap, loaded):
        each.revert()
        assert torch.equal(each.model(*call()), before)


@torch.no_grad()
def test_the_layers_give_what_their_formula_says():
    """With the share at 1 the image reads the text alone; at 0 it is convolved. The text is as it was."""
    torch.manual_seed(0)
    model = Tiny().double()
    image, text = (each.double() for each in call())
    original = copy.deepcopy(model)
    swap = swap_attention(model, "all", joint="split", calib=[(image, text)])
    model(image, text)
    tokens = image.flatten(2).mT
    for name in ("joint", "single"):
        layer, attention = swap.layers[name], original.get_submodule(name)
        for share in (-50.0, 50.0):
            layer.text_share.fill_(share)
            values = (attention.v(tokens)).mT.unflatten(2, GRID)
            kernels = layer.kernels(on_grid(tokens, GRID)).mT.reshape(-1, 1, 3, 3)
            wanted = F.conv2d(values.flatten(0, 1)[None], kernels, padding=1, groups=len(kernels))
            wanted = wanted.view(2, DIM, -1).mT
            if name == "joint":
                ours_text, ours = layer(text, tokens)
                theirs = attention(text, tokens)[0]
                read = attend(attention.q(tokens), attention.tk(text), attention.tv(text))
            else:
                ours, ours_text = layer(torch.cat([tokens, text], 1)).split([15, TEXT], 1)
                theirs = attention(torch.cat([tokens, text], 1))[:, 15:]
                q = attention.q_scale(attention.q(tokens).unflatten(-1, (HEADS, -1))).flatten(2)
                read = attend(q, attention.k(text), attention.v(text))
            torch.testing.assert_close(ours, attention.o(read if share > 0 else wanted))
            torch.testing.assert_close(ours_text, theirs)
    layer, attention = swap.layers["alone"], original.alone
    values = layer.to_v(tokens).mT.unflatten(2, GRID)
    kernels = layer.kernels(on_grid(tokens, GRID)).mT.reshape(-1, 1, 3, 3)
    wanted = F.conv2d(values.flatten(0, 1)[None], kernels, padding=1, groups=len(kernels)).view(2, DIM, -1).mT
    torch.testing.assert_close(layer(2.0, image=tokens), layer.to_out[0](wanted))


def test_parts_that_are_not_there_are_told():
    class Other(TwoStreamGraft):
        text = ("tq", "tk", "nothing")

    assert Other().refusal(Joint()) == "has no nothing: it is no joint attention of the kind that this graft splits"
    assert "test_own_class.Single, not Joint" in Other().refusal(Single())
    model = Tiny()
    model.single.o = nn.Sequential(nn.Linear(DIM, DIM))
    with pytest.raises(InputError, match=r"single has o of type torch\.nn\.modules\.container\.Sequential"):
        swap_attention(model, "all", joint="split", init="copy_vo", calib=[call()])
