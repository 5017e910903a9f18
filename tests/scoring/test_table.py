"""Tables of results: means and spreads by hand, what may not stand together, and what is said where it must."""

import copy
import json
import math
import re
import statistics

import pytest
from conftest import unmarked

from eval.__main__ import main as evaluate
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.markdown import plain
from sit_atconv.scoring import METRICS
from sit_atconv.scoring.frechet import FRECHET
from sit_atconv.scoring.result import features_told
from sit_atconv.scoring.table import markdown as to_markdown
from sit_atconv.scoring.table import tabulate

TRAINING = {"name": "SiT-XL/2", "token_mixer": "attention", "params": 675_100_000, "precision": "fp32"}


@pytest.fixture
def result(tmp_path):
    """Writes a metrics.json; `changes` are laid over it by dotted key."""
    number = iter(range(100))

    def write(values=None, seed=0, **changes):
        values = values or {"fid": 17.0, "is": 100.0}
        which = next(number)
        stored = {
            "protocol": "adm-inception-1",
            "n": 50_000,
            "class_histogram": None,
            "metrics": {
                name: {"value": value, "se": 0.1, "corrected": value - 0.5 if name == "fid" else None}
                for name, value in values.items()
            },
            "reference": {"name": "/data/ref.npz", "sha256": "ab" * 32},
            "extractors": [{"name": "inception", "protocol": "adm-inception-1", "weights_sha256": "cd" * 32}],
            "image_shape": [3, 256, 256],
            "groups": 10,
            "error_bars": {"design": "random", "groups": 10, "upper_bound": False, "why": "drawn", "seed": 0},
            "samples_manifest_sha256": f"manifest {which}",
            "samples_manifest": {
                "sampler": "euler-maruyama", "steps": 250, "guidance_scale": 1.0, "guidance_channels": None,
                "guidance_interval": None, "diffusion": "sigma", "diffusion_norm": 1.0, "last_step": "mean",
                "last_step_size": 0.04, "epsilon": None, "labels_rule": "random", "weights": "ema", "dtype": "fp32",
                "uint8_rule": "trunc",
                "codec": {"codec": "vae", "sha256": "ef" * 32, "scale": 0.18215, "vae": f"at {which}"},
                "step": 400_000, "nfe": 250, "checkpoint_sha256": {"x": f"weights {which}"},
                "training": {**TRAINING, "seed": seed, "images_seen": 102_400_000},
            },
        }  # fmt: skip
        for key, value in changes.items():
            place, *last = key.split("__")
            parts = [place, *last]
            inner = stored
            for part in parts[:-1]:
                inner = inner[part]
            inner[parts[-1]] = copy.deepcopy(value)
        path = tmp_path / f"{which}.json"
        path.write_text(json.dumps(stored))
        return path

    return write


