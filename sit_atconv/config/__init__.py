"""Recipes: their schema, how they are read, and what makes two of them the same run."""

from sit_atconv.config.identity import differences
from sit_atconv.config.reading import load_recipe, make_recipe, to_dict
from sit_atconv.config.schema import (
    DATA_KINDS,
    HUB,
    PARTS,
    Checkpoint,
    Data,
    Distill,
    Ema,
    Flow,
    Latents,
    Loading,
    Lora,
    Model,
    Optimisation,
    Preview,
    Recipe,
    Repa,
    Run,
    Score,
    Train,
    Validation,
)

__all__ = [
    "DATA_KINDS", "HUB", "PARTS", "Checkpoint", "Data", "Distill", "Ema", "Flow", "Latents", "Loading", "Lora", "Model",
    "Optimisation", "Preview", "Recipe", "Repa", "Run", "Score", "Train", "Validation", "differences",
    "load_recipe", "make_recipe", "to_dict",
]  # fmt: skip
