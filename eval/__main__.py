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
    args, late = parser.parse_known_args(argv)  # late: overrides after an option, which argparse does not place
    if late and (not hasattr(args, "overrides") or any(text.startswith("-") for text in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        args.overrides += late
    try:
        args.run(args)
    except KeyboardInterrupt:
        if is_main():
            print("stopped; whatever is there is whole, and the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
