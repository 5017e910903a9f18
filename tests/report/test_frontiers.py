"""The part of a report that shows scores over time: which of them are of a run, and what is drawn of them."""

import copy
import json
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT
from html_page import Page

from sit_atconv.bench.choosing import pareto
from sit_atconv.commands import parser_of
from sit_atconv.report.curves import Spot, scatter
from sit_atconv.runtime.errors import InputError

MEASURED = ROOT / "experiments/results/frontier"


@pytest.fixture
def make(tmp_path):
    """Writes reports: paths of runs -> the page."""

    def write(*runs) -> Page:
        out = tmp_path / "out" / "report.html"
        args = parser_of("report", "report").parse_args([*map(str, runs), "--out", str(out)])
        args.run(args)
        return Page(out.read_bytes().decode("ascii"))

    return write


def begun(folder, files=None):
    """A run, with a checkpoint of these files."""
    step = folder / "step-0001200"
    step.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("train: {max_steps: 1200}\n")
    (step / "manifest.json").write_text(json.dumps({"step": 1200, "files": files or {}}))
    return folder


def frontier(folder, name="digits", **changes):
    """A folder of `sit-atconv frontier`: a measured one, with changes. Its result."""
    result = copy.deepcopy(json.loads((MEASURED / name / "frontier.json").read_text())) | changes
    folder.mkdir(parents=True)
    (folder / "frontier.json").write_text(json.dumps(result))
    return result


def sections(page):
    return [each["id"] for each in page.all("section") if each["id"].startswith("frontier")]


def test_a_frontier_in_the_runs_folder_is_shown_with_what_is_worth_taking(make, tmp_path):
    result = frontier(begun(tmp_path / "run") / "frontier")
    page = make(tmp_path / "run")
    assert sections(page) == ["frontier-0"]
    assert "Score over time: frontier" in page.text
    best = pareto(result["points"])
    assert len(best) == 2
    table = [row for row in page.rows if row[0][:3] in ("1: ", "2: ")]
    assert sorted(row[0] for row in table) == sorted(
        f"{place}: {point['label']}" for place, point in enumerate(best, 1) for _ in range(2)
    )  # once among the best, once among all
    assert ["1: adams2, 8 steps", "2.55 ± 0.21", "5.0034.743 to 5.19", "8"] in table
    assert len([row for row in page.rows if row[0].startswith("euler-maruyama")]) == 1
    (chosen,) = result["recommended"]
    assert chosen["command"] in page.text
    assert chosen["score_command"] in page.text
    (drawing,) = [each for each in page.all("svg") if "over milliseconds" in each.get("aria-label", "")]
    assert drawing["aria-label"].startswith("Fréchet distance (not a FID) over milliseconds per image of 36 settings")
    assert "1: run, adams2, 8 steps, 2.55 ± 0.21, 5.003 ms" in drawing["aria-label"]


def test_a_frontier_beside_a_run_is_its_own_where_it_measured_its_checkpoint(make, tmp_path):
    result = frontier(tmp_path / "runs" / "frontier", "fashion")
    files = result["models"]["atconv"]["checkpoint_sha256"]
    run = begun(tmp_path / "runs" / "a", files)
    other = begun(tmp_path / "runs" / "b", {name: "0" * 64 for name in files})
    assert sections(make(run)) == ["frontier-0"]
    assert sections(make(other)) == []
    half = {name: digest if name.endswith("json") else "1" * 64 for name, digest in files.items()}
    assert sections(make(begun(tmp_path / "runs" / "c", half))) == []  # a config alone is that of many checkpoints
    second = begun(tmp_path / "runs" / "d", result["models"]["attention"]["checkpoint_sha256"])
    page = make(run, second)
    assert sections(page) == ["frontier-0"]  # one, of both
    legend = page.source.partition('id="frontier-0"')[2].partition('class="legend"')[2].partition("</ul>")[0]
    assert legend.count("<li>") == 2
    (tmp_path / "runs" / "frontier" / "frontier.json").write_text("{")  # of nobody, as far as is known
    assert sections(make(run)) == []


def test_of_several_models_the_pareto_sets_of_each_are_listed(make, tmp_path):
    result = frontier(begun(tmp_path / "run") / "f", "fashion")
    page = make(tmp_path / "run")
    own = [point for point in result["points"] if point["pareto"]]
    assert len(own) > sum(point["pareto"] == "all" for point in own)
    section = page.source.partition('id="frontier-0"')[2].partition("</section>")[0]
    assert section.partition("</table>")[0].count("<tr>") == 1 + len(own)
    assert section.partition("</table>")[2].count("<tr>") == 1 + len(result["points"])
    assert [each["of"] for each in result["recommended"]] == ["attention", "atconv", None]
    assert section.count("<pre ") == 2
    assert "standard error of the best, of atconv and of all models: atconv, sampler=euler" in page.text


