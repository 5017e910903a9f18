"""Results of several runs as one table: mean and spread over training seeds, beside what others published."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sit_atconv.runtime.errors import InputError, option
from sit_atconv.runtime.files import made_here, sha256
from sit_atconv.runtime.markdown import markdown_table, plain
from sit_atconv.runtime.reading import read_json, read_yaml
from sit_atconv.scoring import METRICS
from sit_atconv.scoring.result import bars_told, features_told, named, needs, number, own, reading, sound

TABLE = made_here("common", "differs", "rows", "published", "claimed")
PUBLISHED = Path(__file__).with_name("published.yaml")
PUBLISHED_METRICS = ("fid", "sfid", "is", "precision", "recall")
# Facts of the samples without which two results cannot be told apart: how they were drawn, decoded and rounded.
SAMPLED = (
    "sampler", "steps", "start", "grid", "time_shift", "guidance_scale", "guidance_channels", "guidance_interval",
    "guidance_every", "guidance_batches", "diffusion", "diffusion_norm", "last_step", "last_step_size", "epsilon",
    "rtol", "atol", "labels_rule", "weights", "dtype", "uint8_rule", "cache",
)  # fmt: skip
# Of a result, what every one states, and what a table needs besides.
FORM = {
    **dict.fromkeys(("protocol", "n", "image_shape", "extractors", "groups", "class_histogram"), object),
    "metrics": {str: {"se": object, "corrected": object}}, "reference": {"name": str, "sha256": str},
    "warnings?": [str],
    "samples_manifest": {
        "training?": (
            {
                "name?": (str, None), "token_mixer?": (str, [str], None),
                "meanflow?": ({"guidance?": float}, None),
            },
            None,
        )
    },
}  # fmt: skip
NEVER_NONE = ("sampler", "guidance_scale", "labels_rule", "dtype", "uint8_rule")  # of SAMPLED, where recorded
# Of the training; with step and images seen, what a row is of.
METHOD = ("name", "token_mixer", "params", "precision", "repa", "distill", "init", "lora", "meanflow")

TOLD, LONGEST = 8, 40  # facts that a refusal names, and characters of each
TEXTS = ("model", "seeds", "conditions", "source")  # columns
# Of METHOD, what stands on the name of a method that was trained so.
MARKS = {
    "repa": " + REPA", "distill": " + distill", "init": " + train.init", "lora": " + LoRA", "meanflow": " + MeanFlow",
}  # fmt: skip
GUIDED = ", guidance"  # on the last of them, with the scale: a MeanFlow model has it in its weights


def tabulate(files: Sequence[str | Path], mix: bool = False) -> dict[str, Any]:
    """The table as its JSON has it: `common` facts, what `differs`, `rows`, and what is `published` and `claimed`.

    files: each a path, or NAME=PATH. A row is one method after one number of steps, over its training seeds; `std` is
    the sample standard deviation over them, None of one, and `se` the mean of the jackknife errors. Raises InputError
    for a file that is no result, the same file, samples, model or training seed twice, and, unless `mix`, for results
    that differ in what decides a score besides the model.
    """
    results = [_read(str(file)) for file in files]
    for key, what in (
        ("file", "the same file"),
        ("samples", "of the same samples"),
        ("weights", "of the same weights"),
    ):
        _refuse_twice(results, key, what)
    facts = [result["facts"] for result in results]
    differs = [key for key in facts[0] if any(each[key] != facts[0][key] for each in facts)]
    if differs and not mix:
        other = next(result for result in results if result["facts"] != facts[0])
        stated = [_told_apart(*pair) for pair in ((facts[0], other["facts"]), (other["facts"], facts[0]))]
        raise InputError(
            f"{str(results[0]['path'])!r} has {stated[0]}, {str(other['path'])!r} {stated[1]}: such scores cannot be "
            f"compared; leave one out, or give {option('mix', True)}"
        )
    rows: dict[str, list[dict]] = {}
    for result in results:
        own = {key: result["facts"][key] for key in differs}
        rows.setdefault(_text([result["method"], own]), []).append(result)
    figures, claims = _published(results)
    return {
        "reference": None if "reference" in differs else results[0]["reference_name"],
        "common": {key: value for key, value in facts[0].items() if key not in differs},
        "differs": differs,
        "error_bars": list(dict.fromkeys(result["error_bars"] for result in results)),
        "told": features_told(*((result["metrics"], result["extractors"]) for result in results)),
        "warnings": list(dict.fromkeys(warning for result in results for warning in result["warnings"])),
        "rows": [_row(group, differs) for group in rows.values()],
        "published": figures,
        "claimed": claims,
    }


def _read(file: str) -> dict[str, Any]:
    """What the table needs of a metrics.json, given as PATH or NAME=PATH. Raises InputError where it is none."""
    name, _, file = ("", "", file) if Path(file).is_file() else file.rpartition("=")
    path = Path(file)
    try:
        with reading(path):
            stored = sound(read_json(path, FORM))
            manifest = stored["samples_manifest"]
            training = manifest.get("training") or {}
            numbers = {
                key: _number(key, stated.get(key))
                for stated, keys in ((training, ("params", "seed", "images_seen")), (manifest, ("step", "nfe")))
                for key in keys
            }
            method = {key: training.get(key) for key in METHOD}
            marks = "".join(mark for key, mark in MARKS.items() if method[key])
            if (guided := _trained_guidance(manifest)) is not None:
                marks += f"{GUIDED} {guided:g}"
            called = name or f"{method['name'] or _mixer(method['token_mixer']) or 'unnamed'}{marks}"
            found = {
                "facts": comparable(stored, manifest),
                "error_bars": bars_told(stored["error_bars"]),
                "extractors": stored["extractors"],
                "warnings": stored.get("warnings", []),
                "upper_bound": stored["error_bars"]["upper_bound"],
                "metrics": {
                    metric: {
                        key: _number(f"{key} of {metric}", each.get(key), needed=key == "value")
                        for key in ("value", "se", "corrected", "corrected_needs")
                    }
                    for metric, each in stored["metrics"].items()
                    if metric != "classifier_heldout_accuracy"  # which is of the extractor
                },
                "method": {"method": called, **method, **{key: numbers[key] for key in ("step", "images_seen")}},
                "seed": numbers["seed"],
                "nfe": numbers["nfe"],
                "reference_name": stored["reference"]["name"],
                "file": str(path.resolve()),
                "samples": stored["samples_manifest_sha256"] or stored["pixels_sha256"],
                "weights": manifest.get("checkpoint_sha256"),
            }
            _text(found)  # raises where a number in it is not finite
            return {"path": path, **found}
    except OSError as error:
        raise InputError(
            f"{str(path)!r}: {error.strerror or error}; give files that `sit-atconv score` wrote"
        ) from None


def comparable(result: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """What two results must share besides the model for their scores to be compared; None where it is not recorded.

    result: a metrics.json, as `sound` gives it; manifest: of its samples. Raises ValueError, KeyError, TypeError or
    AttributeError where they are none.
    """
    listed, codec = result.get("extractors") or [], manifest.get("codec") or {}
    return {
        **{key: result.get(key) for key in ("protocol", "n", "image_shape")},
        "reference": (result.get("reference") or {}).get("sha256"),
        "extractors": {each["name"]: {k: v for k, v in own(each).items() if k != "name"} for each in listed},
        "groups": result.get("groups"),
        "error_bars": named(result["error_bars"]),
        "samples_lossy": result.get("samples_lossy") or None,  # of a reference, its digest tells
        **{key: manifest.get(key) for key in SAMPLED},
        "sampler": manifest.get("sampler") or manifest.get("scheduler"),  # which takes its place
        "trained_guidance": _trained_guidance(manifest),
        "guide": _guide(manifest.get("guide")),
        "codec": {key: codec.get(key) for key in ("codec", "sha256", "scale", "shift")},
        # What is known of labels from a file; others follow from rule and count.
        "classes": result.get("class_histogram") if manifest.get("labels_rule") == "file" else None,
    }


def _trained_guidance(manifest: dict[str, Any]) -> float | None:
    """The scale of the guidance in the weights of a MeanFlow model; None where there is none."""
    scale = ((manifest.get("training") or {}).get("meanflow") or {}).get("guidance", 1)
    return None if scale == 1 else scale


def _guide(guide: dict[str, Any] | None) -> dict[str, Any] | None:
    """What two guides must share: as of a method, not the training seed, so that every seed may have its own; of one
    that nobody trained here, the weights. None of samples that no guide guided."""
    if guide is None:
        return None
    training = guide.get("training") or {}
    told = {key: training.get(key) for key in (*METHOD, "images_seen")}
    told["repa"] = bool(told["repa"]) or None
    told |= {key: guide.get(key) for key in ("prediction", "weights", "step")}
    return told | {"sha256": guide.get("checkpoint_sha256") if told["images_seen"] is None else None}


def _number(name: str, value: Any, needed: bool = False) -> float | None:
    if (needed or value is not None) and number(value) is None:
        raise ValueError(f"{name} is {value!r}, no finite number")
    return value


def _mixer(mixer: str | list[str] | None) -> str | None:
    """A token mixer as a name: that of all blocks, or how many have each."""
    if isinstance(mixer, list):
        return " + ".join(f"{count} {name}" for name, count in Counter(mixer).items())
    return mixer


def _refuse_twice(results: list[dict], key: str, what: str) -> None:
    """Raise InputError where two results share `key`, unless they were sampled or scored in different ways."""
    seen: dict[str, dict] = {}
    for result in results:
        if result[key] is None:
            continue
        mark = _text([result[key], result["facts"]])
        if mark in seen:
            raise InputError(f"{str(seen[mark]['path'])!r} and {str(result['path'])!r} are {what}; give one of them")
        seen[mark] = result


def _row(group: list[dict], differs: list[str]) -> dict[str, Any]:
    method, seeds = group[0]["method"], [result["seed"] for result in group]
    for seed in seeds:
        if seeds.count(seed) > 1:
            first, second, *_ = (str(result["path"]) for result in group if result["seed"] == seed)
            known = f"are both of training seed {seed}" if seed is not None else "state no training seed"
            raise InputError(
                f"{first!r} and {second!r} {known} of {method['method']}; give one, or tell them apart: NAME=FILE"
            )
    metrics = {}
    for name in dict.fromkeys(name for result in group for name in result["metrics"]):
        each = [result["metrics"].get(name) for result in group]
        if None in each:
            raise InputError(
                f"{str(group[each.index(None)]['path'])!r} lacks {name}, which others of {method['method']} have; "
                f"score it with the same {option('metrics')}"
            )
        metrics[name] = {
            "mean": _mean([one["value"] for one in each]),
            "std": _std([one["value"] for one in each]),
            "se": _mean([one["se"] for one in each]),
            "corrected": _mean([one["corrected"] for one in each]),
            "corrected_std": _std([one["corrected"] for one in each]),
            "values": [one["value"] for one in each],
        }
        if each[0]["corrected_needs"] is not None:  # all of a row are as many images
            metrics[name]["corrected_needs"] = each[0]["corrected_needs"]
    return {
        **method,
        **{key: group[0]["facts"][key] for key in differs},
        **({"reference_name": group[0]["reference_name"]} if "reference" in differs else {}),
        "nfe": _mean([result["nfe"] for result in group]),
        "seeds": seeds,
        "upper_bound": group[0]["upper_bound"],
        "metrics": metrics,
        "results": [{"file": str(result["path"]), "sha256": sha256(result["path"])} for result in group],
    }


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else math.fsum(values) / len(values)


def _std(values: list[float | None]) -> float | None:
    """The sample standard deviation, None of a single value."""
    if None in values or len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _published(results: list[dict]) -> tuple[list[dict[str, Any]], list[str]]:
    """Published figures of the results' methods and of the attention models that those stand against, and claims."""
    stated = read_yaml(PUBLISHED)
    marks = re.compile(rf"({'|'.join(map(re.escape, MARKS.values()))}|{GUIDED} \S+)+$")
    names = {
        marks.sub("", result["method"]["method"])
        for result in results
        if all(result["facts"][key] == stated[key] for key in ("protocol", "image_shape", "n"))
    }
    names |= {name.replace("-ATConv", "").replace("-Hybrid", "") for name in names}
    figures = [figure for figure in stated["figures"] if figure["model"] in names]
    return figures, [claim["text"] for claim in stated["claims"] if claim["model"] in names]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _cell(metric: dict[str, Any] | None, upper_bound: bool, corrected: bool = False) -> str:
    mean, std = ("corrected", "corrected_std") if corrected else ("mean", "std")
    if metric is None or metric[mean] is None:
        return ""
    # As many digits as the error has a use for.
    scale = min((metric[key] for key in (std, "se") if metric[key]), default=None)
    digits = 4 if not scale else min(6, max(0, 1 - math.floor(math.log10(scale))))
    text = "≥ " * (upper_bound and corrected) + f"{metric[mean]:.{digits}f}"
    if metric[std] is not None:
        text += f" ± {metric[std]:.{digits}f}"
    if metric["se"] is not None and not corrected:
        text += f" [{'≤ ' * upper_bound}{metric['se']:.{digits}f}]"
    return text


