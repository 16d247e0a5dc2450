"""Variants of LoRA, one file each: functions on its record. Dropping a file here adds a variant.

Each file names in ``SWITCH`` the field of `LoraConfig` that turns it on, and offers any of

- ``scale(r, scale_so_far)``: another scale;
- ``shapes(config, site)``, ``init(config, site, factors)`` and ``DISK_NAMES`` for parameters that it adds;
- ``lower(config, site, params, record)``: the record after the variant;
- ``OUTWARD``: those of its parameters that are on the side of the output (see `LinearMethod.outward`);
- ``READS_WEIGHT``: True if its ``lower`` needs the frozen weight.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType


@functools.cache
def all_variants() -> tuple[ModuleType, ...]:
    """Return the modules of this folder."""
    return tuple(importlib.import_module(info.name) for info in pkgutil.iter_modules(__path__, f"{__name__}."))
