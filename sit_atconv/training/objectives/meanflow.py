"""MeanFlow: a SiT learns the average velocity between two times, and draws images by one step, or few.

"Mean Flows for One-step Generative Modeling" (arXiv 2505.13447); with `meanflow.tangent=network` the change of the
average is taken along the network's own velocity, as in "Improved Mean Flows" (arXiv 2512.02012).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from sit_atconv import config
from sit_atconv.data.held_out import tell_of_share
from sit_atconv.data.samples import Batch, TrainingSamples
from sit_atconv.flow.meanflow import Guidance, change, meanflow_errors, weigh
from sit_atconv.layers.attention import Attention
from sit_atconv.models.cost import count_macs
from sit_atconv.runtime.compat.torch import load_forward_mode
from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError, named
from sit_atconv.runtime.processes import is_main
from sit_atconv.runtime.weights import digest_of
from sit_atconv.sampling.trained import check_classes, check_codec, open_guide
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.objectives.objective import Forward
from sit_atconv.training.origin import Origin

MATH_KERNEL = "the fused kernels of attention have no forward-mode derivative: plain attention takes their place there"


class MeanFlowObjective(FlowObjective):
    """The squared error of the average velocity, see `flow.meanflow.meanflow_errors`, weighed by itself.

    `loss` is its mean over the numbers of a sample, as of a flow; `weighted_loss` is what is minimised.
    Raises InputError for guidance without a null class, and for a teacher that does not fit.
    """

    no_fsdp = "meanflow.share is not for FSDP, whose shards have no forward-mode derivative; use DDP"

    def __init__(self, recipe: config.Recipe, facts: Facts, origin: Origin | None = None):
        super().__init__(recipe, facts, origin)
        settings = recipe.meanflow
        self.weights = {"loss": 0.0, "weighted_loss": 1.0}
        self.guidance = settings.guidance
        self.taught, self.teacher, self.digest = None, None, None
        if settings.teacher is not None:
            self._open_teacher()
        if self.guidance.rest and (self.teacher or self.model).null_label is None:
            raise InputError(
                f"meanflow.omega={settings.omega:g}, kappa={settings.kappa:g}: the rest to 1 is of no class, which "
                f"{'the teacher' if self.teacher else 'this model'} has not; state model.class_dropout_prob=0.1, or "
                "omega=1 and kappa=0"
            )

    def _open_teacher(self) -> None:
        stated = f"meanflow.teacher={self.recipe.meanflow.teacher!r}"
        with torch.device("cpu"):
            found = open_guide(self.recipe.meanflow.teacher, stated, self.model)
        if (predicts := found.model.config.prediction) != "velocity" or found.model.config.use_meanflow:
            predicts = "average velocities" if found.model.config.use_meanflow else predicts
            raise InputError(f"{stated} predicts {predicts}; give a flow that predicts the velocity, to be averaged")
        if found.model.null_label is None and self.model.null_label is not None:
            raise InputError(
                f"{stated} has no null class, and labels are dropped here: state model.class_dropout_prob=0, or give "
                "a teacher that was trained with class dropout"
            )
        tell_of_share(stated, found.manifest, self.recipe.data.held_out)
        self.taught, self.teacher, self.digest = found, found.model.eval(), digest_of(found.model.state_dict())

    def open(self, codec: nn.Module) -> None:
        super().open(codec)
        if self.taught is not None:
            with named(f"meanflow.teacher={self.recipe.meanflow.teacher!r}"):
                check_codec(self.taught.manifest.get("codec"), codec.describe())
        load_forward_mode()
        if self._heads and is_main():
            say(f"meanflow: {MATH_KERNEL}")

    def make_samples(self, dataset: Dataset) -> TrainingSamples:
        if self.taught is not None:
            with named(f"meanflow.teacher={self.recipe.meanflow.teacher!r}"):
                check_classes(self.taught.id2label, dataset.class_names)
        return super().make_samples(dataset)

    @property
    def _heads(self) -> int:
        """Heads of a layer of attention; 0 without one."""
        return max((each.num_heads for each in self.model.modules() if isinstance(each, Attention)), default=0)

    def rows(self) -> dict[str, str]:
        settings, train, scale = self.recipe.meanflow, self.recipe.train, self.guidance.scale
        said = f"{settings.share:.0%} of the samples with two times"
        said += f"; guidance {scale:g} is learned" if scale != 1 else ""
        said += f"; velocity of {settings.teacher}" if self.teacher else ""
        factor = self.flops_per_image / super().flops_per_image
        rows = {"MeanFlow": f"{said}; a step computes {factor:.2f} of the flow's"}
        if self._heads:
            tokens, some = math.prod(self.model.grid), train.batch_size / train.gradient_accumulation_steps
            scores = math.ceil(some * settings.share) * self._heads * tokens**2 * 4 / 2**20
            rows["without fused"] = (
                f"{MATH_KERNEL}; the scores of a layer ({tokens:,} x {tokens:,}) are {scores:,.2f} MiB for the samples "
                "with two times of a pass, over all processes, and their tangents as much, beside the factor above"
            )
        return {**super().rows(), **rows}

    @property
    def flops_per_image(self) -> float:
        """Of the network 3 evaluations forward and backward, 2 for a product with the Jacobian, and 1 for each velocity
        that guidance and tangent ask it for, or the teacher."""
        settings, source = self.recipe.meanflow, self.teacher or self.model
        asked = bool(self.teacher) + bool(settings.kappa) + bool(self.guidance.rest)
        own = 3 + settings.share * (2 + (settings.tangent == "network"))
        return 2 * (own * count_macs(self.model) + asked * count_macs(source))

    def describe(self) -> dict[str, Any]:
        taught = {"meanflow_teacher": {"sha256": self.digest}} if self.teacher else {}
        return {**super().describe(), **taught}

    @property
    def frozen(self) -> Sequence[nn.Module]:
        return [*super().frozen, *filter(None, [self.teacher])]

    def losses(self, batch: Batch, forward: Forward) -> list[torch.Tensor | None]:
        settings, labels = self.recipe.meanflow, batch["label"]
        t, s, apart = batch["t"], batch["s"], batch["apart"]
        latents = self.encode(batch)
        x = self.path.interpolate(latents, batch["noise"], t)

        def trained(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return forward(x, t, labels, return_dict=False, timestep_r=s)[0]

        # Beside what learns, everything is asked of the bare model, without a gradient.
        with torch.no_grad(), forward.autocast():
            velocity = self._velocity(latents, x, batch)

        def rate(apart: torch.Tensor) -> torch.Tensor:
            some = labels[apart]

            def average(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
                return self.model(x, t, some, return_dict=False, timestep_r=s)[0]

            here = x[apart], t[apart]
            with torch.no_grad(), forward.autocast(), torch.compiler.set_stance("force_eager"):
                along = velocity[apart] if settings.tangent == "sample" else average(*here, t[apart]).to(velocity.dtype)
                return change(average, *here, s[apart], along)

        errors = meanflow_errors(trained, rate, x, t, s, velocity, apart)
        return [errors.detach() / latents[0].numel(), weigh(errors, settings.power, settings.offset)]

    def _velocity(self, latents: torch.Tensor, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The velocity (B, C, H, W) of the target: the sample's or the teacher's, guided."""
        t, labels, source = batch["t"], batch["label"], self.teacher or self.model

        def of(labels: torch.Tensor) -> torch.Tensor:
            return source(x, t, labels, return_dict=False)[0].to(x.dtype)

        v = of(labels) if self.teacher else self.path.velocity(latents, batch["noise"], t)
        if self.guidance == Guidance():
            return v
        none = source.null_label
        guided = self.guidance(v, lambda: of(labels), lambda: of(torch.full_like(labels, none)))
        if none is None:
            return guided
        # A sample without its class learns the velocity of no class, which nothing guides.
        return torch.where((labels == none).reshape(-1, *[1] * (v.ndim - 1)), v, guided)
