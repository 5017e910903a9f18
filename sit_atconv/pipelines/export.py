"""python -m sit_atconv.pipelines.export SRC --out DIR: the command `sit-atconv export`; `exporting` does the work."""

from functools import partial

from sit_atconv.commands import call
from sit_atconv.runtime.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__, dict.fromkeys(("Source", "export", "open_source"), "sit_atconv.pipelines.exporting")
)

main = partial(call, "export", "python -m sit_atconv.pipelines.export")

if __name__ == "__main__":
    main()
