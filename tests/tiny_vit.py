"""A ViT of random weights, as timm stores one, for the tests of REPA."""

import json

import timm
import torch
from safetensors.torch import save_file
from torch import nn

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
WIDTH, HEADS, PATCH = 12, 2, 4
ARGS = {
    "img_size": 16, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "reg_tokens": 2,
    "init_values": 1.0,
}  # fmt: skip


def save_vit(folder, architecture="vit_tiny_patch16_224", num_classes=5, args=ARGS, **changed):
    """A ViT of random weights as timm's local-dir: reads it. changed: of its pretrained_cfg."""
    vit = timm.create_model(architecture, num_classes=num_classes, **args)
    torch.manual_seed(0)
    for parameter in vit.parameters():  # the classifier's are the last
        nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    save_file(vit.state_dict(), folder / "model.safetensors")
    cfg = {"mean": MEAN, "std": STD, "num_classes": num_classes, "input_size": [3, 16, 16], "classifier": "head",
           "first_conv": "patch_embed.proj", "tag": "made_up", **changed}  # fmt: skip
    config = {"architecture": architecture, "num_classes": num_classes, "model_args": args, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"
