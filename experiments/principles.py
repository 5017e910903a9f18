"""python -m experiments.principles CKPT_OR_MODEL ...: the command `sit-atconv principles`."""

from functools import partial

from sit_atconv.commands import call

main = partial(call, "principles", "python -m experiments.principles")

if __name__ == "__main__":
    main()
