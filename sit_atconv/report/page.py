"""The page of a report: what was read, in the order that a reader asks for it."""

import base64
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from sit_atconv.report.curves import Interval, Series, Spot, chart, four_digits, intervals, scatter, swatch
from sit_atconv.report.frontiers import Frontier
from sit_atconv.report.markup import Content, Markup, breakable, markup, tag
from sit_atconv.report.pictures import CLASSES, PER_CLASS, Picture, Shown, grid, preview
from sit_atconv.report.runs import Match, Run, SampleSet, at
from sit_atconv.runtime.comparison import compared, flat
from sit_atconv.runtime.console import clock_told
from sit_atconv.runtime.files import MARK
from sit_atconv.scoring import METRICS
from sit_atconv.scoring.frechet import FRECHET
from sit_atconv.scoring.result import bars_told, features_told, needs, number

STYLE = Path(__file__).with_name("style.css")
UNMEASURED = tag("span", "not measured", class_="none")
UNRECORDED = tag("span", "not recorded", class_="none")
CURVES = {
    "loss": "Training loss", "repa_loss": "REPA loss", "grad_norm": "Gradient norm", "lr": "Learning rate",
    "update_ratio": "Update ratio |Δw| / |w|", "images_per_second": "Training images per second",
}  # fmt: skip
SECONDS = "second of training"
TOLD = 12  # differences at most that a warning tells
POINTS = 300  # of a frontier that are drawn and listed


@dataclass
class Column:
    """A place for samples beside others: the run and its number, and the samples, None where the run has none there.

    name: in the whole page; title: in its own section.
    """

    number: int
    run: Run
    samples: SampleSet | None
    name: str
    title: str

    @property
    def manifest(self) -> dict[str, Any]:
        return self.samples.manifest if self.samples else {}

    @property
    def metrics(self) -> dict[str, Any]:
        return self.samples.metrics if self.samples else {}


def render(runs: Sequence[Run], again: int | None = None) -> str:
    """The page, as ASCII. again: seconds after which a browser is to load it again, None: never.

    Raises InputError for pictures that cannot be read.
    """
    groups = _sample_sections(runs)
    columns = [column for _, group in groups for column in group]
    sections = [
        *(
            (f"samples-{index}", title, _samples(group, 1 / len(columns)))
            for index, (title, group) in enumerate(groups)
        ),
        ("training", "Training", _training(runs)),
        *(
            (f"frontier-{index}", f"Score over time: {each.name}", _frontier(each))
            for index, each in enumerate({each.path: each for run in runs for each in run.frontiers}.values())
        ),
        ("speed", "Speed", _speed(runs, columns)),
        ("settings", "Settings", _settings(runs, columns)),
        ("hashes", "Hashes", _hashes(runs, columns)),
        ("versions", "Versions", _versions(runs, columns)),
    ]
    names = [run.name for run in runs]
    title = f"{names[0]}: report" if len(runs) == 1 else f"{' | '.join(names)}: side by side"
    style = STYLE.read_text(encoding="ascii")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", http_equiv="refresh", content=again) if again else None,
        tag("meta", name="generator", content=MARK),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    contents = tag(
        "nav", tag("ul", [tag("li", tag("a", breakable(title), href=f"#{name}")) for name, title, _ in sections])
    )
    body = [tag("section", tag("h2", breakable(title)), content, id=name) for name, title, content in sections]
    page = tag("html", head, tag("body", tag("header", _header(runs, again), contents), tag("main", body)), lang="en")
    return ("<!doctype html>\n" + page + "\n").encode("ascii", "xmlcharrefreplace").decode()


def _sample_sections(runs: Sequence[Run]) -> list[tuple[str, list[Column]]]:
    """Title and columns of each section of samples: one for the only ones of every run, else one per name."""
    names = dict.fromkeys(samples.name for run in runs for samples in run.sets)
    if all(len(run.sets) <= 1 for run in runs):
        columns = []
        for index, run in enumerate(runs):
            samples = run.sets[0] if run.sets else None
            name = f"{run.name}: {samples.name}" if samples and run.trained else run.name
            columns.append(Column(index, run, samples, name, name))
        return [(f"Samples: {next(iter(names))}" if len(runs) == 1 and names else "Samples", columns)]
    sections = []
    for name in names:
        columns = []
        for index, run in enumerate(runs):
            samples = next((each for each in run.sets if each.name == name), None)
            columns.append(Column(index, run, samples, f"{run.name}: {name}" if len(runs) > 1 else name, run.name))
        sections.append((f"Samples: {name}", columns))
    return sections


