"""accelerate launch train_attnet.py RECIPE [key=value ...] [--dry-run | --resume | --force]: train AttNet, or go on."""

from functools import partial

from sit_atconv.commands import call

main = partial(call, "classify", "train_attnet.py")

if __name__ == "__main__":
    main()
