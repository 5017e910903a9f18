"""diffusers' pipelines of tiny parts with random weights, around the models that swap_attention knows, and what they
are called with. A pipeline is a row of `PIPELINES`; OTHERS says why the rest of diffusers' are none."""

import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from PIL import Image
from torch import nn

from sit_atconv.runtime.compat.torch import tree_leaves
from sit_atconv.swap.adapters import known_adapters, randomised

ADAPTERS = {adapter.model.__name__: adapter for adapter in known_adapters()}


class Prompt(NamedTuple):
    """A text of so many tokens; the seed is that of its sample too."""

    seed: int
    length: int


def noise(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def picture(height: int, width: int, name: str = "picture") -> Image.Image:
    pixels = 127.5 + 50 * noise(name, height, width, 3)
    return Image.fromarray(pixels.clamp(0, 255).byte().numpy())


# What tells a pipeline of its prompts: each is called with them, and gives arguments.


@dataclass(frozen=True)
class Text:
    """Embeddings (B, longest, *width) and where they count, of the prompts and of what they are guided away from."""

    width: int | tuple[int, ...]
    mask: str | None = None
    name: str = "prompt_embeds"
    length: int | None = None  # of all prompts, padded
    dtype: torch.dtype = torch.long  # of the mask

    def __call__(self, prompts: Sequence[Prompt]) -> dict:
        width = (self.width,) if isinstance(self.width, int) else self.width
        longest, found = self.length or max(each.length for each in prompts), {}
        for sign in ("", "negative_"):
            texts = [noise(f"{sign}{self.name} {each.seed}", each.length, *width) for each in prompts]
            pads = [(0, 0) * len(width) + (0, longest - len(each)) for each in texts]
            found[sign + self.name] = torch.stack([F.pad(*each, value=3.0) for each in zip(texts, pads, strict=True)])
            if self.mask is not None:
                counts = [torch.arange(longest) < len(each) for each in texts]
                found[sign + self.mask] = torch.stack(counts).to(self.dtype)
        return found


@dataclass(frozen=True)
class Texts:
    """Embeddings as a list, (length, width) of each prompt."""

    width: int
    name: str = "prompt_embeds"

    def __call__(self, prompts: Sequence[Prompt]) -> dict:
        return {
            sign + self.name: [noise(f"{sign}{each.seed}", each.length, self.width) for each in prompts]
            for sign in ("", "negative_")
        }


@dataclass(frozen=True)
class Whole:
    """One tensor (B, *shape) that is of the whole prompt."""

    shape: tuple[int, ...]
    name: str = "pooled_prompt_embeds"
    signs: tuple[str, ...] = ("", "negative_")

    def __call__(self, prompts: Sequence[Prompt]) -> dict:
        return {
            sign + self.name: torch.stack([noise(f"{sign}{self.name} {each.seed}", *self.shape) for each in prompts])
            for sign in self.signs
        }


def labels(prompts: Sequence[Prompt]) -> dict:
    return {"class_labels": [each.seed for each in prompts]}


def words(prompts: Sequence[Prompt]) -> dict:
    """For pipelines that take text alone: words of the vocabulary of `tokenizer`."""
    texts = [" ".join(f"w{(each.seed + place) % 20}" for place in range(each.length)) for each in prompts]
    return {"prompt": texts, "negative_prompt": [" ".join(reversed(each.split())) for each in texts]}


def lengths(prompts: Sequence[Prompt]) -> dict:
    """Where each prompt begins and ends, one after the other."""
    ends = torch.tensor([0, *(each.length for each in prompts)]).cumsum(0)
    return {"prompt_cu_seqlens": ends, "negative_prompt_cu_seqlens": ends}


def images(prompts: Sequence[Prompt]) -> dict:
    return {"image": [picture(16, 32, f"{each.seed}") for each in prompts]}


def alone(prompts: Sequence[Prompt]) -> dict:
    """For pipelines that take no text."""
    return {"batch_size": len(prompts)}


# Guidance: a scale that the pipeline is called with, or that its guider has.


def by_scale(pipe, scale: float) -> dict:
    return {"guidance_scale": scale}


def by_true_scale(pipe, scale: float) -> dict:
    return {"true_cfg_scale": scale}


def by_frame(pipe, scale: float) -> dict:
    return {"min_guidance_scale": scale, "max_guidance_scale": scale}


def by_guider(pipe, scale: float) -> dict:
    pipe.guider.guidance_scale = scale
    return {}


@dataclass(frozen=True)
class Tiny:
    """A pipeline of tiny parts.

    pipeline, model: classes, by name. home: the module that the former is in.
    parts: makes the components beside the model; those that are not there are None. unsaved: which of them a folder of
        the pipeline does not bring back.
    given: what tells of the prompts. options: further arguments of a call.
    size, sides: (H, W) or (frames, H, W) of what it draws, and the arguments that say so; () where the model does.
    config, std: entries of the tiny model's configuration that fit it to the parts, and the spread of its weights.
    guide, scales: arguments of a scale of guidance, and three scales in equal steps, at the first of which the pipeline
        draws unguided; None where it knows no guidance. affine: whether what its scheduler is given first grows evenly
        with the scale.
    batched: whether it draws several samples, each by a generator of its own, at once. ragged: whether prompts of other
        lengths in the batch change nothing, in the pipeline as diffusers has it.
    rounded: whether what it draws is rounded to 255 steps on the way.
    """

    pipeline: str
    model: str
    parts: Callable[[], dict]
    given: tuple[Callable[[Sequence[Prompt]], dict], ...]
    size: tuple[int, ...]
    options: Mapping = field(default_factory=dict)
    config: Mapping = field(default_factory=dict)
    guide: Callable[..., dict] = by_scale
    scales: tuple[float, float, float] | None = (1.0, 2.0, 3.0)
    affine: bool = True
    ragged: bool = False
    batched: bool = True
    rounded: bool = False
    sides: tuple[str, ...] = ("num_frames", "height", "width")
    unsaved: tuple[str, ...] = ()
    std: float = 0.2
    home: str = "diffusers"

    @property
    def slot(self) -> str:
        return "unet" if "UNet" in self.model else "transformer"

    def make(self):
        """The pipeline, always with the same weights."""
        torch.manual_seed(0)
        tiny = ADAPTERS[self.model].tiny()
        config = {name: each for name, each in tiny.config.items() if not name.startswith("_")}
        model = randomised(type(tiny).from_config({**config, **self.config}), self.std)
        parts = {self.slot: model, **self.parts()}
        for part in parts.values():
            if isinstance(part, nn.Module):
                part.eval()
        cls = getattr(import_module(self.home), self.pipeline)
        for name, each in inspect.signature(cls.__init__).parameters.items():
            if each.default is inspect.Parameter.empty and name not in ("self", *parts):
                parts[name] = None
        pipe = cls(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe, prompts: Sequence[Prompt], scale: float | None = None, steps: int = 2) -> list[torch.Tensor]:
        """All that it draws for the prompts: images (B, H, W, 3), or videos (B, frames, H, W, 3), and sound beside."""
        arguments = {}
        for each in self.given:
            arguments |= each(prompts)
        known = inspect.signature(pipe.__call__).parameters
        arguments = {name: each for name, each in arguments.items() if name in known}
        if "negative_prompt" in known and "prompt" not in arguments:
            arguments["negative_prompt"] = None  # by default it is a text in some, beside embeddings
        if self.sides:
            arguments |= zip(self.sides[-len(self.size) :], self.size, strict=True)
        if self.scales is not None:
            scale = self.scales[2] if scale is None else scale
            arguments |= self.guide(pipe, scale)
            if scale == self.scales[0]:
                arguments |= dict.fromkeys(name for name in arguments if name.startswith("negative_"))
        if "generator" in known:
            arguments["generator"] = [torch.Generator().manual_seed(each.seed) for each in prompts]
            if not self.batched:
                arguments["generator"] = arguments["generator"][0]
        torch.manual_seed(0)  # some ask no generator for what they draw an image's latents by
        output = pipe(**arguments, **self.options, num_inference_steps=steps, output_type="np", return_dict=False)
        return [torch.as_tensor(each) for each in tree_leaves(output) if isinstance(each, torch.Tensor | np.ndarray)]


def calls_of(model: nn.Module, run: Callable[[], object]) -> list[dict]:
    """What the model is called with while something runs, by name."""
    calls, signature = [], inspect.signature(type(model).forward)

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        calls.append({name: each for name, each in bound.items() if name != "self"})

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls


def latent_2d(channels: int = 4, blocks: int = 2, **more) -> diffusers.AutoencoderKL:
    """Of images, 2 ** (blocks - 1) times smaller."""
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=[8] * blocks, layers_per_block=1, norm_num_groups=4, latent_channels=channels,
        **{"scaling_factor": 0.5, "shift_factor": 0.1, **more},
    )  # fmt: skip


