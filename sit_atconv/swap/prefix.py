"""ViTs of timm: class and register tokens attend to all tokens as before, patches get ATConv."""

import copy

import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchDropout
from torch import nn

from sit_atconv.ops.atconv import on_grid
from sit_atconv.ops.forward_mode import exact_derivatives
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.grafts import Graft, class_refusal, linear_refusal, qkv_observed, take_over, value_of
from sit_atconv.swap.grid import GridReference, argument
from sit_atconv.swap.layers import LayerOptions, SwappedLayer, refuse


class PrefixATConv(SwappedLayer):
    """proj([softmax(q_P k) v, K2 * v_I]) for x (B, P + N, dim): P prefix tokens, N patches -> (B, P + N, out_dim).

    q_P = q_norm(q_proj(x_P)), k = k_norm(k_proj(x)), v = v_proj(x); K2 as `KernelGenerator` makes it from the patches,
    convolved on the grid that `reference` tells. Without prefix tokens there are no q and k.
    Raises InputError for a mask, which ATConv has no use for.
    """

    def __init__(self, attention: Attention, reference: GridReference, options: LayerOptions):
        out, biased = attention.proj, attention.qkv.bias is not None
        super().__init__(attention.qkv.in_features, out.in_features, reference, options)
        self.heads, self.prefix = attention.num_heads, options.prefix_tokens
        for name in ("q_proj", "k_proj", "v_proj") if self.prefix else ("v_proj",):
            setattr(self, name, nn.Linear(attention.qkv.in_features, out.in_features, bias=biased))
        self.proj = nn.Linear(out.in_features, out.out_features, bias=biased or out.bias is not None)
        self.to(out.weight.device, out.weight.dtype)
        if self.prefix:
            self.q_norm, self.k_norm = (
                copy.deepcopy(norm).requires_grad_() for norm in (attention.q_norm, attention.k_norm)
            )
        self.attn_drop, self.proj_drop = nn.Dropout(attention.attn_drop.p), nn.Dropout(attention.proj_drop.p)
        self.reset_parameters()

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        refuse(attn_mask=attn_mask, is_causal=is_causal)
        grid = self.reference.get()
        patches = on_grid(x[:, self.prefix :], grid)
        kernels = self.kernels(patches)
        v = self.v_proj(x)
        mixed = self.convolve(patches, on_grid(v[:, self.prefix :], grid), kernels).flatten(1, -2)
        if self.prefix:
            mixed = torch.cat([self._attend(x, v), mixed], 1)
        return self.proj_drop(self.proj(mixed))

    def _attend(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What the prefix tokens read from all tokens: (B, P, channels)."""
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q_proj(x[:, : self.prefix]), self.k_proj(x), v)
        )
        dropout = self.attn_drop.p if self.training else 0.0
        with exact_derivatives():
            read = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=dropout)
        return read.transpose(1, 2).flatten(2)


class PrefixGraft(Graft):
    """timm's `Attention` in a `VisionTransformer`."""

    layer = PrefixATConv

    def refusal(self, attention: nn.Module) -> str | None:
        if reason := class_refusal(attention, Attention, "timm's "):
            return reason
        if attention.gate is not None:
            return "gates what it has mixed: ATConv does not stand for that"
        if not isinstance(attention.norm, nn.Identity):
            return "normalises what it has mixed (scale_norm): ATConv does not stand for that"
        return linear_refusal(attention, "qkv", "proj")

    def copy(self, attention: Attention, layer: PrefixATConv) -> None:
        take_over(value_of(attention.qkv), attention.proj, layer.v_proj, layer.proj)
        if not layer.prefix:
            return
        for name, part in zip(("weight", "bias"), (attention.qkv.weight, attention.qkv.bias), strict=True):
            for index, linear in enumerate((layer.q_proj, layer.k_proj)) if part is not None else ():
                getattr(linear, name).data.copy_(part.data.chunk(3)[index])
        layer.q_norm.load_state_dict(attention.q_norm.state_dict())
        layer.k_norm.load_state_dict(attention.k_norm.state_dict())

    def observe(self, attention, layer, args, kwargs):
        seen = qkv_observed(attention, argument("x", args, kwargs), args, kwargs)
        return tuple(each[:, layer.prefix :] for each in seen)

    def approximated(self, layer, output):
        return output[:, layer.prefix :]


def patch_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Of timm's patch embedding, called with images (B, C, H, W)."""
    return module.dynamic_feat_size(args[0].shape[-2:])


def check_vit(model: nn.Module, config: dict) -> None:
    """Raises InputError where patches are dropped, and for prefix tokens under prefix="error"."""
    if isinstance(model.patch_drop, PatchDropout):
        raise InputError(
            f"patch_drop_rate={model.patch_drop.prob}: a grid with patches missing is none; "
            "set model.patch_drop = torch.nn.Identity()"
        )
    if config["prefix"] == "error" and model.num_prefix_tokens:
        raise InputError(
            f"prefix='error': this {type(model).__name__} has {model.num_prefix_tokens} class or register tokens; give "
            "prefix='attend', which has them attend to all tokens as before"
        )
