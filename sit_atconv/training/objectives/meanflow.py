"""MeanFlow: a SiT learns the average velocity between two times, and draws images by one step, or few.

"Mean Flows for One-step Generative Modeling" (arXiv 2505.13447); with `meanflow.tangent=network` the change of the
average is taken along the network's own velocity, as in "Improved Mean Flows" (arXiv 2512.02012).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sit_atconv import config
from sit_atconv.data.held_out import tell_of_share
from sit_atconv.data.samples import Batch
from sit_atconv.flow.meanflow import Guidance, change, meanflow_errors, weigh
from sit_atconv.layers.attention import Attention
from sit_atconv.models.cost import count_macs
from sit_atconv.runtime.compat.torch import load_forward_mode
from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.processes import is_main
from sit_atconv.runtime.weights import digest_of
from sit_atconv.sampling.trained import open_guide
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.objectives.objective import Forward
from sit_atconv.training.origin import Origin

MATH_KERNEL = (
    "its fused kernels have no forward-mode derivative: the change of the average velocity is computed with plain "
    "attention, whose scores (tokens x tokens) are in memory"
)


class MeanFlowObjective(FlowObjective):
    """The squared error of the average velocity, see `flow.meanflow.meanflow_errors`, weighed by itself.

    Its mean over the numbers of a sample is reported as `squared_error`; `loss` is what is minimised.
    Raises InputError for guidance without a null class, and for a teacher that does not fit.
    """

    no_fsdp = "meanflow.share is not for FSDP, whose shards have no forward-mode derivative; use DDP"

    def __init__(self, recipe: config.Recipe, facts: Facts, origin: Origin | None = None):
        super().__init__(recipe, facts, origin)
        settings = recipe.meanflow
        self.weights = {"squared_error": 0.0, "loss": 1.0}
        self.guidance = Guidance(settings.omega, settings.kappa)
        self.teacher, self.digest = None, None
        if settings.teacher is not None:
            self._open_teacher()
        if 1 - settings.omega - settings.kappa and (self.teacher or self.model).null_label is None:
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
        tell_of_share(stated, found.manifest, self.recipe.data.held_out)
        self.teacher, self.digest = found.model.eval(), digest_of(found.model.state_dict())

    def open(self, codec: nn.Module) -> None:
        super().open(codec)
        load_forward_mode()
        if self.with_attention and is_main():
            say(f"attention: {MATH_KERNEL}")

    @property
    def with_attention(self) -> bool:
        return any(isinstance(module, Attention) for module in self.model.modules())

    def rows(self) -> dict[str, str]:
        settings, guidance = self.recipe.meanflow, self.guidance.scale
        said = f"{settings.share:.0%} of the samples with two times"
        said += f"; guidance {guidance:g} is learned" if guidance != 1 else ""
        said += f"; velocity of {settings.teacher}" if self.teacher else ""
        rows = {"MeanFlow": f"{said}; a step costs {self._evaluations / 3:.2f} of the flow's"}
        return {**super().rows(), **rows, **({"attention": MATH_KERNEL} if self.with_attention else {})}

    @property
    def _evaluations(self) -> float:
        """What a sample's step costs in evaluations of the network: 3 forward and backward, and of those without a
        gradient a product with the Jacobian as 2."""
        settings = self.recipe.meanflow
        rest = 1 - settings.omega - settings.kappa != 0
        of_class = bool(settings.kappa)
        own = 0 if self.teacher else of_class + rest
        along = settings.share if settings.tangent == "network" and not of_class else 0
        return 3 + 2 * settings.share + own + along

    @property
    def flops_per_image(self) -> float:
        teacher = count_macs(self.teacher) * (1 + (self.guidance.omega != 1)) if self.teacher else 0
        return 2 * (self._evaluations * count_macs(self.model) + teacher)

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
