"""What diffusers' pipelines offer for LoRAs, for one whose transformer alone has any."""

from pathlib import Path
from typing import Any

from sit_atconv.runtime.adapters import ADAPTERS, check_whole


class TakesLora:
    """A pipeline whose `transformer` takes adapters, which peft puts in; see diffusers' LoRA loaders."""

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **options) -> None:
        """Put the adapters of a folder, a file, a repository of the Hub, or of tensors by name, on the transformer.

        source: such as the ema/ of a run's checkpoint. Names begin with "transformer.". options: as diffusers'
        `load_lora_adapter` takes them. Raises InputError for a LoRA with parts that were drawn anew: make the pipeline
        by `from_run` then.
        """
        if isinstance(source, str | Path):
            check_whole(Path(source) / ADAPTERS if Path(source).is_dir() else Path(source))
        options.setdefault("use_safetensors", True)
        self.transformer.load_lora_adapter(source, adapter_name=adapter_name, **options)

    def unload_lora_weights(self) -> None:
        """Take all adapters off again."""
        self.transformer.unload_lora()

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Add the adapters, times lora_scale, to the weights."""
        self.transformer.fuse_lora(lora_scale)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`."""
        self.transformer.unfuse_lora()

    def set_adapters(self, names: str | list[str], weights: float | list[float] | None = None) -> None:
        """Which adapters act, and how much each counts."""
        self.transformer.set_adapters(names, weights)
