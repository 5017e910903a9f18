"""Fetch a repository of the Hugging Face hub into a folder: what `sit-atconv push` put there, or any other.

Every file is compared with the hash that the hub lists for it. Nothing that comes down is run.
"""

import argparse

from sit_atconv.runtime.errors import InputError, add_force, check_one_process
from sit_atconv.runtime.files import check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="NAME", help="OWNER/NAME of a model, datasets/OWNER/NAME of a dataset")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    add_force(parser)
    parser.add_argument("--revision", metavar="REV", help="a branch, a tag or a commit (default: the newest)")


def run(args: argparse.Namespace) -> None:
    """Fetch, and say what came."""
    check_one_process()
    check_out(args.out, force=args.force)
    if args.revision == "":
        raise InputError("--revision '': give a branch, a tag or a commit, or leave it out")

    from sit_atconv.hub.pulling import pull

    found = pull(args.repo, args.out, args.revision, args.force)
    print(f"{args.out}: {found.files:,} files, {found.size / 1e6:,.2f} MB, of {args.repo} at {found.commit}")
