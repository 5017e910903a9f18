import itertools
import math
import random
import re
from dataclasses import dataclass

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.runtime.errors import InputError
from sit_atconv.swap import SelfAttentionGraft, SwapAdapter, adapters, calibration, register_adapter, swap_attention
from sit_atconv.swap.calibration import ROUNDS, SLOW_ROUNDS, TIMING_SECONDS, Timing, settled
from sit_atconv.swap.choosing import Candidate, choose, choose_best

NAMES = {f"blocks.{index}.attn": torch.nn.Identity() for index in range(8)}


def chosen(select, exclude=()) -> list[int]:
    return [int(name.split(".")[1]) for name in choose(NAMES, select, exclude)]


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("auto", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("odd", [1, 3, 5, 7]),
        ("even", [0, 2, 4, 6]),
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


def test_even_and_odd_count_the_layers_that_are_swapped_already():
    names = {name: NAMES[name] for name in list(NAMES)[::2]}
    assert choose(names, "even", counted=list(NAMES)) == list(names)
    with pytest.raises(InputError, match=r"select='odd', .* leave nothing to swap"):
        choose(names, "odd", counted=list(NAMES))


def test_odd_and_then_even_are_all(tiny):
    model = tiny.model("dit")
    assert list(swap_attention(model, "odd", init="random").layers) == tiny.layers["dit"][1::2]
    swap = swap_attention(model, "even", init="random")
    assert list(swap.layers) == tiny.layers["dit"][::2]
    assert swap.config["layers"] == tiny.layers["dit"]


def candidates(*rows) -> list[Candidate]:
    return [Candidate(f"layer{index}", *row) for index, row in enumerate(rows)]


def best(rows, max_error=None, speedup=None, whole=1000, together=None):
    """Indices that are chosen, and the choice; errors add up as independent ones do, if not told otherwise."""
    found = candidates(*rows)
    errors = {each.name: each.error for each in found}
    choice = choose_best(
        found, whole, max_error, speedup, together or (lambda names: math.hypot(*(errors[name] for name in names)))
    )
    return [int(name.removeprefix("layer")) for name in choice.names], choice


def test_as_many_are_taken_as_stay_within_the_error_together():
    """Of n layers with errors of 0.1 each the whole error is 0.1 sqrt(n); all counts of them, in few measurements."""
    for number, count in itertools.product((1, 2, 3, 7, 28), range(1, 29)):
        if count > number:
            continue
        calls = []

        def together(names, calls=calls):
            calls.append(len(names))
            return 0.1 * math.sqrt(len(names))

        taken, choice = best([(100, 0.1, 0.5)] * number, max_error=0.1001 * math.sqrt(count), together=together)
        assert taken == list(range(count))  # ties: in the model's order
        assert choice.error == pytest.approx(0.1 * math.sqrt(count))
        assert len(calls) <= 1 + math.log2(number) + 1
        assert all("with those chosen" in reason for reason in choice.reasons.values())


def test_the_least_error_per_mac_saved_comes_first():
    rows = [(100, 0.1, 1.0), (10, 0.02, 1.0), (400, 0.2, 1.0), (100, 0.05, 1.0)]  # per MAC: 1, 2, 0.5, 0.5
    order = [2, 3, 0, 1]
    for count in range(1, 5):
        within = math.hypot(*(rows[index][1] for index in order[:count])) + 1e-9
        taken, _ = best(rows, max_error=max(within, 0.2))
        assert taken == sorted(order[:count])


def test_errors_of_zero_tie_by_macs_and_then_by_place():
    rows = [(10, 0.0, 1.0), (20, 0.0, 1.0), (20, 0.0, 1.0)]
    assert best(rows, max_error=1e-9)[0] == [0, 1, 2]
    assert best(rows, speedup=1.02)[0] == [1]
    assert best(rows, speedup=1.04)[0] == [1, 2]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ((100, 0.1, 1.26), "1.26 times as long"),
        ((0, 0.1, 0.5), "saves no MACs"),
        ((-5, 0.1, 0.5), "saves no MACs"),
        ((100, 0.21, 0.5), "above max_error"),
        ((100, math.inf, 0.5), "output not finite"),
        ((None, None, None), "not called on the calibration inputs"),
        ((100, 0.1, 1.25), None),
        ((100, 0.1, None), None),  # timings that do not settle veto nothing
    ],
)
def test_what_keeps_a_layer_out(row, reason):
    taken, choice = best([(100, 0.1, 0.5), row], max_error=0.2)
    assert taken == ([0] if reason else [0, 1])
    assert choice.reasons == ({"layer1": reason} if reason else {})


