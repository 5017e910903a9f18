"""The report of a run: what it shows of the files, what it makes of missing and broken ones, that it is one page."""

import base64
import hashlib
import html
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest
import yaml
from html_page import Page, picture
from PIL import Image
from safetensors.numpy import save_file

from sit_atconv.commands import parser_of
from sit_atconv.report.curves import Interval, chart, intervals, log_ticks, logarithmic, style_of, thinned, ticks
from sit_atconv.report.curves import Series as Curve
from sit_atconv.report.markup import Markup, breakable, tag
from sit_atconv.report.pictures import chosen
from sit_atconv.runtime.errors import InputError


@pytest.fixture
def make(tmp_path):
    """Writes reports: paths of runs, and options -> the page."""

    def write(*words) -> Page:
        out = tmp_path / "out" / "report.html"
        args = parser_of("report", "report").parse_args([*map(str, words), "--out", str(out)])
        args.run(args)
        return Page(out.read_bytes().decode("ascii"))

    return write


def rows(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def samples(folder, labels=(0, 1, 2) * 4, size=8, metrics=True, grey=10, result=(), **changes):
    """Samples whose grey is so many times their index, with their result, over which `result` is laid."""
    folder.mkdir(parents=True)
    for index in range(len(labels)):
        Image.new("L", (size, size), grey * index).save(folder / f"{index:06d}.png")
    manifest = {
        "num": len(labels), "labels": list(labels), "sampler": "euler", "steps": 20, "guidance_scale": 1.5, "nfe": 40.0,
        "seconds_per_image": 0.125, "weights": "ema", "step": 60, "checkpoint_sha256": {"ema/config.json": "ab" * 32},
        "training": {"params": 1234567}, "versions": {"torch": "9.8.7"}, "image_shape": [1, size, size],
    } | changes  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    result = {
        "protocol": "digits-classifier-2", "n": len(labels), "groups": 10, "image_shape": [1, size, size],
        "metrics": {
            "frechet_distance": {"value": 242.0843, "se": 15.2366, "corrected": 226.7257},
            "precision": {"value": 0.13, "se": float("nan"), "corrected": None},
            "recall": {"value": None, "se": None, "corrected": None},
        },
        "reference": {"name": "digits train split", "sha256": "cd" * 32},
        "extractors": [{"name": "digits", "weights_sha256": "ef" * 32}], "pixels_sha256": "12" * 32,
        "samples_manifest": {}, "samples_manifest_sha256": digest(folder / "manifest.json"),
        "error_bars": {"design": "stratified", "groups": 10, "upper_bound": False, "why": "classes are balanced"},
        "versions": {"torch": "9.8.6"},
    } | dict(result)  # fmt: skip
    if metrics:
        (folder / "metrics.json").write_text(json.dumps(result))
    return folder


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def training(
    folder, lr=0.002, mixer="atconv", losses=(1.5, 1.25, 1.0), rates=(10.0, 500.0, 40.0), by_time=(1.0, None, 0.5),
    score=227.5,
):  # fmt: skip
    folder.mkdir(parents=True)
    recipe = {"run": {"seed": 3}, "model": {"name": None, "token_mixer": mixer}, "train": {"lr": lr, "max_steps": 90}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    log = [
        {"step": 10 * (index + 1), "images_seen": 320, "loss": loss, "loss_by_time": by_time, "grad_norm": 2.0,
         "lr": lr, "update_ratio": 0.01, "images_per_second": rate, "flops_per_second": 2e12, "peak_share": None,
         "data_wait": 0.25, "memory_bytes": 2**31}
        for index, (loss, rate) in enumerate(zip(losses, rates, strict=False))
    ]  # fmt: skip
    rows(folder / "log.jsonl", log)
    rows(folder / "scores.jsonl", [{"step": 30, "frechet_distance": score, "num": 1000, "sampling": {"steps": 20}}])
    step = folder / "step-0000030"
    step.mkdir()
    manifest = {
        "step": 30, "data": {"num_images": 1437, "classes": ["zero", "one", "two"]}, "files": {"model/x": "34" * 32},
    }  # fmt: skip
    (step / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_samples_say_what_guided_them_and_when(make, tmp_path):
    guide = {"checkpoint": "runs/weak", "step": 1200, "training": {"name": "SiT-S/2", "params": 5}}
    guide |= {"checkpoint_sha256": {"x": "12" * 32}}
    told = {
        "a": ({}, "euler, 20 steps, guidance 1.5, EMA"),
        "b": ({"guide": None, "guidance_channels": "all", "guidance_interval": [0.0, 1.0]},
              "euler, 20 steps, guidance 1.5, EMA"),
        "c": ({"guidance_interval": [0.25, 1.0], "guidance_channels": "first3"},
              "euler, 20 steps, guidance 1.5 for t in 0.25 to 1.0 of first3, EMA"),
        "f": ({"sampler": None, "scheduler": "unipc", "time_shift": 2.0, "guidance_every": 3, "cache": "mag:0.1"},
              "unipc, 20 steps, time shift 2.0, guidance 1.5 at one of 3 evaluations, cache mag:0.1, EMA"),
        "g": ({"sampler": "adams3", "start": "rk", "grid": "cosine"},
              "adams3, 20 steps, on the grid cosine, started by rk, guidance 1.5, EMA"),
        "d": ({"guide": guide, "guidance_interval": [0, 0.5]},
              "euler, 20 steps, guidance 1.5 by SiT-S/2 at its step 1,200 for t in 0 to 0.5, EMA"),
        "e": ({"guide": guide | {"training": {}, "step": None}},
              "euler, 20 steps, guidance 1.5 by another model, EMA"),
    }  # fmt: skip
    for name, (changes, text) in told.items():
        page = make(samples(tmp_path / name, **changes))
        assert f"12 samples, {text} weights" in page.text
    assert page.row("guide.checkpoint") == ["runs/weak"]
    assert "guide.checkpoint_sha256" not in page.text


def test_scores_say_from_which_step_on_their_images_were_made_otherwise(make, tmp_path):
    run = training(tmp_path / "a")
    guide = {"checkpoint": "runs/weak", "step": 1200, "training": {"name": "SiT-S/2"}}
    plain, guided = ({"sampler": "euler", "steps": 20, "guidance_scale": 2.0, "guide": each} for each in (None, guide))
    ways = [plain, plain, guided, guided | {"guidance_interval": [0.5, 1.0]}]
    scores = [{"step": 10 * step, "mean": 1.0, "num": 1000, "sampling": way} for step, way in enumerate(ways, 1)]
    rows(run / "scores.jsonl", scores)
    told = "1,000 samples, euler, 20 steps, guidance 2.0"
    assert (
        f"From step 10: {told}. From step 30: {told} by SiT-S/2 at its step 1,200. "
        f"From step 40: {told} by SiT-S/2 at its step 1,200 for t in 0.5 to 1.0."
    ) in make(run).text
    rows(run / "scores.jsonl", scores[:2])
    assert f"Of the EMA, as it was then. {told}." in make(run).text


def test_a_page_shows_what_the_files_say(make, tmp_path):
    run = training(tmp_path / "a-run")
    folder = samples(run / "samples" / "euler20")
    page = make(run)
    assert page.row("Fréchet distance (not a FID)")[0] == "242 ± 15corrected 227"
    assert page.row("Images per second") == ["40"]  # the median, not the mean
    assert page.row("TFLOP per second") == ["2"]
    assert page.row("Most memory") == ["2 GiB"]
    assert page.row("Seconds per image") == ["0.125"]
    assert page.row("NFE") == ["40"]
    assert page.row("train.lr") == ["0.002"]
    assert page.row("model.name") == ["null"]
    assert page.row("Manifest of the samples") == [digest(folder / "manifest.json")]
    assert page.row("Reference") == ["cd" * 32]
    assert page.row("Extractor") == ["ef" * 32]
    assert page.row("Checkpointema/config.json") == ["ab" * 32]
    assert page.row("model/x") == ["34" * 32]
    assert page.row("torch") == ["not recorded", "9.8.7", "9.8.6"]
    for text in ("30 of 90", "1,234,567", "digits train split", "Latest: 1 at step 30", "12 samples, euler, 20 steps"):
        assert text in page.text
    labels = [each.get("aria-label", "") for each in page.all("svg")]
    assert "Training loss over step: a-run from 1.5 to 1, least 1, greatest 1.5" in labels
    assert any(label.startswith("Fréchet distance (not a FID) over step: a-run from 227.5") for label in labels)
    assert "other samples" not in page.text


def test_losses_of_held_out_images_and_losses_over_seconds_are_drawn_where_a_run_has_them(make, tmp_path):
    old, new = training(tmp_path / "old"), training(tmp_path / "new", losses=(2.0, 1.5, 1.25))
    page = make(old)
    assert "Validation loss" not in page.text
    assert "over time" not in page.text
    for index, line in enumerate(log := [json.loads(line) for line in (new / "log.jsonl").read_text().splitlines()]):
        line["seconds"] = None if index == 0 else 2.5 * index  # the first one by an earlier version
    rows(new / "log.jsonl", log)
    validation = [
        {"step": 20, "seconds": 2.5, "loss": 1.75, "loss_se": 0.0125, "num": 7000},
        {"step": 30, "seconds": 5.0, "loss": 1.5, "loss_se": 0.0125, "num": 7000},
    ]
    rows(new / "validation.jsonl", validation)
    manifest = json.loads((new / "step-0000030" / "manifest.json").read_text())
    manifest["data"]["held_out"] = 7000
    recipe = yaml.safe_load((new / "recipe.yaml").read_text()) | {"data": {"kind": "zip"}}
    (new / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (new / "step-0000030" / "manifest.json").write_text(json.dumps(manifest))
    labels = [each.get("aria-label", "") for each in make(old, new).all("svg")]
    for label in (
        "Validation loss over step: new from 1.75 to 1.5, least 1.5, greatest 1.75",
        "Training loss over time over second of training: new from 1.5 to 1.25, least 1.25, greatest 1.5",
        "Validation loss over time over second of training: new from 1.75 to 1.5, least 1.5, greatest 1.75",
    ):
        assert label in labels
    page = make(new)
    for text in ("1.5 at second 5", "1.500 ± 0.013, 7,000 images", "zip, 1,437 images, 7,000 more held out"):
        assert text in page.text
    assert "cannot be compared" not in make(old, new).text
    rows(old / "validation.jsonl", [{"step": 20, "seconds": 2.5, "loss": 1.0, "num": num} for num in (70, 1000)])
    unlike = "of different images, and cannot be compared: old of 70 and of 1,000; new of 7,000."
    assert unlike in make(old, new).text


def test_the_grid_has_the_first_samples_of_each_class_in_their_order(make, tmp_path):
    labels = [2, 0, 1, 2, 0, 2]
    page = make(samples(tmp_path / "a", labels))
    shown = [(picture(image).getpixel((0, 0)), image["title"]) for image in page.all("img")]
    assert shown == [(10 * index, f"sample {index}") for index in (1, 4, 2, 0, 3, 5)]
    grids = [each["aria-label"] for each in page.all("div") if each.get("class") == "row"]
    assert grids == ["2 samples of class 0", "1 sample of class 1", "3 samples of class 2"]


def test_classes_have_the_names_that_the_data_gave_them(make, tmp_path):
    run = training(tmp_path / "a")
    samples(run / "samples" / "x", [0, 2])
    page = make(run)
    assert [each["aria-label"] for each in page.all("div") if each.get("class") == "row"] == [
        "1 sample of class zero",
        "1 sample of class two",
    ]


def test_of_many_classes_some_are_shown_evenly():
    labels = np.arange(4000) % 1000
    found = chosen(labels, 4000)
    assert [label for label, _ in found] == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert found[1] == (111, [111, 1111, 2111, 3111])
    assert chosen(np.zeros(50, int), 50) == [(0, list(range(8)))]
    assert [index for _, row in chosen(None, 20) for index in row] == list(range(20))


@pytest.mark.slow
def test_a_page_with_large_samples_stays_under_two_megabytes(make, tmp_path):
    folder = tmp_path / "noise"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (80, 256, 256, 3), dtype=np.uint8)  # which PNG cannot make less
    np.savez(folder / "samples.npz", arr_0=pixels, arr_1=np.arange(80) % 10)
    (folder / "manifest.json").write_text(json.dumps({"num": 80, "labels": (np.arange(80) % 10).tolist()}))
    page = make(folder)
    assert len(page.all("img")) == 80
    assert picture(page.all("img")[0]).size >= (64, 64)
    assert len(page.source) < 2_000_000


def test_without_samples_the_newest_preview_stands_in_and_the_page_says_so(make, tmp_path):
    run = training(tmp_path / "a")
    (run / "previews").mkdir()
    for step, grey in ((9, 10), (30, 20), (200, 30)):
        Image.new("RGB", (40, 40), (grey,) * 3).save(run / "previews" / f"step-{step}.png")
    page = make(run)
    (image,) = page.all("img")
    assert picture(image).getpixel((0, 0)) == (30, 30, 30)
    assert "newest preview" in page.text
    assert "at step 200" in page.text
    assert "Metrics: not measured" in page.text
    assert "sit-atconv score writes metrics.json beside the samples" in page.text


def test_every_text_from_a_file_is_escaped(make, tmp_path):
    evil = "<script>alert('x')</script>&\"<img src=http://x>"
    run = training(tmp_path / evil.replace("/", "|"), mixer=evil)
    folder = samples(run / "samples" / "<b>x<|b>", sampler=evil, versions={evil: evil})
    result = json.loads((folder / "metrics.json").read_text())
    result["metrics"][evil] = {"value": 1.0, "se": 0.1, "corrected": 0.9}
    result["reference"] |= {"name": evil, "sha256": evil}
    result["extractors"] = [{"name": evil, "weights_sha256": evil}]
    (folder / "metrics.json").write_text(json.dumps(result))
    checkpoint = run / "step-0000030" / "manifest.json"
    checkpoint.write_text(json.dumps({"data": {"num_images": 3, "classes": [evil] * 3}, "files": {evil: evil}}))
    rows(run / "scores.jsonl", [{"step": 1, evil: 1.0, "sampling": {"sampler": evil}}])
    page = make(run)
    assert not page.all("script")
    assert not page.all("b")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert page.text.count("alert('x')") > 10


def test_a_page_needs_nothing_but_itself(make, tmp_path):
    run = training(tmp_path / "a")
    samples(run / "samples" / "x")
    page = make(run)
    assert not {name for name, _ in page.elements} & {"script", "link", "iframe", "object", "base", "form"}
    assert not [attributes for _, attributes in page.elements if "style" in attributes]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    style = re.search("<style>(.*?)</style>", page.source, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [each["content"] for each in page.all("meta") if "http-equiv" in each]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme: dark" in style
    assert all("alt" in image for image in page.all("img"))
    assert all("aria-label" in each or "aria-hidden" in each for each in page.all("svg"))
    assert all(each["href"][1:] in {other.get("id") for other in page.all("section")} for each in page.all("a"))
    assert {each["scope"] for each in page.all("th")} == {"row", "col"}


def test_what_is_missing_or_not_finite_is_not_measured(make, tmp_path):
    run = training(tmp_path / "a", losses=(None, float("nan"), None))
    samples(run / "samples" / "x")
    page = make(run)
    assert page.row("Precision")[0] == "0.13"
    assert page.row("Recall") == ["not measured", "not measured"]
    assert page.row("Share of the device's peak") == ["not measured"]
    assert "Training loss not measured" in page.text
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "recipe.yaml").write_text("train: {lr: 1}")
    page = make(bare)
    for text in (
        "Sample grid: not measured",
        "Metrics: not measured",
        "Training loss not measured",
        "Gradient norm not",
    ):
        assert text in page.text
    assert "Speed of sampling: not measured" in page.text
    assert page.row("Images per second") == ["not measured"]


def test_runs_side_by_side(make, tmp_path):
    first, second = training(tmp_path / "first"), training(tmp_path / "second", lr=0.001, mixer="attention")
    samples(first / "samples" / "x")
    samples(second / "samples" / "x")
    page = make(first, second)
    table = [row for row in page.rows if row[0] in ("train.lr", "model.token_mixer", "run.seed", "train.max_steps")]
    assert sorted(row for row in table if len(row) == 3) == [
        ["model.token_mixer", "atconv", "attention"],
        ["train.lr", "0.002", "0.001"],
    ]
    assert sorted(row for row in table if len(row) == 2) == [["run.seed", "3"], ["train.max_steps", "90"]]
    assert page.row("Fréchet distance (not a FID)")[:2] == ["242 ± 15corrected 227"] * 2
    (curve,) = [
        each["aria-label"] for each in page.all("svg") if each.get("aria-label", "").startswith("Training loss")
    ]
    assert "first from" in curve
    assert "second from" in curve
    assert len(page.all("img")) == 24
    assert "cannot be compared" not in page.text
    assert {"line s0", "line s1"} <= {each.get("class") for each in page.all("polyline")}


def drawn(page, label):
    """The elements of the only drawing whose label begins so."""
    label = html.escape(label).encode("ascii", "xmlcharrefreplace").decode()
    (svg,) = re.findall(rf'<svg[^>]* aria-label="{re.escape(label)}[^"]*"[^>]*>.*?</svg>', page.source)
    return list(ElementTree.fromstring(svg).iter())


def line(elements, number):
    """The points of the only line of a series."""
    (found,) = [each for each in elements if each.tag == "polyline" and each.get("class") == f"line s{number}"]
    return np.array([tuple(map(float, pair.split(","))) for pair in found.get("points").split()])


def test_of_two_runs_that_differ_in_everything_each_has_what_is_its_own(make, tmp_path):
    other = {"losses": (9.0, 8.0, 7.0), "rates": (100.0, 5000.0, 400.0), "by_time": (4.0, 3.0, 2.0), "score": 99.5}
    first = training(tmp_path / "first", by_time=(1.0, 0.9, 0.5))
    second = training(tmp_path / "second", 0.001, "attention", **other)
    samples(first / "samples" / "x")
    metrics = {"frechet_distance": {"value": 130.0, "se": 5.0, "corrected": 120.0}}
    samples(second / "samples" / "x", grey=7, result={"metrics": metrics}, seconds_per_image=0.5, nfe=80.0)
    page = make(first, second)

    section = page.source.partition('id="samples-0"')[2].partition("</section>")[0]
    grids = section.split("<h3>")[1:]
    assert len(grids) == 2
    for part, run, grey, kind in zip(grids, ("first", "second"), (10, 7), ("s0", "s1"), strict=True):
        assert f"{run}: x</h3>" in part
        assert f'class="line {kind}"' in part.partition("</h3>")[0]
        shown = re.findall(r'<img src="([^"]*)"[^>]* title="sample (\d+)"', part)
        assert len(shown) == 12
        assert all(picture({"src": source}).getpixel((0, 0)) == grey * int(index) for source, index in shown)

    labels = [each.get("aria-label", "") for each in page.all("svg")]
    for told in (
        "Training loss over step: first from 1.5 to 1, least 1, greatest 1.5; second from 9 to 7, least 7, greatest 9",
        "Training images per second over step: first from 10 to 40, least 10, greatest 500; second from 100 to 400, "
        "least 100, greatest 5000",
        "Loss by time, at the latest report over t (0 noise, 1 data): first from 1 to 0.5, least 0.5, greatest 1; "
        "second from 4 to 2, least 2, greatest 4",
        "Fréchet distance (not a FID) over step: first from 227.5 to 227.5, least 227.5, greatest 227.5; second "
        "from 99.5 to 99.5, least 99.5, greatest 99.5",
    ):
        assert told in labels
    for label in ("Training loss", "Loss by time"):
        elements = drawn(page, label)
        lower, upper = line(elements, 0), line(elements, 1)
        assert upper[:, 1].max() < lower[:, 1].min()  # up is less
        for points in (lower, upper):
            assert (np.diff(points, axis=0) > 0).all()  # the losses fall from left to right
    middles = line(drawn(page, "Loss by time"), 1)[:, 0]
    assert middles[1] - middles[0] == pytest.approx(middles[2] - middles[1], abs=0.2)

    assert page.row("Images per second") == ["40", "400"]
    assert page.row("Seconds per image") == ["0.125", "0.5"]
    assert page.row("NFE") == ["40", "80"]
    assert page.row("Latest loss") == ["1", "7"]
    assert page.row("Token mixer") == ["atconv", "attention"]
    assert page.row("Fréchet distance (not a FID)")[:2] == ["242 ± 15corrected 227", "130.0 ± 5.0corrected 120.0"]
    strip = drawn(page, "Fréchet distance (not a FID): ")
    kinds = [each.get("class") for each in strip]
    for number in (0, 1):
        assert [kinds.count(f"{what} s{number}") for what in ("error", "corrected", "dot")] == [2, 1, 1]
    (at_first,), (at_second,) = (
        [float(each.get("cx")) for each in strip if each.get("class") == f"dot s{number}"] for number in (0, 1)
    )
    assert at_second < at_first  # 130 is left of 242


def test_which_way_a_metric_gets_better_is_said(make, tmp_path):
    lower = {
        "fid": "FID",
        "sfid": "sFID",
        "fdd": "FD-DINOv2 (not a FID)",
        "frechet_distance": "Fréchet distance (not a FID)",
        "kid": "KID",
    }
    higher = {"is": "Inception score", "precision": "Precision", "recall": "Recall", "density": "Density",
              "coverage": "Coverage", "recognised": "Recognised"}  # fmt: skip
    metrics = {name: {"value": 1.0, "se": 0.1, "corrected": None} for name in [*lower, *higher]}
    page = make(samples(tmp_path / "a", result={"metrics": metrics}))
    heads = {row[0] for row in page.rows}
    assert {f"{name}↓ lower is better" for name in lower.values()} <= heads
    assert {f"{name}↑ higher is better" for name in higher.values()} <= heads


@pytest.mark.parametrize(
    ("result", "manifest", "told"),
    [
        ({"n": 13}, {}, "n 12 | 13."),
        ({"protocol": "other-1"}, {}, "protocol digits-classifier-2 | other-1."),
        ({"reference": {"name": "x", "sha256": "other"}}, {}, "reference cdcdcdcdcdcd... | other."),
        ({"groups": None}, {}, "groups 10 | not recorded."),
        ({"image_shape": [3, 8, 8]}, {}, "image shape [1, 8, 8] | [3, 8, 8]."),
        ({"extractors": [{"name": "digits", "weights_sha256": "other"}]}, {},
         "extractors.digits.weights sha256 efefefefefef... | other."),
        ({}, {"codec": {"codec": "vae", "shift": 0.5}},
         "codec.codec not recorded | vae; codec.shift not recorded | 0.5."),
        ({}, {"guidance_scale": 2.0}, "guidance scale 1.5 | 2.0."),
        ({"samples_manifest": {"sampler": "heun", "steps": 20, "guidance_scale": 1.5, "weights": "ema"}}, {},
         "sampler euler | heun."),
        ({}, {"last_step": "mean", "atol": 0.1}, "last step not recorded | mean; atol not recorded | 0.1."),
    ],
)  # fmt: skip
def test_all_that_keeps_metrics_from_being_compared_is_said(make, tmp_path, result, manifest, told):
    page = make(samples(tmp_path / "a"), samples(tmp_path / "b", result=result, **manifest))
    assert f"These metrics were not measured in the same way and cannot be compared: {told}" in page.text


def test_a_distance_that_is_no_fid_and_one_of_few_images_are_told(make, tmp_path):
    few = "frechet_distance: 64 features of 500 samples: at least 640 are needed; the distance is biased"
    listed = [{"name": "attnet-1234", "protocol": "attnet-1", "heldout_accuracy": 0.912}]
    run = training(tmp_path / "run")
    about = {**listed[0], "heldout_accuracy": None, "warning": few}
    rows(run / "scores.jsonl", [{"step": 30, "frechet_distance": 2.0, "num": 100, "extractor": about}])
    text = make(run).text
    assert f"attnet-1234 (its accuracy on held-out images is not known) is not a FID. Warning: {few}." in text
    page = make(samples(tmp_path / "a", result={"warnings": [few], "extractors": listed}))
    assert f": {few}." in page.text
    assert "The Fréchet distance in features of attnet-1234 (91.2% right on held-out images) is not a FID." in page.text


def test_how_sure_a_number_is_stands_beside_it(make, tmp_path):
    bound = {"design": "random", "groups": 10, "upper_bound": True, "why": "classes are unknown"}
    few = {"frechet_distance": {"value": 242.0843, "se": 15.2366, "corrected": None, "corrected_needs": 640}}
    first, second = (
        samples(tmp_path / "a", result={"error_bars": bound}),
        samples(tmp_path / "b", result={"metrics": few}),
    )
    page = make(first, second)
    assert page.row("Fréchet distance (not a FID)")[:2] == [
        "242 ± ≤ 15corrected ≥ 227",
        "242 ± 15corrected needs N >= 640 images for 64 features",
    ]
    assert "(a: error bars: 10 random groups; classes are unknown | b: error bars: 10 stratified groups;" in page.text
    assert "cannot be compared: error bars random, an upper bound | stratified." in page.text
    assert "242, error at most 15" in (tmp_path / "out/report.html").read_text()


def test_errors_of_earlier_versions_are_left_out_where_they_do_not_hold(make, tmp_path):
    page = make(samples(tmp_path / "a", result={"error_bars": None}))
    assert page.row("Fréchet distance (not a FID)")[0] == "242.1corrected not measured"
    assert "(no error bars: those of an earlier version do not fit how the images were drawn; score" in page.text


def test_of_many_differences_some_are_told(make, tmp_path):
    rule = {"labels_rule": "file"}
    many = [{"class_histogram": {str(index): shift + index for index in range(40)}} for shift in (0, 1)]
    page = make(samples(tmp_path / "a", result=many[0], **rule), samples(tmp_path / "b", result=many[1], **rule))
    assert "classes.0 0 | 1; classes.1 1 | 2;" in page.text
    assert "classes.11 11 | 12; and 28 more." in page.text


def test_a_folder_of_images_alone_is_shown(make, tmp_path):
    folder = samples(tmp_path / "a", metrics=False)
    (folder / "manifest.json").unlink()
    page = make(folder)
    assert [picture(image).getpixel((0, 0)) for image in page.all("img")] == [10 * index for index in range(12)]
    for text in ("they have no labels", "How they were made is not recorded", "Metrics: not measured"):
        assert text in page.text
    (folder / "settings.json").write_text("{}")
    assert "these samples are not finished" in make(folder).text


def test_samples_that_were_not_made_alike_are_not_compared_in_silence(make, tmp_path):
    page = make(samples(tmp_path / "a"), samples(tmp_path / "b", steps=50))
    assert "cannot be compared: steps 20 | 50." in page.text


def test_several_sets_have_a_section_each(make, tmp_path):
    run = training(tmp_path / "a")
    samples(run / "samples" / "euler20")
    samples(run / "samples" / "heun50", metrics=False)
    (run / "samples" / "begun").mkdir()
    (run / "samples" / "begun" / "settings.json").write_text("{}")
    page = make(run)
    assert [each["id"] for each in page.all("section")][:3] == ["samples-0", "samples-1", "samples-2"]
    assert all(f"Samples: {name}" in page.text for name in ("begun", "euler20", "heun50"))
    assert "these samples are not finished" in page.text


def test_metrics_of_samples_that_were_made_anew_are_doubted(make, tmp_path):
    folder = samples(tmp_path / "a")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seed": 5}))
    assert "metrics.json is of other samples" in make(folder).text


def test_runs_of_one_name_are_told_apart(make, tmp_path):
    page = make(samples(tmp_path / "a" / "x"), samples(tmp_path / "b" / "x"))
    assert "a/x" in page.text
    assert "b/x" in page.text


def test_a_last_line_that_was_cut_short_is_skipped(make, tmp_path):
    run = training(tmp_path / "a")
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 40, "lo')
    page = make(run)
    assert "at step 30" in page.text


def damaged_line(run):
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text('{"step": 40, "lo\n' + text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_line, "log.jsonl, line 1 is no JSON"),
        (lambda run: (run / "log.jsonl").write_text('{"step": 1}\n{"step\n'), "log.jsonl, line 2 is no JSON"),
        (lambda run: (run / "log.jsonl").write_text('{"loss": 1}\n'), "line 1: step is missing"),
        (lambda run: (run / "scores.jsonl").write_text("[1]\n"), "line 1: it is \\[1\\], and must be an object"),
        (lambda run: (run / "samples/x/metrics.json").write_text("{"), "metrics.json is no JSON"),
        (
            lambda run: (run / "samples/x/metrics.json").write_text('{"metrics": [1]}'),
            "no result of `sit-atconv score`",
        ),
        (lambda run: (run / "samples/x/manifest.json").write_text("[]"), "must be an object"),
        *(
            (
                lambda run, text=text: (run / "samples/x/metrics.json").write_text(text),
                r"metrics.json' is no result of `sit-atconv score` \(.*\); score the samples again",
            )
            for text in (
                '{"samples_manifest": "text"}',
                '{"samples_manifest": 3}',
                '{"samples_manifest": [1]}',
                '{"extractors": 5}',
                '{"extractors": [5]}',
                '{"extractors": [{}]}',
                '{"reference": "x"}',
                '{"samples_manifest": {"codec": "vae"}}',
                '{"metrics": {"fid": 3}}',
                '{"metrics": null}',
                '{"metrics": {}, "error_bars": {"design": "random", "upper_bound": true}}',
            )
        ),
        (lambda run: (run / "step-0000030/manifest.json").write_text("x"), "manifest.json is no JSON"),
        (lambda run: (run / "recipe.yaml").write_text("a: [b"), "is no YAML"),
        (lambda run: (run / "recipe.yaml").write_text("- a"), "is no recipe"),
        (lambda run: (run / "samples/x/000003.png").write_bytes(b"x"), "does not decode"),
    ],
)
def test_a_broken_file_is_an_error_and_the_old_page_stays(make, tmp_path, damage, message):
    run = training(tmp_path / "a")
    samples(run / "samples" / "x")
    before = make(run).source
    damage(run)
    with pytest.raises(InputError, match=message):
        make(run)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert (tmp_path / "out" / "report.html").read_text() == before


def test_a_folder_with_nothing_to_report_is_an_error_that_says_what_was_looked_for(make, tmp_path):
    (tmp_path / "empty" / "samples" / "x").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"looked for log.jsonl, scores.jsonl, validation.jsonl, recipe.yaml, .*metrics.json"
    ):
        make(tmp_path / "empty")
    with pytest.raises(InputError, match="is no folder"):
        make(tmp_path / "nowhere")
    folder = samples(tmp_path / "a")
    with pytest.raises(InputError, match="given twice"):
        make(folder, tmp_path / "empty" / ".." / "a")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x.pdf", "must end in .html"),
        ("x.html", "is a folder"),
        ("file/x.html", r"file' is no folder; choose another place"),
        ("file/y/x.html", r"file' is no folder; choose another place"),
        ("x" * 300 + ".html", "File name too long; choose another place"),
    ],
)
def test_out_must_be_a_page(tmp_path, out, message):
    (tmp_path / "x.html").mkdir()
    (tmp_path / "file").touch()
    args = parser_of("report", "report").parse_args([str(tmp_path), "--out", str(tmp_path / out)])
    with pytest.raises(InputError, match=message):
        args.run(args)


