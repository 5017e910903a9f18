"""The classes that `swap_attention` does not take, of the libraries that it knows, and why."""

import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

# Of diffusers: transformers and U-Nets. The words complete "CLASS ...".
DIFFUSERS = {
    "AceStepTransformer1DModel": "is of sound",
    "AnyFlowFARTransformer3DModel": "is causal over chunks of frames, with a cache of their keys",
    "BriaFibo2Transformer2DModel": "has several images in one sequence: the context's beside the one to draw",
    "Cosmos3OmniTransformer": "packs text, images, video and actions into one sequence",
    "DreamLiteTransformer2DModel": "is a part of DreamLiteUNetModel",
    "DreamLiteUNetModel": "has the image to edit beside the one to draw, in one map, where they are no neighbours",
    "GlmImageTransformer2DModel": "has a cache of the keys of other images in its attention",
    "HeliosTransformer3DModel": "has frames of other resolutions in one sequence",
    "HiDreamImageTransformer2DModel": "has text of three encoders in one sequence, with images padded to one length",
    "HunyuanVideoFramepackTransformer3DModel": "has frames of other resolutions in one sequence",
    "Ideogram4Transformer2DModel": "packs several samples into one sequence",
    "JoyImageEditPlusTransformer3DModel": "has several images in one sequence, of any size",
    "JoyImageEditTransformer3DModel": "has several images in one sequence, as frames",
    "Kandinsky6SRTransformer3DModel": "has sparse attention over blocks of tokens already",
    "LongCatAudioDiTTransformer": "is of sound",
    "LuminaNextDiT2DModel": "has one output map for its self-attention and its attention to text, in the latter",
    "MiniMaxH3Transformer3DModel": "packs text, references, sound and video into one sequence",
    "MiniMaxMusic3RVQDepthDecoder": "is of sound",
    "MiniMaxMusic3Transformer1DModel": "is of sound",
    "MotionAdapter": "attends over time alone, where tokens have no neighbours in space",
    "NucleusMoEImageTransformer2DModel": "has keys of the text in the softmax of image queries, without text queries",
    "OmniGenTransformer2DModel": "has several images in one sequence, under a mask that is causal for text",
    "PRXTransformer2DModel": "has keys of the text in the softmax of image queries, without text queries",
    "PriorTransformer": "has one token for the whole image",
    "QwenImage21Transformer2DModel": "has several images in one sequence, under a mask that is causal over them",
    "RFD4ProteinaTransformer": "is of proteins",
    "SanaTransformer2DModel": "has linear attention already",
    "SanaVideoTransformer3DModel": "has linear attention already",
    "SanaWMLTX2RefinerTransformer3DModel": "has references of a camera beside the video in one sequence",
    "SanaWMTransformer3DModel": "has linear attention already, and softmax over tokens of a camera",
    "StableAudio3DiTModel": "is of sound",
    "StableAudioDiTModel": "is of sound",
    "StableCascadeUNet": "has keys of the text in the softmax of image queries, without text queries",
    "T5FilmDecoder": "is of sound",
    "Transformer2DModel": "is a part of U-Nets, which are taken",
    "TransformerTemporalModel": "attends over time alone, where tokens have no neighbours in space",
    "UNet1DModel": "is of one dimension",
    "WanAnimate2Transformer3DModel": "has keys of another pass, from a cache, in its softmax",
}
WINDOWS = "attends within windows: local already"
POOLED = "has fewer keys than queries: pooled or strided ones"
LINEAR = "has attention that is linear in the tokens already"
STAGES = "has convolutional stages, and softmax over the few tokens of the last ones by a class of its own"
PACKED = "packs or pads patches of images of any size into one sequence"
# Of timm: what has attention.
TIMM = {
    "ByobNet": STAGES,
    "CPUBone": POOLED,
    "CSATv2": STAGES,
    "Cait": "mixes its heads before and after the softmax",
    "CoaT": LINEAR,
    "ConVit": "has a gate between positions and content in its softmax",
    "CrossVit": "has two grids of patches, which attend to each other",
    "DaVit": WINDOWS,
    "DeepseekVitClassifier": PACKED,
    "DeepseekVitEncoder": PACKED,
    "EdgeNeXt": LINEAR,
    "EfficientFormer": STAGES,
    "EfficientFormerV2": STAGES,
    "EfficientViM": "has no attention between tokens",
    "EfficientViMDistilled": "has no attention between tokens",
    "EfficientVit": LINEAR,
    "EfficientVitLarge": LINEAR,
    "EfficientVitMsra": WINDOWS,
    "FastVit": STAGES,
    "Gemma4VitClassifier": PACKED,
    "Gemma4VitEncoder": PACKED,
    "GhostNet": "has no attention between tokens",
    "GlobalContextVit": WINDOWS,
    "Hiera": WINDOWS,
    "HieraDet": WINDOWS,
    "IFormer": STAGES,
    "Levit": STAGES,
    "LevitDistilled": STAGES,
    "LowFormer": POOLED,
    "MaxxVit": WINDOWS,
    "MetaFormer": STAGES,
    "MlpMixer": "has no attention between tokens",
    "MultiScaleVit": POOLED,
    "NaFlexVit": PACKED,
    "Nest": WINDOWS,
    "NextViT": POOLED,
    "NormFreeNet": "has no attention between tokens",
    "PyramidVisionTransformerV2": POOLED,
    "Qwen3VitClassifier": PACKED,
    "Qwen3VitEncoder": PACKED,
    "ResNet": "has no attention between tokens",
    "SHViT": STAGES,
    "SwiftFormer": LINEAR,
    "SwinTransformer": WINDOWS,
    "SwinTransformerV2": WINDOWS,
    "SwinTransformerV2Cr": WINDOWS,
    "TNT": "has two grids of patches, which attend to each other",
    "TinyVit": WINDOWS,
    "Twins": WINDOWS,
    "VOLO": STAGES,
    "VisionTransformerSAM": WINDOWS,
    "Visformer": STAGES,
    "Xcit": LINEAR,
}
BESIDE = "has a model of text beside that of images: swap its `vision_model`, which is taken"
NONE = "has no attention between tokens"
# Of transformers: the models of images that it classifies by.
TRANSFORMERS = {
    "BeitModel": "has relative positions of its own form in every layer; timm's Beit is taken",
    "BitModel": NONE,
    "CLIPModel": BESIDE,
    "ConvNextModel": NONE,
    "ConvNextV2Model": NONE,
    "CvtModel": POOLED,
    "Data2VecVisionModel": "has relative positions of its own form in every layer; timm's Beit is taken",
    "DinatModel": WINDOWS,
    "DonutSwinModel": WINDOWS,
    "EfficientNetModel": NONE,
    "FocalNetModel": NONE,
    "HieraModel": WINDOWS,
    "HGNetV2Backbone": NONE,
    "ImageGPTModel": "is causal",
    "LevitModel": STAGES,
    "MetaClip2Model": BESIDE,
    "MobileNetV1Model": NONE,
    "MobileNetV2Model": NONE,
    "MobileViTModel": "attends among equal places of patches, which are no neighbours",
    "MobileViTV2Model": LINEAR,
    "PerceiverModel": "has latents that attend, and no grid",
    "PoolFormerModel": NONE,
    "PvtModel": POOLED,
    "PvtV2Model": POOLED,
    "RegNetModel": NONE,
    "ResNetModel": NONE,
    "SegformerModel": POOLED,
    "Siglip2Model": PACKED,
    "SiglipModel": BESIDE,
    "SwiftFormerModel": LINEAR,
    "Swinv2Model": WINDOWS,
    "SwinModel": WINDOWS,
    "TextNetModel": NONE,
    "TimmWrapperModel": "is a model of timm: swap its `timm_model`",
}
REFUSED = {"diffusers": DIFFUSERS, "timm": TIMM, "transformers": TRANSFORMERS}