def markdown(table: dict[str, Any]) -> str:
    """The table for a reader."""
    common, rows, differs = table["common"], table["rows"], table["differs"]
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    corrected = [n for n in names if any((row["metrics"].get(n) or {}).get("corrected") is not None for row in rows)]
    shown = {name: plain(METRICS.get(name, (name.replace("_", " "),))[0]) for name in names}
    head = ["model", *differs, "params (M)", "step", "NFE", "seeds", *shown.values()]
    head += [f"{shown[name]}, corrected" for name in corrected]
    lacking = dict.fromkeys(
        (name, each["corrected_needs"])
        for row in rows for name, each in row["metrics"].items() if "corrected_needs" in each
    )  # fmt: skip
    lines = []
    if differs:
        lines += [f"**These rows cannot be compared with each other: they differ in {', '.join(differs)}.**", ""]
    cells = (_cells(row, differs, names, corrected) for row in rows)
    lines.append(markdown_table(head, cells, (*TEXTS, *differs)))
    lines += [
        "",
        "Mean ± standard deviation over training seeds [mean jackknife standard error of one sampling]; without ±, one "
        "seed. Corrected: without the part of the bias that is proportional to 1/N; the reference's own sampling error "
        f"is in neither{', but in that of copies' * ('copies' in names)}.",
        "",
        *(f"{plain(sentence[0].upper() + sentence[1:])}." for sentence in table["told"] + table["error_bars"]),
        *(f"**Warning: {plain(warning)}.**" for warning in table["warnings"]),
        *(f"{shown[name]}, corrected: {needs(images)}." for name, images in lacking),
        "",
        f"Common to all rows: {'; '.join(_common(table))}.",
    ]
    unknown = [key for key in NEVER_NONE if common.get(key, "") is None]
    if unknown:
        lines += ["", f"Not recorded, so not known to be equal: {', '.join(unknown)}."]
    if table["published"]:
        figures = [
            [each["model"], each["conditions"], *(_plain(each.get(name)) for name in PUBLISHED_METRICS), each["source"]]
            for each in table["published"]
        ]
        lines += ["", f"Published by others, not measured here, of {read_yaml(PUBLISHED)['of']}:", ""]
        lines.append(markdown_table(["model", "conditions", *PUBLISHED_METRICS, "source"], figures, TEXTS))
    for claim in table["claimed"]:
        lines += ["", claim]
    return "\n".join(lines) + "\n"