def latent_wan(channels: int = 4, blocks: int = 2, **more) -> diffusers.AutoencoderKLWan:
    """Of videos, 2 ** (blocks - 1) times smaller in time, height and width."""
    factor = 2 ** (blocks - 1)
    return diffusers.AutoencoderKLWan(**{
        "base_dim": 4, "z_dim": channels, "dim_mult": [1] * blocks, "num_res_blocks": 1,
        "temperal_downsample": [True] * (blocks - 1), "latents_mean": [0.1] * channels, "latents_std": [0.9] * channels,
        "scale_factor_temporal": factor, "scale_factor_spatial": factor, **more,
    })  # fmt: skip


def latent_qwen(channels: int) -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=channels, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1] * channels, latents_std=[0.9] * channels,
    )  # fmt: skip


def latent_hunyuan(channels: int = 4) -> diffusers.AutoencoderKLHunyuanVideo:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=channels, down_block_types=["HunyuanVideoDownBlock3D"] * 3,
        up_block_types=["HunyuanVideoUpBlock3D"] * 3, block_out_channels=[8, 8, 8], layers_per_block=1,
        norm_num_groups=4, spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip


def latent_cogvideo(channels: int = 4) -> diffusers.AutoencoderKLCogVideoX:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=["CogVideoXDownBlock3D"] * 2, up_block_types=["CogVideoXUpBlock3D"] * 2,
        block_out_channels=[8, 8], latent_channels=channels, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=2, sample_height=16, sample_width=16,
    )  # fmt: skip


