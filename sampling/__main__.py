"""python -m sampling generate | likelihood | speed."""

from sampling import generate, likelihood, speed
from sit_atconv.errors import ArgumentParser, command


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m sampling", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate | likelihood | speed")
    for name, module in (("generate", generate), ("likelihood", likelihood), ("speed", speed)):
        module.add_arguments(commands.add_parser(name, description=module.__doc__, help=module.__doc__))
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