def _cells(row: dict, differs: list[str], names: list[str], corrected: list[str]) -> list[str]:
    params = "" if row["params"] is None else f"{row['params'] / 1e6:.4g}"
    seeds = ", ".join("?" if seed is None else str(seed) for seed in row["seeds"])
    metrics = row["metrics"]
    return [
        plain(row["method"]),
        *(plain(_differing(row, key)) for key in differs),
        params,
        _plain(row["step"]),
        "" if row["nfe"] is None else f"{row['nfe']:g}",
        seeds,
        *(_cell(metrics.get(name), row["upper_bound"]) for name in names),
        *(_cell(metrics.get(name), row["upper_bound"], corrected=True) for name in corrected),
    ]


def _common(table: dict[str, Any]) -> list[str]:
    """What all rows share, each in a few words; a reference that differs, and what is empty, are not among it."""
    against = [] if table["reference"] is None else [f"scored against {plain(Path(table['reference']).name)}"]
    told = {key: _fact(key, value) for key, value in table["common"].items() if value is not None}
    return against + [f"{key} {plain(text)}" for key, text in told.items() if text]


def _differing(row: dict[str, Any], key: str) -> str:
    """What a row has of a fact that differs between rows."""
    if key == "reference":
        return f"{Path(row['reference_name']).name} {_fact(key, row[key])}"
    return _stated(key, row[key])


