"""python -m sit_atconv.convert SRC --out DIR: the command `sit-atconv convert`."""

from functools import partial

from sit_atconv.commands import call

main = partial(call, "convert", "python -m sit_atconv.convert")

if __name__ == "__main__":
    main()