def latent_flux2() -> diffusers.AutoencoderKLFlux2:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 8],
        layers_per_block=1, norm_num_groups=4, latent_channels=1,
    )  # fmt: skip


def latent_allegro() -> diffusers.AutoencoderKLAllegro:
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=["AllegroDownBlock3D"] * 2, up_block_types=["AllegroUpBlock3D"] * 2, block_out_channels=[8, 8],
        temporal_downsample_blocks=[True, False], temporal_upsample_blocks=[True, False], layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=2, sample_size=16,
    )  # fmt: skip
    vae.enable_slicing()
    vae.enable_tiling()  # it decodes in no other way, by tiles larger than ours
    vae.kernel = vae.stride = 4, 16, 32
    vae.tile_overlap_t = vae.tile_overlap_h = vae.tile_overlap_w = 0
    return vae


def flow(**config) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(clip_sample=False)


def eyes(cls: str, prepares: str, size: int = 8) -> dict:
    """A model that sees images, and what prepares them for it, under the name that it has in the pipeline."""
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=size,
        patch_size=size // 2, projection_dim=12,
    )  # fmt: skip
    sides = {"height": size, "width": size}
    processor = transformers.CLIPImageProcessor(size=sides, crop_size=sides)
    return {"image_encoder": getattr(transformers, cls)(config), prepares: processor}


