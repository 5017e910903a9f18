"""ViTs: class and register tokens attend to all tokens as before, patches get ATConv."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn

from sit_atconv.ops.atconv import on_grid
from sit_atconv.ops.forward_mode import exact_derivatives
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.adapters import Grid, SwapAdapter, register_adapter
from sit_atconv.swap.grafts import Graft, class_refusal, linear_refusal, observed, part_of, take_over
from sit_atconv.swap.grid import GridReference, argument
from sit_atconv.swap.layers import LayerOptions, SwappedLayer, refuse


@dataclass
class Maps:
    """The parts of an attention over prefix tokens and patches, however its class holds them.

    query, key, value, out: linears that share the attention's weights. heads: equal ones of all of them. q_norm,
    k_norm: of the queries and keys of a head. dropout, out_dropout: of the softmax, and of the output.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    heads: int
    q_norm: nn.Module = field(default_factory=nn.Identity)
    k_norm: nn.Module = field(default_factory=nn.Identity)
    dropout: float = 0.0
    out_dropout: float = 0.0


class PrefixATConv(SwappedLayer):
    """proj([softmax(q_P k) v, K2 * v_I]) for x (B, P + N, dim): P prefix tokens, N patches -> (B, P + N, out_dim).

    q_P = q_norm(q_proj(x_P)), k = k_norm(k_proj(x)), v = v_proj(x); K2 as `KernelGenerator` makes it from the patches,
    convolved on the grid that `reference` tells. Without prefix tokens there are no q and k.
    Raises InputError for a mask, which ATConv has no use for.
    """

    def __init__(self, maps: Maps, reference: GridReference, options: LayerOptions):
        out, biased = maps.out, maps.value.bias is not None
        super().__init__(maps.value.in_features, out.in_features, reference, options)
        self.heads, self.prefix = maps.heads, options.prefix_tokens
        sources = {"q_proj": maps.query, "k_proj": maps.key, "v_proj": maps.value}
        for name in sources if self.prefix else ("v_proj",):
            source = sources[name]
            setattr(self, name, nn.Linear(source.in_features, source.out_features, bias=source.bias is not None))
        self.proj = nn.Linear(out.in_features, out.out_features, bias=biased or out.bias is not None)
        self.to(out.weight.device, out.weight.dtype)
        if self.prefix:
            self.q_norm, self.k_norm = (copy.deepcopy(norm).requires_grad_() for norm in (maps.q_norm, maps.k_norm))
        self.attn_drop, self.proj_drop = nn.Dropout(maps.dropout), nn.Dropout(maps.out_dropout)
        self.reset_parameters()

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        refuse(attn_mask=attn_mask, is_causal=is_causal)
        return self.mix(x)

    def mix(
        self,
        x: torch.Tensor,
        rotate: Callable[[torch.Tensor], torch.Tensor] | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, P + N, dim) -> (B, P + N, out_dim). Of the positions that an attention knows, the prefix reads by:

        rotate: gives the keys of the patches, (B, heads, N, d), their rotary positions; prefix tokens have none.
        bias: of the softmax, (..., heads, P, P + N).
        """
        grid = self.reference.get()
        patches = on_grid(x[:, self.prefix :], grid)
        kernels = self.kernels(patches)
        v = self.v_proj(x)
        mixed = self.convolve(patches, on_grid(v[:, self.prefix :], grid), kernels).flatten(1, -2)
        if self.prefix:
            mixed = torch.cat([self._attend(x, v, rotate, bias), mixed], 1)
        return self.proj_drop(self.proj(mixed))

    def _attend(self, x: torch.Tensor, v: torch.Tensor, rotate: Callable | None, bias: torch.Tensor | None):
        """What the prefix tokens read from all tokens: (B, P, channels)."""
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q_proj(x[:, : self.prefix]), self.k_proj(x), v)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotate is not None:
            k = torch.cat([k[:, :, : self.prefix], rotate(k[:, :, self.prefix :])], 2)
            q, k = q.type_as(v), k.type_as(v)
        dropout = self.attn_drop.p if self.training else 0.0
        with exact_derivatives():
            read = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout)
        return read.transpose(1, 2).flatten(2)


class PrefixGraft(Graft):
    """timm's `Attention` in a `VisionTransformer`; a base for other attentions over prefix tokens and patches.

    wanted: the classes of attention, said to be `of` a library.
    """

    layer = PrefixATConv
    wanted: tuple[type[nn.Module], ...] = (Attention,)
    of = "timm's "

    def linears(self, attention: nn.Module) -> tuple[str, ...]:
        """The names of the attention's maps, the output's last."""
        return "qkv", "proj"

    def maps(self, attention: nn.Module) -> Maps:
        """The attention's parts."""
        return Maps(
            *(part_of(attention.qkv, index) for index in range(3)), attention.proj, attention.num_heads,
            attention.q_norm, attention.k_norm, attention.attn_drop.p, attention.proj_drop.p,
        )  # fmt: skip

    def refusal(self, attention: nn.Module) -> str | None:
        if type(attention) not in self.wanted:
            return class_refusal(attention, self.wanted[0], self.of)
        if getattr(attention, "gate", None) is not None:
            return "gates what it has mixed: ATConv does not stand for that"
        if not isinstance(getattr(attention, "norm", None), nn.Identity | None):
            return "normalises what it has mixed (scale_norm): ATConv does not stand for that"
        if getattr(attention, "num_kv_groups", 1) > 1:
            return "has fewer value heads: ATConv does not stand for that"
        return linear_refusal(attention, *self.linears(attention))

    def build(self, attention: nn.Module, reference: GridReference, options: LayerOptions) -> PrefixATConv:
        return self.layer(self.maps(attention), reference, options)

    def heads(self, attention: nn.Module) -> int:
        return self.maps(attention).heads

    def copy(self, attention: nn.Module, layer: PrefixATConv) -> None:
        maps = self.maps(attention)
        take_over(maps.value, maps.out, layer.v_proj, layer.proj)
        if not layer.prefix:
            return
        for source, linear in ((maps.query, layer.q_proj), (maps.key, layer.k_proj)):
            linear.load_state_dict(source.state_dict())
        layer.q_norm.load_state_dict(maps.q_norm.state_dict())
        layer.k_norm.load_state_dict(maps.k_norm.state_dict())

    def tokens(self, attention: nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
        """What the maps take in a call of the attention, (B, P + N, dim)."""
        return argument("x", args, kwargs)

    def observe(self, attention, layer, args, kwargs):
        value, x = self.maps(attention).value, self.tokens(attention, args, kwargs)
        out = attention.get_submodule(self.linears(attention)[-1])
        seen = observed(attention, value, out, x, args, kwargs)
        return tuple(each[:, layer.prefix :] for each in seen)

    def approximated(self, layer, output, args, kwargs):
        return output[:, layer.prefix :]


def patch_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Of timm's patch embedding, called with images (B, C, H, W)."""
    return module.dynamic_feat_size(args[0].shape[-2:])


def check_prefix(model: nn.Module, config: dict, count: int) -> None:
    """Raises InputError for the prefix tokens of a model, so many, under prefix="error"."""
    if config["prefix"] == "error" and count:
        raise InputError(
            f"prefix='error': this {type(model).__name__} has {count} class or register tokens; give "
            "prefix='attend', which has them attend to all tokens as before"
        )


def check_vit(model: nn.Module, config: dict) -> None:
    """Of a ViT of timm. Raises InputError where patches are dropped, and for prefix tokens under prefix="error"."""
    drop = getattr(model, "patch_drop", None)
    if hasattr(drop, "prob"):
        none = "None" if "Indices" in type(drop).__name__ else "torch.nn.Identity()"
        raise InputError(
            f"patch_drop_rate={drop.prob}: a grid with patches missing is none; set model.patch_drop = {none}"
        )
    check_prefix(model, config, model.num_prefix_tokens)


def _images(model: nn.Module, generator: torch.Generator, grid: Grid = None, text: None = None) -> dict | None:
    """Images for a ViT of timm, None where it takes none of that grid."""
    embed = model.patch_embed
    own = embed.img_size
    size = own if grid is None else tuple(side * patch for side, patch in zip(grid, embed.patch_size, strict=True))
    if size is None or (embed.strict_img_size and tuple(size) != tuple(own)):
        return None
    return {"x": torch.randn(2, model.in_chans, *size, generator=generator)}


def register_timm(model: type[nn.Module], sites: dict[str, Graft], tiny: Callable[[], nn.Module]) -> None:
    """Register the adapter of a class of ViTs of timm, whose `patch_embed` sees the images."""
    register_adapter(SwapAdapter(model, sites, "patch_embed", patch_grid, _images, check=check_vit, tiny=tiny))
