"""python -m eval score SAMPLES --ref REFERENCE."""

from eval import score
from sit_atconv.errors import ArgumentParser, command


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="score")
    score.add_arguments(commands.add_parser("score", description=score.__doc__, help=score.__doc__))
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
