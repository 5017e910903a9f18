"""accelerate launch experiments/distill_swap.py RECIPE [key=value ...]: distil a SiT's attention into ATConv.

The recipe is one of train_sit.py with a section `distill`; see docs/swap.md.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, only its own folder is searched

from sit_atconv.commands import call
from sit_atconv.config import Recipe
from sit_atconv.runtime.errors import InputError


def _check(recipe: Recipe) -> None:
    if recipe.distill.teacher is None:
        raise InputError("distill.teacher is missing: name a checkpoint, or train without one by train_sit.py")


main = partial(call, "train", "distill_swap.py", about=__doc__, check=_check)

if __name__ == "__main__":
    main()
