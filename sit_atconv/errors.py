"""What the user got wrong, and how a command says so."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from functools import wraps


class InputError(ValueError):
    """A value given by the user breaks a rule; the message is one line: the value, the rule, the remedy.

    `every_rank`: the error is known to one process of a distributed run only, so that process reports it;
    otherwise all processes of a machine find the same error and the first one there speaks for them.
    """

    def __init__(self, message: str, every_rank: bool = False):
        super().__init__(" ".join(message.split()))
        self.every_rank = every_rank


def speaks() -> bool:
    """Whether this process prints for all of a distributed run: the first of them, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def check_choice(name: str, value, choices: Iterable[str]) -> None:
    """Raise InputError unless `value` is one of `choices`; the message suggests the nearest one."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), map(str, choices), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        shown = f"choose from {sorted(choices, key=str)}" if len(choices) <= 12 else f"there are {len(choices)} choices"
        raise InputError(f"{name}={value!r}: {hint}{shown}")


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with a usage error told like any other: one line, through InputError."""

    def error(self, message: str):
        raise InputError(f"{message}; see `{self.prog} --help`")


def add_force(parser: argparse.ArgumentParser) -> None:
    """The option of every command that writes to --out."""
    parser.add_argument(
        "--force", action="store_true", help="set aside (NAME.aside) what is at --out and would be refused"
    )


def command(main: Callable) -> Callable:
    """Decorator for the entry point of a command: an InputError becomes one line on stderr and exit status 2."""

    @wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            if error.every_rank or int(os.environ.get("LOCAL_RANK", "0")) == 0:
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
