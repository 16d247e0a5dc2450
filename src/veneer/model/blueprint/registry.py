"""Registry of families, found by walking `families`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from veneer.model.blueprint import families
from veneer.model.blueprint.family import CONVENTION, Family


def family_of(model_type: str) -> Family:
    """Return the family of a model type; `CONVENTION` if no file lists it."""
    return families_by_type().get(model_type, CONVENTION)


@functools.cache
def families_by_type() -> Mapping[str, Family]:
    """Return the family of every model type that some file of `families` lists. Tests compare the outputs of these
    types with the models' own.
    """
    names = (module.name for module in pkgutil.iter_modules(families.__path__))
    found = (importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names)
    return {model_type: family for family in found for model_type in family.model_types}
