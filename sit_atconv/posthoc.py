"""python -m sit_atconv.posthoc RUN --std STD --out FOLDER: the command `sit-atconv posthoc`; see `training.posthoc`."""

from functools import partial

from sit_atconv.commands import call
from sit_atconv.runtime.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__, dict.fromkeys(("Fit", "combine", "fit", "inner_product", "write_model"), "sit_atconv.training.posthoc")
)

main = partial(call, "posthoc", "python -m sit_atconv.posthoc")

if __name__ == "__main__":
    main()