def coordinates(drawing, kind):
    found = [each for each in ElementTree.fromstring(drawing).iter() if each.tag == kind]
    return [[tuple(map(float, pair.split(","))) for pair in each.get("points").split()] for each in found]


def test_a_curve_lies_where_its_numbers_are_and_breaks_where_there_are_none():
    points = [(0, 1.0), (10, 2.0), (20, None), (30, 4.0), (40, 3.0)]
    drawing, log = chart([Curve("a", 0, points)], "step", "alt")
    first, second = coordinates(drawing, "polyline")
    assert not log
    (x0, y0), (x1, y1) = first
    (x3, y3), (x4, y4) = second
    assert (x3 - x0) / (x1 - x0) == pytest.approx(3, rel=0.01)
    assert (x4 - x0) / (x1 - x0) == pytest.approx(4, rel=0.01)
    assert (y0 - y3) / (y0 - y1) == pytest.approx(3, rel=0.01)  # up is greater
    assert y1 < y0
    assert (y0 - y4) / (y0 - y1) == pytest.approx(2, rel=0.01)


def test_an_axis_is_logarithmic_where_values_are_far_apart():
    drawing, log = chart([Curve("a", 0, [(0, 0.01), (1, 0.1), (2, 1.0)])], "step", "alt")
    ((_, low), (_, middle), (_, high)) = coordinates(drawing, "polyline")[0]
    assert log
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert not chart([Curve("a", 0, [(0, 0.0), (1, 100.0)])], "step", "alt")[1]


