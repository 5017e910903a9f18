"""Lengths and grids that change from call to call on one swapped model: nothing stays of the calls before."""

import copy

import pytest
import torch
from swap_families import ADAPTERS, Family, few, outputs, same

# (which of three grids, which of two texts): both change together and by themselves, and come back. The second grid is
# the first one turned, which has as many tokens.
CALLS = [(0, 0), (1, 0), (2, 1), (0, 1), (2, 0), (1, 1), (0, 0)]


def grids(family: Family) -> list[tuple[int, ...]]:
    sides = family.adapter.sides
    return [(2, 6, 4)[-sides:], (2, 4, 6)[-sides:], (3, 4, 8)[-sides:]]


@pytest.mark.parametrize("name", few(sorted(ADAPTERS)))
def test_each_call_gives_what_a_fresh_copy_gives(name):
    family, model = Family(name), Family(name).model()
    family.swapped(model, init="random")
    inputs = {call: family.inputs_of(model, grids(family)[call[0]], (3, 5)[call[1]]) for call in CALLS}
    alone = {call: outputs(copy.deepcopy(model), each) for call, each in inputs.items()}
    for call in CALLS:
        assert same(outputs(model, inputs[call]), alone[call]), call
    other = family.adapter.example(model, torch.Generator(), grid=grids(family)[2])
    if other is not None:  # else it takes one size alone
        assert not same(alone[0, 0], alone[1, 0])
        assert not same(alone[0, 0], alone[2, 0])
