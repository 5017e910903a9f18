"""diffusers' DiT."""

import torch
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from einops import rearrange
from torch import nn

from sit_atconv.runtime.compat.diffusers import checkpoint_function
from sit_atconv.swap.adapters import Grid, latents
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.models import BLOCK, Swapped, register


def _example(model: DiTTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: None = None) -> dict:
    return {
        "hidden_states": latents(model, generator, grid),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "class_labels": torch.randint(model.config.num_embeds_ada_norm, (2,), generator=generator),
    }


class ATConvDiTTransformer2DModel(Swapped, DiTTransformer2DModel, CacheMixin):
    """DiT with ATConv; takes latents that are not square too, which the original unpatchifies as squares, and has
    `enable_cache`, which the original lacks: diffusers' caches know its blocks."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """hidden_states (B, in_channels, H, W), timestep and class_labels (B,) -> sample (B, out_channels, H, W)."""
        height, width = (side // self.patch_size for side in hidden_states.shape[-2:])
        x = self.pos_embed(hidden_states)
        for block in self.transformer_blocks:
            arguments = (x, None, None, None, timestep, cross_attention_kwargs, class_labels)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = checkpoint_function(self)(block, *arguments)
            else:
                x = block(*arguments)
        conditioning = self.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        shift, scale = self.proj_out_1(nn.functional.silu(conditioning))[:, None].chunk(2, dim=-1)
        patches = self.proj_out_2(self.norm_out(x) * (1 + scale) + shift)
        p = self.patch_size
        sample = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=p, q=p)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _tiny() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8
    )


register(DiTTransformer2DModel, {f"{BLOCK}attn1": SelfAttentionGraft()}, _example, _tiny)
