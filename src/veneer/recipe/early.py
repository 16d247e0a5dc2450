"""Refusals before torch and transformers are imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from veneer.errors import ConfigError
from veneer.recipe.advice import value_problems
from veneer.recipe.declared import UnreadableError
from veneer.recipe.known import declared
from veneer.recipe.problems import problems_of


def refuse_early(values: Mapping[str, Any], name: str = "recipe") -> None:
    """Raise what `recipe.parse_recipe` would, where that can be known from source and values alone."""
    found = list[str]()
    with suppress(UnreadableError):
        found = [*problems_of(values, declared()), *value_problems(values)]
    if found:
        raise ConfigError(f"{name}: " + "; ".join(found))
