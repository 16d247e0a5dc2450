"""Registry of the families, filled by walking `families`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from veneer.store.gguf import families
from veneer.store.gguf.family import GgufFamily


@functools.cache
def _families() -> tuple[GgufFamily, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return tuple(importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names)


def by_architecture() -> Mapping[str, GgufFamily]:
    """Return the families that transformers reads, by ``general.architecture``."""
    return {family.architecture: family for family in _families() if family.reads}


def rebuilt_family(architecture: str, keys: Mapping[str, Any]) -> GgufFamily | None:
    """Return the table of a file's model family if transformers cannot read the family's files; else None.

    ``keys`` are the file's values by key, without the architecture's prefix.
    """
    families = [each for each in _families() if each.architecture == architecture and not each.reads]
    marked = [each for each in families if each.marked_by is not None and keys.get(each.marked_by)]
    return next(iter([*marked, *(each for each in families if each.marked_by is None)]), None)


def laid_out_family(architecture: str, keys: Mapping[str, Any]) -> GgufFamily | None:
    """Return the table of a file's model family if the table describes the layout of every tensor; else None.

    ``keys`` are the file's values by key, without the architecture's prefix.
    """
    family = rebuilt_family(architecture, keys) or by_architecture().get(architecture)
    return family if family is not None and family.model_types else None


def by_model_type() -> Mapping[str, GgufFamily]:
    """Return the families with support for writing, by transformers' model type."""
    return {name: family for family in _families() for name in family.model_types}