@pytest.mark.parametrize(("speedup", "count"), [(1.05, 1), (1.1, 1), (1.2, 2), (1.4, 3)])
def test_as_many_are_taken_as_a_speedup_takes(speedup, count):
    """Of 1000 multiply-accumulates a layer saves 100: 1.11 times fewer; two 1.25 times; three 1.43 times."""
    rows = [(100, 0.1, 1.0), (100, 0.3, 1.0), (100, 0.2, 1.0)]
    taken, choice = best(rows, speedup=speedup)
    assert taken == sorted([0, 2, 1][:count])
    assert set(choice.reasons.values()) <= {"not needed for speedup"}


@pytest.mark.parametrize(
    ("rows", "targets", "says"),
    [
        ([(9, 0.1, 2.0), (-1, 0.1, 0.5)], {"max_error": 1}, r"\(of 2, 1 take over 1\.25 times .* 1 save no mu"),
        (
            [(9, 0.2, 1.0), (9, 0.1, 1.0), (9, 0.01, 3.0)],
            {"max_error": 0.05},
            r"within 0\.05 \(least error: 0\.1, layer1; 2 of 3 save something\); raise max_error",
        ),
        ([(None, None, None)], {"max_error": 1}, r"\(of 1, 1 are not called on .*\); give select='all'"),
        ([(9, math.inf, 1.0)], {"speedup": 1.001}, r"output finite \(least error: inf, layer0"),
        ([(300, 0.1, 1.0), (9, 0.1, 2.0)], {"speedup": 2}, "1 of 2 layers .* 1.43 times fewer, not 2 times; lower spe"),
        ([(300, 0.1, 1.0)] * 2, {"speedup": 2, "max_error": 0.13}, "2 layers .* by more than 0.13; raise max_error or"),
    ],
)  # fmt: skip
def test_when_nothing_is_chosen(rows, targets, says):
    taken, choice = best(rows, **targets)
    assert taken == []
    assert re.search(says, choice.refusal)
    assert len(choice.reasons) == len(rows)


def test_a_timing_ends_when_it_is_steady_and_tells_by_its_floor():
    quiet = settled(itertools.repeat((2e-3, 1e-3)))
    assert quiet == Timing(2.0, 1.0, 0.0, 0.0, 0.5)
    taken = []
    settled(taken.append(1) or (2e-3, 1e-3) for _ in range(100))
    assert len(taken) == ROUNDS[0]
    random.seed(0)
    for ratio in (0.5, 1.2, 1.3):  # other work triples two thirds of the times
        busy = settled((1e-3 * random.choice((1, 3, 3)), ratio * 1e-3 * random.choice((1, 3, 3))) for _ in range(100))
        assert busy.slowdown == pytest.approx(ratio)
        assert busy.spread_before > 0
    unsteady = settled((1e-3 * 1.2**-index, 5e-3 * 1.2**-index) for index in range(100))
    assert unsteady.slowdown is None


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(0.4, int(TIMING_SECONDS / 0.4) + 1), (8.0, ROUNDS[0]), (40.0, SLOW_ROUNDS)]
)
def test_a_timing_that_does_not_settle_ends_after_its_time(monkeypatch, seconds, rounds):
    clock = itertools.count(0.0, seconds)
    monkeypatch.setattr(calibration.time, "monotonic", lambda: next(clock))
    taken = []
    settled(taken.append(1) or (1e-3 * 1.2**-index, 1e-3) for index in range(100))
    assert len(taken) == rounds


@pytest.fixture
def clock(monkeypatch):
    """Sets by how much layers are slower, by name: no test reads a clock. Returns the names that are timed."""

    def set(slowdown: dict[str, float | None]) -> list[str]:
        timed = []
        monkeypatch.setattr(
            calibration,
            "timing_of",
            lambda site: timed.append(site.name) or Timing(1.0, 1.0, 0.25, 0.125, slowdown[site.name]),
        )
        return timed

    return set


@pytest.fixture
def fast(tiny, clock):
    return clock({name: 0.5 for names in tiny.layers.values() for name in names})


