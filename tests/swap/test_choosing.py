import pytest
import torch

from sit_atconv.errors import InputError
from sit_atconv.swap import calibration, swap_attention
from sit_atconv.swap.choosing import choose

NAMES = {f"blocks.{index}.attn": torch.nn.Identity() for index in range(8)}


def chosen(select, exclude=()) -> list[int]:
    return [int(name.split(".")[1]) for name in choose(NAMES, select, exclude)]


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("auto", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("odd", [1, 3, 5, 7]),
        (1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.5, [1, 3, 5, 7]),
        (0.25, [3, 7]),
        (0.75, [1, 2, 3, 5, 6, 7]),
        (0.13, [7]),
        (r"blocks\.[02]\.", [0, 2]),
        ("s.3.a", [3]),
        (["blocks.5.attn", "blocks.1.attn"], [1, 5]),
        (("blocks.5.attn",), [5]),
        (lambda name, module: name.endswith(("6.attn", "7.attn")), [6, 7]),
        (lambda name, module: module is NAMES["blocks.4.attn"], [4]),
    ],
)
def test_what_is_selected(select, expected):
    assert chosen(select) == expected


def test_a_share_is_spread_evenly():
    for count in range(1, 9):
        indices = chosen(count / 8)
        assert len(indices) == count
        gaps = [b - a for a, b in zip([-1, *indices], indices, strict=False)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [("blocks.2.attn", [0, 1, 3, 4, 5, 6, 7]), (["[0-4]", "7"], [5, 6]), ((), [0, 1, 2, 3, 4, 5, 6, 7])],
)
def test_what_is_excluded(exclude, expected):
    assert chosen("all", exclude) == expected


def test_a_name_excludes_its_layer_alone():
    names = ["blocks.0.attn", "single_blocks.0.attn", "blocks.0.attn2", "blocks.1.attn"]
    found = dict.fromkeys(names, torch.nn.Identity())
    assert choose(found, "all", "blocks.0.attn") == names[1:]
    assert choose(found, "all", ["blocks.0.attn", "1.attn$"]) == names[1:3]
    assert choose(found, "all", r"blocks\.0\.attn") == ["blocks.1.attn"]


@pytest.mark.parametrize(
    ("select", "exclude", "says"),
    [
        (0, (), r"select=0: a share must lie in \(0, 1\]"),
        (1.5, (), r"select=1\.5"),
        (float("nan"), (), "select=nan"),
        (0.05, (), "leave nothing to swap"),
        (True, (), "select=True: give 'all'"),
        ("blocks.9", (), r"select='blocks\.9', exclude=\(\) leave nothing to swap; to be had are blocks\.0\.attn"),
        ("(", (), r"select='\(' is no regular expression"),
        ("all", "(", r"exclude='\(' is no regular expression"),
        ("all", ".", "exclude='.' leave nothing to swap"),
        ("all", ["blocks.1.attn", "block.2.attn"], r"exclude='block\.2\.attn': did you mean 'blocks\.2\.attn'"),
        (["blocks.1.atn"], (), r"select='blocks\.1\.atn': did you mean 'blocks\.1\.attn'"),
        ([], (), "leave nothing to swap"),
        (lambda name, module: False, (), "leave nothing to swap"),
    ],
)
def test_a_selection_that_cannot_be(select, exclude, says):
    with pytest.raises(InputError, match=says):
        choose(NAMES, select, exclude)


@pytest.fixture
def clock(monkeypatch):
    """Sets what attentions and layers take, by name, and the whole model: no test reads a clock."""

    def set(saved: dict[str, float], whole: float = 10.0):
        monkeypatch.setattr(calibration, "latency_of", lambda site: [5.0, 5.0 - saved[site.name]])
        monkeypatch.setattr(calibration, "_milliseconds", lambda functions, **_: [whole] * len(functions))

    return set


