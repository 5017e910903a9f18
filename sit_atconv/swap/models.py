"""What diffusers' models with ATConv in place of attention have in common: `swap_attention` makes them, and
`from_pretrained` reads them.

Each is the original class with one more configuration entry, `atconv` (see `swap_attention`), by which its constructor
swaps the layers before weights are loaded.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from torch import nn

from sit_atconv.runtime import limits
from sit_atconv.runtime.compat.diffusers import fetch_lora
from sit_atconv.runtime.errors import InputError, said
from sit_atconv.runtime.reading import read_json
from sit_atconv.swap.adapters import Example, SwapAdapter, register_adapter
from sit_atconv.swap.grafts import Graft
from sit_atconv.swap.grid import Reader, latent_grid, volume_grid
from sit_atconv.swap.marking import THIN, check_thin, mark_thin
from sit_atconv.swap.stored import install

# Of a config.json, how many layers its model is made of, one after the other, see `reading.parse_json`.
LAYERS = range(limits.BLOCKS.most + 1)
CONFIG_FORM = {
    "num_layers?": (LAYERS, None), "num_single_layers?": (LAYERS, None), "layers_per_block?": (LAYERS, [LAYERS]),
    "transformer_layers_per_block?": (LAYERS, [object]), "num_refiner_layers?": (LAYERS, None),
    "num_mmdit_layers?": (LAYERS, None), "num_single_dit_layers?": (LAYERS, None), "n_layers?": (LAYERS, None),
    "n_refiner_layers?": (LAYERS, None), "approximator_layers?": (LAYERS, None),
    "num_visual_blocks?": LAYERS, "num_text_blocks?": LAYERS, "vace_layers?": [LAYERS], "LFE_depth?": LAYERS,
    "LFE_num_scale?": LAYERS, "atconv?": dict,
}  # fmt: skip

logger = logging.get_logger(__name__)


class Swapped:
    """What the subclasses add to a model of diffusers, found as the next class in their bases."""

    _cp_plan = None  # neither context nor tensor parallelism knows the swapped layers
    _tp_plan = None
    _keys_to_ignore_on_load = ("pos_embed.pos_embed",)  # buffers that a constructor makes anew

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if Swapped not in cls.__bases__:  # a class of others that derives from a subclass, as FSDP2 makes one
            return
        base = next(each for each in cls.__bases__ if issubclass(each, nn.Module))

        def __init__(self, *args, atconv: dict | None = None, **kwargs):
            if atconv is None:
                raise InputError(
                    f"{cls.__name__} needs atconv, which names its swapped layers; make one of a {base.__name__} by "
                    "sit_atconv.swap_attention(model)"
                )
            base.__init__(self, *args, **kwargs)
            self.register_to_config(atconv=atconv)
            install(self, base, atconv)

        signature = inspect.signature(base.__init__)
        entry = inspect.Parameter("atconv", inspect.Parameter.KEYWORD_ONLY, default=None)
        __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), entry])
        cls.__init__ = __init__
        cls.__module__ = "sit_atconv"  # a pipeline's model_index.json names it, and `import sit_atconv` is all it takes
        THIN[base] = cls

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' `from_pretrained`, and strict. Raises InputError for missing, surplus or misshapen weights, and
        for a config.json that is none, or makes no model."""
        wanted = kwargs.pop("output_loading_info", False)
        if kwargs.pop("use_safetensors", None) is False:
            raise InputError("use_safetensors=False: weights that are unpickled can run code; give safetensors files")
        file = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "config.json")
        try:
            if file.is_file():
                read_json(file, CONFIG_FORM)
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, output_loading_info=True, use_safetensors=True, **kwargs
            )
        except (OSError, InputError):  # OSError: it is not there
            raise
        except Exception as error:  # options of any kind: diffusers and torch refuse them in every way there is
            raise InputError(
                f"{pretrained_model_name_or_path}: no {cls.__name__} can be made of it: {said(error)}"
            ) from None
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            keys = [key for key in info.get(what) or () if key not in cls._keys_to_ignore_on_load]
            if keys:
                raise InputError(
                    f"{pretrained_model_name_or_path}: {what.replace('_', ' ')} {keys[:3]} ({len(keys)} in all); these "
                    f"are not the weights of this {cls.__name__}, or not all of them"
                )
        return (model, info) if wanted else model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As diffusers' own. Raises InputError where `from_pretrained` would not read the weights: adapters, an
        IP-Adapter and fused projections bring others than the configuration tells of."""
        with torch.device("meta"):
            wanted = type(self).from_config(self.config).state_dict().keys()
        found = {name for name, each in self.state_dict().items() if type(each) is torch.Tensor}
        if getattr(self, "hf_quantizer", None) is None and wanted != found:
            name = min(wanted ^ found)
            raise InputError(
                f"save_pretrained: {name} is {'new' if name in found else 'gone, or no plain tensor any more'}, and "
                f"from_pretrained of {type(self).__name__} would not read these weights ({len(wanted ^ found)} such in "
                "all); save before quantising or sharding, without adapters (unload_lora, a pipeline's "
                "unload_ip_adapter)"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def set_attention_backend(self, backend: str) -> None:
        """As diffusers' own, for the text's part of joint layers too."""
        super().set_attention_backend(backend)
        self._tell_backend(AttentionBackendName(backend.lower()))

    def reset_attention_backend(self) -> None:
        """As diffusers' own, for the text's part of joint layers too."""
        super().reset_attention_backend()
        self._tell_backend(None)

    def _tell_backend(self, backend: AttentionBackendName | None) -> None:
        for name in self.config["atconv"]["layers"]:
            if hasattr(layer := self.get_submodule(name), "backend"):
                layer.backend = backend

    def enable_parallelism(self, *args, **kwargs):
        raise InputError(f"{type(self).__name__} has no context or tensor parallelism: swapped layers need all tokens")


class TakesNoImagePrompt:
    """For the subclasses of models whose IP-Adapters work in the attention that is swapped: SD3, Flux's double blocks.

    diffusers counts the attentions that are there, and would give them the weights of others.
    """

    def _load_ip_adapter_weights(self, *args, **kwargs):
        for name in self.config["atconv"]["layers"]:
            if not name.startswith("single_transformer_blocks."):
                raise InputError(
                    f"an IP-Adapter works in the attention {name}, which is swapped; use it with the unswapped model"
                )
        super()._load_ip_adapter_weights(*args, **kwargs)


class TakesLoRA:
    """For the subclasses of models that load LoRAs themselves."""

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict, prefix="transformer", metadata=None, **kwargs):
        """As diffusers' own, for a LoRA of the unswapped model: says which maps are no more, and leaves them out."""
        where = (
            "weight_name", "use_safetensors", "local_files_only", "cache_dir", "force_download", "proxies", "token",
            "revision", "subfolder",
        )  # fmt: skip
        kwargs.setdefault("use_safetensors", True)
        state, metadata = fetch_lora(
            pretrained_model_name_or_path_or_dict,
            **{name: kwargs.pop(name, None) for name in where},
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            metadata=metadata,
        )
        if not any("lora_A" in key or "lokr_" in key for key in state):
            state = convert_unet_state_dict_to_peft(state)  # as diffusers would, for the names of older LoRAs
        gone = {key: name for key in state if (name := self._gone_map(key, prefix)) is not None}
        if gone:
            maps = sorted(set(gone.values()))
            more = f", ... ({len(maps)} in all)" if len(maps) > 4 else ""
            logger.warning(
                f"left out {len(gone)} tensors of the LoRA, for maps that swapped layers do not have: "
                f"{', '.join(maps[:4])}{more}"
            )
        state = {key: tensor for key, tensor in state.items() if key not in gone}
        return super().load_lora_adapter(state, prefix=prefix, metadata=metadata, **kwargs)

    def _gone_map(self, key: str, prefix: str | None) -> str | None:
        """The map that a tensor of a LoRA is for, if that is one that a swapped layer does not have."""
        if prefix is not None and not key.startswith(f"{prefix}."):
            return None
        name = key.removeprefix(f"{prefix}.") if prefix is not None else key
        layer = next((each for each in self.config["atconv"]["layers"] if name.startswith(f"{each}.")), None)
        if layer is None:
            return None
        for known, module in self.get_submodule(layer).named_modules(prefix=layer):
            if known != layer and not isinstance(module, nn.ModuleList) and name.startswith(f"{known}."):
                return None
        return re.split(r"\.(?:lora|lokr)_", name)[0]


BLOCK = r"transformer_blocks\.\d+\."  # in the patterns of an adapter: a block of most transformers


def register(
    model: type[nn.Module],
    sites: Mapping[str, Graft],
    example: Example,
    tiny: Callable[[], nn.Module],
    owner: type[nn.Module] | None = None,
    grid: Reader | None = None,
    sides: int = 2,
    **others,
) -> None:
    """Register the adapter of a model of diffusers that has an ATConv subclass. owner: by default the model itself;
    grid: by default `latent_grid`, or of three sides `volume_grid`. others: of `SwapAdapter`."""
    grid = grid or (volume_grid if sides == 3 else latent_grid)
    marks = {"mark": mark_thin, "check": check_thin}
    register_adapter(
        SwapAdapter(model, sites, owner or model, grid, example, tiny=tiny, sides=sides, **marks, **others)
    )
