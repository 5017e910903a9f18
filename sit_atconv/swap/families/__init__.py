"""The families of models that `swap_attention` knows, a module each: what is swapped, and how it is stored.

A module registers its adapters when it is imported, and all of this folder are. The ATConv subclasses that they define
for models of diffusers are found here, and at the top of the package, by their names.
"""

import importlib
import pkgutil

from sit_atconv.swap.marking import THIN

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

globals().update({cls.__name__: cls for cls in THIN.values()})
__all__ = sorted(cls.__name__ for cls in THIN.values())