def _table(
    caption: str, head: Sequence[Content], rows: Sequence[tuple[Content, Sequence[Content]]], class_=""
) -> Markup:
    """A table with a heading per column and row, which scrolls within its box."""
    lines = [tag("tr", tag("th", name, scope="row"), [tag("td", cell) for cell in cells]) for name, cells in rows]
    table = tag(
        "table",
        tag("caption", tag("span", breakable(caption))),
        tag("thead", tag("tr", [tag("th", each, scope="col") for each in head])),
        tag("tbody", lines),
        class_=class_ or None,
    )
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _compared(
    caption: str, corner: str, heads: Sequence[Content], facts: Sequence[Mapping[str, Content]], folded: bool = False
) -> Markup:
    """A table with a column of each of the facts, and a row for every name in any of them."""
    names = dict.fromkeys(name for each in facts for name in each)
    table = _table(
        caption, [corner, *heads], [(name, [each.get(name, UNRECORDED) for each in facts]) for name in names]
    )
    return tag("details", tag("summary", breakable(caption)), table) if folded else table


def _chip(index: int, name: str, runs: int) -> Markup:
    """A run's name, behind a piece of its curve where there are several."""
    return markup([swatch(index) if runs > 1 else None, breakable(name)])


def _run_heads(runs: Sequence[Run]) -> list[Markup]:
    return [_chip(index, run.name, len(runs)) for index, run in enumerate(runs)]


def _heads(columns: Sequence[Column]) -> list[Markup]:
    several = len({column.number for column in columns})
    return [_chip(column.number, column.name, several) for column in columns]


def _quantity(value: Any, digits: int = 4, unit: str = "") -> Markup | str:
    found = number(value)
    if found is None:
        return UNMEASURED
    text = f"{found:,}" if isinstance(found, int) else f"{found:,.{digits}g}"
    if "e+" in text:
        text = f"{found:,.0f}"
    return f"{text}{unit}"


def _number_of(value: Any) -> Markup | str:
    """A count that somebody wrote down, or did not."""
    return UNRECORDED if number(value) is None else _quantity(value)


def _fact(value: Any) -> Markup:
    if value is None:
        return UNRECORDED
    return breakable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _hash(value: Any) -> Markup:
    return UNRECORDED if value is None else tag("code", _fact(value))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _with_error(value: float, se: float | None) -> tuple[str, str | None]:
    """The value with as many digits as its error has a use for, and the error."""
    if not se:
        return f"{value:.4g}", None if se is None else "0"
    digits = min(8, max(0, 1 - math.floor(math.log10(se))))
    return f"{value:,.{digits}f}", f"{se:,.{digits}f}"


def _header(runs: Sequence[Run], again: int | None) -> list[Content]:
    title = tag("h1", breakable(" vs ".join(run.name for run in runs)))
    facts = [_key_facts(run) for run in runs]
    going = [_going(run, several=len(runs) > 1) for run in runs if run.going]
    if again:
        told = f"This page is written anew while `sit-atconv watch` runs, and loads itself every {again} seconds."
        going.append(tag("p", told))
    state = tag("div", going, class_="going") if going else None
    if len(runs) > 1:
        about = tag("p", f"{len(runs)} runs side by side", class_="soft")
        return [title, about, state, _compared("Key facts", "", _run_heads(runs), facts)]
    cards = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts[0].items()]
    about = tag("p", "Report of ", "a training run" if runs[0].trained else "samples", class_="soft")
    return [title, about, state, tag("dl", cards, class_="facts")]


def _going(run: Run, several: bool) -> Markup:
    """How far a run is that is being trained, and how long the rest will take, as its log says."""
    last = run.log[-1] if run.log else {}
    step, goal = number(last.get("step")), number(run.recipe.get("train.max_steps"))
    left = number(last.get("eta_seconds"))
    parts = [f"{run.name}: being trained" if several else "Being trained"]
    if step is not None and goal:
        parts.append(f"step {_quantity(step)} of {_quantity(goal)}")
    if left is not None:
        parts.append(f"about {clock_told(left)} left")
    bar = tag("progress", value=step, max=goal, aria_label="Steps") if step is not None and goal else None
    return tag("p", breakable(", ".join(parts)), " as this page was written.", bar)


def _key_facts(run: Run) -> dict[str, Content]:
    manifests = [samples.manifest for samples in run.sets]
    stated = [at(manifest, "training") for manifest in manifests]

    def training(key: str) -> Any:
        return _first(*(at(each, key) for each in stated))

    last = run.log[-1] if run.log else {}
    step = _first(last.get("step"), run.checkpoint.get("step"), *(manifest.get("step") for manifest in manifests))
    goal = run.recipe.get("train.max_steps")
    images = at(run.checkpoint, "data", "num_images")
    data, kept = run.recipe.get("data.kind"), number(at(run.checkpoint, "data", "held_out"))
    held_out = "" if kept is None else f", {kept:,} more held out"
    trained = _quantity(step)
    if number(step) is not None and number(goal) is not None and goal != step:
        trained = f"{trained} of {_quantity(goal)}"
    losses = [row["loss"] for row in run.log if number(row.get("loss")) is not None]
    model = _first(run.recipe.get("model.name"), training("name"), "SiT of own sizes" if run.recipe else None)
    average, validated = {}, {}
    if run.recipe.get("meanflow.share") is not None or training("meanflow") is not None:
        average["Predicts"] = "average velocities (MeanFlow)"
    if run.validation:
        validated["Latest validation loss"] = _validated(run.validation[-1])
    seen = _first(last.get("images_seen"), run.checkpoint.get("images_seen"), training("images_seen"))
    return {
        "Model": _fact(model),
        "Token mixer": _fact(_first(run.recipe.get("model.token_mixer"), training("token_mixer"))),
        **average,
        "Parameters": _number_of(_first(run.params, training("params"))),
        "Data": _fact(f"{data}, {images:,} images{held_out}" if number(images) is not None and data else data),
        "Steps": trained,
        "Images seen": _quantity(seen),
        "Batch size": _quantity(run.recipe.get("train.batch_size")),
        "Precision": _fact(_first(run.recipe.get("train.precision"), training("precision"))),
        "Seed": _fact(_first(run.recipe.get("run.seed"), training("seed"))),
        "Latest loss": _quantity(losses[-1] if losses else None),
        **validated,
        "Sample sets": _quantity(len(run.sets)),
    }


