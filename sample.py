"""python sample.py --ckpt PATH [--classes 0 1 2 | --num N]: draw images from a trained model into one picture."""

from functools import partial

from sit_atconv.commands import call

main = partial(call, "sample", "sample.py")

if __name__ == "__main__":
    main()
