"""The families that there are, found by walking `families`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from veneer.store.gguf import families
from veneer.store.gguf.family import Family


@functools.cache
def _families() -> tuple[Family, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return tuple(importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names)


def by_architecture() -> Mapping[str, Family]:
    """The families that are read, by ``general.architecture``."""
    return {family.architecture: family for family in _families() if family.reads}


def by_model_type() -> Mapping[str, Family]:
    """The families that are written, by transformers' model type."""
    return {name: family for family in _families() for name in family.model_types}