def _validated(row: Mapping[str, Any]) -> Content:
    """A loss of held-out images with its standard error over them."""
    loss, images = number(row.get("loss")), number(row.get("num"))
    if loss is None:
        return UNMEASURED
    value, error = _with_error(loss, number(row.get("loss_se")))
    return value + ("" if error is None else f" ± {error}") + ("" if images is None else f", {images:,} images")


def _samples(columns: Sequence[Column], share: float) -> list[Content]:
    """share: of the page's budget of pictures, that each column has."""
    grids = []
    for column in columns:
        head = tag("h3", _chip(column.number, column.title, len(columns))) if len(columns) > 1 else None
        grids.append(tag("div", head, _grid(column, share)))
    metrics = _metrics(columns)
    warnings = [tag("p", breakable(text), class_="warn") for text in _warnings(columns)]
    if len(columns) == 1:
        return [warnings, tag("div", grids, tag("div", metrics), class_="beside with-metrics")]
    return [tag("div", grids, class_="beside"), warnings, metrics]


def _grid(column: Column, share: float) -> Markup:
    samples = column.samples
    if samples is None and column.run.preview:
        file, step = column.run.preview
        picture = preview(file, share)
        text = (
            f"Not measured: no samples of this run. Instead its newest preview, drawn while it was trained, at step "
            f"{step:,}: samples of the EMA, of the classes in turn, row by row."
        )
        image = tag(
            "img", src=picture.uri, width=picture.width, height=picture.height, class_="preview",
            alt=f"Preview of {column.run.name} at step {step}: a grid of samples of the classes in turn",
        )  # fmt: skip
        return tag("figure", image, tag("figcaption", text))
    shown = grid(samples, share) if samples else []
    if not shown:
        if samples is None:
            reason = ["no samples in the run, and no preview."]
        elif not samples.finished:
            reason = ["these samples are not finished."]
        else:
            reason = ["the folder holds no images. ", _drawn(column.manifest)]
        return tag("p", "Sample grid: ", UNMEASURED, "; ", reason)
    cells, names, found = [], column.run.class_names, samples.nearest
    for label, row in shown:
        name = "" if label is None else names[label] if label < len(names) else str(label)
        what = f"{len(row)} sample{'s' * (len(row) != 1)}" + ("" if label is None else f" of class {name}")
        if found:
            pairs = [_pair(each, found.found[each.index]) for each in row]
            what += ", each above the training image nearest to it"
            cells += [
                tag("span", breakable(name)),
                tag("div", pairs, class_="row pairs", role="group", aria_label=what),
            ]
        else:
            images = [_image(each.picture, f"sample {each.index}") for each in row]
            cells += [tag("span", breakable(name)), tag("div", images, class_="row", role="img", aria_label=what)]
    text = "The first samples by index, none chosen; they have no labels."
    if shown[0][0] is not None:
        classes = len(np.unique(samples.source.labels))
        which = f"each of {CLASSES} of the {classes:,} classes" if classes > CLASSES else "each class"
        text = f"The first samples of {which}, {PER_CLASS} at most, by index: none chosen."
    near = tag("p", _nearest(samples), class_="soft") if found else None
    return tag(
        "figure", near, tag("div", cells, class_="samples"), tag("figcaption", text, " ", _drawn(column.manifest))
    )


def _image(picture: Picture, title: str, alt: str = "") -> Markup:
    return tag(
        "img", src=picture.uri, width=picture.width, height=picture.height, alt=alt, title=title,
        class_="sharp" if picture.sharp else None,
    )  # fmt: skip


def _pair(shown: Shown, match: Match) -> Markup:
    """A sample above the training image that is nearest to it, and how far that is."""
    distance, sample = _distance(match.distance), f"sample {shown.index}"
    training = f"training image {match.index}{', mirrored' * match.mirrored}, distance {distance}"
    images = [_image(shown.picture, sample, sample), _image(shown.nearest, training, training)]
    return tag("div", images, tag("small", distance, class_="copy" if match.distance == 0 else None), class_="pair")