def _stated(key: str, value: Any) -> str:
    """A fact as a few words, also where there is none: not every sampler has each setting."""
    return ("" if value is None else _fact(key, value)) or ("not recorded" if key in NEVER_NONE else "-")


def _fact(key: str, value: Any) -> str:
    """A fact as a few words: hashes by their beginning."""
    if isinstance(value, dict):
        told = {name: _fact(name, inner) for name, inner in value.items() if inner is not None}
        return ", ".join(f"{name} {text}" for name, text in told.items() if text)
    if key == "class_names":
        return f"{len(value)}"
    if isinstance(value, list):
        between = {"guidance_interval": " to ", "grid": " "}.get(key, " x ")
        return between.join(_fact(key, each) for each in value) or "nothing"
    text = str(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def _told_apart(facts: dict[str, Any], others: dict[str, Any]) -> str:
    """The facts of one result that differ from those of another: the first ones, each in few characters."""
    told = [f"{key} {_apart(key, value, others[key])}" for key, value in facts.items() if value != others[key]]
    return ", ".join(told[:TOLD]) + (f" and {len(told) - TOLD} more" if len(told) > TOLD else "")


def _apart(key: str, value: Any, other: Any) -> str:
    """A value, of which another differs: of dictionaries with the same names what differs in them."""
    if isinstance(value, dict) and isinstance(other, dict):
        names = [name for name in value if value[name] != other.get(name)]
        if value.keys() == other.keys():
            return ", ".join(f"{name} {_apart(name, value[name], other[name])}" for name in names[:TOLD])
        return _cut(", ".join(value) or "none")
    return _cut(_stated(key, value))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _plain(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"
