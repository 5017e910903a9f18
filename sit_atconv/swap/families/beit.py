"""timm's Beit, and its ViTs with relative positions."""

import torch
from timm.models import beit, vision_transformer_relpos
from torch import nn

from sit_atconv.swap.adapters import randomised
from sit_atconv.swap.grafts import part_of
from sit_atconv.swap.grid import GridReference
from sit_atconv.swap.layers import LayerOptions
from sit_atconv.swap.prefix import Maps, PrefixATConv, PrefixGraft, register_timm


class BeitATConv(PrefixATConv):
    """`PrefixATConv` whose class token reads by the biases of its attention, to the patches and to itself.

    prefix_bias (heads, 2): those two; None where the attention had none. Patches have no use for theirs.
    """

    def __init__(self, maps: Maps, reference: GridReference, options: LayerOptions, biased: bool):
        super().__init__(maps, reference, options)
        self.prefix_bias = nn.Parameter(maps.out.weight.new_zeros(maps.heads, 2)) if biased else None

    def forward(self, x: torch.Tensor, shared_rel_pos_bias: torch.Tensor | None = None) -> torch.Tensor:
        bias = None if shared_rel_pos_bias is None else shared_rel_pos_bias[..., : self.prefix, :]
        if self.prefix_bias is not None:
            others, itself = self.prefix_bias.split(1, 1)
            own = torch.cat([itself, others.expand(-1, x.shape[1] - 1)], 1)[:, None]
            bias = own if bias is None else own + bias
        return self.mix(x, bias=bias)


class BeitGraft(PrefixGraft):
    """The attention of timm's Beit."""

    layer = BeitATConv
    wanted = (beit.Attention,)

    def maps(self, attention: beit.Attention) -> Maps:
        biases = attention.q_bias, None, attention.v_bias  # that of the keys is a buffer of zeros
        return Maps(
            *(part_of(attention.qkv, index, biases) for index in range(3)), attention.proj, attention.num_heads,
            dropout=attention.attn_drop.p, out_dropout=attention.proj_drop.p,
        )  # fmt: skip

    def table(self, attention: nn.Module) -> torch.Tensor | None:
        """Biases by relative position (places + 3, heads); the last three are class to patches, patches to class, and
        class to class."""
        return attention.relative_position_bias_table

    def build(self, attention: nn.Module, reference: GridReference, options: LayerOptions) -> BeitATConv:
        biased = options.prefix_tokens > 0 and self.table(attention) is not None
        return self.layer(self.maps(attention), reference, options, biased)

    def copy(self, attention: nn.Module, layer: BeitATConv) -> None:
        super().copy(attention, layer)
        if layer.prefix_bias is not None:
            layer.prefix_bias.data.copy_(self.table(attention).data[[-3, -1]].T)


class RelPosATConv(BeitATConv):
    """`BeitATConv`, called as timm's ViTs with relative positions call it."""

    def forward(self, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, shared_rel_pos)


class RelPosGraft(BeitGraft):
    """The attention of timm's ViTs with relative positions."""

    layer = RelPosATConv
    wanted = (vision_transformer_relpos.RelPosAttention,)

    def maps(self, attention: vision_transformer_relpos.RelPosAttention) -> Maps:
        return PrefixGraft.maps(self, attention)

    def table(self, attention: vision_transformer_relpos.RelPosAttention) -> torch.Tensor | None:
        return getattr(attention.rel_pos, "relative_position_bias_table", None)  # by an MLP, class tokens have none


SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def tiny_beit(**changed) -> beit.Beit:
    """A Beit with a table of relative positions in every block; changed: other arguments."""
    return randomised(beit.Beit(**{**SHAPE, "use_rel_pos_bias": True, **changed}))


def tiny_rel_pos(**changed) -> vision_transformer_relpos.VisionTransformerRelPos:
    """A ViT with relative positions and a class token; changed: other arguments."""
    shape = {**SHAPE, "class_token": True, "rel_pos_type": "bias", **changed}
    return randomised(vision_transformer_relpos.VisionTransformerRelPos(**shape))


register_timm(beit.Beit, {r"blocks\.\d+\.attn": BeitGraft()}, tiny_beit)
register_timm(vision_transformer_relpos.VisionTransformerRelPos, {r"blocks\.\d+\.attn": RelPosGraft()}, tiny_rel_pos)