def _distance(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _nearest(samples: SampleSet) -> list[Content]:
    """What the training images below the samples are, and what the numbers below them."""
    found = samples.nearest
    distances = sorted(match.distance for match in found.found.values())
    values = math.prod(samples.source.image_shape)
    text = (
        f"Below each sample: the nearest of {found.n:,} training ",
        breakable(found.data),
        ", or of their mirror images," * found.mirrored,
        f" and its distance: the square root of the sum of squared differences of all {values:,} values, 0 to 255 each "
        f"(L2). Least {_distance(distances[0])}, median {_distance(statistics.median(distances))}, greatest "
        f"{_distance(distances[-1])}. ",
    )
    copies = distances.count(0)
    return [*text, f"Copies of a training image: {copies} of {len(distances)} (distance 0)."]


def _drawn(manifest: dict[str, Any]) -> str:
    """How samples were made, in a line."""
    if not manifest:
        return "How they were made is not recorded."
    guidance, weights = manifest.get("guidance_scale"), manifest.get("weights")
    num, steps, step, shift = (number(manifest.get(key)) for key in ("num", "steps", "step", "time_shift"))
    grid, begun = (manifest.get(key) for key in ("grid", "start"))
    parts = [
        "Samples" if num is None else f"{_quantity(num)} samples",
        manifest.get("sampler") or manifest.get("scheduler"),
        None if steps is None else f"{steps} steps",
        "on times of its own" if isinstance(grid, list) else grid and f"on the grid {grid}",
        None if shift is None else f"time shift {_short(shift)}",
        f"started by {begun}" if begun not in (None, "lower") else None,
        None if guidance is None else "no guidance" if guidance == 1 else _guidance(manifest),
        manifest.get("cache") and f"cache {manifest['cache']}",
        f"{'EMA' if weights == 'ema' else weights} weights" if weights else None,
        None if step is None else f"training step {_quantity(step)}",
    ]
    return ", ".join(str(part) for part in parts if part) + "."


def _guidance(manifest: dict[str, Any]) -> str:
    """The guidance of samples: its scale, and where it is not plain what guides, when and which channels."""
    channels, interval, guide = (manifest.get(f"guid{key}") for key in ("ance_channels", "ance_interval", "e"))
    parts = [f"guidance {manifest['guidance_scale']}"]
    if isinstance(guide, dict):
        name = at(guide, "training", "name")
        parts.append(f"by {'another model' if name is None else name}")
        if (step := number(guide.get("step"))) is not None:
            parts.append(f"at its step {_quantity(step)}")
    if isinstance(interval, list) and interval != [0, 1]:
        parts.append(f"for t in {' to '.join(_short(each) for each in interval)}")
    if channels not in (None, "all"):
        parts.append(f"of {channels}")
    if (every := number(manifest.get("guidance_every"))) is not None:
        parts.append(f"at one of {_short(every)} evaluations")
    return " ".join(parts)


def _warnings(columns: Sequence[Column]) -> list[str]:
    """What keeps metrics from being believed, or compared."""
    found, scored = [], [column for column in columns if column.metrics]
    for column in scored:
        digests = column.samples.manifest_sha256, column.metrics.get("samples_manifest_sha256")
        if None not in digests and digests[0] != digests[1]:
            found.append(
                f"{column.name}: its metrics.json is of other samples than those that lie here now (another manifest); "
                "score them again."
            )
        found += [f"{column.name}: {warning}." for warning in column.metrics.get("warnings", [])]
    facts = [flat(column.samples.facts) for column in scored]
    names = dict.fromkeys(name for each in facts for name in each)
    differing = [name for name in names if any(each.get(name) != facts[0].get(name) for each in facts)]
    if differing:
        told = "; ".join(
            f"{name.replace('_', ' ')} {' | '.join(_short(each.get(name)) for each in facts)}"
            for name in differing[:TOLD]
        )
        if len(differing) > TOLD:
            told += f"; and {len(differing) - TOLD} more"
        found.append(f"These metrics were not measured in the same way and cannot be compared: {told}.")
    return found


def _short(value: Any) -> str:
    text = "not recorded" if value is None else value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}..." if len(text) >= 40 else text


