"""The commands: what each takes, and what it does with it.

A module of a command has `add_arguments(parser)` and `run(args)`, and imports torch within `run` alone, so that
`--help` and a wrong command line are answered at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable

from sit_atconv.runtime.errors import ArgumentParser, check_choice, command
from sit_atconv.version import __version__

# {command: what it does}; the module of each has its name.
COMMANDS = {
    "train": "train a SiT, or go on with a run",
    "classify": "train an AttNet classifier, or go on with a run",
    "sample": "draw images from a trained model into one picture",
    "generate": "write many samples, one file each, to be scored",
    "app": "draw images on a page in the browser, from one model or two",
    "calibrate": "measure what the cache mag leaves out by",
    "score": "score samples against a reference",
    "extract": "write the features of images",
    "build-ref": "write the reference that samples are scored against",
    "verify": "check Inception's weights and this machine, or a cache of latents",
    "table": "put results into one table",
    "report": "write one HTML page of a run, or of several",
    "watch": "show how a run is doing, until it ends",
    "encode": "write a cache of latents",
    "convert": "turn a public checkpoint into a folder of ours, or back",
    "export": "write a diffusers pipeline that loads without this package",
    "push": "put a model, a delta or a cache on the Hugging Face hub",
    "pull": "fetch a repository of the hub into a folder",
    "posthoc": "average a run's snapshots to another width of the EMA",
    "likelihood": "give real images their likelihood, in bits per dimension",
    "speed": "time models against attention",
    "frontier": "score models over the time that their images take",
    "swap-check": "say what a swap of a model's attention would come to",
    "principles": "measure routing and inhibition, layer by layer",
    "recipes": "list the recipes, or print one",
}
STOPPED = 130  # the exit status of a command that Ctrl-C ends


def parser_of(name: str, prog: str, about: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command; what it parses has `run`, the function that does the work, and `goes_on`: whether the
    same command goes on where it was stopped."""
    module = importlib.import_module(f"sit_atconv.commands.{name.replace('-', '_')}")
    parser = ArgumentParser(prog=prog, description=about or module.__doc__)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run, goes_on=getattr(module, "GOES_ON", False))
    return parser


@command
def call(name: str, prog: str, argv: list[str] | None = None, about: str | None = None, **more) -> None:
    """Run one command. prog: as its user called it. about: for the help, in place of its own. more: for its `run`."""
    parser = parser_of(name, prog, about)
    words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser.set_defaults(words=words, **more)
    args = parser.parse_intermixed_args(words)
    try:
        args.run(args)
    except KeyboardInterrupt:  # nothing is imported here: it may have come while torch was
        if os.environ.get("RANK", "0") == "0":
            more = "; whatever is there is whole, and the same command goes on" if args.goes_on else ""
            print(f"stopped{more}", file=sys.stderr)
        sys.exit(STOPPED)


def several(prog: str, names: Iterable[str], about: str) -> Callable[[list[str] | None], None]:
    """The entry point of some of the commands: `prog COMMAND ...`."""
    known = {name: COMMANDS[name] for name in names}

    @command
    def chosen(words: list[str]) -> str:
        """The name of the command that is asked for; where it is none, what there is, or an error."""
        width = max(map(len, known))
        listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in known.items())
        parser = ArgumentParser(
            prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"{prog} COMMAND ...", epilog=f"commands, each with --help:\n{listed}",
        )  # fmt: skip
        parser.add_argument("--version", action="version", version=__version__)
        parser.add_argument("command", metavar="COMMAND", nargs="?", help=argparse.SUPPRESS)
        first = parser.parse_args(words[:1]).command
        if first is None:
            parser.error("give a command")
        check_choice("command", first, known)
        return first

    def main(argv: list[str] | None = None) -> None:
        words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
        name = chosen(words)
        call(name, f"{prog} {name}", words[1:])

    return main