def output_of(tiny, model, kind, **options):
    return tiny.run(model, kind, **options).double()


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_errors_are_those_of_the_model_that_a_swap_makes(tiny, fast, kind):
    """Alone and together, against models that were swapped in earnest."""
    names, calls = tiny.layers[kind], [tiny.inputs(kind)]
    before = output_of(tiny, tiny.model(kind), kind)
    planned = swap_attention(tiny.model(kind), "auto", calib=calls, max_error=10, dry_run=True)
    report = planned.report(measure=False)
    assert [row.chosen for row in report.layers] == [True] * len(names)
    found = {row.name: row.output_error for row in report.layers}
    for name in names:
        model = tiny.model(kind)
        swap_attention(model, [name], calib=calls)
        assert found[name] == pytest.approx(relative(output_of(tiny, model, kind), before), rel=1e-4)
    model = tiny.model(kind)
    swap = swap_attention(model, "auto", calib=calls, max_error=10)
    assert list(swap.layers) == names if kind == "dit" else set(swap.layers) == set(names)
    assert swap.report(measure=False).output_error == report.output_error
    assert report.output_error == pytest.approx(relative(output_of(tiny, model, kind), before), rel=1e-4)
    assert f"all chosen layers swapped: {report.output_error:.3g}" in str(report)


def test_auto_looks_at_the_models_error_and_not_at_the_layers(tiny, fast):
    """A layer whose output is made small has the error that it had, and matters no more to the model."""
    names, model = tiny.layers["dit"], tiny.model("dit")
    own = {row.name: row.error for row in swap_attention(model, "all", dry_run=True).report(measure=False).layers}
    worst = max(names, key=own.get)
    with torch.no_grad():
        for parameter in model.get_submodule(worst).to_out[0].parameters():
            parameter.mul_(1e-3)
    swap = swap_attention(model, max_error=1e-4)
    assert list(swap.layers) == [worst]
    assert swap.sites[0].error == pytest.approx(own[worst], rel=0.1)
    assert swap.report(measure=False).output_error <= 1e-4


def test_auto_without_a_target_takes_a_fifth_of_error_in_all(tiny, fast):
    model = tiny.model("dit")
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn1.to_out[0].weight.mul_(10)
    planned = swap_attention(model, "all", dry_run=True).report(measure=False)
    assert planned.output_error > 0.2
    swap = swap_attention(model, calib=[tiny.inputs("dit")])
    assert 0 < len(swap.layers) < 3
    assert 0 < swap.report(measure=False).output_error <= 0.2


def test_a_speedup_counts_the_multiply_accumulates_of_the_model(tiny, fast):
    model, calls = tiny.model("dit"), [tiny.inputs("dit")]
    with FlopCounterMode(display=False) as counter:
        tiny.run(model, "dit")
    rows = swap_attention(model, "all", calib=calls, dry_run=True).report().layers
    attention = sum(2 * 2 * 16 * 16 * 16 for _ in rows)  # what the counter leaves out on CPUs: q k and its values
    whole, saved = counter.get_total_flops() // 2 + attention, [row.macs_before - row.macs_after for row in rows]
    assert len(set(saved)) == 1
    for count in (1, 2, 3):
        reached = whole / (whole - count * saved[0])
        assert len(swap_attention(tiny.model("dit"), calib=calls, speedup=reached - 1e-4).layers) == count
    with pytest.raises(InputError, match=r"times fewer, not .* times; lower speedup"):
        swap_attention(tiny.model("dit"), calib=calls, speedup=reached + 1e-3)


def test_layers_of_one_shape_have_one_timing(tiny, fast):
    names = tiny.layers["dit"]
    swap = swap_attention(tiny.model("dit"), max_error=10, dry_run=True)
    assert fast == names[:1]
    rows = swap.report().layers
    assert fast == names[:1]  # the report shows what chose
    assert len({(row.ms_before, row.ms_after, row.macs_before, row.macs_after) for row in rows}) == 1
    fast.clear()
    swap_attention(tiny.model("unet"), "all").report()
    assert len(fast) == 2  # outer and middle blocks
    fast.clear()
    model = tiny.model("dit")
    model.transformer_blocks[1].attn1.heads = 4
    swap_attention(model, "all").report()
    assert fast == names[:2]


def test_the_choice_is_one_on_a_busy_machine(tiny, monkeypatch):
    """Times of 1.1 ms for 1, now and then five times that, choose the same again and again."""
    generator = random.Random(0)

    def rounds(*_):
        for _ in range(100):
            yield tuple(each * 1e-3 * generator.choice((1, 1, 1.04, 2, 5)) for each in (1.0, 1.1))

    monkeypatch.setattr(calibration, "in_turn", rounds)
    model, calls = tiny.model("dit"), [tiny.inputs("dit")]
    for _ in range(10):
        swap = swap_attention(model, init="copy_vo", calib=calls, max_error=10, dry_run=True)
        assert list(swap.layers) == tiny.layers["dit"]


