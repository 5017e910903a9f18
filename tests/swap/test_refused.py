"""Every class that a swap might be asked for is either taken or refused with a reason, and a table says so."""

import json

import pytest
import timm
from conftest import ROOT
from diffusers import DreamLiteUNetModel, SanaTransformer2DModel
from torch import nn

from experiments.swappable import adapters, table
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import swap_attention
from sit_atconv.swap.adapters import adapter_of
from sit_atconv.swap.refused import REFUSED, candidates

FOLDER = ROOT / "experiments/results/swappable"
STORED = json.loads((FOLDER / "swappable.json").read_text())["rows"]


@pytest.mark.parametrize("library", REFUSED)
def test_no_class_of_a_library_is_unknown_and_no_reason_is_of_one_that_is_gone(library):
    known, classes = adapters(), candidates()[library]
    if not classes:
        pytest.skip(f"{library} is not installed")
    taken = {name for name, cls in classes.items() if any(each in known for each in cls.__mro__)}
    assert classes.keys() - taken - REFUSED[library].keys() == set()
    assert REFUSED[library].keys() - classes.keys() == set()
    assert taken & REFUSED[library].keys() <= {"DreamLiteUNetModel"}  # derives from one that is taken


def test_the_stored_table_has_them_all():
    """Where this fails, run `python -m experiments.swappable` again."""
    known = adapters()
    for library, classes in candidates().items():
        if not classes:
            continue
        ours = {cls.__name__ for cls in known if cls.__module__.split(".")[0] == library}
        stored = {row["class"] for row in STORED if row["library"] == library}
        assert stored == classes.keys() | ours
    for row in STORED:
        assert row.get("refused") == REFUSED[row["library"]].get(row["class"]) if row["library"] in REFUSED else True
    assert table(STORED) in (FOLDER / "swappable.md").read_text()
    rows = {(row["library"], row["class"]): row for row in STORED}
    for row in STORED:  # a class without a row of its own names one that has it
        if "as" in row:
            assert "error" in rows[row["library"], row["as"]]
    assert rows["transformers", "ViTForImageClassification"]["as"] == "ViTModel"
    counts = {library: sum("error" in row for row in STORED if row["library"] == library) for library in REFUSED}
    assert counts["diffusers"] >= 18
    assert counts["timm"] + counts["transformers"] >= 6
    starts = [row["error"] for row in STORED if "error" in row]
    assert all(0 < each["closed_form"] < each["copy_vo"] * 1.001 for each in starts)


def test_a_refused_class_is_told_why():
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4, caption_channels=8,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, sample_size=4,
    )  # fmt: skip
    with pytest.raises(InputError, match="SanaTransformer2DModel has linear attention already: it cannot be swapped"):
        swap_attention(model)
    with pytest.raises(InputError, match="DreamLiteUNetModel has the image to edit beside the one to draw"):
        adapter_of(DreamLiteUNetModel.__new__(DreamLiteUNetModel))
    stranger = type("ResNet", (nn.Module,), {})  # of no library
    with pytest.raises(InputError, match="no adapter for ResNet; known are"):
        swap_attention(stranger())
    with pytest.raises(InputError, match="SwinTransformer attends within windows"):
        swap_attention(timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8))