def _metrics(columns: Sequence[Column]) -> list[Content]:
    found = dict.fromkeys(name for column in columns for name in column.metrics.get("metrics", {}))
    names = [*(name for name in METRICS if name in found), *(name for name in found if name not in METRICS)]
    if not names:
        command = tag("code", "sit-atconv score")
        return [tag("p", "Metrics: ", UNMEASURED, "; ", command, " writes metrics.json beside the samples.")]
    rows = []
    for name in names:
        each = [_estimate(column, name) for column in columns]
        label, better = METRICS.get(name, (name, None))
        shown = [label, tag("small", f"{'↓' if better == 'lower' else '↑'} {better} is better") if better else None]
        told = "; ".join(f"{column.name} {_spoken(one)}" for column, one in zip(columns, each, strict=True))
        drawn = [one for one in each if one.value is not None]
        picture = intervals(each, f"{label}: {told}") if drawn else UNMEASURED
        rows.append((shown, [*(_cell(name, one) for one in each), picture]))
    one = len(columns) == 1
    named = [_chip(column.number, column.title, len(columns)) for column in columns]
    head = ["Metric", *(["Value ± standard error"] if one else named), "Interval"]
    scored = next(column for column in columns if column.metrics)
    bars = {column.title: bars_told(column.metrics["error_bars"]) for column in columns if column.metrics}
    alike = set(bars.values())
    errors = alike.pop() if len(alike) == 1 else " | ".join(f"{title}: {each}" for title, each in bars.items())
    reference = at(scored.metrics, "reference", "name")
    text = (
        f"Value ± jackknife standard error ({errors}). Drawn: dot at the value, bar to one and line to two standard "
        "errors. Corrected (diamond), where the bias is known: without its part that falls as 1/N. The reference's own "
        f"sampling error is in neither{', but in that of copies' * ('copies' in names)}."
    )
    caption = f"Metrics against {reference or 'a reference that is not recorded'}" + (
        f", {_short(scored.metrics.get('n'))} samples, protocol {scored.metrics.get('protocol') or 'not recorded'}"
        if one
        else ""
    )
    told = features_told(*((c.metrics["metrics"], c.metrics.get("extractors") or ()) for c in columns if c.metrics))
    told = [f"{each[0].upper()}{each[1:]}. " for each in told]
    return [_table(caption, head, rows, "measured"), tag("p", *map(breakable, told), text, class_="soft")]


def _estimate(column: Column, name: str) -> Interval:
    each = at(column.metrics, "metrics", name)
    numbers = (number(at(each, key)) for key in ("value", "se", "corrected"))
    bound = at(column.metrics, "error_bars", "upper_bound") or False
    return Interval(column.number, *numbers, bound, number(at(each, "corrected_needs")))


def _spoken(one: Interval) -> str:
    if one.value is None:
        return "not measured"
    value, error = _with_error(one.value, one.se)
    return value if error is None else f"{value}, error {'at most ' * one.upper_bound}{error}"


def _cell(name: str, one: Interval) -> Content:
    if one.value is None:
        return UNMEASURED
    value, error = _with_error(one.value, one.se)
    least, most = ("≥ ", "≤ ") if one.upper_bound else ("", "")
    cells: list[Content] = [value, *([] if error is None else [" ± ", most + error])]
    if one.corrected is not None:
        cells.append(tag("small", "corrected ", least + _with_error(one.corrected, one.se)[0]))
    elif name in FRECHET:
        cells.append(tag("small", "corrected ", UNMEASURED if one.needs is None else needs(one.needs)))
    return cells


def _training(runs: Sequence[Run]) -> list[Content]:
    trained = [(index, run) for index, run in enumerate(runs) if run.trained]
    if not trained:
        return [tag("p", "Curves: ", UNMEASURED, "; these are samples alone, without their training run.")]
    charts = []
    for key, title in CURVES.items():
        if key != "repa_loss" or any(key in row for _, run in trained for row in run.log):
            charts.append(_curve(title, [_series(index, run, run.log, key) for index, run in trained]))
    by_time = []
    for index, run in trained:
        stated = run.log[-1].get("loss_by_time") if run.log else None
        bins = stated if isinstance(stated, list) else []
        middles = [((place + 0.5) / len(bins), number(value)) for place, value in enumerate(bins)]
        by_time.append(Series(run.name, index, middles))
    charts.insert(1, _curve("Loss by time, at the latest report", by_time, "t (0 noise, 1 data)"))
    charts[1:1] = _more_losses(trained)
    names = dict.fromkeys(
        key for _, run in trained for row in run.scores for key, value in row.items()
        if key not in ("step", "num") and (value is None or type(value) in (int, float))
    )  # fmt: skip
    scores = []
    for key in names:
        title = METRICS.get(key, (key, None))[0]
        scores.append(_curve(title, [_series(index, run, run.scores, key) for index, run in trained]))
    return [
        tag("h3", "Curves from log.jsonl and validation.jsonl"),
        tag("p", unlike, class_="soft") if (unlike := _validated_unlike([run for _, run in trained])) else None,
        tag("div", charts, class_="charts"),
        tag("h3", "Scores while training"),
        tag("p", _scoring(trained), class_="soft") if names else tag("p", "Scores while training: ", UNMEASURED, "."),
        tag("div", scores, class_="charts") if scores else None,
    ]


def _validated_unlike(runs: Sequence[Run]) -> str | None:
    """A warning where validation losses are not all of equally many images, and so of different ones."""
    stated = {run.name: sorted({number(row.get("num")) for row in run.validation} - {None}) for run in runs}
    if len({num for nums in stated.values() for num in nums}) < 2:
        return None
    told = "; ".join(
        f"{name} of {' and of '.join(f'{num:,}' for num in nums)}" for name, nums in stated.items() if nums
    )
    return f"Validation losses are of different images, and cannot be compared: {told}."


