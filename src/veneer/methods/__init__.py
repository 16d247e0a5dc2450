"""Methods, one file each, found by name: a new file ``x.py`` here adds the method.

A file defines a subclass of one of the contracts in `veneer.contract`. A variant of LoRA is a function on LoRA's record
instead, see `methods.variants`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from veneer.contract import MethodConfig
from veneer.contract.discovery import concrete


@functools.cache
def all_methods() -> dict[str, type[MethodConfig]]:
    """Return every method by its ``peft_type``: those in this folder, and those that other code has defined before this
    call.
    """
    for info in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        importlib.import_module(info.name)
    return concrete(MethodConfig)


all_methods()  # so that a config read from a file may be of any of them
