"""Prove this library on a CUDA device: what is right, and how fast it is.

Each stage is a process of its own; one that fails, dies or hangs is told, and the others go on. Stages that are done
stay done when the command is run again.
"""

import sys

from sit_atconv.bench.gpu.driver import NAME, Acceptance
from sit_atconv.bench.gpu.stages import STAGES, Stage
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import ArgumentParser, InputError, check_choice, check_one_process, command, option
from sit_atconv.runtime.signals import Interruptions, stops_told

MINUTES = limits.number(0.5, 1_440, "the shortest stage takes half a minute, and nobody waits longer than a day")


def chosen(names: list[str]) -> list[Stage]:
    """The stages of these names or numbers, in the order in which they are run. Raises InputError for another one."""
    known = {key: stage for stage in STAGES for key in (stage.name, str(stage.number))}
    for name in names:
        check_choice(option("stages"), name, known)
    return [stage for stage in STAGES if {stage.name, str(stage.number)} & {*names}]


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m sit_atconv.bench.gpu", description=__doc__)
    listed = "; ".join(f"{stage.number} {stage.name}: {stage.about}" for stage in STAGES)
    parser.add_argument("--out", required=True, metavar="FOLDER", help=f"gets {NAME}.json, {NAME}.md and {NAME}.log")
    parser.add_argument(
        "--minutes", **MINUTES.flag,
        help="end after so many; 5 give correctness, the layer and the model (default: as long as it takes)",
    )  # fmt: skip
    parser.add_argument(
        "--stages", nargs="+", default=[], metavar="STAGE",
        help=f"names or numbers, done again where they are done (default: all that are not); {listed}",
    )  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="every stage at tiny sizes on the CPU")
    args = parser.parse_args(argv)
    check_one_process()
    stages = chosen(args.stages) if args.stages else list(STAGES)
    if not args.rehearse:
        import torch  # here: what is wrong with the options is told before it is loaded

        if not torch.cuda.is_available():
            raise InputError(f"there is no CUDA device here; {option('rehearse', True)} runs all stages on the CPU")
    acceptance = Acceptance(args.out, args.rehearse)
    there = f"what is done is in {str(acceptance.folder)!r}; the same command goes on"
    with Interruptions() as signals, stops_told(lambda: there), signals.working():
        accepted = acceptance.run(stages, args.minutes, again=bool(args.stages))
    print((acceptance.folder / f"{NAME}.md").read_text(), end="")
    sys.exit(0 if accepted else 1)


if __name__ == "__main__":
    main()