def cells(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_model_trained_with_repa_is_a_method_of_its_own(result, tmp_path):
    repa = {"encoder": "dinov2_vitb14", "depth": 8, "weight": 0.5}
    files = [result({"fid": 17.0}, 0), result({"fid": 8.0}, 0, samples_manifest__training__repa=repa)]
    table = tabulate(files)
    name = json.loads(files[0].read_text())["samples_manifest"]["training"]["name"]
    assert [row["method"] for row in table["rows"]] == [name, f"{name} + REPA"]
    assert {figure["model"] for figure in tabulate(files[1:])["published"]} == {name}


def test_models_that_began_from_others_are_methods_of_their_own(result):
    """Whatever their seeds: each seed may have a base of its own."""
    begun = [{"anew": []}, {"anew": ["y_embedder"]}, {"anew": []}, {"anew": []}, None, None, None, None]
    lora = [None, None, {"rank": 4, "alpha": 8.0}, {"rank": 8, "alpha": 8.0}, {"sha256": "aa" * 32}, None, None, None]
    distill = [*[None] * 6, {"select": "all", "control": False}, None]
    meanflow = [*[None] * 7, {"share": 0.25, "guidance": 1.0, "tangent": "sample", "teacher": False}]
    sections = ("init", "lora", "distill", "meanflow")
    kinds = [
        {f"samples_manifest__training__{key}": one for key, one in zip(sections, each, strict=True)}
        for each in zip(begun, lora, distill, meanflow, strict=True)
    ]
    files = [result(seed=seed, **kind) for seed, kind in enumerate(kinds)]
    files += [result(seed=9, **kinds[0]), result(seed=9)]  # the last as an earlier version wrote it, without both
    table = tabulate(files)
    assert [(row["method"].removeprefix("SiT-XL/2"), row["seeds"]) for row in table["rows"]] == [
        (" + train.init", [0, 9]), (" + train.init", [1]), (" + train.init + LoRA", [2]), (" + train.init + LoRA", [3]),
        (" + LoRA", [4]), ("", [5, 9]), (" + distill", [6]), (" + MeanFlow", [7]),
    ]  # fmt: skip
    assert {figure["model"] for figure in tabulate(files[3:4])["published"]} == {"SiT-XL/2"}


def test_guidance_in_the_weights_does_not_stand_beside_none(result):
    """As guidance of the sampling does not; of earlier versions, and of flows, nothing is recorded."""
    learned = {"share": 0.25, "guidance": 1.0, "tangent": "sample", "teacher": False}
    key = "samples_manifest__training__meanflow"
    flow, plain = result(), result(**{key: learned})
    guided = [result(seed=each, **{key: learned | {"guidance": 2.5}}) for each in (1, 2)]
    assert [row["method"] for row in tabulate([flow, plain])["rows"]] == ["SiT-XL/2", "SiT-XL/2 + MeanFlow"]
    for other in (flow, plain, result(seed=3, **{key: learned | {"guidance": 3.0}})):
        with pytest.raises(InputError, match=r"has trained_guidance 2\.5, .* trained_guidance "):
            tabulate([*guided, other])
    table = tabulate([*guided, flow], mix=True)
    called = "SiT-XL/2 + MeanFlow, guidance 2.5"
    assert [(row["method"], row["seeds"]) for row in table["rows"]] == [(called, [1, 2]), ("SiT-XL/2", [0])]
    assert cells(to_markdown(table), called)[1] == "2.5"
    assert {figure["model"] for figure in tabulate(guided)["published"]} == {"SiT-XL/2"}


def test_a_row_is_mean_and_spread_over_training_seeds(result, tmp_path, capsys):
    fids = [17.0, 17.5, 18.3]
    errors, corrected = [0.1, 0.2, 0.6], [16.0, 17.3, 17.4]
    files = [
        result({"fid": fid, "is": 100.0 + fid}, seed, metrics__fid__se=se, metrics__fid__corrected=without)
        for seed, (fid, se, without) in enumerate(zip(fids, errors, corrected, strict=True))
    ]
    other = {"samples_manifest__training__name": "SiT-ATConv-XL/2", "samples_manifest__training__params": 637_700_000}
    files.append(result({"fid": 16.9, "is": 120.0}, **other))
    evaluate(["table", *map(str, files), "--out", str(tmp_path / "table.md")])
    text, table = unmarked(tmp_path / "table.md"), json.loads((tmp_path / "table.json").read_text())
    assert capsys.readouterr().out == text
    first, second = table["rows"]
    assert (first["seeds"], second["seeds"]) == ([0, 1, 2], [0])
    assert first["metrics"]["fid"] == {
        "mean": pytest.approx(statistics.mean(fids)), "std": pytest.approx(statistics.stdev(fids)),
        "se": pytest.approx(0.3), "corrected": pytest.approx(statistics.mean(corrected)),
        "corrected_std": pytest.approx(statistics.stdev(corrected)), "values": fids,
    }  # fmt: skip
    assert second["metrics"]["fid"]["std"] is None
    assert second["metrics"]["is"]["corrected"] is None
    assert cells(text, "model")[1:5] == ["params (M)", "step", "NFE", "seeds"]
    assert cells(text, "SiT-XL/2") == [
        "SiT-XL/2", "675.1", "400,000", "250", "0, 1, 2", "17.60 ± 0.66 [0.30]", "117.60 ± 0.66 [0.10]", "16.90 ± 0.78",
    ]  # fmt: skip
    assert cells(text, "SiT-ATConv-XL/2")[5:] == ["16.90 [0.10]", "120.00 [0.10]", "16.40"]
    assert "scored against ref.npz" in text
    assert "/data" not in text
    assert "cannot be compared" not in text
    assert [row["file"] for row in first["results"]] == [str(path) for path in files[:3]]


def test_how_sure_a_number_is_is_said(result, tmp_path):
    bound = {"design": "random", "groups": 10, "upper_bound": True, "why": "classes are unknown", "seed": 0}
    evaluate(["table", str(result(error_bars=bound)), "--out", str(tmp_path / "t.md")])
    text = (tmp_path / "t.md").read_text()
    assert cells(text, "SiT-XL/2")[5:] == ["17.00 [≤ 0.10]", "100.00 [≤ 0.10]", "≥ 16.50"]
    assert "Error bars: 10 random groups; classes are unknown." in text
    few = result(n=10_000, metrics__fid__corrected=None, metrics__fid__corrected_needs=20_480)
    evaluate(["table", str(few), "--out", str(tmp_path / "t.md")])
    text = (tmp_path / "t.md").read_text()
    assert cells(text, "SiT-XL/2")[5:] == ["17.00 [0.10]", "100.00 [0.10]"]
    assert "FID, corrected: needs N >= 20,480 images for 2,048 features." in text


BARS = {"design": "random", "groups": 10, "upper_bound": False, "why": "classes are unknown"}
ODD_BARS = (
    5, {}, {"design": "random"}, {"design": "random", "upper_bound": True}, BARS | {"design": "other"},
    BARS | {"design": None}, BARS | {"groups": None}, BARS | {"groups": "10"}, BARS | {"why": None},
    BARS | {"upper_bound": 1},
)  # fmt: skip


@pytest.mark.parametrize("error_bars", ODD_BARS, ids=str)
def test_odd_error_bars_are_refused(result, error_bars):
    with pytest.raises(InputError, match="is no result of `sit-atconv score`"):
        tabulate([result(error_bars=error_bars)])


BALANCED = {str(label): 50 for label in range(1000)}


@pytest.mark.parametrize(
    ("changes", "se", "corrected"),
    [
        ({"class_histogram": BALANCED, "samples_manifest__labels_rule": "balanced"}, 0.1, 16.5),
        ({"class_histogram": BALANCED, "samples_manifest__labels_rule": "random"}, None, None),
        ({"samples_manifest__labels_rule": None}, None, None),  # unlabelled
        ({"class_histogram": {str(label): 5 for label in range(10_000)}, "samples_manifest__labels_rule": "file"},
         None, None),
        ({"class_histogram": {str(label): 10 for label in range(1000)}, "samples_manifest__labels_rule": "balanced",
          "n": 10_000}, 0.1, None),  # too few images for 2,048 features
        ({"class_histogram": None, "n": 10, "groups": None}, 0.1, None),
    ],
)  # fmt: skip
def test_of_a_result_of_an_earlier_version_stands_what_holds(result, changes, se, corrected):
    """They counted off class by class in ten groups, however the images were drawn, and corrected any distance."""
    table = tabulate([result(error_bars=None, **changes)])
    found = table["rows"][0]["metrics"]["fid"]
    assert (found["mean"], found["se"], found["corrected"]) == (17.0, se, corrected)
    assert any("score the samples again" in sentence for sentence in table["error_bars"]) == (se is None)
    assert ("corrected_needs" in found) == (se is not None and corrected is None)


def test_published_figures_stand_beside_with_conditions_and_sources(result, tmp_path):
    xl = tabulate([result()])["published"]
    assert {figure["model"] for figure in xl} == {"SiT-XL/2"}
    assert [figure["fid"] for figure in xl] == [17.2, 7.9, 8.3, 9.5, 2.06]
    assert all(figure["source"] and figure["conditions"] for figure in xl)
    hybrid = tabulate([result(samples_manifest__training__name="SiT-ATConv-B/2-Hybrid")])["published"]
    assert [(figure["model"], figure["fid"]) for figure in hybrid] == [("SiT-B/2", 33.0)]
    assert not tabulate([result(protocol="digits-classifier-2")])["published"]
    evaluate(["table", str(result()), "--out", str(tmp_path / "t.md")])
    text = (tmp_path / "t.md").read_text()
    assert "Published by others, not measured here, of ImageNet 256 px, 50,000 samples, ADM's reference:" in text
    assert "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |" in text  # the sources are text
    assert text.splitlines()[1] == "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |"  # and so are the seeds
    assert (
        "| SiT-XL/2 | 7M steps, SDE 250, no guidance | 8.3 | 6.32 | 131.7 | 0.68 | 0.67 | SiT repository, issue 31 |"
        in text
    )


MIXED = {
    "protocol": "digits-classifier-2",
    "n": 10_000,
    "image_shape": [3, 512, 512],
    "groups": None,
    "error_bars": {"design": "stratified", "groups": 10, "upper_bound": False, "why": "balanced", "seed": 0},
    "samples_lossy": True,
    "reference__sha256": "00" * 32,
    "extractors": [{"name": "inception", "protocol": "adm-inception-1", "weights_sha256": "00" * 32}],
    "samples_manifest__sampler": "dopri5",
    "samples_manifest__steps": 50,
    "samples_manifest__guidance_scale": 1.5,
    "samples_manifest__guidance_channels": "first3",
    "samples_manifest__guidance_interval": [0.1, 0.9],
    "samples_manifest__diffusion": "linear",
    "samples_manifest__last_step_size": 0.1,
    "samples_manifest__diffusion_norm": 2.0,
    "samples_manifest__last_step": "tweedie",
    "samples_manifest__epsilon": 0.001,
    "samples_manifest__atol": 1e-3,
    "samples_manifest__rtol": 1e-3,
    "samples_manifest__labels_rule": "balanced",
    "samples_manifest__uint8_rule": "round",
    "samples_manifest__dtype": "bf16",
    "samples_manifest__weights": "model",
    "samples_manifest__codec__codec": "identity",
    "samples_manifest__codec__sha256": "00" * 32,
    "samples_manifest__codec__scale": 0.13025,
    "samples_manifest__codec__shift": 0.1,
}


@pytest.mark.parametrize("key", MIXED)
def test_what_cannot_be_compared_is_refused_or_said(result, key, tmp_path, fails):
    files = [result(seed=0), result(seed=1), result(seed=2, **{key: MIXED[key]})]
    name = key.removeprefix("samples_manifest__").partition("__")[0]
    out = tmp_path / "table.md"
    message = fails(evaluate, "table", *files, "--out", out)
    assert f"{str(files[0])!r} has {name} " in message
    assert f"{str(files[2])!r} " in message
    assert not out.exists()
    assert not out.with_suffix(".json").exists()
    evaluate(["table", *map(str, files), "--out", str(out), "--mix"])
    table = json.loads(out.with_suffix(".json").read_text())
    assert table["differs"] == [name]
    assert [row["seeds"] for row in table["rows"]] == [[0, 1], [2]]  # never averaged together
    assert f"**These rows cannot be compared with each other: they differ in {name}.**" in out.read_text()


def test_where_files_lie_and_what_cannot_matter_is_not_compared(result):
    files = [result(seed=0), result(seed=1, reference__name="/other/ref.npz", samples_manifest__block=3)]
    assert len(tabulate(files)["rows"]) == 1


def test_methods_that_differ_are_rows_of_their_own(result):
    files = [
        result(),
        result(samples_manifest__training__token_mixer="hybrid"),
        result(samples_manifest__step=100_000),
        result(samples_manifest__training__precision="bf16"),
        result(samples_manifest__training__params=1),
    ]
    assert len(tabulate(files)["rows"]) == 5


def test_nothing_is_counted_twice(result):
    one = result()
    with pytest.raises(InputError, match="are the same file; give one of them"):
        tabulate([one, f"{one.parent}/../{one.parent.name}/{one.name}"])
    copy_of_it = one.with_name("copy.json")
    copy_of_it.write_bytes(one.read_bytes())
    with pytest.raises(InputError, match="are of the same samples; give one of them"):
        tabulate([one, copy_of_it])
    bare = [result(samples_manifest={}, samples_manifest_sha256=None, pixels_sha256="same") for _ in "ab"]
    with pytest.raises(InputError, match="are of the same samples; give one of them"):
        tabulate([f"A={bare[0]}", f"B={bare[1]}"], mix=True)
    weights = json.loads(one.read_text())["samples_manifest"]["checkpoint_sha256"]
    with pytest.raises(InputError, match="are of the same weights"):
        tabulate([one, result(seed=1, samples_manifest__checkpoint_sha256=weights)])
    with pytest.raises(InputError, match=r"are both of training seed 0 of SiT-XL/2"):
        tabulate([one, result()])
    with pytest.raises(InputError, match="state no training seed"):
        tabulate([result(seed=None), result(seed=None)])
    with pytest.raises(InputError, match="lacks is, which others of SiT-XL/2 have"):
        tabulate([one, result({"fid": 1.0}, seed=1)])


def test_a_refusal_names_all_that_differs_between_the_two(result):
    files = [result(), result(samples_manifest__sampler="heun", samples_manifest__steps=9, seed=1)]
    with pytest.raises(InputError) as refused:
        tabulate(files)
    assert str(refused.value).startswith(
        f"{str(files[0])!r} has sampler euler-maruyama, steps 250, {str(files[1])!r} sampler heun, steps 9: "
    )


def test_a_refusal_is_short_whatever_differs(result):
    long = "trunc(clamp(127.5 * x + 128, 0, 255)), and more words than anybody reads"
    extractor = {"name": "inception", "protocol": "adm-inception-1", "weights_sha256": "00" * 32}
    for changes, first, second in (
        ({"extractors": [extractor]}, "extractors inception weights_sha256 cdcdcdcdcdcd", "weights_sha256 00000000"),
        ({"extractors": [extractor | {"name": "digits"}]}, "extractors inception", "extractors digits"),
        ({"samples_manifest__uint8_rule": long}, "uint8_rule trunc", f"uint8_rule {long[:40]}..."),
        ({"samples_manifest__uint8_rule": None}, "uint8_rule trunc", "uint8_rule not recorded"),
        ({"samples_manifest__steps": None}, "steps 250", "steps -"),
        ({"samples_manifest": {}}, "sampler euler-maruyama, steps 250", "and 4 more"),
    ):
        files = [result(), result(seed=1, **changes)]
        with pytest.raises(InputError) as refused:
            tabulate(files)
        said = str(refused.value).replace(str(files[0].parent), "")
        assert first in said
        assert second in said
        assert len(said) < 600
        assert "{" not in said


def test_references_that_differ_are_a_column(result):
    other = {"reference__sha256": "00" * 32, "reference__name": "own.npz", "samples_manifest__codec": {}}
    files = [result(samples_manifest__codec={}), result(seed=1, **other)]
    table = tabulate(files, mix=True)
    text = to_markdown(table)
    assert table["reference"] is None
    assert [cells(text, "SiT-XL/2")[1], cells(text, "model")[1]] == ["ref.npz abababababab", "reference"]
    assert "| SiT-XL/2 | own.npz 000000000000 |" in text
    common = next(line for line in text.splitlines() if line.startswith("Common to all rows"))
    assert "scored against" not in common
    assert "; ." not in common
    assert "codec" not in common


def test_settings_are_told_as_they_are_meant(result):
    interval = {"samples_manifest__guidance_interval": [0.0, 1.0]}
    assert "; guidance_interval 0.0 to 1.0; " in to_markdown(tabulate([result(**interval)]))
    mixed = to_markdown(tabulate([result(**interval), result(seed=1, samples_manifest__sampler=None)], mix=True))
    assert cells(mixed, "model")[1:3] == ["sampler", "guidance_interval"]
    assert "| SiT-XL/2 | euler-maruyama | 0.0 to 1.0 |" in mixed
    assert "| SiT-XL/2 | not recorded | - |" in mixed


def guide(which, **training):
    trained = {**TRAINING, "name": "SiT-S/2", "repa": None, "seed": which, "images_seen": 25_600, **training}
    return {
        "checkpoint": f"at {which}", "weights": "ema", "step": 100, "prediction": "velocity",
        "checkpoint_sha256": {"x": f"guide {which}"}, "training": trained,
    }  # fmt: skip


def test_what_a_guide_guided_is_told_from_what_none_did(result):
    scale = {"samples_manifest__guidance_scale": 2.0}
    plain, guided = result(**scale), result(seed=1, samples_manifest__guide=guide(0), **scale)
    with pytest.raises(InputError, match=r"has guide -, .* guide name SiT-S/2"):
        tabulate([plain, guided])
    mixed = to_markdown(tabulate([plain, guided], mix=True))
    assert cells(mixed, "model")[1] == "guide"
    assert "| SiT-XL/2 | - |" in mixed
    assert "| SiT-XL/2 | name SiT-S/2, " in mixed
    # Every training seed may have a guide of its own seed; another kind of guide is another way of drawing.
    again = result(seed=2, samples_manifest__guide=guide(5), **scale)
    table = tabulate([guided, again])
    assert [row["seeds"] for row in table["rows"]] == [[1, 2]]
    assert "; guide name SiT-S/2, token_mixer attention, params 675100000, " in to_markdown(table)
    begun = [guide(5, init={"anew": []}), guide(5, lora={"rank": 4, "alpha": 8.0})]
    for other in (guide(5, params=3), guide(5, images_seen=1), {**guide(5), "step": 7}, *begun):
        with pytest.raises(InputError, match="such scores cannot be compared"):
            tabulate([guided, result(seed=3, samples_manifest__guide=other, **scale)])
    with pytest.raises(InputError, match=r"has guide init -, .* guide init anew nothing"):
        tabulate([guided, result(seed=3, samples_manifest__guide=begun[0], **scale)])
    unknown = [result(seed=each, samples_manifest__guide={**guide(each), "training": None}, **scale) for each in (1, 2)]
    with pytest.raises(InputError, match=r"has guide sha256 x guide 1, .* guide sha256 x guide 2"):
        tabulate(unknown)


def test_a_model_that_nobody_trained_here_is_given_its_name(result):
    bare = {"samples_manifest__training": None, "samples_manifest__step": None}
    released, ours = result(**bare), result({"fid": 18.0, "is": 99.0}, **bare)
    with pytest.raises(InputError, match="tell them apart: NAME=FILE"):
        tabulate([released, ours])
    named = tabulate([f"SiT-XL/2={released}", f"SiT-B/2 of a friend={ours}"])
    assert [(row["method"], row["seeds"]) for row in named["rows"]] == [
        ("SiT-XL/2", [None]), ("SiT-B/2 of a friend", [None]),
    ]  # fmt: skip
    assert {figure["model"] for figure in named["published"]} == {"SiT-XL/2"}
    odd = released.with_name("a=b.json")
    odd.write_bytes(released.read_bytes())
    assert tabulate([odd])["rows"][0]["method"] == "unnamed"


def test_a_mixer_per_block_is_named_by_how_many_there_are(result):
    mixers = ["attention", "atconv", "atconv"]
    file = result(samples_manifest__training__name=None, samples_manifest__training__token_mixer=mixers)
    assert tabulate([file])["rows"][0]["method"] == "1 attention + 2 atconv"


def test_published_figures_and_claims_are_of_their_protocol_and_size(result):
    name = {"samples_manifest__training__name": "SiT-ATConv-XL/2"}
    own = tabulate([result(**name)])
    assert {figure["model"] for figure in own["published"]} == {"SiT-XL/2"}
    assert len(own["claimed"]) == 1
    assert own["claimed"][0] in to_markdown(own)
    for change in ({"image_shape": [3, 512, 512]}, {"n": 10_000}, {"protocol": "digits-classifier-2"}):
        other = tabulate([result(**change, **name)])
        assert (other["published"], other["claimed"]) == ([], []), change
    assert not tabulate([result()])["claimed"]


def test_what_was_not_recorded_is_said(result, tmp_path):
    known, unknown = tabulate([result()]), tabulate([result(samples_manifest={})])
    assert "Not recorded" not in to_markdown(known)
    assert "sampler, guidance_scale, labels_rule, dtype, uint8_rule." in to_markdown(unknown)


def test_labels_from_files_are_compared_by_their_histograms(result):
    rule = {"samples_manifest__labels_rule": "file"}
    files = [result(class_histogram={"0": 9}, **rule), result(class_histogram={"0": 8}, seed=1, **rule)]
    with pytest.raises(InputError, match="has classes"):
        tabulate(files)
    drawn = {"samples_manifest__labels_rule": "random"}
    files = [result(class_histogram={"0": 9}, **drawn), result(class_histogram={"0": 8}, seed=1, **drawn)]
    assert len(tabulate(files)["rows"]) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3", True, None])
def test_values_that_are_no_numbers_are_refused(result, value, tmp_path, fails):
    file = result()
    stored = json.loads(file.read_text())
    stored["metrics"]["fid"]["value"] = value
    file.write_text(json.dumps(stored))
    assert "fid is" in fails(evaluate, "table", file, "--out", tmp_path / "t.md")
    assert not (tmp_path / "t.md").exists()


ODD = [
    *((f"metrics__fid__{key}", value) for key in ("se", "corrected") for value in ([], {}, False, "", "1", math.inf)),
    *(("reference__name", value) for value in (None, 3, ["a"])),
    *(("reference__sha256", value) for value in (None, 3)),
    *(("samples_manifest__training__params", value) for value in ("many", [1], True, math.nan, 10**400)),
    *(("samples_manifest__training__images_seen", value) for value in ("", [], math.inf)),
    *(("samples_manifest__step", value) for value in ("9", [9], {}, math.nan)),
    *(("samples_manifest__nfe", value) for value in ("", [], False)),
    *(("samples_manifest__training__name", value) for value in (7, ["SiT"])),
    ("samples_manifest__training__seed", [0]),
    ("samples_manifest__training__meanflow", {"guidance": "2"}),
    ("samples_manifest__training__token_mixer", {"a": [math.nan]}),
    ("samples_manifest__training", "text"),
    ("samples_manifest__codec", "vae"),
    ("samples_manifest__codec__scale", math.nan),
    ("samples_manifest__guidance_interval", [0.0, math.inf]),
    ("samples_manifest", 5),
    ("extractors", 5),
    ("extractors", [{"name": "a", "x": math.inf}]),
    ("image_shape", [3, math.nan]),
    ("metrics", [1]),
    ("metrics__fid", 1.0),
]


@pytest.mark.parametrize(("key", "value"), ODD)
def test_results_with_odd_values_are_refused_in_one_line(result, key, value, tmp_path, fails):
    file = result(**{key: value})
    for given in (file, f"A={file}"):
        message = fails(evaluate, "table", given, "--out", tmp_path / "t.md")
        assert message.startswith(f"error: {str(file)!r} is no result of `sit-atconv score` (")
    assert not (tmp_path / "t.md").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"samples_manifest": {}}', "null"])
