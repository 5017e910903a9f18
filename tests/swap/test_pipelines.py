"""diffusers' pipelines around swapped models, end to end: drawn, saved and loaded, in batches, guided."""

import functools
import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from swap_families import aligned
from tiny_pipelines import NONE, OTHERS, PIPELINES, Prompt, Tiny, calls_of
from torch import nn

from sit_atconv.swap import swap_attention
from sit_atconv.swap.marking import THIN

FIRST = Prompt(seed=1, length=5)


def swap(tiny: Tiny, pipe, calls: list[dict]):
    return swap_attention(pipe, "all", joint="split", calib=calls[:1])


def same(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


def distance(ours: list, theirs: list) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def align(pipe) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            aligned(part)


class Predicted(Exception):
    """The first prediction of a pipeline, which stops there."""


class Swapped:
    """A pipeline with its model swapped, what it drew for two prompts before and draws now, alone and in a batch."""

    def __init__(self, tiny: Tiny):
        self.tiny, self.pipe = tiny, tiny.make()
        self.prompts = [FIRST, Prompt(seed=2, length=3 if tiny.ragged else 5)][: 1 + tiny.batched]
        self.calls = calls_of(getattr(self.pipe, tiny.slot), lambda: setattr(self, "before", self.draw()))
        self.swap = swap(tiny, self.pipe, self.calls)
        self.after = self.draw()

    def draw(self) -> dict[str, list]:
        """What it draws for each prompt, and for both."""
        alone = [self.tiny.draw(self.pipe, [prompt]) for prompt in self.prompts]
        return {"first": alone[0], "alone": [torch.cat(each) for each in zip(*alone, strict=True)],
                "batch": self.tiny.draw(self.pipe, self.prompts)}  # fmt: skip


FEW = ("DDPMPipeline", "DiTPipeline", "FluxPipeline", "WanPipeline", "ZImagePipeline")  # the others are slow


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(each, id=each.pipeline, marks=[] if each.pipeline in FEW else pytest.mark.slow)
        for each in PIPELINES
    ],
)
def swapped(request) -> Swapped:
    return Swapped(request.param)


def test_it_draws_with_the_swapped_model(swapped):
    before, after = swapped.before["first"], swapped.after["first"]
    assert after[0].shape == (1, *swapped.tiny.size, 3)
    assert [each.shape for each in after] == [each.shape for each in before]
    assert all(each.isfinite().all() for each in after)
    assert distance(after[:1], before[:1]) > 5e-3


def test_reverted_it_draws_as_before(swapped):
    pipe = swapped.tiny.make()
    names = dict(pipe.config)
    swap(swapped.tiny, pipe, swapped.calls).revert()
    assert dict(pipe.config) == names
    assert same(swapped.tiny.draw(pipe, [FIRST]), swapped.before["first"])


def test_loaded_by_its_folder_alone_it_draws_the_same(swapped, tmp_path):
    tiny, pipe = swapped.tiny, swapped.pipe
    kept = {name: getattr(pipe, name) for name in tiny.unsaved}
    absent = {name: None for name, each in pipe.components.items() if each is None}  # else diffusers misses them
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())[tiny.slot] == ["sit_atconv", f"ATConv{tiny.model}"]
    known = diffusers.DiffusionPipeline if tiny.home == "diffusers" else type(pipe)
    loaded = known.from_pretrained(tmp_path, **kept, **absent)
    loaded.set_progress_bar_config(disable=True)
    align(loaded)
    assert type(loaded) is type(pipe)
    assert same(tiny.draw(loaded, [FIRST]), swapped.after["first"])
    pipe.register_modules(**kept)


def test_a_batch_is_its_samples_alone(swapped):
    for drawn in (swapped.before, swapped.after):  # as diffusers has it, and swapped
        assert distance(drawn["batch"], drawn["alone"]) < (1.01 / 255 if swapped.tiny.rounded else 1e-4)
        for batch, alone in zip(drawn["batch"], drawn["alone"], strict=True):  # few fall on either side of a step
            assert (batch - alone).abs().mean() < 1e-4
    assert not swapped.tiny.batched or not torch.equal(*swapped.after["batch"][0])


