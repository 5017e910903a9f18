"""Tiny models of random weights, of the classes that swap_attention knows, and inputs for them."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel

from sit_atconv.models.sit import SiTTransformer2DModel


def _sit(depth=3):
    return SiTTransformer2DModel(sample_size=8, hidden_size=16, depth=depth, num_heads=2, num_classes=10)


def _dit(depth=3):
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=depth, sample_size=8
    )


def _pixart(depth=2):
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=depth, sample_size=8,
        cross_attention_dim=16, caption_channels=12,
    )  # fmt: skip


def _unet():
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


class Tiny:
    """model(kind): always the same weights. inputs(kind, size): keyword arguments of a forward pass."""

    makers = {"sit": _sit, "dit": _dit, "pixart": _pixart, "unet": _unet}  # noqa: RUF012
    layers = {  # noqa: RUF012
        "sit": [f"blocks.{i}.attn" for i in range(3)],
        "dit": [f"transformer_blocks.{i}.attn1" for i in range(3)],
        "pixart": [f"transformer_blocks.{i}.attn1" for i in range(2)],
        "unet": [
            f"{block}.transformer_blocks.0.attn1"
            for block in (
                "down_blocks.0.attentions.0",
                "up_blocks.1.attentions.0",
                "up_blocks.1.attentions.1",
                "mid_block.attentions.0",
            )
        ],
    }

    def model(self, kind, seed=0, **shape):
        torch.manual_seed(seed)
        return self.makers[kind](**shape).eval()

    def inputs(self, kind, size=(8, 8), batch=2, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(batch, 4, *size, generator=generator).to(dtype)
        if kind == "sit":
            t = torch.rand(batch, generator=generator)
            return {"hidden_states": latents, "timestep": t, "class_labels": torch.arange(batch) % 10}
        t = torch.randint(1000, (batch,), generator=generator)
        if kind == "dit":
            return {"hidden_states": latents, "timestep": t, "class_labels": torch.arange(batch) % 10}
        text = torch.randn(batch, 5, 12, generator=generator).to(dtype)
        if kind == "unet":
            return {"sample": latents, "timestep": t, "encoder_hidden_states": text}
        extra = {"resolution": None, "aspect_ratio": None}
        return {
            "hidden_states": latents, "timestep": t, "encoder_hidden_states": text, "added_cond_kwargs": extra
        }  # fmt: skip

    def run(self, model, kind, size=(8, 8), **options):
        with torch.no_grad():
            return model(**self.inputs(kind, size, **options)).sample

    def snapshot(self, model):
        """All that a swap must give back, or leave alone where it is refused."""
        hooks = [
            (name, each._forward_pre_hooks, each._forward_pre_hooks_with_kwargs, each._forward_hooks)
            for name, each in model.named_modules()
        ]
        config = getattr(model, "config", {})
        return {
            "class": type(model),
            "config": config.to_dict() if hasattr(config, "to_dict") else dict(config),
            "modules": [(name, id(each), type(each), each.training) for name, each in model.named_modules()],
            "hooks": [(name, *(list(each.items()) for each in rest)) for name, *rest in hooks],
            "attributes": {
                (name, key): id(value) for name, each in model.named_modules() for key, value in vars(each).items()
                if key not in ("training", "_internal_dict")
            },
            "state": {name: each.clone() for name, each in model.state_dict().items()},
        }  # fmt: skip

    def assert_as(self, before, model):
        after = self.snapshot(model)
        for what in ("class", "config", "modules", "hooks", "attributes"):
            assert after[what] == before[what], what
        assert list(after["state"]) == list(before["state"])
        assert all(torch.equal(after["state"][name], each) for name, each in before["state"].items())


@pytest.fixture(scope="session")
def tiny():
    return Tiny()
