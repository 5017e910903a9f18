"""Put results into one table: Markdown, and a JSON of the same name beside it."""

import argparse
import json
from pathlib import Path

from sit_atconv.runtime.errors import InputError, add_force
from sit_atconv.runtime.files import check_out, write_out
from sit_atconv.scoring.table import TABLE, markdown, tabulate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="+", metavar="[NAME=]JSON",
        help="metrics.json files, one per trained model; NAME: what it is called, where its training does not say it",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="MD", help="Markdown file; a JSON of the same name beside it")
    add_force(parser)
    parser.add_argument(
        "--mix", action="store_true",
        help="tabulate results that cannot be compared (protocol, reference, count, sampler, ...); the table says so",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Write the table, and print it. Raises InputError for results that cannot stand in one table."""
    out = Path(args.out)
    if out.suffix != ".md":
        raise InputError(f"--out {args.out}: must end in .md")
    for file in (out, out.with_suffix(".json")):
        check_out(file, force=args.force, ours=TABLE)
    table = tabulate(args.results, args.mix)
    text = markdown(table)
    content = json.dumps(table, indent=1, allow_nan=False) + "\n"
    write_out(out.with_suffix(".json"), content, force=args.force, ours=TABLE)
    write_out(out, text, force=args.force, ours=TABLE)
    print(text, end="")
