"""What the process has loaded that the drill's commands are forked off."""

import importlib

from experiments.drill.commands import SUBCOMMANDS
from sit_atconv.scoring import digits

for module in {each.module for each in SUBCOMMANDS} | {"train_sit", "train_attnet"}:
    importlib.import_module(module)
digits.train_classifier()