def _more_losses(trained: Sequence[tuple[int, Run]]) -> list[Markup]:
    """The loss of held-out images, and both losses over the seconds that the steps took, as far as runs have them."""
    validated = any(run.validation for _, run in trained)
    over_steps = [_series(index, run, run.validation, "loss") for index, run in trained]
    charts = [_curve("Validation loss", over_steps)] if validated else []
    for title, logs in (
        ("Training loss over time", [(index, run, run.log) for index, run in trained]),
        ("Validation loss over time", [(index, run, run.validation) for index, run in trained]),
    ):
        series = [_series(index, run, rows, "loss", "seconds") for index, run, rows in logs]
        if any(each.values for each in series):
            charts.append(_curve(title, series, SECONDS))
    return charts


def _scoring(trained: Sequence[tuple[int, Run]]) -> str:
    ways = [(run.name, _ways(run.scores)) for _, run in trained if run.scores]
    same = len({way for _, way in ways}) == 1
    told = ways[0][1] if same else " ".join(f"{name}: {way}" for name, way in ways)
    return f"Of the EMA, as it was then. {told}"


def _ways(scores: Sequence[dict[str, Any]]) -> str:
    """How the images of a run's scores were made; where that changed, as on a resume, from which step on each."""
    ways = [(way, next(rows).get("step")) for way, rows in groupby(scores, _way)]
    return " ".join(f"From step {_quantity(step)}: {way}" for way, step in ways) if len(ways) > 1 else ways[0][0]


def _way(score: dict[str, Any]) -> str:
    """How the images of a score were made, and whose features it is in, where its distance is no FID and says so; its
    warning."""
    extractor = _mapping(score.get("extractor"))
    told = features_told((score, [extractor])) if extractor else []
    told += [f"warning: {extractor['warning']}"] if extractor.get("warning") else []
    features = "".join(f" {each[0].upper()}{each[1:]}." for each in told)
    return _drawn({"num": score.get("num"), **_mapping(score.get("sampling"))}) + features


def _series(index: int, run: Run, rows: Sequence[dict[str, Any]], key: str, over: str = "step") -> Series:
    """The values of a key over those of another, of the rows that have this one."""
    places = [number(row.get(over)) for row in rows]
    points = [(x, number(row.get(key))) for x, row in zip(places, rows, strict=True) if x is not None]
    return Series(run.name, index, points)


def _curve(title: str, series: Sequence[Series], x_label: str = "step") -> Markup:
    """A figure of the series that have values; a legend says the last value of each."""
    measured = [each for each in series if each.values]
    legend = []
    for each in series:
        told: Content = UNMEASURED
        if each.values:
            x, value = next((x, y) for x, y in reversed(each.points) if y is not None)
            lost = len(each.points) - len(each.values)
            told = [
                f"{four_digits(value)} at {x_label.split()[0]} {f'{x:,}' if x_label == 'step' else four_digits(x)}",
                f"; {lost} of {len(each.points)} points not measured" if lost else None,
            ]
        legend.append(
            tag("li", _chip(each.number, each.name, len(series)) if len(series) > 1 else "Latest", ": ", told)
        )
    if not measured:
        return tag("figure", tag("h4", title), tag("p", UNMEASURED))
    alt = f"{title} over {x_label}: " + "; ".join(
        f"{each.name} from {each.values[0]:.4g} to {each.values[-1]:.4g}, least {min(each.values):.4g}, greatest "
        f"{max(each.values):.4g}"
        for each in measured
    )
    drawing, log = chart(measured, x_label, alt)
    scale = tag("small", " (log scale)", class_="soft") if log else None
    return tag("figure", tag("h4", title, scale), drawing, tag("figcaption", tag("ul", legend, class_="legend")))