def refusal_of(cls: type[nn.Module]) -> str | None:
    """Why a class is not taken, in words that complete "CLASS ..."; None where nothing is known of it."""
    return REFUSED.get(cls.__module__.partition(".")[0], {}).get(cls.__name__)


def candidates() -> dict[str, dict[str, type[nn.Module]]]:
    """By library, the classes that a swap might be asked for, by name: diffusers' transformers and U-Nets, timm's
    models with attention in their module, and transformers' models of images to classify, where it is installed."""
    return {
        "diffusers": dict(_of_diffusers()),
        "timm": dict(_of_timm()),
        "transformers": dict(_of_transformers()),
    }


def _of_diffusers() -> Iterator[tuple[str, type[nn.Module]]]:
    for place in ("diffusers.models.transformers", "diffusers.models.unets"):
        package = import_module(place)
        for found in pkgutil.iter_modules(package.__path__):
            module = import_module(f"{place}.{found.name}")
            for name, cls in inspect.getmembers(module, inspect.isclass):
                if cls.__module__ == module.__name__ and issubclass(cls, ModelMixin):
                    yield name, cls


def _of_timm() -> Iterator[tuple[str, type[nn.Module]]]:
    models = import_module("timm.models")
    for found in pkgutil.iter_modules(models.__path__):
        if found.name.startswith("_") or found.name in ("hub", "layers", "registry"):  # earlier names of others
            continue
        module = import_module(f"timm.models.{found.name}")
        if re.search(r"softmax\(|scaled_dot_product|Attention", inspect.getsource(module)):
            for name, cls in inspect.getmembers(module, inspect.isclass):
                own = cls.__module__ == module.__name__ and issubclass(cls, nn.Module)
                if own and hasattr(cls, "forward_features"):
                    yield name, cls


def _of_transformers() -> Iterator[tuple[str, type[nn.Module]]]:
    try:
        library = import_module("transformers")
        auto = import_module("transformers.models.auto.modeling_auto")
    except ImportError:
        return
    names = {auto.MODEL_MAPPING_NAMES.get(kind) for kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
    for name in sorted(filter(None, names)):
        yield name, getattr(library, name)