def test_files_that_are_no_results_are_refused(tmp_path, fails, text):
    (tmp_path / "m.json").write_text(text)
    assert "is no result of `sit-atconv score`" in fails(
        evaluate, "table", tmp_path / "m.json", "--out", tmp_path / "t.md"
    )
    assert "give files that `sit-atconv score` wrote" in fails(
        evaluate, "table", tmp_path / "nowhere.json", "--out", tmp_path / "t.md"
    )
    assert "must end in .md" in fails(evaluate, "table", tmp_path / "m.json", "--out", tmp_path / "t.txt")


def test_names_of_others_do_nothing_in_the_table(result):
    evil = "x\n\n# head | y <script>alert(1)</script> ![i](http://h/i) `c`"
    changes = {"samples_manifest__training__name": evil, "samples_manifest__sampler": evil}
    changes |= {"reference__name": f"/data/{evil}", "extractors": [{"name": evil, "protocol": evil}]}
    changes |= {"error_bars__why": evil}
    other = {**changes, "samples_manifest__sampler": f"{evil}2"}
    text = to_markdown(tabulate([str(result({evil: 1.0}, **changes)), str(result({evil: 1.0}, **other))], mix=True))
    assert not [line for line in text.splitlines() if line.startswith("# ")]
    assert not re.search(r"<script|(?<!\\)!?\[i(?<!\\)\]|(?<!\\)`", text)
    assert text.count("&lt;script&gt;") >= 6
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_a_distance_that_is_no_fid_is_called_so_and_warnings_are_repeated(result, tmp_path):
    """Whatever the extractor: only Inception's distances are FIDs."""
    other = {"name": "attnet-12345678", "protocol": "attnet-1", "weights_sha256": "ab", "heldout_accuracy": 0.912}
    other["class_names"] = ["a", "b", "c"]
    score = {"value": 3.0, "se": 0.1, "corrected": None}
    few = "frechet_distance: 64 features of 500 samples: at least 640 are needed; the distance is biased"
    file = result(protocol="attnet-1", extractors=[other], metrics={"frechet_distance": score}, warnings=[few])
    table = tabulate([file])
    text = to_markdown(table)
    assert "| Fréchet distance (not a FID) |" in text
    assert "The Fréchet distance in features of attnet-12345678 (91.2% right on held-out images) is not a FID." in text
    # Scored once from a run, which knows its accuracy, and once from a copy of its weights: the same classifier.
    known = {**other, "heldout_num": 6000, "heldout_step": 1000, "image_size": [28, 28]}
    copy = {**other, "heldout_accuracy": None, "heldout_num": None, "heldout_step": None, "image_size": None}
    files = [
        result(protocol="attnet-1", extractors=[each], metrics={"frechet_distance": score}, seed=seed)
        for seed, each in enumerate((copy, known))
    ]
    for given, says in (
        (files, "91.2% right on 6,000 held-out images at step 1,000, before these weights"),
        (files[:1], "its accuracy on held-out images is not known"),
    ):
        table = tabulate(given)
        assert table["told"] == [f"the Fréchet distance in features of attnet-12345678 ({says}) is not a FID"]
        assert not table["differs"]
    table = tabulate([file])
    assert table["warnings"] == [few]
    assert f"**Warning: {plain(few)}.**" in text
    assert "class_names 3" in text
    assert "not a FID" not in to_markdown(tabulate([result()]))
    both = [{"protocol": "adm-inception-1"}, {"name": "v", "protocol": "dinov2-v-1"}]
    assert features_told((["fdd", "fid"], both)) == ["the Fréchet distance in features of v is not a FID"]
    assert features_told((["fid"], both[:1]), (["is"], both)) == []
    for name, (label, _) in METRICS.items():
        assert ("FID" in label) == (name in FRECHET), name
        assert ("not a FID" in label) == (name in ("fdd", "frechet_distance")), name