def _frontier(frontier: Frontier) -> list[Content]:
    """Points over their time, those worth taking, and the lines that draw with them."""
    result, points = frontier.result, frontier.points
    kept = {id(each) for each in sorted(points, key=lambda each: each["pareto"] is None)[:POINTS]}
    shown = [each for each in points if id(each) in kept]
    models = list(dict.fromkeys(point["model"] for point in points))
    best = [point for point in points if point["pareto"] == "all"]
    marks = {id(point): str(place) for place, point in enumerate(best, 1)}
    label = METRICS.get(result["metric"], (result["metric"], None))[0]
    spots = [
        Spot(
            models.index(point["model"]), point["ms"], tuple(point["ms_quartiles"]), point["score"]["value"],
            point["score"]["error"] or 0.0, point["kind"] == "SDE", marks.get(id(point), ""),
        )
        for point in shown
    ]  # fmt: skip
    paths = [
        [place for place, point in enumerate(shown) if point["model"] == model and point["pareto"]] for model in models
    ]
    told = "; ".join(
        f"{marks[id(point)]}: {point['model']}, {point['label']}, {_scored(point)}, {four_digits(point['ms'])} ms"
        for point in best[:TOLD]
    )
    alt = f"{label} over milliseconds per image of {len(shown)} settings; those that no other one beats: {told}"
    drawing = scatter(spots, [path for path in paths if path], "ms per image", alt)
    text = (
        "Each point is a setting: a circle draws by an ODE, a square by an SDE. Bars: one standard error, and the "
        "middle half of the times. The line goes along the Pareto set: no other setting is both as quick and as good. "
        "Numbers are those of the table."
    )
    if len(shown) < len(points):
        text += f" Of {len(points):,} settings {len(shown):,} are shown, those of the Pareto sets among them."
    names = [tag("li", _chip(index, model, len(models))) for index, model in enumerate(models)]
    legend = tag("ul", names, class_="legend") if len(models) > 1 else None
    figure = tag("figure", tag("h4", f"{label} over time"), drawing, tag("figcaption", legend, text))
    head = ["Setting", label, "ms per image", "NFE"]
    rows = [_setting(point, marks, models) for point in shown if point["pareto"]]
    worth = _table(f"The Pareto set{' of all and of each model' * (len(models) > 1)}", head, rows, "points")
    every = _table(f"All {len(shown):,} settings", head, [_setting(point, marks, models) for point in shown], "points")
    chosen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in result["recommended"]:  # one may be that of its model and of all
        chosen.setdefault((each["command"], each["score_command"]), []).append(each)
    commands = []
    for lines, some in chosen.items():
        of = " and ".join("of all models" if each["of"] is None else f"of {each['of']}" for each in some)
        which = f"The cheapest setting within one standard error of the best, {of}: "
        told = breakable(f"{some[0]['model']}, {some[0]['point']}: {some[0]['told']}")
        commands += [tag("p", which, told, "."), tag("pre", tag("code", "\n".join(lines)), tabindex=0)]
    return [
        tag("div", figure, tag("div", worth), class_="beside"),
        commands,
        tag("details", tag("summary", f"All {len(shown):,} settings"), every) if len(shown) > len(rows) else None,
        tag("ul", [tag("li", breakable(note)) for note in result["notes"][:TOLD]], class_="soft"),
    ]


def _scored(point: Mapping[str, Any]) -> str:
    value, error = _with_error(point["score"]["value"], point["score"]["error"])
    return value if error is None else f"{value} ± {error}"


def _setting(
    point: Mapping[str, Any], marks: Mapping[int, str], models: Sequence[str]
) -> tuple[Content, list[Content]]:
    """A row of a table of a frontier's points."""
    mark = marks.get(id(point))
    name = [f"{mark}: " if mark else None, breakable(point["label"])]
    if len(models) > 1:
        name.append(tag("small", _chip(models.index(point["model"]), point["model"], len(models))))
    low, high = map(four_digits, point["ms_quartiles"])
    times = [four_digits(point["ms"]), tag("small", f"{low} to {high}")]
    return name, [_scored(point), times, four_digits(point["nfe"])]


# Of a manifest of samples: what its key is called, and how it is said.
SAMPLING = (
    ("Seconds per image", "seconds_per_image", _quantity), ("NFE", "nfe", _quantity),
    ("Processes", "processes", _quantity), ("Block of images", "block", _quantity),
    ("Dtype", "dtype", _fact), ("Device", "device", _fact),
)  # fmt: skip


def _speed(runs: Sequence[Run], columns: Sequence[Column]) -> list[Content]:
    sampled = [column for column in columns if column.samples]
    title, facts = "Training: medians over the reports in log.jsonl", [_training_speed(run) for run in runs]
    training = _compared(title, "Training", _run_heads(runs), facts)
    if not sampled:
        return [training, tag("p", "Speed of sampling: ", UNMEASURED, "; there are no samples.")]
    facts = [{name: said(column.manifest.get(key)) for name, key, said in SAMPLING} for column in sampled]
    sampling = _compared("Sampling: as the samples' manifest states it", "Sampling", _heads(sampled), facts)
    nfe = tag("p", "NFE: evaluations of the network per image, guidance's included.", class_="soft")
    return [training, sampling, nfe]


def _training_speed(run: Run) -> dict[str, Content]:
    def values(key: str) -> list[float]:
        return [value for row in run.log if (value := number(row.get(key))) is not None]

    def median(key: str, scale: float = 1.0) -> float | None:
        return scale * statistics.median(found) if (found := values(key)) else None

    return {
        "Images per second": _quantity(median("images_per_second")),
        "TFLOP per second": _quantity(median("flops_per_second", 1e-12)),
        "Share of the device's peak": _quantity(median("peak_share", 100), 3, " %"),
        "Share spent waiting for data": _quantity(median("data_wait", 100), 3, " %"),
        "Most memory": _quantity((max(values("memory_bytes"), default=0) or math.nan) / 2**30, 3, " GiB"),
        "Processes": _quantity(run.checkpoint.get("processes")),
    }