def test_a_frontier_of_many_settings_stays_small_and_keeps_the_best(make, tmp_path):
    result = frontier(begun(tmp_path / "run") / "f")
    point = result["points"][0]
    points = [point | {"ms": 10.0 + place, "label": f"p{place}", "pareto": None} for place in range(5000)]
    points[4999] |= {"pareto": "all", "label": "best"}
    (tmp_path / "run" / "f" / "frontier.json").write_text(json.dumps(result | {"points": points}))
    page = make(tmp_path / "run")
    assert [row[1] for row in page.rows if row[0] == "1: best"] == ["3.50 ± 0.24"] * 2  # of the best, and of all
    assert "Of 5,000 settings 300 are shown" in page.text
    assert len(page.source) < 300_000


def test_texts_of_a_frontier_are_escaped(make, tmp_path):
    evil = "<script>x</script>\"'&"
    result = frontier(begun(tmp_path / "run") / "f", metric=evil, notes=[evil])
    points = [point | {"model": evil, "label": evil} for point in result["points"]]
    chosen = [each | {"of": evil, "point": evil, "told": evil, "command": evil} for each in result["recommended"]]
    changes = {"points": points, "recommended": chosen}
    (tmp_path / "run" / "f" / "frontier.json").write_text(json.dumps(result | changes))
    page = make(tmp_path / "run")
    assert not page.all("script")
    assert page.text.count("<script>x</script>") > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.pop("points"), "points is missing"),
        (lambda result: result["points"].clear(), "points is empty"),
        (lambda result: result["points"][3].update(ms=0), r"points\.3: a time is not above 0"),
        (lambda result: result["points"][3].update(ms_quartiles=[-1.0, 2.0]), r"points\.3: a time is not above 0"),
        (lambda result: result["points"][3].update(score={"value": 1e300, "error": None}), r"points\.3\.score is"),
        (lambda result: result["points"][3].update(score={"value": 1.0, "error": -1.0}), r"points\.3\.score is"),
        (lambda result: result["points"][3].update(pareto="some"), r"points\.3\.pareto is 'some'"),
    ],
)
def test_a_damaged_frontier_in_the_runs_folder_is_an_error(make, tmp_path, change, message):
    result = frontier(begun(tmp_path / "run") / "f")
    change(result)
    (tmp_path / "run" / "f" / "frontier.json").write_text(json.dumps(result))
    with pytest.raises(InputError, match=rf"f/frontier\.json' is damaged: .*{message}.*; mend it, or set it aside"):
        make(tmp_path / "run")


def test_a_scatter_has_its_points_where_their_numbers_are():
    spots = [
        Spot(0, 1.0, (0.5, 2.0), 4.0, 1.0, mark="1"),
        Spot(0, 10.0, (10.0, 10.0), 3.0, 0.0, square=True),
        Spot(1, 100.0, (100.0, 100.0), 2.0, 0.5),
    ]
    elements = list(ElementTree.fromstring(scatter(spots, [[0, 1]], "ms", "alt")).iter())
    circles = [each for each in elements if each.tag == "circle"]
    (square,) = [each for each in elements if each.tag == "rect"]
    (first, last) = [(float(each.get("cx")), float(each.get("cy"))) for each in circles]
    middle = float(square.get("x")) + 3.5, float(square.get("y")) + 3.5
    assert middle[0] - first[0] == pytest.approx(last[0] - middle[0], abs=0.2)  # the times are in decades
    assert middle[1] - first[1] == pytest.approx(last[1] - middle[1], abs=0.2)  # and the scores in a line
    assert first[1] < last[1]  # up is greater
    bars = [each for each in elements if (each.get("class") or "").startswith("error")]
    lengths = [[float(each.get(f"{axis}2")) - float(each.get(f"{axis}1")) for axis in "xy"] for each in bars]
    decade, one = middle[0] - first[0], middle[1] - first[1]
    assert lengths[0] == pytest.approx([decade * 0.602, 0], abs=0.3)  # from a half to double
    assert lengths[1] == pytest.approx([0, -2 * one], abs=0.3)
    assert lengths[5] == pytest.approx([0, -one], abs=0.3)
    (path,) = [each.get("points").split() for each in elements if each.tag == "polyline"]
    assert [tuple(map(float, each.split(","))) for each in path] == [pytest.approx(first), pytest.approx(middle)]
    (mark,) = [each for each in elements if each.get("class") == "mark"]
    assert (mark.text, float(mark.get("x")) < first[0], float(mark.get("y")) > first[1]) == ("1", True, True)


def test_one_point_and_errors_beyond_zero_are_drawn():
    for spots in ([Spot(0, 1.0, (1.0, 1.0), 0.0, 0.0)], [Spot(0, 1.0, (1.0, 1.0), 1.0, 5.0), Spot(0, 2, (1, 3), 9, 0)]):
        drawing = scatter(spots, [], "ms", "alt")
        assert "nan" not in drawing
        assert "inf" not in drawing