class Guard(nn.Module):
    """For Cosmos, which draws nothing that nobody has looked at."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: np.ndarray) -> np.ndarray:
        return video


def reader(width: int) -> dict:
    """A model that reads words, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

    vocabulary = {name: place for place, name in enumerate(["<pad>", "<unk>", *(f"w{place}" for place in range(20))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = SmolLM3Config(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    return {"text_encoder": SmolLM3ForCausalLM(config), "tokenizer": fast}


def with_vae(vae: Callable[[], nn.Module], scheduler: Callable[[], object] = flow, **more: Callable[[], object]):
    """parts of a pipeline with a VAE and a scheduler; more: others, each made anew."""
    return lambda: {"vae": vae(), "scheduler": scheduler(), **{name: make() for name, make in more.items()}}


IMAGE, CLIP = (16, 32), (5, 16, 32)
MASK = "prompt_attention_mask"
one_channel = partial(latent_2d, 1)

PIPELINES = (
    Tiny("AllegroPipeline", "AllegroTransformer3DModel", with_vae(latent_allegro, ddim), (Text(10, MASK),), (4, 16, 32),
         ragged=True, unsaved=("vae",)),
    Tiny("AnyFlowPipeline", "AnyFlowTransformer3DModel",
         with_vae(latent_wan, diffusers.FlowMapEulerDiscreteScheduler), (Text(10),), CLIP),
    Tiny("AuraFlowPipeline", "AuraFlowTransformer2DModel", with_vae(latent_2d), (Text(12, MASK),), IMAGE),
    Tiny("BriaPipeline", "BriaTransformer2DModel", with_vae(one_channel), (Text(12),), IMAGE),
    Tiny("BriaFiboPipeline", "BriaFiboTransformer2DModel",
         lambda: {**reader(6), "vae": latent_wan(4, 4, patch_size=2, in_channels=12, out_channels=12),
                  "scheduler": flow()},
         (words,), (32, 48), config={"text_encoder_dim": 6}, ragged=True),
    Tiny("ChromaPipeline", "ChromaTransformer2DModel", with_vae(one_channel),
         (Text(12, MASK, dtype=torch.bool),), IMAGE, ragged=True),
    Tiny("ChronoEditPipeline", "ChronoEditTransformer3DModel", 
         lambda: {**eyes("CLIPVisionModel", "image_processor"), "vae": latent_wan(), "scheduler": flow()},
         (Text(10, length=512),), CLIP, options={"image": picture(16, 32)},
         config={"in_channels": 10, "image_dim": 8, "added_kv_proj_dim": 24}),
    Tiny("CogVideoXPipeline", "CogVideoXTransformer3DModel",
         with_vae(latent_cogvideo, diffusers.CogVideoXDDIMScheduler), (Text(10, length=6),), (5, 16, 16),
         config={"ofs_embed_dim": None}),
    Tiny("CogView3PlusPipeline", "CogView3PlusTransformer2DModel",
         with_vae(latent_2d, diffusers.CogVideoXDDIMScheduler), (Text(12),), IMAGE),
    Tiny("CogView4Pipeline", "CogView4Transformer2DModel", with_vae(latent_2d), (Text(12),), IMAGE),
    Tiny("ConsisIDPipeline", "ConsisIDTransformer3DModel",
         with_vae(latent_cogvideo, diffusers.CogVideoXDPMScheduler), (images, Text(10, length=6)), (5, 16, 16),
         config={"in_channels": 8},
         home="diffusers.pipelines.consisid.pipeline_consisid"),
    Tiny("Cosmos2TextToImagePipeline", "CosmosTransformer3DModel",
         with_vae(latent_wan, partial(flow, use_karras_sigmas=True), safety_checker=Guard), (Text(10),), IMAGE,
         scales=(0.0, 2.0, 4.0), rounded=True,
         unsaved=("safety_checker",)),
    Tiny("CosmosTextToWorldPipeline", "CosmosTransformer3DModel", with_vae(
        lambda: diffusers.AutoencoderKLCosmos(
            latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
            attention_resolutions=(4,), resolution=16, num_layers=1, patch_size=2, spatial_compression_ratio=4,
            temporal_compression_ratio=4, latents_mean=None, latents_std=None),
        diffusers.EDMEulerScheduler, safety_checker=Guard),
        (Text(10),), (5, 16, 32), affine=False, rounded=True, unsaved=("safety_checker",)),
    Tiny("DDPMPipeline", "UNet2DModel", lambda: {"scheduler": diffusers.DDPMScheduler()}, (alone,), (8, 8),
         config={"in_channels": 3, "out_channels": 3}, scales=None, sides=()),
    Tiny("DiTPipeline", "DiTTransformer2DModel", with_vae(latent_2d, ddim), (labels,), (16, 16), sides=()),
    Tiny("EasyAnimatePipeline", "EasyAnimateTransformer3DModel", with_vae(
        lambda: diffusers.AutoencoderKLMagvit(
            latent_channels=4, block_out_channels=[8] * 3, layers_per_block=1, norm_num_groups=4,
            down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"],
            up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"])),
        (Text(10, MASK),), (5, 32, 64)),
    Tiny("ErnieImagePipeline", "ErnieImageTransformer2DModel", with_vae(latent_flux2), (Texts(12),), IMAGE,
         ragged=True),
    Tiny("FluxPipeline", "FluxTransformer2DModel", with_vae(one_channel), (Text(12), Whole((10,))), IMAGE,
         guide=by_true_scale),
    Tiny("Flux2KleinPipeline", "Flux2Transformer2DModel", with_vae(latent_flux2), (Text(12),), IMAGE),
    Tiny("HunyuanDiTPipeline", "HunyuanDiT2DModel", with_vae(partial(latent_2d, 4, 4), ddim),
         (Text(12, MASK, length=5), Text(16, f"{MASK}_2", "prompt_embeds_2", 6)), (64, 96),
         options={"use_resolution_binning": False}, ragged=True),
    Tiny("HunyuanImagePipeline", "HunyuanImageTransformer2DModel", with_vae(
        lambda: diffusers.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[32, 32], layers_per_block=1,
            spatial_compression_ratio=2, sample_size=16, scaling_factor=0.5),
        guider=diffusers.ClassifierFreeGuidance),
        (Text(12, "prompt_embeds_mask"), Text(8, "prompt_embeds_mask_2", "prompt_embeds_2")), IMAGE,
        config={"text_embed_2_dim": 8}, guide=by_guider, ragged=True),
    Tiny("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", with_vae(latent_hunyuan),
         (Text(10, MASK), Whole((6,))), (5, 32, 64), guide=by_true_scale, ragged=True),
    Tiny("HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel", with_vae(
        lambda: diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=[8, 8], layers_per_block=1, spatial_compression_ratio=2,
            temporal_compression_ratio=2),
        guider=diffusers.ClassifierFreeGuidance),
        (Text(10, "prompt_embeds_mask"), Text(6, "prompt_embeds_mask_2", "prompt_embeds_2")), CLIP,
        config={"in_channels": 9}, guide=by_guider, batched=False),
    Tiny("Kandinsky3Pipeline", "Kandinsky3UNet",
         lambda: {"movq": diffusers.VQModel(
             down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
             block_out_channels=[8] * 4, latent_channels=4, norm_num_groups=4, vq_embed_dim=4,
             num_vq_embeddings=8), "scheduler": diffusers.DDPMScheduler(clip_sample=False)},
         (Text(12, "attention_mask"),), (64, 128), scales=(0.0, 2.0, 4.0), std=0.1),
    Tiny("Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", with_vae(latent_hunyuan),
         (Text(10, name="prompt_embeds_qwen"), Whole((6,), "prompt_embeds_clip"), lengths), (5, 32, 64),
         config={"in_visual_dim": 4, "out_visual_dim": 4}),
    Tiny("Kandinsky6TI2VAPipeline", "Kandinsky6Transformer3DModel", with_vae(latent_hunyuan),
         (Text(10, MASK), Whole((6,))), (5, 32, 64), options={"sample_audio": False}),
    Tiny("Krea2Pipeline", "Krea2Transformer2DModel", with_vae(partial(latent_qwen, 1)),
         (Text((3, 12), "prompt_embeds_mask", dtype=torch.bool),), IMAGE, scales=(0.0, 2.0, 4.0), ragged=True),
    Tiny("LTXPipeline", "LTXVideoTransformer3DModel", with_vae(
        lambda: diffusers.AutoencoderKLLTXVideo(
            latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2, layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3,
            spatio_temporal_scaling=(True, False), decoder_spatio_temporal_scaling=(True, False),
            decoder_inject_noise=(False,) * 3, downsample_type=("conv",) * 2, upsample_residual=(False,) * 2,
            upsample_factor=(1, 1))),
        (Text(10, MASK),), (5, 32, 64), ragged=True),
    Tiny("LTX2Pipeline", "LTX2VideoTransformer3DModel", with_vae(
        lambda: diffusers.AutoencoderKLLTX2Video(
            latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",), layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False,) * 2, downsample_type=("spatiotemporal",), upsample_residual=(False,),
            upsample_factor=(1,)),
        audio_vae=lambda: diffusers.AutoencoderKLLTX2Audio(
            base_channels=8, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=16),
        connectors=lambda: LTX2TextConnectors(
            caption_channels=10, text_proj_in_factor=2, video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=5, video_connector_num_layers=1,
            video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=5, audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None),
        vocoder=lambda: LTX2Vocoder(
            in_channels=32, hidden_channels=8, upsample_kernel_sizes=[4], upsample_factors=[2], resnet_kernel_sizes=[3],
            resnet_dilations=[[1]])),
        (Text(20, MASK),), (9, 32, 64), config={"audio_in_channels": 8, "audio_out_channels": 8},
        options={"modality_scale": 1.0, "audio_modality_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0,
                 "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0, "audio_guidance_scale": 1.0}),
    Tiny("LongCatImagePipeline", "LongCatImageTransformer2DModel",
         lambda: {**reader(12), "vae": latent_2d(16), "scheduler": flow()}, (words,), IMAGE,
         options={"enable_cfg_renorm": False, "enable_prompt_rewrite": False}, config={"in_channels": 64}),
    Tiny("LattePipeline", "LatteTransformer3DModel", with_vae(latent_2d, ddim), (Text(10),), (3, 16, 32),
         sides=("video_length", "height", "width"),
         options={"mask_feature": False}),  # by default it cuts one unguided text at a length of a float
    Tiny("Lumina2Pipeline", "Lumina2Transformer2DModel", with_vae(partial(latent_2d, 4, 4)), (Text(12, MASK),),
         (48, 64), options={"cfg_normalization": False}, ragged=True),
    Tiny("MochiPipeline", "MochiTransformer3DModel", with_vae(
        lambda: diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
            add_attention_block=(False,) * 5)),
        (Text(8, MASK),), (7, 32, 48), config={"in_channels": 12}, ragged=True),
    Tiny("MotifVideoPipeline", "MotifVideoTransformer3DModel",
         with_vae(latent_wan, guider=diffusers.ClassifierFreeGuidance),
         (Text(10, MASK),), CLIP, config={"in_channels": 9}, guide=by_guider, ragged=True),
    Tiny("OvisImagePipeline", "OvisImageTransformer2DModel", with_vae(one_channel), (Text(12),), IMAGE),
    Tiny("PixArtSigmaPipeline", "PixArtTransformer2DModel", with_vae(latent_2d, ddim), (Text(12, MASK),), IMAGE,
         options={"use_resolution_binning": False}, ragged=True),
    Tiny("QwenImagePipeline", "QwenImageTransformer2DModel", with_vae(partial(latent_qwen, 1)),
         (Text(12, "prompt_embeds_mask"),), IMAGE, guide=by_true_scale, affine=False,
         ragged=True),
    Tiny("StableDiffusion3Pipeline", "SD3Transformer2DModel", with_vae(latent_2d), (Text(12), Whole((10,))), IMAGE),
    Tiny("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", with_vae(
        latent_wan,
        partial(diffusers.UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True)),
        (Text(10),), CLIP),
    Tiny("StableDiffusionPipeline", "UNet2DConditionModel", with_vae(latent_2d, ddim), (Text(12),), IMAGE),
    Tiny("StableDiffusionXLPipeline", "UNet2DConditionModel", with_vae(latent_2d, ddim), (Text(12), Whole((10,))),
         IMAGE, config={"addition_embed_type": "text_time", "addition_time_embed_dim": 2,
                 "projection_class_embeddings_input_dim": 22}),
    Tiny("TextToVideoSDPipeline", "UNet3DConditionModel", with_vae(latent_2d, ddim), (Text(12),), (3, 16, 32)),
    Tiny("AnimateDiffPipeline", "UNetMotionModel", with_vae(latent_2d, ddim), (Text(12),), (3, 16, 32)),
    Tiny("I2VGenXLPipeline", "I2VGenXLUNet",
         lambda: {**eyes("CLIPVisionModelWithProjection", "feature_extractor"), "vae": latent_2d(),
                  "scheduler": ddim()},
         (images, Text(12)), (3, 16, 32), batched=False),
    Tiny("StableVideoDiffusionPipeline", "UNetSpatioTemporalConditionModel",
         lambda: {**eyes("CLIPVisionModelWithProjection", "feature_extractor", 224),
                  "vae": diffusers.AutoencoderKLTemporalDecoder(
                      down_block_types=["DownEncoderBlock2D"] * 2, block_out_channels=[32, 32]),
                  "scheduler": diffusers.EulerDiscreteScheduler()},
         (images,), (3, 16, 32), guide=by_frame),
    Tiny("AmusedPipeline", "UVit2DModel",
         lambda: {"vqvae": diffusers.VQModel(
             down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
             block_out_channels=[8, 8], latent_channels=4, norm_num_groups=4, vq_embed_dim=4, num_vq_embeddings=16,
             lookup_from_codebook=True), "scheduler": diffusers.AmusedScheduler(mask_token_id=19)},
         (Text(12, name="encoder_hidden_states"), Whole((8,), "prompt_embeds")), IMAGE, batched=False),
    Tiny("WanPipeline", "WanTransformer3DModel", with_vae(latent_wan), (Text(10),), CLIP),
    Tiny("WanImageToVideoPipeline", "WanTransformer3DModel", 
         lambda: {**eyes("CLIPVisionModel", "image_processor"), "vae": latent_wan(), "scheduler": flow()},
         (Text(10, length=512),), CLIP, options={"image": picture(16, 32)},
         config={"in_channels": 10, "image_dim": 8, "added_kv_proj_dim": 24}),
    Tiny("WanVACEPipeline", "WanVACETransformer3DModel", with_vae(latent_wan), (Text(10),), CLIP,
         config={"vace_in_channels": 12}, batched=False),
    Tiny("WanAnimatePipeline", "WanAnimateTransformer3DModel",
         lambda: {**eyes("CLIPVisionModel", "image_processor"), "vae": latent_wan(4, 3), "scheduler": flow()},
         (Text(10),), (5, 32, 48), sides=("segment_frame_length", "height", "width"),
         options={"image": picture(32, 48), "pose_video": [picture(32, 48, f"pose {i}") for i in range(5)],
                  "face_video": [picture(16, 16, f"face {i}") for i in range(5)]}),
    Tiny("ZImagePipeline", "ZImageTransformer2DModel", with_vae(latent_2d), (Texts(12),), IMAGE, scales=(0.0, 2.0, 4.0),
         ragged=True),
)  # fmt: skip

# The pipelines of diffusers around such a model that are not in the table, by folder and name: a pattern, and why.
OTHERS = {
    r"deprecated/\w+|kandinsky/\w+|(ddim|consistency_models|latent_diffusion)/\w+": "old",
    r"\w+/\w*(Img2Img|Inpaint|Inpainting|VideoToVideo|Depth2Img|Upscale|SuperResolution|Fill)\w*": (
        "calls its model as the pipeline of text does, from other latents or beside more channels"
    ),
    r"\w+/\w*(ImageToVideo|VideoToWorld|Image2Video|I2V|I2I|T2I|LTX2?Condition|DFR|HDR|InContext)\w*": (
        "calls its model as the pipeline of text does, from a first frame or other ones, or with one frame"
    ),
    r"(pag|t2i_adapter|controlnet\w*)/\w+|\w+/\w*(Controlnet|ControlNet|Adapter)\w*": (
        "what comes in beside the layers, or looks into them: docs/swap.md, and tests/swap/test_interfaces.py"
    ),
    r"\w+/\w*(Control|Transfer)Pipeline|\w+/\w*(FunControl|InstructPix2Pix)\w*": (
        "calls its model as the pipeline of text does, beside channels of what controls it"
    ),
    r"\w+/\w*(Edit|EditPlus|Kontext|Layered|Omni|VisualCloze\w*|KV|Flux2)Pipeline": (
        "puts other images into the sequence, which a swapped model refuses; or draws as a row of the table does"
    ),
    r"(kolors|latent_consistency_models|marigold|ledits_pp|deepfloyd_if|kandinsky2_2|stable_diffusion|lucy)/\w+": (
        "calls a U-Net or a Wan as a row of the table does, with other text or images around it"
    ),
    r"animatediff/\w+SDXLPipeline|pixart_alpha/PixArtAlphaPipeline|cosmos/Cosmos2_5_PredictBasePipeline": (
        "calls its model as a row of the table does, with sizes or an encoder of its own"
    ),
    r"skyreels_v2/SkyReelsV2DiffusionForcingPipeline": "has frames at times of their own, in blocks that may be causal",
    r"hunyuan_image/HunyuanImageRefinerPipeline": "gives its model frames, which a swapped one refuses",
}
# The models that no pipeline of diffusers is for.
NONE = {"Flux3Transformer2DModel": "modular blocks draw with it, which are no DiffusionPipeline"}