def _settings(runs: Sequence[Run], columns: Sequence[Column]) -> list[Content]:
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    # As text, in which 1 and True differ; one that is missing is none of them.
    stated = [{key: repr(value) for key, value in run.recipe.items()} for run in runs]
    differ = [key for key in keys if len({each.get(key) for each in stated}) > 1]
    found: list[Content] = []
    if not keys:
        found.append(tag("p", "Recipe: ", UNRECORDED, "; there is no recipe.yaml."))
    elif differ:
        facts = [_coded({key: run.recipe[key] for key in differ if key in run.recipe}) for run in runs]
        found.append(_compared("Where the recipes differ", "Key", _run_heads(runs), facts))
    elif len(runs) > 1:
        found.append(tag("p", "The recipes are the same."))
    if keys:
        shared = {key: runs[0].recipe[key] for key in keys if key not in differ}
        title = "The whole recipe" if len(runs) == 1 else f"What the recipes share, {len(shared)} keys"
        found.append(_compared(title, "Key", ["Value"], [_coded(shared)], folded=True))
    for column in columns:
        if column.samples:
            # What has a place of its own: hashes, versions, and what the training was.
            own = ("versions", "training", "checkpoint_sha256", "labels", "guide.training", "guide.checkpoint_sha256")
            settings = compared(column.manifest, own)
            title = f"Settings of the samples {column.name}"
            if settings:
                found.append(_compared(title, "Key", ["Value"], [_coded(settings)], folded=True))
            else:
                found.append(tag("p", f"{title}: ", UNRECORDED, "."))
    return found


def _coded(settings: Mapping[str, Any]) -> dict[str, Content]:
    """Settings as rows, of which a null was stated, and is not missing."""
    return {
        tag("code", breakable(key)): tag("code", "null") if value is None else _fact(value)
        for key, value in settings.items()
    }


def _hashes(runs: Sequence[Run], columns: Sequence[Column]) -> list[Content]:
    found: list[Content] = []
    sampled = [column for column in columns if column.samples]
    if sampled:
        # SHA-256 by name; that of a single file has none.
        weights = [column.manifest.get("checkpoint_sha256") or {} for column in sampled]
        weights = [each if isinstance(each, dict) else {"": each} for each in weights]
        extractors = [
            {str(each["name"]): each.get("weights_sha256") for each in column.metrics.get("extractors") or ()}
            for column in sampled
        ]
        rows: list[tuple[Content, list[Content]]] = [
            ("Manifest of the samples", [_hash(column.samples.manifest_sha256) for column in sampled]),
            ("Manifest that was scored", [_hash(column.metrics.get("samples_manifest_sha256")) for column in sampled]),
            ("Pixels", [_hash(column.metrics.get("pixels_sha256")) for column in sampled]),
            ("Reference", [_hash(at(column.metrics, "reference", "sha256")) for column in sampled]),
        ]
        for what, each in (("Extractor", extractors), ("Checkpoint", weights)):
            for name in dict.fromkeys(name for one in each for name in one) or [""]:
                heading = [what, tag("small", breakable(name)) if name else None]
                rows.append((heading, [_hash(one.get(name)) for one in each]))
        found.append(_table("SHA-256 of what the scores stand on", ["Samples", *_heads(sampled)], rows))
    files = [flat(_mapping(run.checkpoint.get("files"))) for run in runs]
    if any(files):
        facts = [
            {
                "Checkpoint": run.checkpoint_folder.name if run.checkpoint_folder else UNRECORDED,
                **{tag("code", breakable(name)): _hash(digest) for name, digest in each.items()},
            }
            for run, each in zip(runs, files, strict=True)
        ]
        title = "SHA-256 of the newest checkpoint's files"
        found.append(_compared(title, "File", _run_heads(runs), facts, folded=True))
    else:
        found.append(tag("p", "Checkpoint: ", UNRECORDED, "."))
    return found


def _versions(runs: Sequence[Run], columns: Sequence[Column]) -> list[Content]:
    stages: list[tuple[Content, dict[str, Any]]] = []
    for index, run in enumerate(runs):
        if run.trained:
            name = _chip(index, run.name, len(runs)) if len(runs) > 1 else None
            stages.append(([name, tag("small", "training")], run.checkpoint))
    for column in columns:
        if column.samples:
            name = _chip(column.number, column.name, len(runs))
            stages.append(([name, tag("small", "sampling")], column.manifest))
            stages.append(([name, tag("small", "scoring")], column.metrics))
    facts = [{name: _fact(value) for name, value in _mapping(stated.get("versions")).items()} for _, stated in stages]
    if not any(facts):
        return [tag("p", "Versions: ", UNRECORDED, ".")]
    title = "Versions of the libraries, as each stage wrote them down"
    return [_compared(title, "Library", [head for head, _ in stages], facts)]
