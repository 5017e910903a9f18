"""timm's VisionTransformer, what derives from it (the distilled one of DeiT), and its parallel blocks."""

import copy

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

from sit_atconv.swap.adapters import randomised
from sit_atconv.swap.grafts import as_linear
from sit_atconv.swap.grid import GridReference, argument
from sit_atconv.swap.layers import LayerOptions, refuse
from sit_atconv.swap.prefix import Maps, PrefixATConv, PrefixGraft, register_timm


class ParallelATConv(PrefixATConv):
    """x + drop_path(ls(mix(y) + mlp_out(act(mlp_in(y))))), y = in_norm(x): a parallel block, whose norm, MLP and scale
    are the block's own. mix: of `PrefixATConv`.
    """

    kept = ("in_norm", "mlp_act", "mlp_drop", "ls", "drop_path")

    def __init__(
        self,
        block: ParallelScalingBlock,
        maps: Maps,
        mlp: tuple[nn.Linear, nn.Linear],
        reference: GridReference,
        options: LayerOptions,
    ):
        super().__init__(maps, reference, options)
        for name in self.kept:
            setattr(self, name, copy.deepcopy(block.get_submodule(name)).requires_grad_())
        self.mlp_in, self.mlp_out = (copy.deepcopy(linear).requires_grad_() for linear in mlp)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        refuse(attn_mask=attn_mask, is_causal=is_causal)
        y = self.in_norm(x)
        mlp = self.mlp_drop(self.mlp_act(self.mlp_in(y)))
        return x + self.drop_path(self.ls(self.mix(y) + self.mlp_out(mlp)))


class ParallelGraft(PrefixGraft):
    """timm's `ParallelScalingBlock`, one linear of which gives queries, keys, values and the MLP: a site as a whole.

    The error of a layer is relative to the block's output, with its MLP and its residual connection.
    """

    layer = ParallelATConv
    wanted = only = (ParallelScalingBlock,)

    def linears(self, block: ParallelScalingBlock) -> tuple[str, ...]:
        return ("in_proj", "mlp_out_proj", "attn_out_proj") if block.out_proj is None else ("in_proj", "out_proj")

    def maps(self, block: ParallelScalingBlock) -> Maps:
        _, *qkv = self._inputs(block)
        return Maps(
            *qkv, self._outputs(block)[0], block.num_heads, block.q_norm, block.k_norm, block.attn_drop.p
        )  # fmt: skip

    def build(self, block, reference: GridReference, options: LayerOptions) -> ParallelATConv:
        mlp = self._inputs(block)[0], self._outputs(block)[1]
        return ParallelATConv(block, self.maps(block), mlp, reference, options)

    def _inputs(self, block: ParallelScalingBlock) -> list[nn.Linear]:
        """Of the MLP, of queries, keys and values."""
        weights, bias = block.in_proj.weight.split(block.in_split), block.in_proj.bias
        biases = [block.mlp_bias, None, None, None] if bias is None else bias.split(block.in_split)
        return [as_linear(*each) for each in zip(weights, biases, strict=True)]

    def _outputs(self, block: ParallelScalingBlock) -> list[nn.Linear]:
        """Of the attention and of the MLP. Of a fused one, the bias is the attention's."""
        if block.out_proj is None:
            return [block.attn_out_proj, block.mlp_out_proj]
        hidden, dim = block.in_split[:2]
        weights = block.out_proj.weight.split([dim, hidden], 1)
        return [as_linear(weights[0], block.out_proj.bias), as_linear(weights[1], None)]

    def tokens(self, block, args, kwargs) -> torch.Tensor:
        return block.in_norm(argument("x", args, kwargs))


TINY = {  # without a head, which reads either the class token or the patches of the last block
    "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0, "global_pool": "",
    "dynamic_img_size": True,
}  # fmt: skip


def _tiny() -> VisionTransformer:
    return VisionTransformer(**TINY)


def _tiny_distilled() -> VisionTransformerDistilled:
    return randomised(VisionTransformerDistilled(**TINY))


SITES = {r"blocks\.\d+\.(attns\.\d+\.)?attn": PrefixGraft(), r"blocks\.\d+": ParallelGraft()}
register_timm(VisionTransformer, SITES, _tiny)
register_timm(VisionTransformerDistilled, SITES, _tiny_distilled)


def tiny_parallel(scaling: bool = True, **changed) -> VisionTransformer:
    """A VisionTransformer of parallel blocks, scaling ones or `ParallelThingsBlock`."""
    block = ParallelScalingBlock if scaling else ParallelThingsBlock
    return randomised(VisionTransformer(**{**TINY, "block_fn": block, "qkv_bias": False, **changed}))
