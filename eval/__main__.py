"""python -m eval extract | build-ref | score | verify | table | report: from images to features, scores and pages."""

import sys

from eval import extract, refs, report, score, table, verify
from sit_atconv.errors import ArgumentParser, command
from sit_atconv.processes import is_main

COMMANDS = {"extract": extract, "score": score, "build-ref": refs, "verify": verify, "table": table, "report": report}


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = module.__doc__.partition("\n\n")[0]
        module.add_arguments(commands.add_parser(name, description=module.__doc__, help=summary))
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        if is_main():
            print("stopped; whatever is there is whole, and the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