def fall(floor, steps=200, scale=20):
    """A curve that falls to a floor."""
    return [floor + math.exp(-step / scale) for step in range(steps)]


@pytest.mark.parametrize(
    ("values", "log"),
    [
        (fall(0.5), True),  # most values in a small part of a linear axis
        ([*fall(0.5), *fall(0.52)], True),  # and two curves that lie on one another there
        ([10.0 ** (-step / 20) for step in range(100)], True),  # five decades
        ([300.0, 100.0, 30.0, 10.0, 5.0], True),
        ([*(100 + step for step in range(50)), *(1 + step / 50 for step in range(50))], True),  # runs far apart
        ([2e-5 * step for step in range(1, 101)], False),  # a warm-up: over two decades, and even
        ([*(2e-5 * step for step in range(1, 101)), *[2e-3] * 1000], False),
        ([1 + 0.1 * math.sin(step) for step in range(200)], False),
        ([10 - fall(0.0)[step] for step in range(200)], False),  # what crowds at the top
        ([100 + value for value in fall(0.5)], False),  # no curvature to gain from
        ([*(value - 0.5 for value in fall(0.5)), 0.0], False),
        ([-value for value in fall(0.5)], False),
        ([3.0] * 10, False),
        ([3.0], False),
        ([1.0] * 150 + [2.0] * 50, False),  # equal values are as crowded on any axis
    ],
)
def test_an_axis_is_logarithmic_where_low_values_crowd(values, log):
    assert logarithmic(values) is log
    assert logarithmic([1000 * value for value in values[::-1]]) is log  # in whatever unit and order


