"""What training minimises: an object for each kind, which one loop runs.

A new kind of what a SiT learns is a file here, and a row in KINDS; `classification.objective` is another trainer's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from sit_atconv.config import Recipe

if TYPE_CHECKING:
    from sit_atconv.training.objectives.flow import FlowObjective


@dataclass(frozen=True)
class Kind:
    """A kind of objective: where its class is, and whether a recipe asks for it.

    frozen: a network with weights of its own that it looks at, by its names in a manifest and in a recipe.
    """

    place: str
    asked: Callable[[Recipe], bool]
    frozen: tuple[str, str] | None = None


KINDS = (
    Kind("repa:RepaObjective", lambda recipe: recipe.repa.encoder is not None, ("encoder", "repa.encoder")),
    Kind("distill:DistillObjective", lambda recipe: recipe.distill.teacher is not None, ("teacher", "distill.teacher")),
    Kind("lora:LoraObjective", lambda recipe: recipe.lora.rank is not None),
    Kind(
        "meanflow:MeanFlowObjective",
        lambda recipe: recipe.meanflow.share is not None,
        ("meanflow_teacher", "meanflow.teacher"),
    ),
    Kind("flow:FlowObjective", lambda recipe: True),
)
# What a run is made of beside its recipe, by its name in a manifest and in a recipe: it may lie elsewhere today.
FROZEN = {"init": "train.init"} | dict(kind.frozen for kind in KINDS if kind.frozen)


def objective_of(recipe: Recipe) -> "type[FlowObjective]":
    """The class of the first kind that the recipe asks for. It is imported now: some need seconds."""
    module, name = next(kind for kind in KINDS if kind.asked(recipe)).place.split(":")
    return getattr(import_module(f"{__name__}.{module}"), name)