def test_guidance_is_that_of_two_passes(swapped, monkeypatch):
    """The first prediction is affine in the scale. Unguided, the prompt goes through the model alone; guided, with the
    other text beside it or after it."""
    tiny, pipe = swapped.tiny, swapped.pipe
    if tiny.scales is None:
        pytest.skip("it has no guidance")
    step = type(pipe.scheduler).step

    @functools.wraps(step)  # pipelines look at what it takes
    def stop(scheduler, *args, **kwargs):
        raise Predicted(args[0] if args else kwargs["model_output"])

    monkeypatch.setattr(type(pipe.scheduler), "step", stop)
    found = []
    for scale in tiny.scales:
        with pytest.raises(Predicted) as info:
            tiny.draw(pipe, [FIRST], scale)
        found.append(info.value.args[0])
    plain, some, more = (each[: len(found[0])] for each in found)
    assert (more - plain).norm() > 1e-3 * plain.norm()
    if tiny.affine:
        torch.testing.assert_close(more - some, some - plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_the_second_of_two_models_is_swapped_by_itself(tmp_path):
    tiny = next(each for each in PIPELINES if each.pipeline == "WanPipeline")
    pipe, other = tiny.make(), tiny.make()
    pipe.register_modules(transformer_2=other.transformer)
    pipe.register_to_config(boundary_ratio=0.9)
    calls = {
        name: calls_of(getattr(pipe, name), lambda: tiny.draw(pipe, [FIRST]))
        for name in ("transformer", "transformer_2")
    }
    with pytest.warns(UserWarning, match=r"transformer_2 of this WanPipeline is .* keeps its attention") as told:
        swap(tiny, pipe, calls["transformer"])
    assert told[0].filename == __file__
    one = tiny.draw(pipe, [FIRST], steps=3)  # of two, the second is too short to tell
    swap_attention(pipe.transformer_2, "all", calib=calls["transformer_2"][:1])
    pipe.register_modules(transformer_2=pipe.transformer_2)
    two = tiny.draw(pipe, [FIRST], steps=3)
    assert distance(two, one) > 5e-3
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    align(loaded)
    assert same(tiny.draw(loaded, [FIRST], steps=3), two)


def uses(folder: Path) -> dict[str, set[str]]:
    """By model that can be swapped, the pipelines that are made of it, as folder/name."""
    found = {cls.__name__: set() for cls in THIN}
    for file in folder.rglob("*.py"):
        place = "deprecated" if "deprecated" in file.parts else file.parent.name
        classes = re.split(r"^class (\w+Pipeline)\b", file.read_text(), flags=re.MULTILINE)[1:]
        for name, cls in zip(classes[::2], classes[1::2], strict=True):
            body = re.split(r"^\S", cls.partition("):\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
            if "\n    def __init__(" not in body:
                continue
            arguments = re.search(r"\n    def __init__\((.*?)\)(?: -> None)?:\n", body, re.DOTALL)[1]
            for model in found.keys() & set(re.findall(r"\w+", arguments)):
                found[model].add(f"{place}/{name}")
    return found


def test_no_pipeline_of_a_model_that_is_taken_is_unknown():
    """Where this fails, give the pipeline a row in PIPELINES of tests/tiny_pipelines.py, or a reason in OTHERS."""
    found = uses(Path(diffusers.__file__).parent / "pipelines")
    ours = {each.pipeline for each in PIPELINES}
    assert {each.model for each in PIPELINES} | NONE.keys() == found.keys()
    assert not any(found[name] for name in NONE)
    assert ours <= {name.split("/")[1] for names in found.values() for name in names}
    others = {name for names in found.values() for name in names if name.split("/")[1] not in ours}
    assert {name for name in others if not any(re.fullmatch(pattern, name) for pattern in OTHERS)} == set()
    assert [pattern for pattern in OTHERS if not any(re.fullmatch(pattern, name) for name in others)] == []