@pytest.fixture
def errors(tiny):
    swap = swap_attention(tiny.model("dit"), "all", dry_run=True)
    return {row.name: row.error for row in swap.report(measure=False).layers}


def test_auto_takes_layers_up_to_an_error(tiny, clock, errors):
    names = tiny.layers["dit"]
    clock(dict.fromkeys(names, 1.0))
    ranked = sorted(names, key=errors.get)
    for count in (1, 2, 3):
        swap = swap_attention(tiny.model("dit"), max_error=errors[ranked[count - 1]] * 1.0001)
        assert set(swap.layers) == set(ranked[:count])
        assert list(swap.layers) == [name for name in names if name in ranked[:count]]
        assert swap.model.config.atconv["layers"] == list(swap.layers)


def test_auto_leaves_layers_that_save_no_time(tiny, clock):
    names = tiny.layers["dit"]
    clock({names[0]: 1.0, names[1]: -1.0, names[2]: 0.0})
    assert list(swap_attention(tiny.model("dit"), max_error=10).layers) == names[:1]


@pytest.mark.parametrize(("speedup", "count"), [(1.05, 1), (1.1, 1), (1.2, 2), (1.4, 3)])
def test_auto_takes_layers_by_error_per_millisecond_until_it_is_fast_enough(tiny, clock, errors, speedup, count):
    """Of 10 ms one layer saves 1: 1.11 times as fast; two 1.25 times; three 1.43 times."""
    names = tiny.layers["dit"]
    clock(dict.fromkeys(names, 1.0))
    swap = swap_attention(tiny.model("dit"), speedup=speedup)
    assert set(swap.layers) == set(sorted(names, key=errors.get)[:count])


def test_auto_weighs_errors_by_what_they_save(tiny, clock, errors):
    names = tiny.layers["dit"]
    worst = max(names, key=errors.get)
    clock({name: 4.0 if name == worst else 0.1 for name in names})
    assert list(swap_attention(tiny.model("dit"), speedup=1.5).layers) == [worst]


def test_auto_with_both_targets(tiny, clock, errors):
    names = sorted(tiny.layers["dit"], key=errors.get)
    clock({names[0]: 1.0, names[1]: 1.0, names[2]: 8.0})
    swap = swap_attention(tiny.model("dit"), max_error=errors[names[1]] * 1.0001, speedup=1.2)
    assert set(swap.layers) == set(names[:2])


def test_auto_without_a_target_takes_a_fifth_of_error(tiny, clock, monkeypatch):
    names = tiny.layers["dit"]
    clock(dict.fromkeys(names, 1.0))
    given = {names[0]: 0.19, names[1]: 0.21, names[2]: 0.05}
    monkeypatch.setattr(calibration.Site, "error", property(lambda site: given[site.name]))
    assert list(swap_attention(tiny.model("dit")).layers) == [names[0], names[2]]


@pytest.mark.parametrize(
    ("targets", "saved", "says"),
    [
        ({"max_error": 1e-6}, 1.0, "select='auto': no layer saves time with an error of at most 1e-06 .least error: 0"),
        ({"max_error": 10}, -1.0, "attention is the faster one in all 3 layers; calibrate on larger inputs"),
        ({"speedup": 3.0}, 1.0, "all that save time do not give 3x .*lower speedup"),
    ],
)
def test_auto_that_cannot_be_leaves_the_model_alone(tiny, clock, targets, saved, says):
    model = tiny.model("dit")
    clock(dict.fromkeys(tiny.layers["dit"], saved))
    before = tiny.snapshot(model)
    with pytest.raises(InputError, match=says):
        swap_attention(model, **targets)
    tiny.assert_as(before, model)


def test_exclude_goes_with_auto(tiny, clock):
    names = tiny.layers["dit"]
    clock(dict.fromkeys(names, 1.0))
    assert list(swap_attention(tiny.model("dit"), max_error=10, exclude=names[1]).layers) == [names[0], names[2]]
