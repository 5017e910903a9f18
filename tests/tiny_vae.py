"""An AutoencoderKL of random weights, as diffusers stores one: 4 channels, 4 times smaller."""

import torch
from diffusers import AutoencoderKL


def save_vae(folder):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    vae.save_pretrained(folder)
