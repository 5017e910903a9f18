"""timm's Eva: EVA, EVA-02, the ViTs with rotary positions, Perception Encoder, DINOv3."""

from functools import partial

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention
from torch import nn

from sit_atconv.swap.adapters import randomised
from sit_atconv.swap.grafts import part_of
from sit_atconv.swap.grid import GridReference
from sit_atconv.swap.layers import LayerOptions, refuse
from sit_atconv.swap.prefix import Maps, PrefixATConv, PrefixGraft, register_timm


class EvaATConv(PrefixATConv):
    """`PrefixATConv` whose prefix tokens read by the rotary positions of the patches. half: the layout of these."""

    half = False

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        refuse(attn_mask=attn_mask, is_causal=is_causal)
        return self.mix(x, None if rope is None else partial(apply_rot_embed_cat, emb=rope, half=self.half))


class EvaGraft(PrefixGraft):
    """timm's `EvaAttention` and `AttentionRope`, with one linear for queries, keys and values, or three."""

    layer = EvaATConv

    wanted = (EvaAttention, AttentionRope)

    def linears(self, attention: nn.Module) -> tuple[str, ...]:
        return ("q_proj", "k_proj", "v_proj", "proj") if attention.qkv is None else ("qkv", "proj")

    def maps(self, attention: nn.Module) -> Maps:
        if attention.qkv is None:
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        else:
            own = getattr(attention, "q_bias", None)
            biases = None if own is None else (own, None, attention.v_bias)  # that of the keys is a buffer of zeros
            qkv = [part_of(attention.qkv, index, biases) for index in range(3)]
        return Maps(
            *qkv, attention.proj, attention.num_heads, attention.q_norm, attention.k_norm, attention.attn_drop.p,
            attention.proj_drop.p,
        )  # fmt: skip

    def build(self, attention: nn.Module, reference: GridReference, options: LayerOptions) -> EvaATConv:
        layer = super().build(attention, reference, options)
        layer.half = attention.rotate_half
        return layer


def tiny_eva(**changed) -> Eva:
    """An Eva with one linear for queries, keys and values, registers and rotary positions; changed: other arguments."""
    shape = {
        "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5,
        "num_reg_tokens": 1, "use_rot_pos_emb": True, "dynamic_img_size": True,
    }  # fmt: skip
    return randomised(Eva(**{**shape, **changed}))


register_timm(Eva, {r"blocks\.\d+\.attn": EvaGraft()}, tiny_eva)
