"""What every layer would do to the model's output, and which layers select="auto" chooses by that."""

import math
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import nn

from sit_atconv.runtime.compat.torch import tree_leaves
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.hooks import of_this_thread
from sit_atconv.runtime.processes import is_main
from sit_atconv.swap.calibration import (
    Cost,
    LayerReport,
    Site,
    SwapReport,
    call_model,
    cost_of,
    evaluating,
    macs_of_call,
    relative,
)
from sit_atconv.swap.choosing import Candidate, Choice, choose_best


class Outputs:
    """The model's outputs on the calibration inputs, and how they change where layers stand in for their attentions.

    refusal: why there is no relative error of them; None where there is one.
    Raises InputError where an output is not finite.
    """

    def __init__(self, model: nn.Module, inputs: list):
        self.model, self.inputs, self.refusal = model, inputs, None
        with torch.no_grad(), evaluating(model):
            self.references = [_tensors_of(call_model(model, each)) for each in inputs]
        self.squares = _sums_of_squares([[each.double() for each in tensors] for tensors in self.references])
        if not all(map(math.isfinite, self.squares)):
            raise InputError(
                "the model's output has NaN or infinity on the calibration inputs; look at calib, and calibrate an "
                "fp16 model in bf16 or fp32"
            )
        if not self.squares:
            self.refusal = f"{type(model).__name__} gives no floating-point tensor whose error would tell layers apart"
        elif not any(self.squares):
            self.refusal = (
                f"{type(model).__name__} gives nothing but zeros on the calibration inputs, as a last layer does that "
                "was never trained, so no error at its output tells layers apart"
            )

    @torch.no_grad()
    def error(self, sites: list[Site]) -> float:
        """The error where the layers of `sites` stand in, all at once: in norm, relative, over all inputs.

        Taken in fp64. Of several tensors that a model gives, the largest; infinite where one is not finite.
        """
        differences = []
        with _standing_in(sites), evaluating(self.model, *(site.layer for site in sites)):
            for each, reference in zip(self.inputs, self.references, strict=True):
                pairs = zip(_tensors_of(call_model(self.model, each)), reference, strict=True)
                differences.append([ours.double() - theirs.double() for ours, theirs in pairs])
        errors = [relative(*pair) for pair in zip(_sums_of_squares(differences), self.squares, strict=True)]
        return max(error if math.isfinite(error) else math.inf for error in errors)


@contextmanager
def _standing_in(sites: list[Site]) -> Iterator[None]:
    """While this is open, what the attentions give is what their layers give; the model holds no other modules."""

    def stand_in(layer: nn.Module):
        return of_this_thread(lambda _, args, kwargs, output: layer(*args, **kwargs))

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(site.attention.register_forward_hook(stand_in(site.layer), with_kwargs=True))
        yield


def _sums_of_squares(outputs: list[list[torch.Tensor]]) -> list[float]:
    """Of every tensor of an output, over all outputs."""
    return [sum(each) for each in zip(*([x.square().sum().item() for x in each] for each in outputs), strict=True)]


def _tensors_of(output) -> list[torch.Tensor]:
    """The floating-point tensors in what a model gives: a tensor, or a nest of containers and dataclasses of them."""
    found = []
    for leaf in tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors_of([getattr(leaf, each.name) for each in fields(leaf)])
        elif isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            found.append(leaf)
    return found


@dataclass
class Survey:
    """errors: by name, of the model's output with that layer alone in its place; empty where they cannot be measured.

    costs: by shape, see `cost_of`. refused: the layers that were not built, and why.
    """

    errors: dict[str, float]
    costs: dict[Hashable, Cost]
    choice: Choice
    refused: dict[str, str]

    def report(self, rows: list[LayerReport]) -> SwapReport:
        """The report of these rows and of the layers that were not built, with errors of the output and the choice."""
        for row in rows:
            row.output_error, row.chosen = self.errors.get(row.name), row.name in self.choice.names
            row.reason = self.choice.reasons.get(row.name)
        refused = [LayerReport(name, None, None, chosen=False, reason=reason) for name, reason in self.refused.items()]
        return SwapReport([*rows, *refused], self.choice.error, self.choice.refusal)


def survey_of(
    model: nn.Module,
    sites: list[Site],
    inputs: list,
    names: list[str],
    refused: dict[str, str],
    refusal: str | None,
    target: tuple[float | None, float | None] | None,
) -> Survey:
    """Measure the model's output on the inputs with each layer alone in its place, and with those chosen of `names`.

    One pass of the model for each layer and input, and a few for the choice. target: (max_error, speedup) of
    `choose_best`, which then chooses; None: all of `names` are. refusal: why none can be, some of them being `refused`.
    Raises InputError where the output is not finite.
    """
    survey = Survey({}, {}, Choice(names), refused)
    outputs = Outputs(model, inputs) if inputs else None

    def error(names: list[str]) -> float:
        return outputs.error([site for site in sites if site.name in names])

    if outputs is not None and outputs.refusal is None:
        title = "measuring errors of the output"
        for site in Progress(sites, title, leave=False, disable=len(sites) < 2 or not is_main()):
            survey.errors[site.name] = error([site.name])
    if refusal is not None:
        survey.choice = Choice([], None, dict.fromkeys(names, "not with those that cannot be swapped"), refusal)
    elif target is None:
        survey.choice.error = error(names) if survey.errors else None
    elif outputs.refusal is not None:
        survey.choice = Choice([], refusal=f"{outputs.refusal}; name the layers by select, such as select='all'")
    else:
        candidates = [_candidate(site, survey) for site in sites if site.name in names]
        with evaluating(model):
            whole = macs_of_call(model, lambda: call_model(model, inputs[0]))
        survey.choice = choose_best(candidates, whole, *target, error)
    survey.choice.reasons |= {site.name: "not selected" for site in sites if site.name not in names}
    return survey


def _candidate(site: Site, survey: Survey) -> Candidate:
    if site.call is None:
        return Candidate(site.name, None, None, None)
    cost = cost_of(site, survey.costs)
    return Candidate(site.name, cost.saved, survey.errors[site.name], cost.timing.slowdown)
