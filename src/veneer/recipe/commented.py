"""The recipe with comments that ``veneer train --print-recipe`` shows: ``recipe.yaml`` with the methods filled in."""

from __future__ import annotations

import textwrap
from importlib import resources

from veneer.recipe.adapter import method_names

_COLUMN = " " * 34 + "# "


def commented_recipe() -> str:
    """A valid recipe in YAML, every key explained."""
    text = (resources.files("veneer.recipe") / "recipe.yaml").read_text(encoding="utf-8")
    names = textwrap.fill(" | ".join(method_names()), 118, initial_indent=_COLUMN, subsequent_indent=_COLUMN)
    return text.replace(f"{_COLUMN}METHODS", names)
