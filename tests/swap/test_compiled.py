"""Swapped models whose repeated blocks are compiled: a graph for all blocks of a kind, and one more for other sizes."""

import pytest
import torch
from swap_families import ADAPTERS, Family, outputs
from torch import nn
from torch._dynamo.utils import counters

COMPILED = {name for name, each in ADAPTERS.items() if getattr(each.model, "_repeated_blocks", None)}
# Of these the first block is given a view or another layout than those behind it. torch has a graph for each, before a
# swap as after it.
LAYOUTS = {
    "AnyFlowTransformer3DModel", "BriaFiboTransformer2DModel", "ChromaTransformer2DModel",
    "ChronoEditTransformer3DModel", "FluxTransformer2DModel", "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel", "HunyuanVideoTransformer3DModel", "Kandinsky5Transformer3DModel",
    "Kandinsky6Transformer3DModel", "LTX2VideoTransformer3DModel", "LTXVideoTransformer3DModel",
    "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel", "QwenImageTransformer2DModel",
    "SkyReelsV2Transformer3DModel", "WanVACETransformer3DModel",
}  # fmt: skip
CASES = [*((name, "eager") for name in sorted(COMPILED)), ("WanTransformer3DModel", "inductor")]  # others take minutes
BOUNDS = {"eager": {"rtol": 1e-5, "atol": 1e-5}, "inductor": {"rtol": 1e-3, "atol": 1e-4}}


def kinds_of_blocks(model: nn.Module) -> int:
    """How many kinds of blocks are compiled: of another class, with other parts, or of other sizes."""
    blocks = [each for each in model.modules() if type(each).__name__ in type(model)._repeated_blocks]
    parts = [[(name, type(part)) for name, part in each.named_modules() if name] for each in blocks]
    sizes = [[(name, weight.shape) for name, weight in each.named_parameters()] for each in blocks]
    return len({(type(each), *a, *b) for each, a, b in zip(blocks, parts, sizes, strict=True)})


def calls_of(family: Family, model: nn.Module) -> list[dict]:
    """One size twice, other sizes of image and text, and still others."""
    inputs = [family.inputs(model, which) for which in (0, 0, 1)]
    grid, text = family.calls[1]
    return [*inputs, family.inputs_of(model, (*grid[:-1], grid[-1] + 2), text and text + 2)]


def graphs(family: Family, model: nn.Module, backend: str) -> list[int]:
    """How many graphs there are after each call, whose output must be as without compiling."""
    calls, found = calls_of(family, model), []
    wanted = [outputs(model, each) for each in calls]
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    for inputs, expected in zip(calls, wanted, strict=True):
        torch.testing.assert_close(outputs(model, inputs), expected, **BOUNDS[backend])
        found.append(counters["stats"]["unique_graphs"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_blocks_of_a_kind_share_a_graph(name, backend):
    family = Family(name)
    model = family.model()
    family.swapped(model, init="random")
    kinds = kinds_of_blocks(model)
    once, again, other, more = ours = graphs(family, model, backend)
    assert once == again
    assert other == more
    if name not in LAYOUTS:
        assert once == kinds
        assert other <= 2 * kinds
        return
    model = family.model()
    kinds = kinds_of_blocks(model)
    theirs = graphs(family, model, backend)
    assert theirs[0] > kinds or theirs[2] > 2 * kinds
    assert all(after <= before for after, before in zip(ours, theirs, strict=True))
