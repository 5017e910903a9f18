"""accelerate launch train_sit.py RECIPE [key=value ...] [--dry-run | --resume | --force]: train a SiT, or go on."""

from functools import partial

from sit_atconv.commands import call

main = partial(call, "train", "train_sit.py")

if __name__ == "__main__":
    main()