def test_a_dry_run_shows_all_layers(tiny, clock):
    names, model = tiny.layers["dit"], tiny.model("dit")
    clock({names[0]: 0.5, names[1]: 0.5, names[2]: 0.5})
    before = tiny.snapshot(model)
    for select in ("odd", names[1:2]):
        swap = swap_attention(model, select, dry_run=True)
        rows = swap.report().layers
        assert [row.name for row in rows] == names
        assert [row.chosen for row in rows] == [False, True, False]
        assert [row.reason for row in rows] == ["not selected", None, "not selected"]
        assert all(row.output_error > 0 and row.macs_before > row.macs_after > 0 for row in rows)
        assert list(swap.layers) == swap.config["layers"] == names[1:2]
        text = str(swap.report())
        assert "| 1.000 ± 0.250 -> 1.000 ± 0.125 | 0.5 |" in text
        assert text.count("no (not selected)") == 2
    model.transformer_blocks[0].attn1.is_causal = True
    swap = swap_attention(model, "odd", dry_run=True)
    model.transformer_blocks[0].attn1.is_causal = False
    (row,) = [row for row in swap.report().layers if row.name == names[0]]
    assert not row.chosen
    assert "is causal" in row.reason
    tiny.assert_as(before, model)


@pytest.mark.parametrize(
    ("targets", "slowdown", "says"),
    [
        ({"max_error": 1e-6}, 0.5, "select='auto': no layer that saves anything keeps the model's output within 1e-06"),
        ({"max_error": 10}, 1.5, r"\(of 3, 3 take over 1\.25 times as long as .*\); give select='all' to swap all, or"),
        ({"speedup": 30.0}, 0.5, "times fewer, not 30 times; lower speedup"),
    ],
)
def test_auto_that_cannot_be_leaves_the_model_alone_and_says_where_the_table_is(tiny, clock, targets, slowdown, says):
    model = tiny.model("dit").train()
    clock(dict.fromkeys(tiny.layers["dit"], slowdown))
    before = tiny.snapshot(model)
    with pytest.raises(InputError, match=says) as info:
        swap_attention(model, **targets)
    tiny.assert_as(before, model)
    planned = swap_attention(model, **targets, dry_run=True)
    tiny.assert_as(before, model)
    assert planned.sites == []
    report = planned.report()
    assert report.refusal in str(info.value)
    assert f"None is chosen: {report.refusal}." in str(report)
    for row in report.layers:
        assert not row.chosen
        assert row.reason
        latency = f"1.000 ± 0.250 -> 1.000 ± 0.125 | {slowdown} "
        assert f"{latency}| {row.error:.3f} | {row.output_error:.3g} | no ({row.reason}) |" in str(report)
    assert str(info.value).endswith("; the same call with dry_run=True has a report() of all layers")
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 400


def test_a_dry_run_goes_where_the_model_goes_with_all_its_layers(tiny, fast):
    model = tiny.model("dit")
    planned = swap_attention(model, "odd", dry_run=True)
    model.double()
    assert all(row.macs_after > 0 for row in planned.report().layers)
    assert {each.dtype for site in planned.candidates for each in site.layer.parameters()} == {torch.float64}


@pytest.mark.parametrize("select", ["auto", "all"])
def test_a_dry_run_shows_what_cannot_be_swapped(tiny, clock, select):
    model, names = tiny.model("dit"), tiny.layers["dit"]
    clock(dict.fromkeys(names, 0.5))
    model.transformer_blocks[1].attn1.is_causal = True
    planned = swap_attention(model, select, dry_run=True)
    with pytest.raises(InputError, match=r"attn1 is causal: .*; or leave it out by exclude=") as info:
        swap_attention(model, select)
    report = planned.report()
    assert report.refusal == str(info.value)
    assert planned.sites == planned.config["layers"] == []
    assert {row.name for row in report.layers} == set(names)
    for row in report.layers:
        assert not row.chosen
        assert row.reason
        assert row.name == names[1] or (row.macs_before and row.error > 0 and row.output_error > 0)
    assert swap_attention(model, select, exclude=names[1], max_error=None, dry_run=True).report().refusal is None


