"""A SiT's attention distilled into ATConv: its layers on the teacher's inputs, then the model beside the teacher."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sit_atconv import config
from sit_atconv.data.held_out import tell_of_share
from sit_atconv.data.samples import Batch, TrainingSamples
from sit_atconv.layers.attention import Attention
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.hooks import recorded
from sit_atconv.runtime.limits import check_kernel
from sit_atconv.runtime.processes import is_main
from sit_atconv.swap.choosing import choose
from sit_atconv.swap.identity import teacher_of
from sit_atconv.swap.swapping import swap_attention
from sit_atconv.training.checkpoint import load_trained
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.objectives.objective import Forward


def load_teacher(recipe: config.Recipe, latent_shape: tuple[int, int, int], num_classes: int) -> SiTTransformer2DModel:
    """The model that `distill.teacher` names, frozen. Raises InputError where it does not fit data and flow."""
    with torch.device("cpu"):
        trained = load_trained(recipe.distill.teacher)
    teacher = trained.model.requires_grad_(False)
    if teacher.config.use_meanflow:
        raise InputError(
            f"distill.teacher={recipe.distill.teacher!r} predicts average velocities (MeanFlow), and the student "
            "learns velocities; give a teacher of velocities"
        )
    channels, height, width = latent_shape
    for what, own, wanted in (
        ("in_channels", teacher.config.in_channels, channels),
        ("sample_size", teacher.latent_size, (height, width)),
        ("num_classes", teacher.config.num_classes, num_classes),
        ("path", teacher.config.path, recipe.flow.path),
        ("prediction", teacher.config.prediction, recipe.flow.prediction),
    ):
        if own != wanted:
            raise InputError(
                f"distill.teacher={recipe.distill.teacher!r} has {what} {own!r}, data, codec and flow say {wanted!r}; "
                "give a teacher that was trained on them"
            )
    tell_of_share(f"distill.teacher={recipe.distill.teacher!r}", trained.manifest, recipe.data.held_out)
    return teacher


def student_of(teacher: SiTTransformer2DModel, settings: config.Distill, seed: int) -> SiTTransformer2DModel:
    """A copy of the teacher with fresh layers where attention is to go: ATConv, or attention again for a control.

    Raises InputError where `distill.select` leaves nothing to swap.
    """
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    names = swapped_names(teacher, settings)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if settings.control:
            for name in names:
                student.set_submodule(name, _fresh(student.get_submodule(name)))
        else:
            swap_attention(student, names, init="random", pool=settings.pool, kernel_size=settings.kernel_size)
    return student


def swapped_names(teacher: SiTTransformer2DModel, settings: config.Distill) -> list[str]:
    """Names of the attentions that go."""
    attentions = {name: module for name, module in teacher.named_modules() if isinstance(module, Attention)}
    if not attentions:
        raise InputError(f"distill.teacher={settings.teacher!r} has no attention to distil; give one that has")
    every = [f"blocks.{index}.attn" for index in range(len(teacher.blocks))]
    return choose(attentions, settings.select, settings.exclude, every)


class Distillation(nn.Module):
    """A student beside its frozen teacher, in one module as DDP wants it; the teacher is in no state dict.

    Steps up to `blockwise_steps` train the swapped layers alone, all in one pass: each gets the input that its
    attention has in the teacher, and is to give the same output. Later steps train the whole student by its own loss,
    by the teacher's output and by its hidden states; the share of the swapped layers that the student runs with steps
    up through `shares`, `share_steps` steps each but the last, and in the place of the others is the teacher's
    attention.
    """

    def __init__(self, student: SiTTransformer2DModel, teacher: SiTTransformer2DModel, settings: config.Distill):
        super().__init__()
        self.model, self.settings, self.names = student, settings, swapped_names(teacher, settings)
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._active = rising(self.names, settings.shares)

    @property
    def teacher(self) -> SiTTransformer2DModel:
        return self._teacher[0]

    def start(self, calib: Iterable) -> dict[str, float]:
        """Warm-start the student's layers from the teacher's attention; relative error by layer.

        calib: calibration inputs, tuples (x_t, t, labels).
        """
        settings = self.settings
        started = copy.deepcopy(self.teacher)
        swap = swap_attention(
            started, self.names, init=settings.init, calib=calib, pool=settings.pool, kernel_size=settings.kernel_size
        )
        self.model.load_state_dict(started.state_dict())
        return {row.name: row.error for row in swap.report(measure=False).layers}

    def describe(self) -> dict:
        """What a run is resumed against: the teacher's fingerprint, wherever it lies."""
        return {"fingerprint": teacher_of(self.teacher)["fingerprint"]}

    def blockwise(self, step: int) -> bool:
        """Whether a step (0-based) trains the swapped layers alone."""
        return step < self.settings.blockwise_steps

    def idle(self, step: int) -> list[nn.Parameter]:
        """The parameters that a step does not train."""
        swapped = {name: [*self.model.get_submodule(name).parameters()] for name in self.names}
        if self.blockwise(step):
            trained = {id(p) for layer in swapped.values() for p in layer}
            return [p for p in self.model.parameters() if id(p) not in trained]
        active = self._active_at(step)
        return [p for name, layer in swapped.items() if name not in active for p in layer]

    def _active_at(self, step: int) -> set[str]:
        """The swapped layers that the student runs with."""
        late = (step - self.settings.blockwise_steps) // self.settings.share_steps
        return self._active[min(late, len(self._active) - 1)]

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, step: int
    ) -> tuple[torch.Tensor | None, ...]:
        """(output, output loss (B,), feature loss (B,), layer loss (B,)) at x_t (B, C, H, W); None is not of this step.

        Losses are squared errors relative to what the teacher has: of the output, of the hidden states after every
        block (their mean), of the swapped layers' outputs (their mean).
        """
        if self.blockwise(step):
            return None, None, None, self._layer_loss(x, t, labels)
        active = self._active_at(step)
        for name in self.names:
            layer = self.model.get_submodule(name)
            layer.__dict__.pop("forward", None)
            if name not in active:  # until the next step: a checkpointed block runs again in the backward pass
                layer.forward = self.teacher.get_submodule(name).forward
        with torch.no_grad():
            theirs, wanted = _with_hidden(self.teacher, x, t, labels)
        ours, hidden = _with_hidden(self.model, x, t, labels)
        features = [relative_error(own, their) for own, their in zip(hidden, wanted, strict=True)]
        return ours + _nothing_of(self.idle(step)), relative_error(ours, theirs), torch.stack(features).mean(0), None

    def _layer_loss(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with recorded({name: self.teacher.get_submodule(name) for name in self.names}) as seen, torch.no_grad():
            self.teacher(x, t, labels)
        errors = [
            relative_error(self.model.get_submodule(name)(*args, **kwargs), output)
            for name, (args, kwargs, output) in seen.items()
        ]
        return torch.stack(errors).mean(0) + _nothing_of(self.idle(0))


def rising(names: Sequence[str], shares: Sequence[float]) -> list[set[str]]:
    """For every share, that many of the names and one at least; each set holds the one before.

    They come by the reversed bits of their number, so every beginning is spread over all; of a half, the odd ones.
    """
    order = sorted(range(len(names)), key=lambda index: f"{index:b}"[::-1].ljust(32, "0"), reverse=True)
    return [{names[index] for index in order[: max(1, int(share * len(names) + 1e-9))]} for share in shares]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """(B,): |ours - theirs|^2 / |theirs|^2 of every sample (B, ...), in fp32."""
    ours, theirs = ours.float().flatten(1), theirs.float().flatten(1)
    return (ours - theirs).square().sum(1) / theirs.square().sum(1).clamp_min(1e-12)


def _nothing_of(parameters: Iterable[nn.Parameter]) -> torch.Tensor | float:
    """Zero, with a gradient of zero for what this step does not train: DDP waits for all of them."""
    return sum(parameter.sum() * 0.0 for parameter in parameters)


def _with_hidden(
    model: SiTTransformer2DModel, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The output, and the hidden states after every block."""
    with recorded(dict(enumerate(model.blocks))) as seen:
        (output,) = model(x, t, labels, return_dict=False)
    return output, [seen[index][2] for index in range(len(model.blocks))]


def _fresh(attention: Attention) -> Attention:
    """Attention of the same sizes, with SiT's starting weights."""
    qk_norm = isinstance(attention.q_norm, nn.LayerNorm)
    fresh = Attention(attention.proj.in_features, attention.num_heads, qk_norm)
    for linear in (fresh.qkv, fresh.proj):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return fresh


class DistillObjective(FlowObjective):
    """The flow loss of a student, and what `Distillation` compares of it with its teacher.

    Raises InputError for a teacher that does not fit data and flow, and where nothing is left to swap.
    """

    no_fsdp = "distill.teacher is not for FSDP: its layers are called apart from their blocks; use DDP"
    flops_per_image = None  # of a step that trains layers alone it is another one

    def __init__(self, recipe: config.Recipe, facts: Facts, origin: None = None):
        super().__init__(recipe, facts, origin)
        settings = recipe.distill
        self.trained = Distillation(self.model, self.teacher, settings)
        self.weights |= {"output_loss": settings.output_weight, "feature_loss": settings.feature_weight}
        self.weights["layer_loss"] = 1.0

    def _make_model(self) -> SiTTransformer2DModel:
        self.teacher = load_teacher(self.recipe, self.facts.latent_shape, self.facts.num_classes)
        check_kernel("distill.kernel_size", self.recipe.distill.kernel_size, self.teacher.grid)
        return student_of(self.teacher, self.recipe.distill, self.recipe.run.seed)

    def rows(self) -> dict[str, str]:
        settings, names = self.recipe.distill, self.trained.names
        shown = ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
        into = "fresh attention (a control)" if settings.control else f"ATConv, started by {settings.init}"
        layers = f"{len(names)} of {len(self.teacher.blocks)} layers"
        return {"teacher": f"{settings.teacher}; {layers} to {into}: {shown}"}

    def describe(self) -> dict[str, Any]:
        return {"teacher": self.trained.describe()}

    @property
    def frozen(self) -> list[nn.Module]:
        return [*super().frozen, self.teacher]

    def _start(self, samples: TrainingSamples) -> None:
        """Warm-start the student on the first training samples, the same in every process; not one of a control."""
        settings, size = self.recipe.distill, self.recipe.train.batch_size
        if settings.control:
            return
        inputs = []
        for first in range(0, settings.calib, size):
            batch, _ = samples.fetch(range(first, min(first + size, settings.calib)))
            if isinstance(batch, InputError):
                raise batch
            x = self.path.interpolate(self.encode(batch), batch["noise"], batch["t"])
            inputs.append((x, batch["t"], batch["label"]))
        errors = self.trained.start(inputs)
        if is_main():
            mean = sum(errors.values()) / len(errors)
            say(f"swapped {len(errors)} layers; relative error at the start: {mean:.3f}")

    def learning_rate(self, step: int) -> float:
        own = self.recipe.distill.blockwise_lr if self.trained.blockwise(step) else None
        return own or super().learning_rate(step)

    def idle(self, step: int) -> list[nn.Parameter]:
        return self.trained.idle(step)

    def losses(self, batch: Batch, forward: Forward) -> list[torch.Tensor | None]:
        latents = self.encode(batch)
        x = self.path.interpolate(latents, batch["noise"], batch["t"])
        output, *losses = forward(x, batch["t"], batch["label"], forward.step)
        own = None if output is None else self.flow_loss(lambda _, __: output, latents, batch)
        return [own, *losses]
