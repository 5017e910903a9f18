"""LoRA: adapters of a model's linear layers are trained, by the flow loss, and nothing else but what is drawn anew."""

from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sit_atconv import config
from sit_atconv.models.cost import count_macs
from sit_atconv.models.fitting import is_named
from sit_atconv.models.lora import targets
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime import sharding
from sit_atconv.runtime.errors import InputError
from sit_atconv.training.checkpoint import Part, load_adapted_tensors, write_adapted
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.origin import Origin


def attach(model: SiTTransformer2DModel, layers: list[str], settings: config.Lora, seed: int) -> None:
    """Give the layers adapters, which do nothing yet, and freeze all else. A is drawn from the seed alone.

    Raises InputError without peft.
    """
    if find_spec("peft") is None:
        raise InputError("lora.rank needs peft, which is not installed: pip install 'sit_atconv[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    own_seed = np.random.SeedSequence(seed, spawn_key=(2,)).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(own_seed))
        inject_adapter_in_model(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=layers), model)


class Shown(nn.Module):
    """Some of a model's parameters as a module of their own, under their names there: what is stored of the model."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        super().__init__()
        for name in names:
            *above, last = name.split(".")
            place = self
            for part in above:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, model.get_parameter(name))


class LoraObjective(FlowObjective):
    """The flow loss of a model whose weights are those of `train.init`, and whose adapters alone are trained.

    Parts that are drawn anew are trained with them, as a whole. A checkpoint holds what is trained.
    Raises InputError where a target is no linear layer of the model, or none is left.
    """

    no_fsdp = "lora.rank is not for FSDP, which has nothing to cut: what is trained is small; use DDP"

    def __init__(self, recipe: config.Recipe, facts: Facts, origin: Origin):
        super().__init__(recipe, facts, origin)
        self.macs, anew = count_macs(self.model), recipe.train.init_anew
        drawn = {name for name in self.model.state_dict() if is_named(name, anew)}
        # A layer of which one tensor is drawn anew has no adapter: what is trained as a whole needs none.
        self.layers = [
            each for each in targets(self.model, recipe.lora.targets)
            if drawn.isdisjoint((f"{each}.weight", f"{each}.bias"))
        ]  # fmt: skip
        if not self.layers:
            raise InputError(
                f"lora.targets={recipe.lora.targets} are all drawn anew, and trained as a whole; name others"
            )
        attach(self.model, self.layers, recipe.lora, recipe.run.seed)
        for name, parameter in self.model.named_parameters():
            if name in drawn:
                parameter.requires_grad_()
        self.names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def rows(self) -> dict[str, str]:
        settings, of = self.recipe.lora, list(self.model.parameters())
        own, whole = (sum(each.numel() for each in some) for some in ([p for p in of if p.requires_grad], of))
        said = f"rank {settings.rank}, alpha {settings.alpha:g}, of {len(self.layers)} layers"
        return {**super().rows(), "LoRA": f"{said}; trained {_millions(own)} of {_millions(whole)} parameters"}

    @property
    def flops_per_image(self) -> float:
        return 2 * 2 * self.macs  # forward, and once that backward: the gradient of what is frozen is not computed

    def open(self, codec: nn.Module) -> None:
        super().open(codec)
        super()._start(None)  # a checkpoint holds none of these weights

    def _start(self, samples) -> None:
        """Adapters begin as they were drawn."""

    def load(self, folder: Path, into: SiTTransformer2DModel) -> None:
        sharding.load_full(Shown(into, self.names), load_adapted_tensors(folder))

    def parts(self) -> list[Part]:
        settings = self.recipe.lora
        models = {"model": self.model, **self.averages.models}
        return [
            Part(name, Shown(each, self.names), partial(write_adapted, each.config, settings.rank, settings.alpha))
            for name, each in models.items()
        ]


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number / 1e6:.3f} M"