def test_long_curves_are_means_in_a_band_that_keeps_the_extremes():
    values = np.random.default_rng(0).normal(size=1000).tolist()
    values[500] = 50.0
    points = thinned(list(enumerate(values)))
    assert len(points) == 250
    assert points[0] == pytest.approx((1.5, np.mean(values[:4]), min(values[:4]), max(values[:4])))
    assert max(greatest for *_, greatest in points) == 50.0
    assert thinned([(0, None), (1, 2.0)]) == [(0, None, None, None), (1, 2.0, 2.0, 2.0)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (0.123, 0.127), (1e5, 4.1e5), (-1e-7, 1e-7)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low - 1e-9 * (high - low) <= value <= high + 1e-9 * (high - low) for value in found)
    assert len({f"{value:.4g}" for value in found}) == len(found)


@pytest.mark.parametrize("about", [3, 5])
def test_an_axis_has_two_ticks_at_least(about):
    for span in range(100, 1000):
        found = [ticks(low, low + span, about) for low in (0, -span / 3, 1.01 * span)]
        assert all(2 <= len(each) <= 2 * about for each in found), (span, found)


def test_ticks_of_a_logarithmic_axis():
    assert log_ticks(0.015, 3) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    assert log_ticks(2, 30) == pytest.approx([2, 5, 10, 20])
    assert log_ticks(1e-6, 1e2) == pytest.approx([1e-6, 1e-4, 1e-2, 1, 100])
    assert log_ticks(0.6, 8) == pytest.approx([0.7, 1, 1.5, 2, 3, 5, 7])
    assert log_ticks(0.5, 1.7) == pytest.approx([0.5, 0.7, 1, 1.5])
    assert log_ticks(0.45, 1.3) == ticks(0.45, 1.3)
    for ratio in (1.5, 2, 3, 5, 10, 30, 100, 1e4, 1e9):
        for low in (1e-7, 0.0123, 0.5, 0.99, 7, 4e5):
            marks = [math.log(mark / low) / math.log(ratio) for mark in log_ticks(low, ratio * low)]
            assert 2 <= len(marks) <= 7
            assert min(high - low for low, high in pairwise(marks)) > 0.07  # 13 of 190 pixels
            assert all(-1e-9 <= mark <= 1 + 1e-9 for mark in marks)


