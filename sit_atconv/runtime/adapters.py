"""The files of a LoRA, by names that a pipeline knows too, which needs no more than this of them."""

from pathlib import Path

from sit_atconv.runtime.errors import InputError

ADAPTERS = "pytorch_lora_weights.safetensors"  # diffusers' name
ANEW = "anew.safetensors"  # beside it: tensors of the model that were trained as a whole, which diffusers ignores


def check_whole(file: Path) -> None:
    """Raise InputError where adapters alone are not what was trained, and the model would be another."""
    if file.with_name(ANEW).is_file():
        raise InputError(
            f"LoRA {str(file)!r}: {ANEW} beside it holds parts that were drawn anew and trained as a whole; take the "
            "run or its checkpoint, which has both"
        )
