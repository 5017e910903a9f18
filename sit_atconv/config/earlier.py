"""What was stored before stored recipes held every value that a run ran with."""

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from sit_atconv.runtime.fields import WHEN

# What null stood for then, by the name of a setting that acts. It never changes, whatever the defaults become.
MEANT = {
    "split": "train", "val_split": "validation", "image_key": "image", "label_key": "label", "shuffle_buffer": 10_000,
    "time_mean": 0.0, "time_std": 1.0, "decay": 0.9999, "stds": [0.05, 0.1],
    "diffusion": "sigma", "diffusion_norm": 1.0, "last_step": "mean", "last_step_size": 0.04,
    "erasing_mode": "pixel", "mix_prob": 1.0, "switch_prob": 0.5, "warmup_lr": 1e-6,
}  # fmt: skip

# What a key means where it is not there, by its name, since that version did not have it yet.
LEFT_OUT = {"background": None}


def by_section(schema: type, value_of: Callable[[dataclasses.Field], Any]) -> dict[str, Any]:
    """What a function gives for the settings of a schema, in its sections; those left out that it gives MISSING for."""
    found = {}
    for entry in dataclasses.fields(schema):
        inner = by_section(entry.type, value_of) if dataclasses.is_dataclass(entry.type) else value_of(entry)
        found |= {} if inner is dataclasses.MISSING else {entry.name: inner}
    return found


def left_out(schema: type) -> dict[str, Any]:
    """The keys of LEFT_OUT that a schema has, in its sections, with what they mean where they are not there."""
    return by_section(schema, lambda entry: LEFT_OUT.get(entry.name, dataclasses.MISSING))


def meant(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the nulls among a stored recipe's values, or those of a section, stand for: those that act alone."""
    found = {}
    for entry in dataclasses.fields(schema):
        value, when = values[entry.name], entry.metadata.get(WHEN)
        if dataclasses.is_dataclass(entry.type):
            found[entry.name] = meant(entry.type, value)
        elif value is None and entry.name in MEANT and when is not None and when.holds(SimpleNamespace(**values)):
            found[entry.name] = MEANT[entry.name]
    if "latents" in found and values["latents"]["precision"] is None:
        found["latents"]["precision"] = _encoding_precision(values)
    return found


def _encoding_precision(recipe: Mapping[str, Any]) -> str | None:
    """Of the autoencoder in a training step, before it had one of its own: that of the step, but no autocast."""
    if recipe["latents"]["codec"] != "vae" or recipe["data"]["kind"] == "latents":
        return None
    return "tf32" if recipe["train"]["precision"] == "tf32" else "fp32"
