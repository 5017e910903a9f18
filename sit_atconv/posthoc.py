"""python -m sit_atconv.posthoc RUN --std STD --out FOLDER: the command `sit-atconv posthoc`."""

from functools import partial

from sit_atconv.commands import call

main = partial(call, "posthoc", "python -m sit_atconv.posthoc")

if __name__ == "__main__":
    main()