def test_an_interval_reaches_one_and_two_standard_errors():
    drawing = intervals([Interval(0, 10.0, 1.0, 9.0)], "alt")
    elements = list(ElementTree.fromstring(drawing).iter())
    thin, thick = [each for each in elements if each.get("class") == "error s0"]
    centre = next(float(each.get("cx")) for each in elements if each.tag == "circle")
    reach = [float(each.get("x2")) - float(each.get("x1")) for each in (thin, thick)]
    assert reach[0] == pytest.approx(2 * reach[1], abs=0.3)
    assert (float(thin.get("x1")) + float(thin.get("x2"))) / 2 == pytest.approx(centre, abs=0.1)
    left, _, right, _ = coordinates(drawing, "polygon")[0]
    assert (left[0] + right[0]) / 2 == pytest.approx(centre - reach[1] / 2, abs=0.2)  # corrected is one error below


def test_constant_and_single_values_are_drawn():
    for points in ([(5, 0.0)], [(5, 3.0), (6, 3.0)], [(5, -1e-9), (6, -1e-9)]):
        drawing, _ = chart([Curve("a", 0, points)], "step", "alt")
        assert "nan" not in drawing
        assert "inf" not in drawing
    assert "nan" not in intervals([Interval(0, 0.0, None, None)], "alt")


