"""Flow matching: a SiT learns the velocity from noise to latents, and averages of it are kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from sit_atconv.config import Recipe
from sit_atconv.data.samples import Batch, TrainingSamples, ValidationSamples
from sit_atconv.flow.loss import flow_loss
from sit_atconv.flow.path import PATHS
from sit_atconv.models.cost import count_macs
from sit_atconv.models.sit import SiTTransformer2DModel, create_model
from sit_atconv.runtime.devices import computing, import_compiler
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.fields import idle
from sit_atconv.runtime.limits import check_kernel
from sit_atconv.training.checkpoint import load_weights, write_pretrained
from sit_atconv.training.ema import Averages
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives.objective import Forward, Objective
from sit_atconv.training.optimizer import learning_rate, make_optimizer
from sit_atconv.training.origin import Origin


def build_model(recipe: Recipe, facts: Facts) -> SiTTransformer2DModel:
    """The recipe's model for these facts, with the weights that `run.seed` draws.

    Raises InputError for options that do not make a model.
    """
    channels, height, width = facts.latent_shape
    options = recipe.model.options() | {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "num_classes": facts.num_classes,
        "path": recipe.flow.path,
        "prediction": recipe.flow.prediction,
        "use_meanflow": recipe.meanflow.share is not None,
        "trained_guidance": recipe.meanflow.guidance.scale,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.run.seed)
        model = create_model(recipe.model.name, **options)
    check_kernel("model.kernel_size", recipe.model.kernel_size, model.grid)
    return model


class FlowObjective(Objective):
    """The flow-matching loss of a SiT, see `flow_loss`. Other objectives of latents add to it.

    origin: of `train.init`, whose options the recipe has, see `Origin.completed`. A plan makes it on the meta device.
    `open` comes before training.
    """

    write, load = staticmethod(write_pretrained), staticmethod(load_weights)
    with_image = False  # whether the losses need images besides their latents
    besides = ""  # what a plan says of memory that it does not count

    def __init__(self, recipe: Recipe, facts: Facts, origin: Origin | None = None):
        if recipe.data.source is not None and not self.with_image:
            raise InputError(
                f"data.source={recipe.data.source!r}: only a loss that looks at images needs them; "
                f"{idle('data.source')}, or name repa.encoder"
            )
        self.recipe, self.facts, self.origin = recipe, facts, origin
        self.path = PATHS[recipe.flow.path]()
        self.steps, self.weights = recipe.train.max_steps, {"loss": 1.0}
        self.model = self.trained = self._make_model()
        if origin is not None:
            origin.check(recipe, self.model)

    def _make_model(self) -> SiTTransformer2DModel:
        return build_model(self.recipe, self.facts)

    def rows(self) -> dict[str, str]:
        """What a plan says of this objective alone: text by name."""
        return {} if self.origin is None else {"init": self.origin.row()}

    def open(self, codec: nn.Module) -> None:
        """Take the codec of images and latents, and load what a plan does without."""
        self.codec = codec

    def describe(self) -> dict[str, Any]:
        """What a manifest records of other networks, by their names in `objectives.FROZEN`."""
        return {} if self.origin is None else {"init": self.origin.record}

    @property
    def frozen(self) -> list[nn.Module]:
        return [self.codec]

    @property
    def flops_per_image(self) -> float | None:
        return 3 * 2 * count_macs(self.model)  # forward, and twice that backward

    def make_samples(self, dataset: Dataset) -> TrainingSamples:
        """What the steps are made of."""
        shape, drop = self.facts.latent_shape, self.model.config.class_dropout_prob
        return TrainingSamples(dataset, shape, self.recipe, drop, self.codec.draws_posterior, self.with_image)

    def make_validation_samples(self, held_out: Dataset) -> ValidationSamples:
        """What `held_out_loss` is taken of: as many of the held-out images as the recipe says."""
        shape, times, number = self.facts.latent_shape, self.recipe.flow.times(), self.recipe.validation.num
        return ValidationSamples(held_out, shape, times, self.codec.draws_posterior, number)

    def begin(self, samples: TrainingSamples, checkpoint: Path | None) -> None:
        if checkpoint is None:
            self._start(samples)
        else:
            self._load(checkpoint)
        self.averages = Averages(self.model, self.recipe.ema)
        if checkpoint is not None:
            for name, average in self.averages.models.items():
                self.load(checkpoint / name, average)

    def _start(self, samples: TrainingSamples) -> None:
        """What a new run does to the weights before its first step."""
        if self.origin is not None:
            self.origin.give(self.recipe, self.model, self.codec.describe())

    def _load(self, checkpoint: Path) -> None:
        self.load(checkpoint / "model", self.model)

    def make_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        return make_optimizer(self.trained, self.recipe.train, fused)

    def prepare(self) -> None:
        if self.recipe.train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if self.recipe.train.compile:
            import_compiler()
            self.model.compile_repeated_blocks()

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        rate = self.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def learning_rate(self, step: int) -> float:
        """Of all that a step (0-based) trains."""
        return learning_rate(step, self.recipe.train)

    def losses(self, batch: Batch, forward: Forward) -> list[torch.Tensor | None]:
        return [self.held_out_loss(batch, forward)]

    def held_out_loss(self, batch: Batch, forward: Forward) -> torch.Tensor:
        """(B,): the flow loss of a SiT, the trained one or an average of it, which all objectives validate."""

        def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return forward(x, t, batch["label"], return_dict=False)[0]

        return self.flow_loss(network, self.encode(batch), batch)

    def encode(self, batch: Batch) -> torch.Tensor:
        """The latents (B, C, H, W) of a batch, fp32; an autoencoder computes in `latents.precision`."""
        with computing(self.recipe.encoding_precision, batch["noise"].device):
            return self.codec.encode(batch["image"], batch.get("posterior"))

    def flow_loss(
        self, network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], latents: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """(B,): see `sit_atconv.flow.loss.flow_loss`, at the batch's times and noise."""
        flow = self.recipe.flow
        return flow_loss(network, self.path, latents, batch["noise"], batch["t"], flow.prediction, flow.loss_weight)
