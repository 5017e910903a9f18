"""The FID pipeline of a clone: `python -m eval`. Its modules are those of `sit_atconv.scoring`."""

import sys

from sit_atconv.runtime.lazy import Renamed
from sit_atconv.scoring import MODULES

sys.meta_path.insert(
    0,
    Renamed(
        {f"eval.{name}": f"sit_atconv.scoring.{name}" for name in MODULES} | {"eval.report": "sit_atconv.report"},
        told=False,
    ),
)
