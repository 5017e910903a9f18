"""What the process has loaded that the drill's commands are forked off."""

import functools
import importlib

from eval import digits
from experiments.drill.commands import SUBCOMMANDS

for module in {each.module for each in SUBCOMMANDS} | {"train_sit", "train_attnet"}:
    importlib.import_module(module)
digits.train_classifier = functools.cache(digits.train_classifier)
digits.train_classifier()