def test_the_table_shows_the_ratio_that_decides(tiny, clock):
    clock(dict(zip(tiny.layers["dit"], (1.24, None, 2.5), strict=True)))
    model = tiny.model("dit")
    for index, block in enumerate(model.transformer_blocks):  # of shapes that differ, each is timed
        block.attn1.heads = 2**index
    report = swap_attention(model, max_error=10, dry_run=True).report()
    assert [row.slowdown for row in report.layers] == [1.24, None, 2.5]
    assert [row.reason for row in report.layers] == [None, None, "2.5 times as long"]
    rows = [line for line in str(report).splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[4] for row in rows] == ["1.24", "unsteady", "2.5"]
    assert str(swap_attention(model, "all", dry_run=True).report(measure=False)).count("| not measured ") == 9


def test_exclude_goes_with_auto(tiny, fast):
    names = tiny.layers["dit"]
    assert list(swap_attention(tiny.model("dit"), max_error=10, exclude=names[1]).layers) == [names[0], names[2]]


def test_a_model_that_gives_zeros_tells_no_layers_apart(tiny, clock):
    model, names = tiny.model("sit"), tiny.layers["sit"]
    clock(dict.fromkeys(names, 0.5))
    for parameter in model.final_layer.linear.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(
        InputError, match=r"gives nothing but zeros .*; name the layers by select, such as select='all'"
    ):
        swap_attention(model)
    planned = swap_attention(model, dry_run=True)
    assert planned.sites == []
    assert [row.output_error for row in planned.report().layers] == [None] * 3
    assert all(row.error > 0 and row.macs_before for row in planned.report().layers)
    assert list(swap_attention(model, "all", dry_run=True).layers) == names
    assert list(swap_attention(model, "all").layers) == names


def test_layers_behind_closed_gates_are_exact_and_taken_first(tiny, fast):
    model, names = tiny.model("dit"), tiny.layers["dit"]
    for parameter in model.transformer_blocks[2].norm1.linear.parameters():
        torch.nn.init.zeros_(parameter)
    swap = swap_attention(model, max_error=1e-9)
    assert list(swap.layers) == names[2:]
    assert swap.report(measure=False).output_error == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(tiny, fast, dtype):
    """Squares of its output go beyond fp16."""
    model = tiny.model("dit").to(dtype)
    with torch.no_grad():
        model.proj_out_2.weight.mul_(1e3)
        model.proj_out_2.bias.mul_(1e3)
    report = swap_attention(model, max_error=10, dry_run=True).report(measure=False)
    assert all(0 < row.output_error < 1 for row in report.layers)
    assert 0 < report.output_error < 1


@dataclass
class Answer:
    picture: torch.Tensor
    more: dict


class Wrapped(torch.nn.Module):
    """What an attention gives, in the shape that `answer` puts it in."""

    def __init__(self, answer):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.answer = Attention(query_dim=16, heads=2, dim_head=8), answer

    def forward(self, image):
        return self.answer(self.attention(image.flatten(2).transpose(1, 2)))


@pytest.fixture
def wrapped(monkeypatch):
    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    register_adapter(
        SwapAdapter(
            Wrapped, {"attention": SelfAttentionGraft()}, Wrapped, lambda _, args, kwargs: tuple(args[0].shape[-2:])
        )
    )
    calls = [(torch.randn(2, 16, *grid, generator=torch.Generator().manual_seed(5)),) for grid in ((6, 4), (3, 5))]
    return lambda answer: swap_attention(Wrapped(answer), "all", calib=calls, dry_run=True).report(measure=False)


def test_models_that_give_several_tensors(wrapped):
    plain = wrapped(lambda x: x)
    (row,) = plain.layers
    assert row.output_error == pytest.approx(row.error)  # the output is the layer's own, over both inputs
    same = [
        lambda x: (x, x * 1e-3, x.argmax()),
        lambda x: {"a": [x], "b": None},
        lambda x: Answer(x, {"count": 3}),
        lambda x: (x, torch.zeros(3)),
        lambda x: (x * 1e-3 + 100, Answer(x, {})),  # the largest error of any, however large the tensor
    ]
    for answer in same:
        assert wrapped(answer).output_error == pytest.approx(plain.output_error, rel=1e-5)
    for answer in (lambda x: x.argmax(-1), lambda x: "text"):
        assert wrapped(answer).output_error is None


def test_outputs_that_are_not_finite(wrapped):
    with pytest.raises(InputError, match="the model's output has NaN or infinity on the calibration inputs"):
        wrapped(lambda x: x / 0)
    seen = []
    assert wrapped(lambda x: x / (0 if len(seen) > 6 else seen.append(1) or 1)).output_error == math.inf