def test_series_are_told_apart_without_colour():
    assert len({style_of(number)["stroke_dasharray"] for number in range(4)}) == 4
    assert len({tuple(style_of(number).values()) for number in range(12)}) == 12


def test_names_break_at_signs_and_words_do_not():
    def pieces(text):
        return breakable(text).split("<wbr>")

    assert pieces("ema/diffusion_pytorch_model.safetensors") == [
        "ema/",
        "diffusion_",
        "pytorch_",
        "model.",
        "safetensors",
    ]
    assert pieces("model.token_mixer=atconv") == ["model.", "token_", "mixer=", "atconv"]
    assert pieces("ab" * 32) == ["abababab"] * 8
    for whole in ("attention", "0.0025", "1,437 images", "2.14.1", "deadbeef", "internationalisation" * 9, "..."):
        assert pieces(whole) == [whole]
    assert breakable("<b>/<i>") == "&lt;b&gt;/<wbr>&lt;i&gt;"


def test_no_word_of_a_table_breaks_and_the_page_keeps_to_the_width(make, tmp_path):
    run = training(tmp_path / "a")
    samples(run / "samples" / "x")
    page = make(run)
    style = re.search("<style>(.*?)</style>", page.source, re.DOTALL)[1]
    breaking = [rule.split("{")[0] for rule in style.split("}") if re.search("overflow-wrap|word-break", rule)]
    assert not re.search(r"\b(td|th|code|table|body)\b", " ".join(breaking))
    assert page.source.count("<table") == page.source.count('class="scroll" tabindex="0" role="region"')
    assert "<wbr>".join(["cd" * 4] * 8) in page.source


