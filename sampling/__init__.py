"""The sampling and speed harness of a clone: `python -m sampling`. Its modules are those of the library."""

import sys

from sit_atconv.runtime.lazy import Renamed

_SAMPLING = ("generate", "labels", "likelihood", "samples", "schedulers")
_BENCH = ("baselines", "plots", "speed")

sys.meta_path.insert(
    0,
    Renamed(
        {f"sampling.{name}": f"sit_atconv.sampling.{name}" for name in _SAMPLING}
        | {f"sampling.{name}": f"sit_atconv.bench.{name}" for name in _BENCH},
        told=False,
    ),
)