def test_markup_is_escaped_once():
    inner = tag("b", "1 < 2 & 3")
    assert tag("p", inner, [None, 4], class_="a\"b'") == '<p class="a&quot;b&#x27;"><b>1 &lt; 2 &amp; 3</b>4</p>'
    assert tag("i", Markup("<u>")) == "<i><u></i>"


def weigh(run, **files):
    """Give a run's checkpoint the files of weights, {part: shapes}, and their names in its manifest."""
    step = run / "step-0000030"
    manifest = json.loads((step / "manifest.json").read_text())
    for name, shapes in files.items():
        file = step / name.replace("__", "/") / "weights.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({f"w{index}": np.zeros(shape, np.float16) for index, shape in enumerate(shapes)}, file)
        manifest["files"][file.relative_to(step).as_posix()] = digest(file)
    (step / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_parameters_are_those_of_the_checkpoints_average(make, tmp_path):
    run = weigh(training(tmp_path / "a"), ema=[(3, 4), (5,), ()], model=[(100,)], other__ema=[(7,)])
    samples(run / "samples" / "x")  # whose manifest says 1,234,567
    second = run / "step-0000030/ema/weights-2.safetensors"
    save_file({"w": np.zeros((2, 50))}, second)
    assert "Parameters 18 " in make(run).text  # a file that the manifest does not name is none of the checkpoint
    path = run / "step-0000030/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["ema/weights-2.safetensors"] = digest(second)
    path.write_text(json.dumps(manifest))
    assert "Parameters 118 " in make(run).text
    second.unlink()
    assert "Parameters 1,234,567 " in make(run).text
    lora = weigh(training(tmp_path / "b"), ema=[(3, 4)])  # adapters, and what was drawn anew beside them
    path = lora / "step-0000030/manifest.json"
    path.write_text(path.read_text().replace("ema/weights.safetensors", "ema/pytorch_lora_weights.safetensors"))
    (path.parent / "ema/weights.safetensors").rename(path.parent / "ema/pytorch_lora_weights.safetensors")
    assert "Parameters not recorded " in make(lora).text
    samples(lora / "samples" / "x")
    assert "Parameters 1,234,567 " in make(lora).text
    second.write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"checkpoint file '.*weights-2\.safetensors' is cut or damaged"):
        make(run)


def test_parameters_that_nobody_wrote_down_are_not_recorded(make, tmp_path):
    assert "Parameters not recorded " in make(training(tmp_path / "a")).text


def test_a_report_loads_no_torch(tmp_path):
    run = weigh(training(tmp_path / "a"), ema=[(3, 4)])
    samples(run / "samples" / "x")
    (run / "previews").mkdir()
    Image.new("RGB", (40, 40)).save(run / "previews" / "step-9.png")
    program = (
        "import sys; from sit_atconv.commands import parser_of\n"
        "args = parser_of('report', 'report').parse_args(sys.argv[1:]); args.run(args)\n"
        "assert not {'torch', 'diffusers', 'torchvision', 'sklearn'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, run, "--out", tmp_path / "x.html"], check=True)
    assert len(Page((tmp_path / "x.html").read_text()).all("img")) == 12
